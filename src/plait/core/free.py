"""Free factors: trained A and B, as most methods of low rank have, with two kinds of start.

    dW = s B A              init="kaiming": A Kaiming-uniform, B = 0
    dW = s (B A - B0 A0)    init="pissa":   A = A0, B = B0, s B0 A0 the best rank-r part of W

With several A or B each is a separate draw, or a copy of A0 and B0; routers whose weights sum to 1
then start at the base model too. Subtracting the start (ours) leaves the base weight unedited.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core.config import DeltaConfig, option
from plait.core.delta import FrozenLinear, Pair
from plait.core.init import kaiming
from plait.core.low_rank import LowRankDelta
from plait.kernels.low_rank import Plan


@dataclass
class FreeConfig(DeltaConfig):
    """Options of methods with free factors."""

    init: Literal["kaiming", "pissa"] = option("kaiming", "Start: LoRA's, or W's main directions.")
    svd: Literal["randomized", "exact"] = option("randomized", "How W's principal part is found.")


class FreeDelta(LowRankDelta):
    """A (r, in) or (n, r, in), B (out, r) or (n, out, r), all free and trained."""

    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1, "A0": -2, "B0": -1}
    reads: ClassVar[tuple[str, ...] | None] = ("A", "B", "A0", "B0")
    closes_by: ClassVar[tuple[str, ...] | None] = ()

    config: Any  # a FreeConfig
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        base: FrozenLinear,
        config: Any,
        gen: torch.Generator,
        num_A: int | None = None,
        num_B: int | None = None,
    ) -> None:
        """Draw the factors.

        Args:
            base, config, gen: as in Delta.
            num_A, num_B: how many of each, stacked; None: one, without that axis.
        """
        super().__init__(base, config, gen)
        r = self.ranks
        of_A, of_B = ([] if n is None else [n] for n in (num_A, num_B))
        A = kaiming(gen, *of_A, r, base.in_features)
        B = torch.zeros(*of_B, base.out_features, r)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        if config.init == "pissa":
            self.A0, self.B0 = A0, B0 = base.principal(r, self.scaling, config.svd, gen)
            A, B = A0.expand(A.shape).clone(), B0.expand(B.shape).clone()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out)."""
        return config.r * (in_features + out_features)

    def free_pairs(self) -> list[Pair]:
        """One pair of all A with all B; with several of both, one pair for each expert."""
        pair = partial(Pair, self.base.name, self.A, self.B, self.scaling)
        of_A, of_B = (tuple(range(len(p))) if p.ndim == 3 else None for p in (self.A, self.B))
        if of_A and of_B:
            return [pair((i,), (i,)) for i in of_A]
        return [pair(of_A, of_B)]

    def masked_down(self, x: Tensor, A: Tensor) -> Tensor:
        """Rank activations (.., n r) of x (.., in), with one dropout mask per A of (n, r, in)."""
        dropped = F.dropout(x.unsqueeze(-2).expand(*x.shape[:-1], len(A), -1), self.dropout)
        return torch.einsum("...ni,nri->...nr", dropped, A).flatten(-2)

    @property
    def rank_groups(self) -> int:
        """One for each A, two with a start that is subtracted."""
        return self.A.shape[:-2].numel() * (1 if self.A0 is None else 2)

    @property
    def closed(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:  # type: ignore[override]
        """A and B; None if they are the factors."""
        plain = self.A0 is None and self.A.ndim == self.B.ndim == 2
        return None if plain else (("A",), ("B",))

    def close(self, plan: Plan) -> None:
        """Slices of A and B lie side by side; with a start, that of a slice lies behind it."""
        of_A, of_B, r = self.A.shape, self.B.shape, self.A.shape[-2]
        plan.pull_A = lambda leaves, dA: (dA.view(of_A),)
        if len(of_B) == 3:
            plan.pull_B = lambda leaves, dB: (dB.unflatten(1, (-1, r)).movedim(1, 0),)
        else:
            plan.pull_B = lambda leaves, dB: (dB,)
        if self.A0 is not None:
            # b (a - a0) + (b - b0) a0: the gradient of b meets both parts of h, that of a one of z.
            plan.own_z = lambda dz: dz.unflatten(1, (-1, 2, r))[:, :, 0].flatten(1)
            plan.own_h = lambda h: h.unflatten(1, (-1, 2, r)).sum(2).flatten(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_cat and B_cat; with a start each A_i as [A_i - A0; A0], each B_j as [B_j | B_j - B0].

        b a - b0 a0 = b (a - a0) + (b - b0) a0: both parts are exactly zero at the start.
        """
        A, B = self.A, self.B
        if self.A0 is not None and self.B0 is not None:
            A = torch.cat([A - self.A0, self.A0.expand(A.shape)], dim=-2)
            B = torch.cat([B, B - self.B0], dim=-1)
        return (
            A.flatten(0, 1) if A.ndim == 3 else A,
            B.movedim(0, 1).flatten(1) if B.ndim == 3 else B,
        )
