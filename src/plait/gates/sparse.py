"""The gate of SoRA: trained, penalised by its size, and driven to zero by a proximal step.

Penalty: l1_weight * sum |g| / (number of all gate entries of the adapter). After each optimizer
step g is soft-thresholded by xi, which is not multiplied by the learning rate:

    exact       g <- sign(g) max(|g| - xi, 0)
    official    g > xi: g -= xi; then g < -xi: g += xi; then |g| < xi: g = 0  (the released lines)

The released lines zero everything below 2 xi. A zeroed gate may become non-zero again, because the
optimizer keeps its moments. Weight decay skips g, which may have a learning rate of its own.
`xi_schedule` (Algorithm 1) lists thresholds: the last ones hold for `xi_every` steps each at the
end of training, the first one before that. arXiv 2311.11696.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.core.config import option
from plait.core.gate import Gate, register_gate
from plait.core.init import gaussian
from plait.core.rates import Rates
from plait.core.sharding import whole


@dataclass
class SparseOptions:
    """Options of the sparse gate."""

    l1_weight: float = option(10.0, "Weight of the mean |g|.", least=0)
    xi: float = option(3e-4, "Threshold of the proximal step; 0: none.", least=0)
    prox: Literal["exact", "official"] = option("exact", "Soft threshold, or the released lines.")
    gate_lr: float | None = option(None, "Learning rate of g; None: the common one.", above=0)
    xi_schedule: list[float] | None = option(None, "Thresholds in turn, in place of xi.")
    xi_every: int | float = option(0.1, "Steps, or share of all, of each after the first.", above=0)


@register_gate("sora")
@dataclass
class SparseGate(SparseOptions, Gate):
    """g, trained, thresholded after each step."""

    rank_axes: ClassVar[dict[str, int]] = {"g": -1}
    reads = ("g",)
    leaf = "g"

    def __post_init__(self) -> None:
        super().__post_init__()
        for xi in self.xi_schedule or ():
            if not (isinstance(xi, int | float) and math.isfinite(xi) and xi >= 0):
                text = f"xi_schedule = {self.xi_schedule}: {xi!r} is no threshold."
                raise ValueError(f"{text} Give numbers from 0.")

    @property
    def total_steps_needed(self) -> bool:
        """Whether it has stages, which end with training."""
        return bool(self.xi_schedule)

    def count(self, ranks: int) -> int:
        """One number a rank."""
        return ranks

    def prepare(self, delta: Any, ranks: int, gen: torch.Generator) -> None:
        """Declare g ~ N(0, 1)."""
        delta.g = nn.Parameter(gaussian(gen, ranks, std=1.0))
        delta.count_steps()

    def value(self, delta: Any) -> Tensor:
        """The trained g."""
        return delta.g

    def start_of(self, index: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Draw g for ranks that restart: with g = 0 and B = 0 no gradient would reach them."""
        return {"g": gaussian(gen, len(index), std=1.0)}

    def own_rates(self, delta: Any) -> Rates:
        """Weight decay skips g, whose learning rate is gate_lr."""
        return {"g": self.gate_lr}

    def penalty(self, deltas: Sequence[Any]) -> Tensor | None:
        """l1_weight times the mean |g| over all layers."""
        if not self.l1_weight:
            return None
        return self.l1_weight * torch.cat([whole(d.g) for d in deltas]).abs().mean()

    def threshold(self, delta: Any) -> float:
        """xi of the step just completed."""
        if not self.xi_schedule:
            return self.xi
        total, every = delta.total_steps, self.xi_every
        stage = max(1, int(every * total) if isinstance(every, float) else every)
        before_end = max(0, total - delta.steps) // stage  # stages still to come after this one
        return self.xi_schedule[max(0, len(self.xi_schedule) - 1 - before_end)]

    def after_step(self, delta: Any) -> None:
        """The proximal step."""
        xi = self.threshold(delta)
        if xi:
            delta.g.copy_(proximal(delta.g, xi, self.prox))


def proximal(g: Tensor, xi: float, prox: str = "exact") -> Tensor:
    """g after the proximal step with threshold xi, in the shape of g."""
    if prox == "exact":
        return g.sign() * (g.abs() - xi).clamp_min(0)
    g = torch.where(g > xi, g - xi, g)
    g = torch.where(g < -xi, g + xi, g)
    return torch.where(g.abs() < xi, 0.0, g)
