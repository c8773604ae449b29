"""Reference figures of chains: what they gain and lose on a toy, and what rounding costs.

    python -m benchmarks.chain.reference_figures [PART ...]    # rounding, quadratic, toy; none: all

1. Toy: four tanh layers of 24 x 24, target W + 0.25 N(0, 1) / sqrt(24), 256 inputs, AdamW with
   learning rate 5e-3, 600 steps in all, s = 1. Final loss of one adapter and of chains.
2. Quadratic: 3 x 3, curvature 10 in one entry and 1 elsewhere, gamma = 1 / L: RAC-LoRA with one SGD
   step a link and orthonormal sketches; the control with raw Gaussian factors, 10 steps a link.
3. Rounding: 200 rank-1 links into a 256 x 256 half-precision weight, merged one after another, or
   as the ledger does it, by one rounding of their sum.

Results go to results/reference_figures.json, with hardware and versions, and as tables to
reference_figures.md.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import plait
from benchmarks._common import (
    least_to_most,
    parser,
    read_results,
    table,
    versions,
    write_results,
)
from plait import ChainPlan
from plait.core.init import seeded
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "reference_figures.json"
SEEDS = (0, 1)
SIDE, STEPS = 24, 600


# ------------------------------------------------------------------------------------------- toy


class Toy(nn.Module):
    """x <- tanh(W x), four times."""

    def __init__(self, gen: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(SIDE, SIDE, bias=False)}) for _ in range(4)
        )
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=gen) / math.sqrt(SIDE))

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        for block in self.layers:
            x = torch.tanh(block["linear"](x))  # type: ignore[index]
        return x


def toy_loss(plan: Any, rank: int, seed: int) -> tuple[float, float]:
    """Loss at the start and after training, of one adapter (a chain of one link) or of a chain."""
    gen = seeded("toy", seed)
    base = Toy(gen)
    x = torch.randn(256, SIDE, generator=gen)
    with torch.no_grad():
        own = [p.clone() for p in base.parameters()]
        for p in base.parameters():
            p += 0.25 * torch.randn(p.shape, generator=gen) / math.sqrt(SIDE)
        target = base(x)
        for p, W in zip(base.parameters(), own, strict=True):
            p.copy_(W)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
        model: Any = get_peft_model(base, config)  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    chain = plait.chain.start(model, plan, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    chain.finish()
    with torch.no_grad():
        return losses[0], float((model(x) - target).square().mean())


def toy_rows() -> dict[str, tuple[Any, int]]:
    """Name -> plan and rank of the adapter."""
    one, chain, rac, xgb = ChainPlan.chain(1), ChainPlan.chain, ChainPlan.rac, ChainPlan.xgb
    rows: dict[str, tuple[Any, int]] = {f"LoRA r={r}": (one, r) for r in (1, 2, 6, 24)}
    return rows | {
        "chain 3 x r2": (chain(3), 2),
        "chain 12 x r2": (chain(12), 2),
        "chain 12 x r2, state kept": (chain(12, reset_optimizer=False), 2),
        "RAC freeze A, 12 x r2": (rac(12), 2),
        "RAC freeze B, 12 x r2": (rac(12, freeze="B"), 2),
        "RAC freeze A, 60 x r2": (rac(60), 2),
        "AsymLoRA r=2": (rac(1), 2),
        "xgb 60 x r1, all layers": (xgb(60, blocks_per_link=4), 1),
        "xgb 120 x r1, 2 of 4 layers": (xgb(120, blocks_per_link=2), 1),
    }


def toy() -> dict[str, Any]:
    """Losses of all rows, by seed."""
    found = {}
    for name, (plan, rank) in toy_rows().items():
        runs = [toy_loss(plan, rank, seed) for seed in SEEDS]
        found[name] = {"start": [a for a, _ in runs], "final": [b for _, b in runs]}
        print(f"{name:30} {mean(found[name]['final']):.2e}", flush=True)
    return found


# ------------------------------------------------------------------------------------- quadratic


class Quadratic(nn.Module):
    """f(W) = 1/2 sum h_ij (W_ij - T_ij)^2, h = 10 in one entry and 1 elsewhere, fp64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)
        gen = seeded("quadratic", seed)
        self.target = torch.randn(3, 3, generator=gen, dtype=torch.float64)
        self.h = torch.ones(3, 3, dtype=torch.float64)
        self.h[0, 0] = 10

    def forward(self) -> Tensor:
        """f at the effective weight."""
        W = self.linear(torch.eye(3, dtype=torch.float64)).T
        return 0.5 * (self.h * (W - self.target).square()).sum()


