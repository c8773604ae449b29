"""What libraries say is not shown, unless it is asked for; what plait warns of is one line.

It imports no library, so that it is in force before the first one is loaded.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# What libraries read when they are loaded, here and in the processes that are started.
_SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_OURS = ("plait.core.events", "PlaitWarning")


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Print plait's own warnings plainly and drop those, the logs and the bars of libraries.

    verbose: libraries say what they like.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _showing(warnings.showwarning if verbose else None)
        if verbose:
            yield
            return
        level, known = logging.root.manager.disable, {k: os.environ.get(k) for k in _SILENT}
        logging.disable(max(level, logging.WARNING))
        os.environ.update({k: v for k, v in _SILENT.items() if known[k] is None})
        restore = _stop_bars()
        try:
            yield
        finally:
            logging.disable(level)
            for name, value in known.items():
                if value is None:
                    os.environ.pop(name, None)
            restore()


def _showing(others: Any) -> Any:
    """Return a `warnings.showwarning`; others: what shows the warnings of libraries, or None."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if any((c.__module__, c.__name__) == _OURS for c in category.__mro__):
            print(f"warning: {message}", file=file or sys.stderr)
        elif others is not None:
            others(message, category, filename, lineno, file, line)

    return show


def _stop_bars() -> Any:
    """Stop the progress bars of transformers if it is loaded; return what starts them again."""
    logs: Any = sys.modules.get("transformers.utils.logging")
    if logs is None or not logs.is_progress_bar_enabled():
        return lambda: None
    logs.disable_progress_bar()
    return logs.enable_progress_bar
