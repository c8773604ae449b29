"""`plait demo [DIR]`: a first run without a download: the base fails, LoRA and Dual LoRA learn."""

import argparse

from plait_cli._options import check_counts


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "demo",
        help="train LoRA and Dual LoRA on the shipped model and tasks",
        description="Train LoRA and Dual LoRA on the shipped model and tasks; no download.",
    )
    parser.add_argument("folder", nargs="?", default="demo", metavar="DIR", help="default: demo")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print exact match by task for the base model and both adapters."""
    check_counts(args, "steps")
    import time

    from rich.table import Table

    from plait.run.callbacks import ProgressBar
    from plait.run.demo import demo
    from plait_cli import console
    from plait_cli._show import Status

    started = time.perf_counter()
    screen = console()
    with Status(screen, "rows") as status:
        scores = demo(
            args.folder,
            args.steps,
            announce=lambda method: screen.print(f"\n{method}"),
            callbacks=lambda: [ProgressBar(screen)],
            progress=status,
        )
    table = Table("exact match", *next(iter(scores.values())))
    for arm, values in scores.items():
        table.add_row(arm, *(f"{value:.2f}" for value in values.values()))
    screen.print(table)
    screen.print(f"{time.perf_counter() - started:.0f} s; pictures and runs are in {args.folder}/")
    return 0