def descend(plan: Any, seed: int, steps: int, lr: float, gaussian: bool = False) -> list[float]:
    """Values of f over SGD; gaussian: N(0, 1) for A at each link of a `chain`, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["linear"])
        model: Any = get_peft_model(Quadratic(seed), config)  # type: ignore[arg-type]
    chain = plait.chain.start(model, plan, steps)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    A, links, values = model.base_model.model.linear.lora_A["default"].weight, -1, []
    for _ in range(steps):
        if gaussian and chain.ties != links:
            links = chain.ties
            with torch.no_grad():
                A.copy_(torch.randn(1, 3, generator=seeded(seed, links), dtype=torch.float64))
        f = model()
        f.backward()
        values.append(f.item())
        optimizer.step()
        optimizer.zero_grad()
    return [*values, model().item()]


def quadratic() -> dict[str, Any]:
    """RAC-LoRA's theory step, and the control."""
    found: dict[str, Any] = {}
    for freeze in ("A", "B"):
        runs = []
        for seed in range(20):
            plan = ChainPlan.rac(
                steps_per_link=1, freeze=freeze, seed=seed, lr="global", storage="merge"
            )
            runs.append(descend(plan, seed, 600, lr=0.1))
        # Below 1e-28 of the start f is made of rounding.
        monotone = [all(b <= max(a, 1e-28 * v[0]) for a, b in itertools.pairwise(v)) for v in runs]
        found[f"RAC freeze {freeze}, orthonormal, gamma = 1 / L, 1 step a link"] = {
            "monotone": sum(monotone),
            "runs": len(runs),
            "largest f600 / f0": max(v[-1] / v[0] for v in runs),
        }
    found["PL bound (1 - gamma mu r / n)^600"] = {"f600 / f0": (1 - 0.1 / 3) ** 600}
    raw: dict[str, Callable[[int], Any]] = {
        "rac": lambda seed: ChainPlan.rac(
            steps_per_link=10, sketch="gaussian", seed=seed, lr="global"
        ),
        "chain": lambda seed: ChainPlan.chain(steps_per_link=10, seed=seed, lr="global"),
    }
    for lr in (0.1, 0.02):
        for name, make in raw.items():
            runs = [descend(make(seed), seed, 600, lr, gaussian=True) for seed in range(3)]
            grown = [next((t for t, f in enumerate(v) if not f <= 1e3 * v[0]), None) for v in runs]
            found[f"{name}, raw Gaussian, lr = {lr}, 10 steps a link"] = {
                "diverged": sum(t is not None for t in grown),
                "runs": len(runs),
                "at step": grown,
                "f600 / f0": [v[-1] / v[0] if math.isfinite(v[-1]) else None for v in runs],
            }
    for name, row in found.items():
        print(name, row, flush=True)
    return found


# -------------------------------------------------------------------------------------- rounding


def lost(dtype: torch.dtype, seed: int, links: int = 200) -> tuple[float, float]:
    """Share of dW lost by incremental merges, and by the ledger's one rounding."""
    gen = seeded("rounding", seed)
    W0 = (torch.randn(256, 256, generator=gen) / 16).to(dtype)
    base = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=dtype))
    with torch.no_grad():
        base[0].weight.copy_(W0)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    with torch.random.fork_rng(devices=[]):
        model: Any = get_peft_model(base, config)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", plait.PlaitWarning)
        chain = plait.chain.start(model, ChainPlan.chain(links + 1, storage="merge"), links + 1)
    layer = model.base_model.model[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    dW, incremental = torch.zeros(256, 256, dtype=torch.float64), W0.clone()
    for _ in range(links):
        a, b = torch.randn(1, 256, generator=gen), torch.randn(256, 1, generator=gen)
        b *= 3e-3 * W0.float().norm() / (b @ a).norm()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        dW += b.double() @ a.double()
        incremental = (incremental.float() + b @ a).to(dtype)
        chain.tie(optimizer)

    def share(weight: Tensor) -> float:
        return float((weight.detach().double() - W0.double() - dW).norm() / dW.norm())

    return share(incremental), share(layer.base_layer.weight)


def rounding() -> dict[str, Any]:
    """Both types, by seed."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        runs = [lost(dtype, seed) for seed in range(3)]
        found[str(dtype).removeprefix("torch.")] = {
            "incremental": [a for a, _ in runs],
            "ledger": [b for _, b in runs],
        }
    print(found, flush=True)
    return found


# ---------------------------------------------------------------------------------------- report


def report(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    where = results["environment"]
    toy_runs = [
        [name, f"{mean(run['final']):.2e}", least_to_most(run["final"], ".2e")]
        for name, run in results["toy"].items()
    ]
    quadratic_runs = [
        [name, ", ".join(f"{key}: {_text(value)}" for key, value in run.items())]
        for name, run in results["quadratic"].items()
    ]
    roundings = [
        [name, *(least_to_most(values, ".1%") for values in run.values())]
        for name, run in results["rounding"].items()
    ]
    return "\n".join(
        [
            f"Made by `benchmarks/chain/reference_figures.py` on {where['cpu_count']} shared CPU "
            f"cores, one thread, {versions(where, 'torch', 'peft')}.",
            "",
            f"Toy: final loss, mean of seeds {', '.join(map(str, SEEDS))} and range; the start is "
            f"{mean(results['toy']['LoRA r=1']['start']):.4f}.",
            "",
            table(["run", "final loss", "range"], toy_runs, "|---|---:|---:|"),
            "Quadratic, fp64:",
            "",
            table(["run", "result"], quadratic_runs),
            "Share of dW lost by 200 rank-1 links, 3 seeds:",
            "",
            table(
                ["base", "merged one after another", "one rounding of the sum"],
                roundings,
                "|---|---:|---:|",
            ),
        ]
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.1e}"
    return "-" if value is None else str(value)


def main() -> None:
    """Measure the parts that are asked for and write everything down."""
    torch.set_num_threads(1)
    parts = {"rounding": rounding, "quadratic": quadratic, "toy": toy}
    options = parser(__doc__)
    options.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; none: all")
    measured = {name: parts[name]() for name in options.parse_args().parts or parts}
    results = read_results(RESULTS) | measured | {"environment": environment()}
    write_results(RESULTS, results, report(results))


if __name__ == "__main__":
    main()
