"""Measure what federated rounds cost: time to aggregate, memory, 1,000 clients, numbers sent.

    python -m benchmarks.federated.scale
    python -m benchmarks.federated.scale PART [ARGUMENT]    # one measurement, as JSON

Aggregation: CPU seconds of 1,000 updates of 8 KiB. Streaming: 32 uploads of a 7B model (r = 8, q
and v projections; common_rank 16 for fedalora_het) from a `Spool`; memory is the peak of the
resident set while they are aggregated, less that before, in payloads of one client. Simulation:
Fed-ALoRA on a tiny Llama, 10 % of the clients in each of 10 rounds, one step each; slope: of the
resident set over the number of clients, whose private states lie on the disk. Communication:
numbers up and down for a client and a round, from shapes alone. Each measurement of memory has a
process of its own and one thread. It needs Linux and glibc. Results go to results/scale.json.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._common import write_results
from plait.core.init import seeded
from plait.federated import Algorithm, Client, State, algorithm, weights_of
from plait.federated.adapter import Layer, StateDict
from plait.federated.client import LocalTraining
from plait.federated.engines.local import Federation
from plait.federated.payload import Header, pack
from plait.federated.server import ServerOptions
from plait.federated.state import Spool
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "scale.json"
SEED = 0
REPEATS = 5
EXCHANGING = (
    *("fedit", "ffa", "fedsa", "fedalora", "fedavg", "fedalora_het"),
    *("zeropad", "hetlora", "flexlora", "flora", "fedex"),
)
STREAMED = ("fedit", "fedalora", "fedalora_het", "hetlora")  # the other averages do as these do
CLIENTS = (100, 500, 1000)


def made(
    key: str, r: int, q: int, shapes: Mapping[str, tuple[int, int]]
) -> tuple[Algorithm, Client]:
    """A method and a client with s = 2; shapes: layer -> (in, out)."""
    layers = {name: Layer(a, b, r, 2.0) for name, (a, b) in shapes.items()}
    if key != "fedalora_het":
        return algorithm(key), Client.lora("c", layers)
    sizes: dict[str, tuple[int, ...]] = {}
    for name, (a, b) in shapes.items():
        sizes |= {f"{name}/A": (r, a), f"{name}/M": (q, r)}
        sizes |= {f"{name}/B1": (r, q), f"{name}/B2": (b, r)}
    return algorithm(key, common_rank=q), Client("c", layers, sizes)


def drawn(shapes: Mapping[str, tuple[int, ...]], *key: object) -> StateDict:
    """Gaussian tensors."""
    gen = seeded(SEED, *key)
    return {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}


def start_of(method: Algorithm, client: Client) -> State:
    """The server's state before round 1."""
    bars = {f"{name}/B_bar": (x.out_features, 16) for name, x in client.layers.items()}
    if method.key == "fedalora_het":
        bars = {name: (out, method.common_rank) for name, (out, _) in bars.items()}  # type: ignore[attr-defined]
    return method.start(drawn({**client.shapes, **bars}, "start"), client)


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least and largest of some repetitions."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(x, 4) for name, x in found.items()} | {"repeats": len(values)}


# Time of aggregation ----------------------------------------------------------------------------


def aggregation() -> dict[str, Any]:
    """Method -> CPU seconds of 1,000 updates of 8 KiB."""
    torch.set_num_threads(1)
    found = {}
    for key in EXCHANGING:
        r = 4 if key in ("ffa", "fedsa", "fedalora", "fedalora_het") else 2
        method, client = made(key, r, 4, {f"l{i}": (64, 64) for i in range(8)})
        clients = {f"c{i:04}": client for i in range(1000)}
        updates = {name: drawn(method.share(client), name) for name in clients}
        weights, start = weights_of(dict.fromkeys(clients, 1)), start_of(method, client)
        assert sum(x.nbytes for x in updates["c0000"].values()) == 8 * 1024
        seconds = []
        for _ in range(REPEATS):
            begin = time.process_time()
            method.aggregate(updates, weights, start, clients)
            seconds.append(time.process_time() - begin)
        found[key] = spread(seconds)
    return found


# Memory of streaming ----------------------------------------------------------------------------


def resident(name: str) -> int:
    """Bytes of the resident set: `VmRSS` now, `VmHWM` at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}. Measure on Linux.")


def peak_of(function: Callable[[], object]) -> int:
    """Bytes by which a function raises the peak of the resident set above what it is now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before would hide new memory
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def streaming(key: str) -> dict[str, Any]:
    """A method's peak in payloads of one client, its CPU seconds, and its result's size."""
    torch.set_num_threads(1)
    method, client = made(key, 8, 16, {f"l{i}": (4096, 4096) for i in range(64)})
    clients = {f"c{i:02}": client for i in range(32)}
    share = method.share(client)
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(folder)
        upload = pack(Header(key, "scale", 1, "c", 0, 8, "fp32", 1), drawn(share, "upload"))
        for name in clients:
            spool.add(name, upload)
        del upload
        payload = 4 * method.numbers_up(client)
        start, weights = start_of(method, client), weights_of(dict.fromkeys(clients, 1))
        states: list[State] = []
        begin = time.process_time()
        peak = peak_of(lambda: states.append(method.aggregate(spool, weights, start, clients)))
        seconds = time.process_time() - begin
    result = sum(x.nbytes for x in states[0].tensors.values())
    return {
        "payload_MB": round(payload / 1e6, 3),
        "peak_payloads": round(peak / payload, 2),
        "result_payloads": round(result / payload, 2),
        "cpu_seconds": round(seconds, 2),
    }


