"""`plait inspect RUN [RUN ...]`: what did an adapter learn, and how alike are several?"""

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from plait.run.inspect.findings import InspectReport, SimilarityReport

_MOST_PAIRS = 12  # of one kind in the terminal, else the ends; all are in inspect.json
_END = 4


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "inspect",
        help="measure what a run learned, and how similar runs are",
        description="Measure what runs learned: size, direction, rank and spectrum of each "
        "update, similarity of factors and updates within and between runs, gates, and "
        "what token routers do on held-out rows. Writes inspect.json and pictures.",
    )
    parser.add_argument(
        "run_folders", nargs="+", metavar="RUN", help="run folders, of one base model"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="other rows for token routers"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write; default inspect in the first RUN"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=256,
        metavar="N",
        help="held-out rows for token routers, default 256; 0: leave routers out",
    )
    parser.add_argument(
        "--principal",
        type=int,
        default=8,
        metavar="K",
        help="compare updates with the top K directions of W, default 8; 0: leave it out",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write inspect.json alone")
    parser.add_argument("--force", action="store_true", help="replace an earlier report")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, write, print the means."""
    from plait.run.inspect.runs import inspect_runs
    from plait_cli import console
    from plait_cli._show import Status

    words = [*args.run_folders, *args.overrides]  # argparse gives the first list all of them
    overrides = [
        word
        for word in words
        if word.startswith(("data.", "evaluation.", "model.")) and "=" in word
    ]
    runs = [word for word in words if word not in overrides]
    if not runs:
        raise ValueError("there is no run folder. Give the output.dir of a finished run.")
    screen = console()
    with Status(screen, "layers") as status:
        out, report = inspect_runs(
            runs,
            args.out,
            rows=args.rows,
            principal_k=args.principal,
            pictures=not args.no_pictures,
            force=args.force,
            overrides=overrides,
            progress=status,
        )
    render(report, screen)
    screen.print(f"written: {out}", soft_wrap=True)
    return 0


def render(report: "InspectReport", console: "Console") -> None:
    """Print the means of a report."""
    for run in report.runs:
        console.print(
            f"{run.label}: {run.method} on {run.model}, {run.layers} layers", style="bold"
        )
        if run.updates != "single":
            what = {
                "experts": "updates depend on the token; the numbers are of the experts' parts "
                "s B_i A_i, mean over experts",
                "tasks": "one update a task; the numbers are means over tasks",
            }[run.updates]
            console.print(f"  {what}")
        for note in run.notes:
            console.print(f"  {note}")
        for table in _modules(report, run.label):
            console.print()
            console.print(table)
        console.print()
    for note in report.notes:
        console.print(note)
    if report.similarity:
        console.print(_similarity(report))
        console.print()
    if report.loads:
        console.print(_loads(report))
        console.print()


def _table(*columns: str, numbers: int) -> "Table":
    """A table whose last columns are numbers, which are never broken."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns[: len(columns) - numbers]:
        table.add_column(column, overflow="fold")
    for column in columns[len(columns) - numbers :]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _modules(report: "InspectReport", run: str) -> "list[Table]":
    """Means over layers; columns without any number are left out."""
    from plait.run.inspect.findings import short_names

    rows = [m for m in report.modules if m.run == run]
    names = short_names(m.module for m in report.modules)
    size = {
        "layers": [str(m.layers) for m in rows],
        "|dW|": [_number(m.norm) for m in rows],
        "|dW|/|W|": [_number(m.relative) for m in rows],
        "stable": [_number(m.stable_rank) for m in rows],
        "effective": [_number(m.effective_rank) for m in rows],
        "rank": [_number(m.numerical_rank) for m in rows],
        "of": ["-".join(map(str, sorted(set(m.rank)))) for m in rows],
    }
    direction = {
        "left": [_number(m.left) for m in rows],
        "right": [_number(m.right) for m in rows],
        "cosine": [_number(m.cosine) for m in rows],
        "dW = 0": [_number(m.untouched) for m in rows],
        "live": [_number(m.live) for m in rows],
        "of": [_number(m.ranks) for m in rows],
    }
    tables = []
    for columns in (size, direction):
        columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
        if not columns:
            continue
        table = _table("module", *columns, numbers=len(columns))
        for i, m in enumerate(rows):
            table.add_row(names[m.module], *(cells[i] for cells in columns.values()))
        tables.append(table)
    return tables


def _similarity(report: "InspectReport") -> "Table":
    """The pairs; if there are many, the most alike first."""
    table = _table("", "pair", "cosine", "overlap", "chance", "least", "most deg", numbers=5)
    for kind in dict.fromkeys(s.kind for s in report.similarity):
        pairs = [s for s in report.similarity if s.kind == kind]
        if len(pairs) > _MOST_PAIRS:
            pairs.sort(key=lambda s: -(_likeness(s) or 0.0))
        for i, s in enumerate(pairs):
            if len(pairs) > _MOST_PAIRS and _END <= i < len(pairs) - _END:
                if i == _END:
                    table.add_row(kind, f"({len(pairs) - 2 * _END} between, in inspect.json)")
                continue
            angles = ["-" if v is None else f"{v:.1f}" for v in (s.smallest, s.largest)]
            numbers = [_number(v) for v in (s.cosine, s.overlap, s.chance)]
            table.add_row(kind, f"{s.a}, {s.b}", *numbers, *angles)
    return table


def _likeness(pair: "SimilarityReport") -> float | None:
    return pair.cosine if pair.overlap is None else pair.overlap


def _loads(report: "InspectReport") -> "Table":
    """Routers by task."""
    table = _table("router", "task", "load", "tokens", "entropy", "of load", "ln n", numbers=4)
    for load in report.loads:
        table.add_row(
            load.run,
            load.task or "(all)",
            " ".join("-" if v is None else f"{v:.2f}" for v in load.load),
            f"{load.tokens:,}",
            _number(load.entropy),
            _number(load.load_entropy),
            _number(math.log(load.experts)),
        )
    return table
