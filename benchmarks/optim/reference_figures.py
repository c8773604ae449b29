"""Measure the optimizers on the small problems of toys.py and write the figures down.

    python -m benchmarks.optim.reference_figures
    python -m benchmarks.optim.reference_figures --time    # only the times, again

Invariance: largest relative difference of the trajectories of dW from (A, B) and (R A, B R^-1).
Linear task: distance to the best rank-r solution, (f - f*) / f*. Time: a step of LoRA-RITE
and of AdamW, alternating in one process. Results, with hardware, versions, seeds and spread, go to
benchmarks/optim/results. Learning rates are fixed, not tuned: the losses are no ranking.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn

import plait
from benchmarks._common import (
    mean_and_deviation,
    median_and_range,
    parser,
    read_results,
    table,
    versions,
    write_results,
)
from benchmarks.optim.toys import Invariance, LinearTask, Make
from plait.core.init import seeded
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "reference_figures.json"
SEEDS = range(5)
STEPS = (1, 2, 5, 10, 30, 100)
EPOCHS = (1, 2, 5, 10, 30, 60)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What trains."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(lr: float) -> Make:
    """AdamW without weight decay."""
    return lambda m: torch.optim.AdamW(trained(m), lr=lr, weight_decay=0.0)


def rite(**options: Any) -> Make:
    """LoRA-RITE."""
    return lambda m: plait.create_lora_rite_optimizer(m, **options)


def lorsum(**options: Any) -> Make:
    """LoRSum, as the tables have it: A first and no momentum unless they say so."""
    defaults = {"momentum": 0.0, "start": "in"}
    return lambda m: plait.create_lorsum_optimizer(m, **{**defaults, **options})


def riemannian(cls: Any, lr: float, reg: float) -> Make:
    """Upstream's preconditioned SGD or AdamW."""
    return lambda m: create_riemannian_optimizer(m, cls, lr=lr, reg=reg, weight_decay=0.0)  # type: ignore[arg-type]


def loraplus(lr: float) -> Make:
    """Upstream's LoRA+ with a ratio of 16."""
    return lambda m: create_loraplus_optimizer(  # type: ignore[return-value]
        m,  # type: ignore[arg-type]
        torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=16,
        weight_decay=0.0,
    )


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
INVARIANCE: dict[str, tuple[bool, Make]] = {  # label -> (starts from B = 0, optimizer)
    "SGD": (False, lambda m: SGD(trained(m), lr=0.05)),
    "AdamW": (False, adamw(1e-2)),
    "LoRA+ (x16)": (False, loraplus(2e-3)),
    "Riemannian SGD, reg 0": (False, riemannian(SGD, 0.2, 0.0)),
    "Riemannian SGD, reg 1e-2": (False, riemannian(SGD, 0.2, 1e-2)),
    "Riemannian AdamW, reg 0": (False, riemannian(ADAMW, 1e-2, 0.0)),
    "LoRA-RITE": (False, rite(lr=1e-2)),
    "LoRA-RITE, clip 0.02": (False, rite(lr=1e-2, clip_unmagnified=0.02)),
    "LoRA-RITE, decay 0.1, balance": (False, rite(lr=1e-2, weight_decay=0.1, balance=True)),
    "LoRSum K=0, lam 0": (False, lorsum(lr=0.2, sweeps=0, lmbd=0.0)),
    "LoRSum K=1, lam 0": (False, lorsum(lr=0.2, lmbd=0.0)),
    "LoRSum K=1, lmbd 1e-2": (False, lorsum(lr=0.2)),
    "LoRSum K=1, lmbd 1e-2, momentum 0.9": (False, lorsum(lr=0.2, momentum=0.9)),
    "B = 0: LoRA-RITE": (True, rite(lr=1e-2)),
    "B = 0: LoRA-RITE, decay 0.1, balance": (True, rite(lr=1e-2, weight_decay=0.1, balance=True)),
    "B = 0: AdamW": (True, adamw(1e-2)),
    "B = 0: LoRSum K=1, lam 0, out": (True, lorsum(lr=0.2, lmbd=0.0, start="out")),
    "B = 0: the same, momentum 0.9": (
        True,
        lorsum(lr=0.2, lmbd=0.0, start="out", momentum=0.9),
    ),
}


