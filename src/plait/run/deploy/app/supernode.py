"""Flower's SuperNode, with shorter waits: it looks for messages as often as it has had some.

    client programs: forked by `superexec.py`                       (flwr: started anew, 1 s each)
    no message: 0.1 s after the last one, 5 % longer each time, up to 1 s     (flwr: 3 s, always)
    waiting for its own client program: 0.1 s                                 (flwr: 0.5 s)

flwr 1.40 and 1.41 sleep for fixed times, longer than most of plait's messages take. This program
takes the arguments of flower-supernode; run it with `python -P`.
"""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

_IDLE = 3.0  # seconds; how long flwr sleeps where no message was there
_SHORTEST, _LONGEST, _GROWTH = 0.1, 1.0, 1.05
_SUPEREXEC = Path(__file__).with_name("superexec.py")


class Sleep:
    """In place of `time.sleep` in flwr's loop."""

    def __init__(self) -> None:
        self.next = _SHORTEST

    def __call__(self, seconds: float) -> None:
        """Sleep, for a shorter time than flwr asks for."""
        if seconds < _IDLE:  # there is a message, and its program runs
            self.next = _SHORTEST
            time.sleep(min(seconds, _SHORTEST))
        else:
            time.sleep(self.next)
            self.next = min(_GROWTH * self.next, _LONGEST)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """In place of `subprocess.Popen` in flwr: start plait's SuperExec."""
    name, *arguments = command
    if name != "flower-superexec":
        raise RuntimeError(f"flwr starts {name!r}, not flower-superexec. Install flwr < 1.42.")
    return subprocess.Popen([sys.executable, "-P", str(_SUPEREXEC), *arguments])


if __name__ == "__main__":
    module: Any = start_client_internal  # an AttributeError where flwr has changed
    module.time = SimpleNamespace(**{**vars(module.time), "sleep": Sleep()})
    module.subprocess = SimpleNamespace(**{**vars(module.subprocess), "Popen": start})
    sys.exit(flower_supernode())
