"""Processes that write files of plait, hold locks, and are killed."""

import signal
import subprocess
import sys
from pathlib import Path

from plait.core import files

# A process that loads the module by its path: importing the package would take seconds.
CHILD = f"""
import importlib.util, os, shutil, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = Path(sys.argv[1])
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def fill(text):
    def write(folder):
        for name in ("a", "b"):
            (folder / name).write_text(text)
    return write
"""


def child(code: str, path: Path) -> subprocess.Popen[str]:
    """A process that runs code with `files`, `path`, `kill` and `fill`."""
    words = [sys.executable, "-c", CHILD + code, str(path)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def killed(code: str, path: Path) -> None:
    """Run code that has to kill its process."""
    assert child(code, path).wait(30) == -signal.SIGKILL


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a folder."""
    process = child("with files.lock(path):\n print('held', flush=True)\n time.sleep(60)", folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process