def measure_invariance() -> dict[str, dict[str, list[float]]]:
    """Label -> column -> one value for each seed."""
    found = {}
    for label, (zero_B, make) in INVARIANCE.items():
        columns: dict[str, list[float]] = {}
        for seed in SEEDS:
            toy = Invariance(seed, zero_B)
            for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
                for cond in (10.0, 1e3):
                    value = toy.difference(make, cond, dtype)
                    columns.setdefault(f"{name} c={cond:g}", []).append(value)
            losses = toy.run(make)[1]
            columns.setdefault("first loss", []).append(losses[0])
            columns.setdefault("last loss", []).append(losses[-1])
        found[label] = columns
    return found


def sums(**options: Any) -> Callable[[LinearTask, int, int | None], list[float]]:
    """LoRSum with the linear task's damping."""
    return of(lorsum(lmbd=1e-3, **options))


def of(make: Make) -> Callable[[LinearTask, int, int | None], list[float]]:
    """A row of the tables, from an optimizer."""
    return lambda task, epochs, size: task.run(make, epochs, size)


def dense(lr: float, momentum: float = 0.0) -> Callable[[LinearTask, int, int | None], list[float]]:
    """The row of SVDLoRA."""
    return lambda task, epochs, size: task.reference(lr, epochs, size, momentum)


FULL = {
    "SVDLoRA, lr 0.5": dense(0.5),
    **{f"LoRSum K={K}, lr 0.5": sums(lr=0.5, sweeps=K) for K in (32, 8, 2, 1)},
    "LoRSum K=0, lr 0.48": sums(lr=0.48, sweeps=0),
    "LoRA-RITE, lr 0.3": of(rite(lr=0.3, clip_unmagnified=0.0)),
    "AdamW, lr 0.5": of(adamw(0.5)),
    "SGD, lr 0.01": of(lambda m: SGD(trained(m), lr=0.01)),
}
STOCHASTIC = {
    "SVDLoRA, lr 0.1, momentum 0.75": dense(0.1, 0.75),
    **{
        f"LoRSum K={K}, lr 0.1, momentum 0.75": sums(lr=0.1, sweeps=K, momentum=0.75)
        for K in (1, 2, 8)
    },
    "LoRSum K=1, lr 0.1": sums(lr=0.1),
    "SVDLoRA, lr 0.1": dense(0.1),
    "Riemannian SGD, lr 0.1, reg 1e-3": of(riemannian(SGD, 0.1, 1e-3)),
    "LoRA-RITE, lr 0.1": of(rite(lr=0.1, clip_unmagnified=0.0)),
    "AdamW, lr 0.05": of(adamw(0.05)),
}
ILL = {
    "SVDLoRA, lr 0.5": dense(0.5),
    **{f"LoRSum K={K}, lr 0.5": sums(lr=0.5, sweeps=K) for K in (8, 2, 1)},
    "LoRSum K=0, lr 0.5": sums(lr=0.5, sweeps=0),
    "LoRA-RITE, lr 0.3": of(rite(lr=0.3, clip_unmagnified=0.0)),
    "AdamW, lr 0.1": of(adamw(0.1)),
}
LINEAR = {
    "full batch": (FULL, STEPS, None, False),
    "batch 16": (STOCHASTIC, EPOCHS, 16, False),
    "full batch, condition number 1e3": (ILL, (1, 2, 5, 10), None, True),
}


