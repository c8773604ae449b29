"""Fed-ALoRA for unequal ranks: clients of rank r_i meet in one matrix B_bar of common width q.

    dW = s (B_bar + B2 B1) M A     A: (r, in)   M: (q, r)   B1: (r, q)   B2: (out, r)
    s = lora_alpha / r             B_bar: (out, q), a buffer, common to all clients

Start: A, M, B1 Kaiming-uniform by their own fan-in, B2 = B_bar = 0: the base model. By default
lora_alpha = 2 r, so that s = 2 for every rank, as published. Dropout acts on A's input only.

A round of federated training: `begin_round` takes the server's B_bar, sets B2 = 0 and draws a new
B1, which leaves the function unchanged; A and M persist (the released code redraws them). The
client sends P = B2 B1 and the server adds the weighted mean of P to B_bar: products are averaged,
never factors. Without a server it is LoRA with a factored B. arXiv 2509.25414.

Limit: dW has rank min(r, q), so a client with r > q has a wider path and no more rank. Exact as a
plain LoRA of rank min(r, q): (M A, B_bar + B2 B1) or (A, (B_bar + B2 B1) M).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import DeltaConfig, FrozenLinear, LowRankDelta, gaussian, kaiming, option, register


@dataclass
class FedAloraHetConfig(DeltaConfig):
    """Options of Fed-ALoRA for unequal ranks."""

    r: int = option(8, "Rank r of this client.", least=1)
    lora_alpha: float | None = option(None, "s = lora_alpha / r; None: 2 r.", above=0)  # type: ignore[assignment]
    common_rank: int = option(16, "q, the inner width that all clients have in common.", least=1)

    def __post_init__(self) -> None:
        self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha  # type: ignore
        super().__post_init__()


@register(
    "fedalora_het",
    FedAloraHetConfig,
    paper="2509.25414",
    formula="dW = s (B_bar + B2 B1) M A",
    rank="min(r, q)",
    names=("Fed-ALoRA",),
)
class FedAloraHet(LowRankDelta):
    """See the module."""

    no_pairs = "B is a common part and a product of two factors"
    closed = (("A",), ("B2",), ("M", "B1"))
    reads = ("A", "B2", "B_bar", "M", "B1")
    closes_by = ()
    config: FedAloraHetConfig

    def __init__(self, base: FrozenLinear, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        r, q = config.r, config.common_rank
        self.A = nn.Parameter(kaiming(gen, r, base.in_features))
        self.M = nn.Parameter(kaiming(gen, q, r))
        self.B1 = nn.Parameter(kaiming(gen, r, q))
        self.B2 = nn.Parameter(torch.zeros(base.out_features, r))
        self.B_bar = nn.Buffer(torch.zeros(base.out_features, q))

    def randomize(self, gen: torch.Generator) -> None:
        """A random start, B_bar too; of a size at which a product of four is not tiny."""
        super().randomize(gen)
        with torch.no_grad():
            for p in (*self.parameters(), self.B_bar):
                p.copy_(gaussian(gen, *p.shape, std=0.5))

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out + 2 q)."""
        return config.r * (in_features + out_features + 2 * config.common_rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and [B_bar | B2] (out, q + r)."""
        return self.A, torch.cat([self.B_bar, self.B2], dim=1)

    def close(self, plan: Any) -> None:
        """B_bar takes no gradient."""
        q = self.config.common_rank
        plan.keeps_leaves, plan.own_h = True, lambda h: h[:, q:]

        def pull_M(p: Any, d: Tensor) -> tuple[Tensor, Tensor]:
            M, B1 = p
            d = d.to(M.dtype)
            return d[:q] + B1.T @ d[q:], d[q:] @ M.T

        plan.pull_M = pull_M

    def mix(self) -> Tensor:
        """[M; B1 M] (q + r, r)."""
        return torch.cat([self.M, self.B1 @ self.M])

    def rank(self) -> int:
        """min(r, q): whatever the factors hold now."""
        r, q = self.config.r, self.config.common_rank
        return min(r, q, self.base.in_features, self.base.out_features)

    @torch.no_grad()
    def begin_round(self, B_bar: Tensor, gen: torch.Generator) -> None:
        """Take the server's B_bar (out, q); B2 = 0 and B1 from `gen`: dW = s B_bar M A."""
        self.B_bar.copy_(B_bar)
        self.B2.zero_()
        self.B1.copy_(kaiming(gen, *self.B1.shape))