# A thousand clients -----------------------------------------------------------------------------


class Rows(Mapping[str, list[Tensor]]):
    """Eight rows of 16 random tokens for each client, drawn when asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __getitem__(self, client: str) -> list[Tensor]:
        gen = seeded(SEED, "rows", client)
        return list(torch.randint(3, 160, (8, 16), generator=gen))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch for language modelling."""
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def tiny() -> LlamaForCausalLM:
    """Two blocks, 102,720 parameters."""
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded(SEED).get_state())
        return LlamaForCausalLM(config)


def simulation(number: str) -> dict[str, Any]:
    """CPU seconds and memory of a whole process that simulates so many clients."""
    torch.set_num_threads(1)
    names = [f"c{i:04}" for i in range(int(number))]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    train = LocalTraining(Rows(names), collate, steps=1, batch_size=8, seed=SEED)
    options = ServerOptions(rounds=10, fraction=0.1, seed=SEED)
    base, before = tiny(), resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        configs = dict.fromkeys(names, lora)
        method = algorithm("fedalora", seed=SEED)
        federation = Federation(base, configs, method, train, folder, options)
        built, begin = resident("VmRSS"), time.process_time()
        accepted: list[int] = []
        federation.run(lambda record: accepted.append(len(record.accepted)))
        seconds = time.process_time() - begin
        states = list(Path(folder).rglob("*.state"))
        private = sum(path.stat().st_size for path in states)
    return {
        "clients": len(names),
        "client_rounds": sum(accepted),
        "cpu_seconds": round(time.process_time(), 1),
        "cpu_seconds_of_rounds": round(seconds, 1),
        "rss_MiB": {
            "model": round(before / 2**20, 1),
            "built": round(built / 2**20, 1),
            "end": round(resident("VmRSS") / 2**20, 1),
            "peak": round(resident("VmHWM") / 2**20, 1),
        },
        "private_KiB_on_disk_per_client": round(private / len(states) / 1024, 2),
    }


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the least-squares line."""
    return statistics.linear_regression(xs, ys).slope


# Communication ----------------------------------------------------------------------------------

RANKS = (64, 64, 32, 32, 16, 16, 8, 8)
MODELS = {"LLaMA2-7B, q and v": (64, 4096), "Qwen2-7B, q and o": (56, 3584)}


def communication() -> dict[str, Any]:
    """Model -> setting -> millions of numbers up and down, mean over clients."""
    found: dict[str, Any] = {}
    for model, (modules, side) in MODELS.items():
        shapes = {f"l{i}": (side, side) for i in range(modules)}

        def both(key: str, ranks: tuple[int, ...], shapes: Any = shapes) -> float:
            total = 0
            for r in ranks:
                method, client = made(key, r, 16, shapes)
                total += method.numbers_up(client) + method.numbers_down(client, [client])
            return total / len(ranks) / 1e6

        pair = 2 * side * modules / 1e6  # millions of numbers of one rank, A and B
        mean, one = sum(RANKS) / len(RANKS), pair / 2
        found[model] = {
            "fedit, r = 8": both("fedit", (8,)),
            "ffa, r = 8": both("ffa", (8,)),
            "fedsa, r = 8": both("fedsa", (8,)),
            "fedalora, r = 8": both("fedalora", (8,)),
            "zeropad, unequal ranks": both("zeropad", RANKS),
            "zeropad, all ranks of the server down": (mean + max(RANKS)) * pair,
            "fedalora_het, P up": both("fedalora_het", RANKS),
            "fedalora_het, B2 up": (mean + 16) * one,
            "fedalora_het, B2, B1 and M up": (mean + 16) * one + 2 * 16 * mean * modules / 1e6,
        }
    return found


# All of it --------------------------------------------------------------------------------------

PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "aggregation": aggregation,
    "streaming": streaming,
    "simulation": simulation,
    "communication": communication,
}


def apart(part: str, *arguments: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.federated.scale", part, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(part, *arguments, done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measure all and write the results down."""
    begin = time.monotonic()
    runs = [apart("simulation", str(number)) for number in CLIENTS]
    numbers = [float(run["clients"]) for run in runs]
    rss = {name: [1024 * run["rss_MiB"][name] for run in runs] for name in ("peak", "end")}
    results = {
        "seed": SEED,
        "threads": 1,
        "aggregation_cpu_seconds": apart("aggregation"),
        "streaming": {key: apart("streaming", key) for key in STREAMED},
        "simulation": {
            "runs": runs,
            "slope_KiB_per_client": {k: round(slope(numbers, ys), 2) for k, ys in rss.items()},
        },
        "communication_million_numbers": apart("communication"),
        "environment": environment(),
    }
    results["seconds"] = round(time.monotonic() - begin)
    write_results(RESULTS, results)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
