"""Measure the optimizers on the small problems of toys.py and write the figures down.

    python -m benchmarks.optim.reference_figures
    python -m benchmarks.optim.reference_figures --time    # only the times anew

Invariance: largest relative difference of the trajectories of dW from (A, B) and (R A, B R^-1).
Linear task: distance to the best rank-r solution, (f - f*) / f*. Time: RITE's own step beside
AdamW's, in turns in one process. Results, with hardware, versions, seeds and spread, go to
benchmarks/optim/results. Learning rates are fixed, not tuned: the losses are no ranking.
"""

import argparse
import json
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
from benchmarks.optim.toys import Invariance, LinearTask, Make
from plait.core.init import seeded
from plait.run.folder import environment, write_atomic

RESULTS = Path(__file__).parent / "results"
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
    for table, (rows, at, size, ill) in LINEAR.items():
        found[table] = {}
        for label, run in rows.items():
            gaps = [run(LinearTask(seed, ill), at[-1], size) for seed in SEEDS]
            found[table][label] = [[g[i - 1] for i in at] for g in gaps]
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


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.2g} ± {statistics.stdev(values):.1g}"


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
    text += [table(["optimizer", *heads], rows)]
    for name, (_, at, size, _) in LINEAR.items():
        unit = "epochs" if size else "steps"
        text += [f"## Linear task, {name}", ""]
        text += [f"(f - f*) / f* after {unit}, mean ± standard deviation over {seeds}.", ""]
        rows = [
            [label, *[spread([g[i] for g in gaps]) for i in range(len(at))]]
            for label, gaps in found["linear"][name].items()
        ]
        text += [table(["optimizer", *map(str, at)], rows)]
    text += ["## Time of a step", ""]
    text += ["Processor time; rank 16, 8 layers, one thread; median (least to most).", ""]
    rows = [
        [
            side,
            *[
                f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})"
                for v in (*measured["ms a layer"].values(), measured["ratio"])
            ],
        ]
        for side, measured in found["time"].items()
    ]
    text += [table(["in = out", "AdamW, ms a layer", "LoRA-RITE, ms a layer", "ratio"], rows)]
    return "\n".join(text)


def main() -> None:
    """Measure everything, about two minutes on a core of one's own; or the times alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="measure only the times anew")
    torch.set_num_threads(1)
    if parser.parse_args().time:
        found = json.loads((RESULTS / "reference_figures.json").read_text(encoding="utf-8"))
        write(found | {"time": measure_time()})
        return
    facts = environment()
    found = {
        "command": "python -m benchmarks.optim.reference_figures",
        "seeds": list(SEEDS),
        "environment": facts,
        "invariance": measure_invariance(),
        "linear": measure_linear(),
        "time": measure_time(),
    }
    versions = facts["packages"]
    found["on"] = (
        f"{facts['cpu_count']} CPU cores ({facts['platform']}) shared with other work, one thread, "
        f"torch {versions['torch']}, peft {versions['peft']}"
    )
    write(found)


def write(found: dict[str, Any]) -> None:
    """The figures as JSON and as tables."""
    write_atomic(RESULTS / "reference_figures.json", json.dumps(found, indent=1) + "\n")
    write_atomic(RESULTS / "reference_figures.md", report(found))


if __name__ == "__main__":
    main()
