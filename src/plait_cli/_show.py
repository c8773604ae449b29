"""What several verbs show: tables of metrics, the state of an evaluation."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table


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


def comparison(rows: Sequence[tuple[str, str, str]]) -> Table:
    """A table of (metric, before, after)."""
    table = Table("metric", box=None)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    return table