def measure_linear() -> dict[str, dict[str, list[list[float]]]]:
    """Table -> label -> for each seed the gaps at the table's steps or epochs."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name, (rows, at, size, ill) in LINEAR.items():
        found[name] = {}
        for label, run in rows.items():
            gaps = [run(LinearTask(seed, ill), at[-1], size) for seed in SEEDS]
            found[name][label] = [[g[i - 1] for i in at] for g in gaps]
    return found


def measure_time(sizes: tuple[int, ...] = (1024, 2048), layers: int = 8, rank: int = 16) -> Any:
    """Milliseconds of processor time of a step for each layer, nine rounds in turns."""
    found = {}
    for side in sizes:
        blocks = [nn.Linear(side, side, bias=False) for _ in range(layers)]
        names = [str(i) for i in range(layers)]
        model: Any = get_peft_model(
            nn.Sequential(*blocks),  # type: ignore[arg-type]
            LoraConfig(r=rank, target_modules=names),
        )
        gen = seeded("time", side)
        with torch.no_grad():
            for p in trained(model):
                p.copy_(0.02 * torch.randn(p.shape, generator=gen))
                p.grad = 1e-3 * torch.randn(p.shape, generator=gen)
        optimizers = {"AdamW": adamw(1e-4)(model), "LoRA-RITE": rite(lr=1e-4)(model)}
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(9):
            for name, optimizer in optimizers.items():
                optimizer.step()  # the caches are this optimizer's
                began = time.process_time()
                for _ in range(10):
                    optimizer.step()
                times[name].append((time.process_time() - began) / 10 / layers * 1e3)
        ratios = [r / a for a, r in zip(times["AdamW"], times["LoRA-RITE"], strict=True)]
        found[str(side)] = {"ms a layer": times, "ratio": ratios}
    return found


# Tables -----------------------------------------------------------------------------------------


def numbers(head: list[str], rows: list[list[str]]) -> str:
    """A table whose columns, except for the first, are numbers."""
    return table(head, rows, "| --- |" + " ---: |" * (len(head) - 1))


def report(found: dict[str, Any]) -> str:
    """The figures as tables."""
    seeds = f"{len(SEEDS)} seeds"
    text = [
        "# Reference figures of the optimizers",
        "",
        f"`{found['command']}`; {found['on']}.",
        "",
    ]
    text += ["## Invariance", "", f"Largest over {seeds}; losses are means, not tuned.", ""]
    rows = []
    for label, columns in found["invariance"].items():
        *differences, first, last = columns.items()
        losses = f"{statistics.mean(first[1]):.3f} -> {statistics.mean(last[1]):.3f}"
        rows.append([label, *[f"{max(v):.1e}" for _, v in differences], losses])
    heads = [*list(next(iter(found["invariance"].values())))[:-2], "loss"]
    text += [numbers(["optimizer", *heads], rows)]
    for name, (_, at, size, _) in LINEAR.items():
        unit = "epochs" if size else "steps"
        text += [f"## Linear task, {name}", ""]
        text += [f"(f - f*) / f* after {unit}, mean ± standard deviation over {seeds}.", ""]
        rows = [
            [
                label,
                *[mean_and_deviation([g[i] for g in gaps], ".2g", ".1g") for i in range(len(at))],
            ]
            for label, gaps in found["linear"][name].items()
        ]
        text += [numbers(["optimizer", *map(str, at)], rows)]
    text += ["## Time of a step", ""]
    text += ["Processor time; rank 16, 8 layers, one thread; median (least to most).", ""]
    rows = [
        [
            side,
            *[
                median_and_range(v, ".2f")
                for v in (*measured["ms a layer"].values(), measured["ratio"])
            ],
        ]
        for side, measured in found["time"].items()
    ]
    text += [numbers(["in = out", "AdamW, ms a layer", "LoRA-RITE, ms a layer", "ratio"], rows)]
    return "\n".join(text)


def main() -> None:
    """Measure everything, about two minutes on an idle core, or the times alone."""
    options = parser(__doc__)
    options.add_argument("--time", action="store_true", help="measure only the times")
    torch.set_num_threads(1)
    if options.parse_args().time:
        results = read_results(RESULTS) | {"time": measure_time()}
    else:
        where = environment()
        results = {
            "command": "python -m benchmarks.optim.reference_figures",
            "seeds": list(SEEDS),
            "environment": where,
            "invariance": measure_invariance(),
            "linear": measure_linear(),
            "time": measure_time(),
            "on": f"{where['cpu_count']} CPU cores ({where['platform']}) shared with other work, "
            f"one thread, {versions(where, 'torch', 'peft')}",
        }
    write_results(RESULTS, results, report(results))


if __name__ == "__main__":
    main()
