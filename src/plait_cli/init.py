"""`plait init`: write a commented config to start from."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Add the verb and its arguments."""
    text = "write a commented config to start from"
    parser = subparsers.add_parser("init", help=text, description=text.capitalize() + ".")
    parser.add_argument("file", help="file to write; an existing one is refused")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the starter config."""
    from plait.run.config import starter_config

    path = Path(args.file)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} is missing. Make it first.")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_config())
    except FileExistsError:
        raise FileExistsError(f"{path}: exists already. Give another name, or remove it.") from None
    print(f"{path} written. Look at it with: plait check {path}")
    return 0
