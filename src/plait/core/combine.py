"""A weighted sum of adapters: sum_i w_i dW_i, exact for every kind of Delta.

Upstream's `add_weighted_adapter` exists for LoRA only and is wrong for its variants. Here updates
are added, never factors. The result runs, merges and exports like any adapter. It is frozen and has
no file format of its own: export it to keep it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.delta import Delta
from plait.core.route import NOWHERE, Rows


class WeightedSum(Delta):
    """sum_i w_i dW_i of one layer, over frozen copies of its parts."""

    def __init__(self, parts: Sequence[Delta], weights: Sequence[float]) -> None:
        first = parts[0]
        super().__init__(first.base, first.config, torch.Generator())
        self.parts = nn.ModuleList([copy.deepcopy(p).requires_grad_(False) for p in parts])
        self.weights = list(weights)
        self.scaling = 1.0

    def forward(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """sum_i w_i dW_i x, (.., in) to (.., out)."""
        parts = zip(self.weights, self.parts, strict=True)
        return torch.stack([w * part(x, rows) for w, part in parts]).sum(0)

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """sum_i w_i dW_i, (out, in)."""
        parts: Any = zip(self.weights, self.parts, strict=True)
        return torch.stack([w * part.weight(**choice) for w, part in parts]).sum(0)

    @torch.no_grad()
    def folded(self, *args: Any, **choice: Any) -> tuple[Tensor, Tensor] | None:
        """Stacked factors A (k, in), B (out, k) with dW = B A, or None with a dense part."""
        parts: Any = self.parts
        factors = [part.folded(*args, **choice) for part in parts]
        if None in factors:
            return None
        scaled = zip(self.weights, parts, factors, strict=True)
        return (
            torch.cat([A for A, _ in factors]),
            torch.cat([w * part.scaling * B for w, part, (_, B) in scaled], dim=1),
        )

    def rank(self) -> int:
        """Attainable rank: the sum of those of the parts, at most min(in, out)."""
        parts: Any = self.parts
        total = sum(part.rank() for part in parts)
        return min(total, self.base.in_features, self.base.out_features)


def check(
    adapters: Sequence[str], weights: Sequence[float], known: Sequence[str], name: str
) -> None:
    """Check the arguments of `add_weighted_adapter`.

    Args:
        adapters, weights: to add up. known: adapters of the model. name: of the sum.

    Raises:
        ValueError: an unknown adapter, not one weight for each, or a name that is taken.
    """
    missing = sorted(set(adapters) - set(known))
    if missing or not adapters:
        raise ValueError(
            f"add_weighted_adapter: {', '.join(missing) or 'no adapter'} is not in this model. "
            f"It has: {', '.join(known)}."
        )
    if len(adapters) != len(weights):
        raise ValueError(
            f"add_weighted_adapter: {len(adapters)} adapters and {len(weights)} weights. "
            "Give one weight for each adapter."
        )
    if name in known:
        raise ValueError(f"add_weighted_adapter: the name {name!r} is taken. Choose another.")
