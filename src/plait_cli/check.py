"""`plait check`: look at a run before it starts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from plait.run.check import CheckReport
    from plait.run.data.overlap import Overlap


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Add the verb and its arguments."""
    text = "validate a config, count parameters, show one example; trains nothing"
    parser = subparsers.add_parser("check", help=text, description=text.capitalize() + ".")
    parser.add_argument("file", help="config file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. method.r=16")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report of a config."""
    from plait.run.config import load_config

    cfg = load_config(args.file, args.overrides, import_plugins=True)

    from plait.run.check import check  # loads torch: after the answer to a mistake in the file
    from plait_cli import console

    report = check(cfg)
    render(report, console())
    return 0


def render(report: "CheckReport", console: "Console") -> None:
    """Print a report; tokens with loss are green, or in [[...]] without colour."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        table.add_row(name, value)
    console.print(table)
    console.print()
    _print_example(report, console)
    _print_repeats(report, console)
    for overlap in report.overlaps:
        _print_overlap(overlap, report, console)
    folder = Path(report.config.output.dir)
    taken = ", which exists: train with --resume, or elsewhere" if folder.exists() else ""
    console.print(f"\nNothing was trained. The run folder will be {folder}{taken}.", soft_wrap=True)


def _facts(report: "CheckReport") -> list[tuple[str, str]]:
    config = report.config
    percent = 100 * report.trainable / report.total
    facts = [
        ("model", f"{config.model.name} ({report.model}), {config.model.task}"),
        ("method", f"{config.method.name} on {report.adapted} layers"),
        ("trainable", f"{report.trainable:,} of {report.total:,} parameters ({percent:.3g} %)"),
    ]
    if report.stored is None:
        facts[1] = ("method", "full: every weight is trained")
    else:
        facts.append(("stored", f"{report.stored:,} numbers in the adapter's file"))
    if report.new:
        facts.append(("also trained", f"{', '.join(report.new)}, saved with the adapter"))
    facts += [
        ("rows", _counted(report.rows)),
        *([("form", report.form)] if report.form else []),
        ("longest row", f"{report.longest} tokens (data.max_length {config.data.max_length})"),
    ]
    if any(report.cut.values()):
        facts.append(("cut rows", f"{_counted(report.cut)}, by data.truncate"))
    for name, counts in (("labels", report.labels), ("tasks", report.tasks)):
        if counts is not None:
            facts.append((name, _some([f"{key} ({rows:,})" for key, rows in counts.items()])))
    facts += [
        ("steps", f"{report.steps:,} optimizer steps"),
        *_chain(report),
        *_memory(report),
    ]
    return facts


def _memory(report: "CheckReport") -> list[tuple[str, str]]:
    memory = report.memory
    how = "" if memory.traced else " by a rule of thumb, as the step cannot be traced"
    parts = ("weights", "gradients", "optimizer", "activations")
    listed = ", ".join(f"{name} {_bytes(getattr(memory, name))}" for name in parts)
    facts = [("memory", f"about {_bytes(memory.training)} in training{how}: {listed}")]
    if memory.evaluating is not None:
        size = report.config.evaluation.batch_size
        facts.append(
            (
                "",
                f"about {_bytes(memory.evaluating)} in evaluation, in batches of {size} rows "
                "(evaluation.batch_size)",
            )
        )
    return facts


def _counted(rows: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in rows.items())


def _chain(report: "CheckReport") -> list[tuple[str, str]]:
    if report.config.chain is None:
        return []
    plan = report.config.chain.build()
    lengths = plan.lengths(report.steps)
    shown = _some([f"{n:,}" for n in lengths]).partition(": ")[2]
    return [("chain", f"{plan.recipe}, {len(lengths)} links of {shown} steps")]


def _print_example(report: "CheckReport", console: "Console") -> None:
    from rich.text import Text

    text = Text()
    for piece, trained in report.example:
        if trained and not console.is_terminal:
            piece = f"[[{piece}]]"
        text.append(piece, style="bold green" if trained else "")
    if report.target is None:
        how = "green" if console.is_terminal else "in [[...]]"
        console.print(f"First training row, tokens with loss {how}:", style="bold")
    else:
        console.print(f"First training row, to predict {report.target}:", style="bold")
    console.print(text, soft_wrap=True)


def _print_repeats(report: "CheckReport", console: "Console") -> None:
    repeats, rows = report.repeats, report.rows["train"]
    if repeats.rows:
        others = repeats.rows - repeats.identical
        answers = "all with the same answer" if not others else f"{others:,} with another answer"
        console.print(
            f"\n{repeats.rows:,} of {rows:,} train rows ({100 * repeats.rows / rows:.1f} %) repeat "
            f"the input of an earlier one, {answers}; {repeats.inputs:,} inputs are different."
        )


def _print_overlap(overlap: "Overlap", report: "CheckReport", console: "Console") -> None:
    from rich.text import Text

    if not overlap.rows:
        console.print(f"\nNone of the {overlap.total:,} {overlap.split} rows occurs in train.")
        return
    share, data = 100 * overlap.rows / overlap.total, report.config.data
    drawn = overlap.split == "validation" and isinstance(data.validation, int | float)
    remedy = "Remove them from train"
    if drawn:
        column = "another column" if data.split_by is not None else "a column"
        remedy = f"Keep such rows on one side with data.split_by: COLUMN ({column} that they share)"
    console.print(
        f"\n{overlap.rows:,} of {overlap.total:,} {overlap.split} rows ({share:.1f} %) also occur "
        f"in train, {overlap.identical:,} of them with the same answer. {remedy} "
        "for an honest metric. Among them:",
        style="bold yellow",
    )
    for example in overlap.examples:
        console.print(Text(f"  {example}", overflow="ellipsis", no_wrap=True))


def _some(names: list[str], most: int = 8) -> str:
    more = "" if len(names) <= most else f" and {len(names) - most} more"
    return f"{len(names)}: {', '.join(names[:most])}{more}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
