"""A server killed at random moments, and runs with a fifth of poisoned clients.

    python -m benchmarks.federated.faults           # both; about a quarter of an hour on one core
    python -m benchmarks.federated.faults --kills 20 --seeds 3 --rounds 8

kills: the process of a run (server and clients) gets SIGKILL at a moment drawn uniformly from its
time after loading; the run is resumed; its last checkpoint and all private states must have the
bits of a run that was never stopped.

poison: 10 clients with equal shares of the shift task, 2 of them poisoned in every round, on the
shipped tiny model. Held-out loss after the last round, against the same run without poison and with
the plain mean. flip: an update with its sign turned. scale: 1e6 times as large. nan: not a number.
Results: results/faults.json.
"""

import itertools
import multiprocessing as mp
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks._common import parser, write_results
from plait.federated.payload import pack_tensors, unpack_tensors
from plait.federated.protocol import Order, Reply
from plait.run.federated.clients import make_clients
from plait.run.federated.conduct import conduct
from plait.run.federated.config import load_federate_config
from plait.run.federated.engines import simulate
from plait.run.federated.folder import read_rounds
from plait.run.federated.setup import prepare_federation
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "faults.json"
POISONED = ("client-3", "client-7")


def config(folder: Path, sections: Mapping[str, Any]) -> Any:
    """A checked config with its output in a folder."""
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump({**sections, "output": {"dir": str(folder)}}))
    return load_federate_config(file)


# Kills ------------------------------------------------------------------------------------------


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


# Poison -----------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (upload, start of the round)
    "clean": lambda x, start: x,
    "flip": lambda x, start: 2 * start - x,
    "scale": lambda x, start: 1e6 * x,
    "nan": lambda x, start: x * float("nan"),
}


def poisoned(fault: str, upload: bytes, down: Mapping[str, Tensor]) -> bytes:
    """An upload after the fault."""
    header, tensors = unpack_tensors(upload)
    change = CHANGES[fault]
    zero = torch.zeros(())
    return pack_tensors(header, {k: change(x, down.get(k, zero)) for k, x in tensors.items()})


def loss_of(
    method: str, fault: str, aggregator: str, seed: int, rounds: int, scratch: Path, n: int = 3200
) -> dict[str, Any]:
    """The mean held-out loss before and after a run, and what was rejected."""
    sections = {
        "method": {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "federated": {"method": method},
        "data": {"train": f"builtin:shift?n={n}", "validation": "builtin:shift?n=128"},
        "partition": {"kind": "iid", "clients": 10, "seed": seed},
        "sampling": {"seed": seed},
        "local": {"rounds": rounds, "steps": 10, "batch_size": 8, "learning_rate": 5e-3},
        "guard": {"aggregator": aggregator, "faulty": 2, "min_updates": 7},
        "evaluation": {"every": rounds},
        "engine": {"threads": 1},
    }
    made = config(scratch / f"{method}-{fault}-{aggregator}-{seed}", sections)
    setup = prepare_federation(made)
    clients = make_clients(setup, Path(made.output.dir) / "clients")

    def exchange(orders: Mapping[str, bytes]) -> Any:
        for name in orders:
            data = orders[name]
            reply = Reply.unpack(clients.answer(data))
            if name in POISONED and reply.upload:
                down = Order.unpack(data)[1]
                reply = replace(reply, upload=poisoned(fault, reply.upload, down))
            yield name, reply.pack()

    folder = conduct(setup, exchange)
    lines = read_rounds(folder.metrics)
    measured = [row["clients"] for row in lines if row["kind"] == "evaluation"]
    honest = [[c["loss"] for n, c in row.items() if n not in POISONED] for row in measured]
    reasons = [
        reason for row in lines if row["kind"] == "round" for _, reason, _ in row["rejected"]
    ]
    return {
        "before": mean(honest[0]),
        "after": mean(honest[-1]),
        "rejected": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }


FAULTS = ("clean", "flip", "scale", "nan")
CASES = [(fault, aggregator) for aggregator in ("mean", "multi_krum") for fault in FAULTS]
CASES += [("flip", "trimmed_mean"), ("flip", "median")]


def poison_runs(
    seeds: int,
    rounds: int,
    scratch: Path,
    methods: tuple[str, ...] = ("fedit", "fedalora"),
    cases: Sequence[tuple[str, str]] = CASES,
    n: int = 3200,
) -> list[dict[str, Any]]:
    """One row for each method, fault and mean: losses by seed, and the ratio to the first case."""
    rows = []
    for method in methods:
        clean: list[float] = []
        for fault, aggregator in cases:
            found = [
                loss_of(method, fault, aggregator, s, rounds, scratch, n) for s in range(seeds)
            ]
            after = [row["after"] for row in found]
            clean = clean or after
            rows.append(
                {
                    "method": method,
                    "fault": fault,
                    "aggregator": aggregator,
                    "before": [round(row["before"], 4) for row in found],
                    "after": [round(x, 4) for x in after],
                    "to_clean": [round(x / c, 4) for x, c in zip(after, clean, strict=True)],
                    "rejected": found[0]["rejected"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run both and write the results."""
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=8)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_runs(args.kills, Path(folder))
        print(f"{sum(row['equal'] for row in kills)} of {len(kills)} resumes are bit-equal")
        poison = poison_runs(args.seeds, args.rounds, Path(folder))
    write_results(RESULTS, {"environment": environment(), "kills": kills, "poison": poison})


if __name__ == "__main__":
    main()
