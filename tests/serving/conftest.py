"""Prints what the real server measured."""

from typing import Any

from tests.support import llamacpp


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a line for each comparison with llama.cpp."""
    if llamacpp.MEASURED:
        terminalreporter.section("llama.cpp against the live model")
        for line in llamacpp.MEASURED:
            terminalreporter.write_line(line)
