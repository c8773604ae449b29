"""The gate of DropLoRA: ranks that are dropped at random in training.

    g = z / (1 - p) in training, z in {0, 1} with P(z = 1) = 1 - p;  g = 1 otherwise

scope="token" draws z for each token and rank, as the released code does and as its results were
obtained. scope="step" draws one z for each layer and optimizer step, as the paper writes, keyed by
seed, step and layer: so micro-batches, recomputation, processes and resumed runs agree.
arXiv 2508.17337.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.config import option
from plait.core.gate import Gate, register_gate
from plait.core.init import seeded


@dataclass
class DropOptions:
    """Options of the random gate."""

    inner_dropout: float = option(
        0.5, "p, the share of ranks dropped in training.", least=0, below=1
    )
    scope: Literal["token", "step"] = option(
        "token", "A mask for each token (released code), or one a layer and step (paper)."
    )


@register_gate("droplora")
@dataclass
class DropGate(DropOptions, Gate):
    """z / (1 - p) in training, 1 otherwise."""

    reads = ()
    blind = True

    def prepare(self, delta: Any, ranks: int, gen: torch.Generator) -> None:
        """Count the steps if the mask is drawn per step."""
        if self.scope == "step":
            delta.count_steps()

    def value(self, delta: Any) -> Tensor | None:
        """The mask of this step, drawn on the CPU from (seed, t, layer name)."""
        if not delta.training or self.scope == "token" or not self.inner_dropout:
            return None
        p = next(delta.parameters())

        def draw() -> Tensor:
            gen = seeded(delta.config.seed, delta.steps, delta.base.name)
            kept = torch.rand(delta.ranks, generator=gen) >= self.inner_dropout
            return kept.to(device=p.device, dtype=p.dtype) / (1 - self.inner_dropout)

        return delta.kept.get(("droplora", delta.ranks, p.device, p.dtype), [delta.t], draw)

    def mask(self, delta: Any, z: Tensor, ranks: int) -> Tensor | None:
        """A mask for each token and rank, by dropout of ones: checkpointing replays it."""
        if self.scope == "step" or not self.inner_dropout:
            return None
        return F.dropout(z.new_ones(*z.shape[:-1], ranks), self.inner_dropout)
