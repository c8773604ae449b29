"""Flower's SuperNode, which looks for messages four times a second and not every three seconds.

flwr 1.40 and 1.41 sleep for a fixed time where no message was there, longer than most of plait's
messages take. This program takes the arguments of flower-supernode; run it with `python -P`.
"""

import sys
import time
from types import SimpleNamespace
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

LONGEST = 0.25  # seconds


def sleep(seconds: float) -> None:
    """Sleep for as long, but not longer than LONGEST."""
    time.sleep(min(seconds, LONGEST))


if __name__ == "__main__":
    module: Any = start_client_internal  # an AttributeError where flwr has changed
    module.time = SimpleNamespace(**{**vars(module.time), "sleep": sleep})
    sys.exit(flower_supernode())
