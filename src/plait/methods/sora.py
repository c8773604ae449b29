"""SoRA: LoRA with a trained gate on each rank, driven to zero by a proximal step.

    dW = s B diag(g) A     A: (r, in)   B: (out, r)   g: (r,)   s = lora_alpha / r

Penalty: l1_weight * sum |g| / (number of all gate entries of the adapter). After each optimizer
step g is soft-thresholded by xi, which is not multiplied by the learning rate:

    exact       g <- sign(g) max(|g| - xi, 0)
    official    g > xi: g -= xi; then g < -xi: g += xi; then |g| < xi: g = 0  (the released lines)

The released lines zero everything below 2 xi. A zeroed gate may return: its moments are kept. g
knows no weight decay and takes its own learning rate `gate_lr`, whatever groups the optimizer has.
`xi_schedule` (Algorithm 1): each value rules for the last steps of a run, `xi_every` of them each;
the first rules before. Start: A Kaiming, B = 0, g ~ N(0, 1). s keeps the r of the start.

`plait.prune` removes ranks with gate 0 for good; export leaves them out in any case. The gate can
be added to other methods: `gates: [sora]`. arXiv 2311.11696.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.core import FreeConfig, FreeDelta, Gate, option, register, register_gate, whole
from plait.core.init import gaussian


@dataclass
class SoraOptions:
    """Options of the sparse gate."""

    l1_weight: float = option(10.0, "Weight of the mean |g|.", least=0)
    xi: float = option(3e-4, "Threshold of the proximal step; 0: none.", least=0)
    prox: Literal["exact", "official"] = option("exact", "Soft threshold, or the released lines.")
    gate_lr: float | None = option(None, "Learning rate of g; None: the common one.", above=0)
    xi_schedule: list[float] | None = option(None, "Thresholds in turn, in place of xi.")
    xi_every: int | float = option(0.1, "Steps, or share of all, of each after the first.", above=0)


@register_gate("sora")
@dataclass
class SoraGate(SoraOptions, Gate):
    """g, trained, thresholded after each step."""

    rank_axes: ClassVar[dict[str, int]] = {"g": -1}

    def __post_init__(self) -> None:
        super().__post_init__()
        for xi in self.xi_schedule or ():
            if not (isinstance(xi, int | float) and math.isfinite(xi) and xi >= 0):
                text = f"xi_schedule = {self.xi_schedule}: {xi!r} is no threshold."
                raise ValueError(f"{text} Give numbers from 0.")

    @property
    def total_steps_needed(self) -> bool:
        """Its stages end with training."""
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
        """A rank that starts anew draws its g: with g = 0 and B = 0 no gradient would reach it."""
        return {"g": gaussian(gen, len(index), std=1.0)}

    def own_rates(self, delta: Any) -> dict[str, float | None]:
        """No decay on g, and its learning rate."""
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


@dataclass
class SoraConfig(SoraOptions, FreeConfig):
    """Options of SoRA; `r` is the largest rank."""


@register("sora", SoraConfig, paper="2311.11696", formula="dW = s B diag(g) A", rank="r, then kept")
class Sora(FreeDelta):
    """See the module."""

    own_gates = (SoraGate,)
    config: SoraConfig
    g: nn.Parameter

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out + 1)."""
        return cls.slots_of(config) * (in_features + out_features + 1)
