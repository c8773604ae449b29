"""Real loaders in the table of readers, if asked for; prints what the real server measured."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import readers
from tests.support import llamacpp


@pytest.fixture(scope="session", autouse=True)
def _real_loaders() -> Iterator[None]:
    """With PLAIT_LOADERS, the folder of unpacked wheels, vLLM and SGLang read for themselves."""
    folder = os.environ.get("PLAIT_LOADERS")
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            from tests.serving.loaders import loaders

            for title, read in loaders(Path(folder)).items():
                patch.setitem(readers.READERS, title, read)
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a line for each comparison with llama.cpp."""
    if llamacpp.MEASURED:
        terminalreporter.section("llama.cpp against the live model")
        for line in llamacpp.MEASURED:
            terminalreporter.write_line(line)
