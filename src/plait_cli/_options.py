"""Options that several verbs have, and their bounds."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the task, the length, and how tokens are chosen."""
    parser.add_argument("--task", help="the task, for a run with routing: task")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: evaluation.max_new_tokens"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling, with --temperature")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ValueError for a number out of range."""
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature} is out of range. Give 0 or more.")
    check_counts(args, "max-new-tokens")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for one of these options that is less than 1; None is not given."""
    for name in names:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is below 1. Give 1 or more.")


def add_form(parser: argparse.ArgumentParser, size: Any = None) -> None:
    """Add the form of a plain LoRA; size: a group of options that exclude --max-rank."""
    parser.add_argument(
        "--for",
        dest="server",
        choices=("peft", "vllm", "sglang", "llamacpp", "all"),
        default="all",
        help="refuse what this reader would misread; all (default): report on each reader",
    )
    (parser if size is None else size).add_argument(
        "--max-rank", type=int, metavar="N", help="largest rank that the server accepts"
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="keep each layer's own rank and scale: smaller, for stock peft and vLLM >= 0.33",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="dtype of the file; default: that of the factors",
    )
    parser.add_argument(
        "--lossy", action="store_true", help="write the export even if it loses too much"
    )


@contextmanager
def need_compare(verb: str) -> Iterator[None]:
    """Name the extra if a package of the statistics is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("scipy", "statsmodels"):
            raise
        raise ImportError(
            f'{verb} needs {package}. Install it with: pip install "plait[compare]"'
        ) from None
