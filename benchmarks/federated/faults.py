"""A federated run that is killed at random moments and resumed.

    python -m benchmarks.federated.faults --kills 20           # some minutes on one core

The process of a run (server and clients) gets SIGKILL at a moment drawn uniformly from its time
after loading; the run is resumed; its last checkpoint and all private states must have the bits of
a run that was never stopped. Results: results/faults.json.
"""

import itertools
import multiprocessing as mp
import os
import random
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks._common import parser, write_results
from plait.run.federated.config import load_federate_config
from plait.run.federated.engines import simulate
from plait.run.federated.folder import read_rounds
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "faults.json"


def config(folder: Path, sections: Mapping[str, Any]) -> Any:
    """A checked config with its output in a folder."""
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump({**sections, "output": {"dir": str(folder)}}))
    return load_federate_config(file)


def killed(method: str, adapter: str) -> dict[str, Any]:
    """The sections of the run that is killed: unequal ranks where the method takes them."""
    return {
        "method": {"name": adapter, "r": 4, "target_modules": ["q_proj", "v_proj"]}
        | ({"common_rank": 4} if adapter == "fedalora_het" else {}),
        "federated": {"method": method, "ranks": [8, 4, 4, 2]}
        | ({"options": {"common_rank": 4}} if adapter == "fedalora_het" else {}),
        "data": {"train": "builtin:shift?n=64"},
        "partition": {"kind": "iid", "clients": 4},
        "local": {"rounds": 6, "steps": 2, "batch_size": 4},
        "evaluation": {"every": 0},
        "engine": {"threads": 1},
    }


def saved(folder: Path) -> dict[str, bytes]:
    """The last checkpoint and the private states, by their place."""
    kept = [max((folder / "server").glob("round-*.ckpt")), *(folder / "clients").rglob("*.state")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def kill_runs(count: int, scratch: Path, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each kill: seconds after the start, completed rounds, bit-equal or not."""
    rows, draw, fork = [], random.Random(seed), mp.get_context("fork")
    number = itertools.count()
    for method, adapter in (("fedalora_het", "fedalora_het"), ("flora", "lora")):
        sections = killed(method, adapter)
        whole = config(scratch / f"{method}-whole", sections)
        whole_process = fork.Process(target=simulate, args=(whole,))
        begun = time.monotonic()
        whole_process.start()
        whole_process.join()
        took, expected = time.monotonic() - begun, saved(Path(whole.output.dir))
        goal = count if method == "flora" else count // 2
        while len(rows) < goal:
            cut = config(scratch / f"{method}-{next(number)}", sections)
            path = Path(cut.output.dir)
            process = fork.Process(target=simulate, args=(cut,))
            begun = time.monotonic()
            process.start()
            while process.is_alive() and not (path / "metrics.jsonl").exists():  # it loads
                time.sleep(0.002)
            loaded = time.monotonic() - begun
            time.sleep(draw.uniform(0, max(took - loaded, 0.05)))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            if process.exitcode == 0:
                continue  # it had ended, faster than the whole one: no kill
            rounds = len(read_rounds(path / "metrics.jsonl"))
            resumed = fork.Process(target=simulate, args=(cut, True))
            resumed.start()
            resumed.join()
            rows.append(
                {
                    "method": method,
                    "exit_code": process.exitcode,
                    "lines_at_kill": rounds,
                    "resumed_exit_code": resumed.exitcode,
                    "equal": saved(path) == expected,
                }
            )
    return rows


def main() -> None:
    """Kill and resume, and write the results."""
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=20)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_runs(args.kills, Path(folder))
        print(f"{sum(row['equal'] for row in kills)} of {len(kills)} resumes are bit-equal")
    write_results(RESULTS, {"environment": environment(), "kills": kills})


if __name__ == "__main__":
    main()
