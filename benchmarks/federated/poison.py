"""Runs with colluding clients: what the guard's defaults let through.

    python -m benchmarks.federated.poison           # about five minutes on one core
    python -m benchmarks.federated.poison --seeds 3 --rounds 3

10 clients with equal shares of the shift task on the shipped tiny model. The poisoned ones know the
updates of all others and send, in every round, what `ATTACKS` makes of them. The figure is the
held-out loss of an honest client after the last round, divided by that of the run without poison
and with the plain mean of the same seed. Results: results/poison.json.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks._common import parser, table, write_results
from plait.federated.payload import pack_tensors, unpack_tensors
from plait.federated.protocol import Order, Reply
from plait.federated.server import Server
from plait.run.federated.clients import make_clients
from plait.run.federated.config import load_federate_config
from plait.run.federated.setup import Setup, prepare_federation
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "poison.json"
CLIENTS = 10
POISONED = ("client-3", "client-7", "client-1", "client-8")  # the first ones of them
COUNTS = (1, 2, 3, 4)
AGAINST = "little, against the mean"
Tensors = Mapping[str, Tensor]

# What the poisoned client does ------------------------------------------------------------------


def flip(own: Tensors, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its own change with the sign turned."""
    return {key: -x for key, x in own.items()}


def little(own: Tensors, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of the honest changes less 1.5 standard deviations of each number.

    "A little is enough", Baruch et al. 2019. Their z depends on the number of clients, and is 0 for
    2 of 10; 1.5 is what later studies take.
    """
    return {key: x.mean(0) - 1.5 * x.std(0) for key, x in others.items()}


def against(own: Tensors, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the deviations against the mean's sign in each number."""
    return {key: x.mean(0) - 1.5 * x.std(0) * x.mean(0).sign() for key, x in others.items()}


def scaled(own: Tensors, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-9.5 times the mean of the honest changes: below the limit of the norm filter."""
    return {key: -9.5 * x.mean(0) for key, x in others.items()}


def copies(own: Tensors, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each the same: the turned mean, as long as an honest change usually is."""
    mean = {key: -x.mean(0) for key, x in others.items()}
    squares = sum(x.double().square().flatten(1).sum(1) for x in others.values())
    assert isinstance(squares, Tensor)
    norm = sum(float(x.double().square().sum()) for x in mean.values()) ** 0.5
    return {key: x * (float(squares.sqrt().median()) / norm) for key, x in mean.items()}


Attack = Callable[[Tensors, Mapping[str, Tensor]], dict[str, Tensor]]
ATTACKS: dict[str, Attack] = {
    "flip": flip,
    "little is enough": little,
    AGAINST: against,
    "scaled": scaled,
    "equal copies": copies,
}


def poisoned(
    replies: Mapping[str, Reply], down: Tensors, attack: Attack, who: Sequence[str]
) -> dict[str, Reply]:
    """The replies of a round after the attack.

    Args:
        replies: client -> honest reply. down: what the clients started from. who: the poisoned.
    """
    frames = {name: unpack_tensors(reply.upload) for name, reply in replies.items()}
    changes = {
        name: {key: x - down.get(key, torch.zeros(())) for key, x in tensors.items()}
        for name, (_, tensors) in frames.items()
    }
    honest = [changes[name] for name in sorted(changes) if name not in who]
    others = {key: torch.stack([change[key] for change in honest]) for key in honest[0]}
    sent = dict(replies)
    for name in who:
        made = attack(changes[name], others)
        tensors = {key: down.get(key, torch.zeros(())) + x for key, x in made.items()}
        sent[name] = replace(replies[name], upload=pack_tensors(frames[name][0], tensors))
    return sent


# Runs -------------------------------------------------------------------------------------------


def prepared(
    scratch: Path, method: str, seed: int, rounds: int, n: int, guard: Mapping[str, Any]
) -> Setup:
    """A loaded run of ten clients."""
    file = scratch / "run.yaml"
    sections = {
        "method": {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "federated": {"method": method},
        "data": {"train": f"builtin:shift?n={n}", "validation": "builtin:shift?n=32"},
        "partition": {"kind": "iid", "clients": CLIENTS, "seed": seed},
        "sampling": {"seed": seed},
        "local": {"rounds": rounds, "steps": 5, "batch_size": 8, "learning_rate": 1e-2},
        "guard": dict(guard),
        "evaluation": {"every": 0},
        "engine": {"threads": 1},
        "output": {"dir": str(scratch / "run")},
    }
    file.write_text(yaml.safe_dump(sections))
    return prepare_federation(load_federate_config(file))


def loss_of(setup: Setup, folder: Path, attack: str, count: int) -> dict[str, Any]:
    """The held-out loss of an honest client before and after a run, and what was done to updates.

    Args:
        setup: of the run. folder: a new one, for the run. attack: of ATTACKS, or "none".
        count: poisoned clients.
    """
    site, who = make_clients(setup, folder / "clients"), POISONED[:count]
    server = Server(setup.roster, folder / "server", setup.config.server_options())

    def exchange(orders: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        replies, down = dict[str, Reply](), dict[str, Tensor]()
        for name in orders:
            data = orders[name]
            order, down = Order.unpack(data)
            replies[name] = Reply.unpack(site.answer(data))
            if order.kind != "train":
                yield name, replies.pop(name).pack()
        asked = [name for name in who if name in replies]
        if asked and attack != "none":
            replies = poisoned(replies, down, ATTACKS[attack], asked)
        for name, reply in replies.items():
            yield name, reply.pack()

    def held_out() -> float:  # all clients have one model and the same held-out rows
        return round(server.evaluate(exchange, ["client-0"])["client-0"]["loss"], 4)

    before = held_out()
    records = [server.step(exchange) for _ in range(setup.config.local.rounds)]
    faults = [name for record in records for name, _, _ in record.rejected]
    return {
        "before": before,
        "after": held_out(),
        "rejected": sum(name in who for name in faults),
        "rejected_honest": sum(name not in who for name in faults),
        "less_weight_honest": sum(name not in who for record in records for name in record.votes),
    }


GUARDS: dict[str, dict[str, Any]] = {"default": {}, "off": {"agreement": False}}


def measure(
    seeds: int,
    rounds: int,
    scratch: Path,
    methods: Sequence[str],
    cases: Mapping[str, Sequence[tuple[str, int]]],
    n: int = 800,
) -> list[dict[str, Any]]:
    """One row for each method, guard, attack and count, with a figure for each seed.

    cases: guard -> attacks and numbers of poisoned clients; of "off" first, for its clean run.
    """
    rows: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    clean: dict[tuple[str, int], float] = {}
    for method in methods:
        for seed in range(seeds):
            for guard in cases:
                setup = prepared(scratch, method, seed, rounds, n, GUARDS[guard])
                for attack, count in [("none", 0), *cases[guard]]:
                    folder = scratch / f"{method}-{seed}-{guard}-{attack}-{count}"
                    found = loss_of(setup, folder, attack, count)
                    before = clean.setdefault((method, seed), found["after"])
                    found["to_clean"] = round(found["after"] / before, 4)
                    rows.setdefault((method, guard, attack, count), []).append(found)
                    print(method, seed, guard, attack, count, found, flush=True)
    return [
        {"method": method, "guard": guard, "attack": attack, "poisoned": count}
        | {name: [one[name] for one in found] for name in found[0]}
        for (method, guard, attack, count), found in rows.items()
    ]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The largest change of the loss over the seeds, against that without poison, in Markdown."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by = {(r["method"], r["guard"], r["attack"], r["poisoned"]): r["to_clean"] for r in rows}
    counts = sorted({row["poisoned"] for row in rows} - {0})
    head = ["attack", "method", "guard", *(f"{100 * c // CLIENTS} %" for c in counts)]
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        for method in methods:
            for guard in GUARDS:
                found = [by.get((method, guard, attack, c)) for c in counts]
                if attack == "none":
                    found = [by.get((method, guard, attack, 0))] * len(counts)
                if any(found):
                    cells = ["" if x is None else f"{100 * (max(x) - 1):+.1f} %" for x in found]
                    lines.append([attack, f"`{method}`", guard, *cells])
    return table(head, lines, "|---|---|---|" + "---:|" * len(counts))


def main() -> None:
    """Measure all and write the results."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "off": [(attack, 2) for attack in ATTACKS],
            "default": [
                (attack, n) for attack in ATTACKS for n in COUNTS if n == 2 or attack != AGAINST
            ],
        }
        rows = measure(args.seeds, args.rounds, Path(folder), ("fedit",), cases)
    write_results(RESULTS, {"environment": environment(), "runs": rows}, tables(rows))


if __name__ == "__main__":
    main()
