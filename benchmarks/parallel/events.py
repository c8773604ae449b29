"""The share of plait's events, and of what processes agree on, in the time of training under DDP.

    torchrun --nproc-per-node 2 -m benchmarks.parallel.events FOLDER

CPU time of the main thread, which other programs on the machine hardly change.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.parallel.throughput import ROWS, prepare
from plait.core import events
from plait.run.config import load_config
from plait.run.parallel import ranks
from plait.run.train import train
from plait.run.trainer import RunTrainer

SIZE = int(os.environ["WORLD_SIZE"])
spent: dict[str, float] = {}


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Add the time of a call to `spent`."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.thread_time() - began

    return measured


def main(folder: Path) -> None:
    """Train three methods and print the shares."""
    if os.environ["RANK"] == "0":
        folder.mkdir(parents=True)
        prepare(folder)
    while not (folder / "run.yaml").exists():
        time.sleep(0.1)
    time.sleep(1)
    for name in ("_before", "_after"):
        setattr(events, name, timed("events", getattr(events, name)))
    for name in ("any_of", "total", "gather"):
        setattr(ranks, name, timed("agreement", getattr(ranks, name)))
    RunTrainer.fit = timed("training", RunTrainer.fit)
    for method in ("lora", "sora", "dual_module"):
        spent.clear()
        words = [f"method.name={method}", f"output.dir={folder / method}"]
        words.append(f"training.per_device_train_batch_size={ROWS // SIZE}")
        train(load_config(folder / "run.yaml", words))
        if ranks.is_first():
            shares = {k: spent.get(k, 0.0) / spent["training"] for k in ("events", "agreement")}
            print(
                f"{method}: {spent['training']:.1f} s, events {100 * shares['events']:.2f} %, "
                f"agreement {100 * shares['agreement']:.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
