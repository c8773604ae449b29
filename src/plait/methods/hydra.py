"""HydraLoRA: one down-projection and several up-projections, mixed per token.

    y = W x + s sum_i w_i(x) B_i A x     w = softmax(G x), per token, dense, in fp32
    A: (r, in)   B: (N, out, r)   G: (N, in), no bias   s = lora_alpha / r      arXiv 2404.19245

Start: A and G Kaiming-uniform, B_i = 0. One (r, in) product, the router in rank space, one (out,
N r) product, whatever N is. The released code chooses N by k-means or DBSCAN on the data, draws a
dropout mask for each i (`independent_dropout`; here one mask serves all by default) and returns a
tuple, which forces patched model code: not followed. The router reads x itself, never a mean over
the batch.

Limits: with a live router no single matrix fits, so merge and export raise; merge(approx="mean")
takes the router as uniform.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.core import FreeConfig, FreeDelta, FrozenLinear, TokenRouter, option, register
from plait.core.init import kaiming


@dataclass
class HydraLoraConfig(FreeConfig):
    """Options of HydraLoRA."""

    r: int = option(4, "Rank of the update of one token.", least=1)
    lora_alpha: float = option(32, "Numerator of the scaling s.", above=0)
    lora_dropout: float = option(0.05, "Dropout on A's input, a fraction.", least=0, below=1)
    num_B: int = option(4, "N, the number of B.", least=1)
    independent_dropout: bool = option(False, "A mask for each B, as in the released code.")


@register(
    "hydra",
    HydraLoraConfig,
    paper="2404.19245",
    formula="dW x = s sum_i softmax(G x)_i B_i A x",
    rank="r per token",
    names=("HydraLoRA",),
)
class Hydra(FreeDelta):
    """See the module."""

    mergeable: ClassVar[bool] = False
    exact_export: ClassVar[bool] = False
    reads = ("A", "B", "A0", "B0", "G")
    config: HydraLoraConfig

    def __init__(self, base: FrozenLinear, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen, num_B=config.num_B)
        self.G = nn.Parameter(kaiming(gen, config.num_B, base.in_features))

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r in + N r out + N in."""
        n, r = config.num_B, cls.slots_of(config)
        return r * in_features + n * r * out_features + n * in_features

    @property
    def masks(self) -> int:
        """Dropout masks of one call."""
        several = self.config.independent_dropout and self.training and self.dropout
        return self.config.num_B if several else 1

    @property
    def rank_groups(self) -> int:
        """As ever, once for each mask."""
        return super().rank_groups * self.masks

    def mix(self) -> TokenRouter:
        """(.., r) to (.., N r); with a mask for each B from (.., N r)."""
        return TokenRouter(self.G, "expand" if self.masks == 1 else "pair")

    @property
    def one_mask(self) -> bool:
        """Unless each B has a mask of its own."""
        return self.masks == 1

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """One dropout mask, or one for each B: (.., in) to (.., r) or (.., N r)."""
        if self.masks == 1:
            return super().down(x, A)
        return self.masked_down(x, A.expand(self.masks, *A.shape))
