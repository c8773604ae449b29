"""A federation of real processes on this machine: TLS, node keys, one server, several clients.

    certs -> serve -> join x N -> run

Prints how long each step takes, the time from `serve` to the first aggregated round, and the
overhead of a message: the time of a round beyond that of its slowest client's training, by the
client's own clock. Clients of a round work side by side, so a round is one message long.

    python -m benchmarks.federated.deployment --clients 2 --rounds 4 --out FILE.json
"""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks._common import parser, write_results
from plait.run.federated.folder import read_rounds

LIMIT = 600.0  # seconds for any one step


def settings(folder: Path, clients: int, rounds: int, steps: int) -> dict[str, Any]:
    """The config of the run: the shipped tiny model, rows of the shifted-letters task."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return {
        "method": {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "federated": {"method": "fedit"},
        "data": {"train": f"builtin:shift?n={40 * clients}", "validation": "builtin:shift?n=16"},
        "partition": {"kind": "iid", "clients": [f"c{i}" for i in range(clients)]},
        "local": {"rounds": rounds, "steps": steps},
        "evaluation": {"every": 0},
        "output": {"dir": str(folder / "run")},
        "deploy": {
            "address": f"127.0.0.1:{port}",
            "certs": str(folder / "certs"),
            "home": str(folder / "home"),
        },
    }


class Process:
    """`plait federate WORDS` in the background, with its output in a file."""

    def __init__(self, folder: Path, name: str, *words: str):
        self.name, self.file = name, folder / f"{name}.txt"
        with self.file.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "plait", "federate", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )

    def wait_for(self, text: str) -> None:
        """Until its output has `text`."""
        end = time.monotonic() + LIMIT
        while text not in (shown := self.file.read_text()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name}: {text!r} is not in its output:\n{shown}")
            time.sleep(0.1)

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


def measure(folder: Path, clients: int, rounds: int, steps: int) -> dict[str, Any]:
    """Run it once; seconds of each step, and of each round."""
    config = settings(folder, clients, rounds, steps)
    names, file = config["partition"]["clients"], folder / "fed.yaml"
    file.write_text(yaml.safe_dump(config))
    found: dict[str, Any] = {}
    last = start = time.monotonic()

    def note(name: str) -> None:
        nonlocal last
        found[name] = round(time.monotonic() - last, 2)
        last = time.monotonic()

    certs = ["certs", str(folder / "certs"), "--host", "127.0.0.1", "--clients", ",".join(names)]
    Process(folder, "certs", *certs).process.wait()
    note("certs")
    begun, running = time.monotonic(), []
    try:
        running.append(Process(folder, "serve", "serve", str(file)))
        running[0].wait_for("Next, ")
        note("serve")
        joined = [Process(folder, f"join-{n}", "join", str(file), "--client", n) for n in names]
        running += joined
        for process in joined:
            process.wait_for("accepted, node")
        note("join")
        running.append(Process(folder, "run", "run", str(file)))
        times, log = [], folder / "run" / "metrics.jsonl"
        while len(times) < rounds:
            done = [row for row in read_rounds(log) if row["kind"] == "round"]
            times += [time.monotonic()] * (len(done) - len(times))
            if running[-1].process.poll() is not None and len(times) < rounds:
                raise RuntimeError(f"the run ended early:\n{running[-1].file.read_text()}")
            time.sleep(0.05)
        found["first round, from run"] = round(times[0] - last, 2)
        found["first round, from serve"] = round(times[0] - begun, 2)
        found["first round, from certs"] = round(times[0] - start, 2)
        found["exit code"] = running[-1].process.wait(LIMIT)
    finally:
        for process in reversed(running):
            process.stop()
    rows = [row for row in read_rounds(log) if row["kind"] == "round"]
    slowest = [max(row["seconds"].values()) for row in rows]
    walls = [b - a for a, b in pairwise(times)]
    found["rounds"] = [round(wall, 2) for wall in walls]
    found["training"] = [round(own, 2) for own in slowest]
    over = [wall - own for wall, own in zip(walls, slowest[1:], strict=True)]
    found["overhead of a message"] = round(median(over), 2) if over else None
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=2)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="plait-") as folder:
        found = measure(Path(folder), args.clients, args.rounds, args.steps)
    found["clients"], found["load"] = args.clients, os.getloadavg()[0]
    found["cores"], found["flwr"] = os.cpu_count(), version("flwr")
    found["platform"] = f"{platform.system()} {platform.machine()}"
    print(json.dumps(found, indent=2))
    if args.out:
        write_results(args.out, found)


if __name__ == "__main__":
    main()
