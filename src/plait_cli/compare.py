"""`plait compare FILE`: is B better than A, by how much, and could it have been seen?"""

import argparse
import dataclasses
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from plait_cli._options import need_compare

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from plait.run.compare.study import Study, Trial

_WIDE = 100  # columns that the whole table takes
_FILE = 200  # columns where the output is no terminal
_LINES = 20  # that a phase prints without a terminal


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "compare",
        help="compare methods, each at its own learning rate, with intervals and verdicts",
        description="Compare the arms of a file: tune each one's learning rate on validation rows, "
        "train all with the same seeds, and say which wins, which loses and what cannot be told. "
        "Finished runs are never repeated: the same command continues after an interruption.",
    )
    parser.add_argument("file", help="the file of the comparison; see examples/compare/")
    parser.add_argument(
        "--out", metavar="DIR", help="the folder of the comparison; overrides `dir`"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="time a short run of each arm; show the difference that the study can detect, and "
        "its time and memory; compare nothing",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare; return 130 after Ctrl-C."""
    with need_compare("plait compare"):
        from plait.run.compare import outcome, plan, tables
    from plait.core.files import lock
    from plait.run.compare.match import match_arms
    from plait.run.compare.report import NAME, write_report
    from plait.run.compare.runner import Pool
    from plait.run.compare.study import read_study
    from plait.run.config import IMPORTED
    from plait_cli import console

    study = read_study(args.file, import_plugins=True)
    if args.out is not None:
        study = dataclasses.replace(study, options=dataclasses.replace(study.options, dir=args.out))
    screen, until = console(), time.monotonic() + study.seconds
    again = shlex.join(["plait", "compare", args.file, *(["--out", args.out] if args.out else [])])
    try:
        with lock(study.folder):
            study, sizes = match_arms(study)
            for arm in sizes.arms:
                screen.print(str(arm), soft_wrap=True)
            plugins = list(IMPORTED.values())
            with Pool(study.folder, study.options.workers, plugins, until) as pool:
                if args.plan or study.options.budget is not None:
                    made = plan.make_plan(study, sizes, pool)
                    for line in made.lines():
                        screen.print(line, soft_wrap=True)
                    if args.plan:
                        return 0
                with _Progress(study) as progress:
                    results = outcome.conduct(
                        study, sizes, lambda trials: pool.run(trials, progress)
                    )
            page = study.folder / f"{NAME}.html"
            if outcome.write(study, results) or not page.is_file():
                write_report(results, study.folder)
    except KeyboardInterrupt as stopped:
        text = str(stopped) or "compare: stopped."
        print(f"\n{text}\nFinished runs are kept. Continue with: {again}", file=sys.stderr)
        return 130
    _print(screen, tables.verdict_table(results))
    for sentence in tables.conclusions(results):
        screen.print(sentence, soft_wrap=True)
    screen.print(f"report: {page}", soft_wrap=True)
    return 0


def _print(screen: "Console", table: tuple[str, list[str], list[list[str]]]) -> None:
    """Print the verdicts, a table for each combination of factors.

    A narrow terminal has no p-values.
    """
    from rich.table import Table
    from rich.text import Text

    title, head, rows = table
    factors = head[0] == "factors"
    narrow = screen.is_terminal and screen.width < _WIDE
    left_out = {"factors", "p (Holm)"} if narrow else {"factors"}
    kept = [place for place, name in enumerate(head) if name not in left_out]
    if not screen.is_terminal:
        screen.width = _FILE
    screen.print(title, style="bold", soft_wrap=True)
    for cell in dict.fromkeys(row[0] for row in rows) if factors else [None]:
        shown = Table(title=cell, box=None, title_justify="left", title_style="")
        for place in kept:
            words = head[place] in ("arm", "verdict")
            shown.add_column(head[place], justify="left" if words else "right", no_wrap=True)
        for row in rows:
            if cell is None or row[0] == cell:
                shown.add_row(*(Text(row[place]) for place in kept))
        screen.print(shown)


class _Progress:
    """Shows what has finished: a table that lives in a terminal, else some lines."""

    def __init__(self, study: "Study") -> None:
        from plait_cli import console

        self.study, self.screen = study, console()
        self.tried: dict[tuple[str, str], dict[str, int]] = {}
        self.shown, self.total = -1, 0
        self.live: Any = None

    def __enter__(self) -> "_Progress":
        from rich.live import Live

        if self.screen.is_terminal:
            self.live = Live(console=self.screen, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, trial: "Trial", done: int, of: int) -> None:
        """Show that a trial has finished: `done` of `of` in this phase."""
        test = trial.config.data.test is not None
        counts = self.tried.setdefault((trial.cell, trial.arm), {"rates": 0, "seeds": 0})
        counts["seeds" if test else "rates"] += 1
        phase = "compared" if test else "rates"
        if self.live is not None:
            self.live.update(self._table(f"{phase}: {done} of {of} runs"))
            return
        if of != self.total or done == 1:
            self.shown, self.total = -1, of
        if done * _LINES // of > self.shown:
            self.shown = done * _LINES // of
            self.screen.print(f"{phase}: {done} of {of} runs", soft_wrap=True)

    def _table(self, title: str) -> "RichTable":
        from rich.table import Table
        from rich.text import Text

        table = Table("factors", "arm", "trials of rates", "seeds", title=title, box=None)
        for (cell, arm), counts in self.tried.items():
            seeds = f"{counts['seeds']} of {len(self.study.seeds)}"
            table.add_row(Text(cell), Text(arm), str(counts["rates"]), seeds)
        return table
