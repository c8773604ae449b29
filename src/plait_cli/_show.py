"""What several verbs show: tables of metrics, the state of an evaluation, warnings on one line."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from transformers.utils import logging as transformers_logging

from plait.core.events import PlaitWarning


class Status:
    """A bar for the rows of an evaluation, in a terminal only; it disappears when they are done."""

    def __init__(self, console: Console, what: str):
        self.console, self.what = console, what
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` rows are measured."""
        if not self.console.is_terminal:
            return
        if self.bar is None:
            self.bar = Progress(console=self.console, transient=True)
            self.task = self.bar.add_task(self.what, total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and deprecations; print plait's warnings plainly."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, PlaitWarning):
            print(f"warning: {message}", file=file or sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    had_bars = transformers_logging.is_progress_bar_enabled()
    had_level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # It logs on every call of every layer that it works in float16.
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.showwarning = show
            yield
    finally:
        transformers_logging.set_verbosity(had_level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def comparison(rows: Sequence[tuple[str, str, str]]) -> Table:
    """A table of (metric, before, after)."""
    table = Table("metric", box=None)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    return table
