"""CoLA (collaborative): M matrices A and N matrices B that work together.

    dW = s (sum_ij P_ji B_j A_i - k B0 A0)      A: (M, r, in)   B: (N, out, r)   s = lora_alpha / r

    strategy    pairing P in training                       in evaluation       k = sum(P) / (M N)
    full        every A with every B                        the same            1
    random      each A meets one drawn B, anew each step    1/N everywhere      1/N
    random_b    each B meets one drawn A, anew each step    1/M everywhere      1/M
    heuristic   A_i with B_i for i < M, A_M with the rest   the same            1/M

Start "pissa": A_i = A0/M, B_j = B0/N, s B0 A0 the best rank-r part of W: the base model for every
strategy and draw. "kaiming": A_i Kaiming, B_j = 0, no A0. "pissa_split" (ours, heuristic only):
block i of the singular triples for group i. arXiv 2505.15471, Findings of ACL 2025.

P = U V folds into the factors, sum_a (U B)_a (V A)_a: a LoRA of k ranks r, no loop over pairs.

In training, full is one LoRA of rank r with learning rates M lr for A and N lr for B, for every A_i
gets the same gradient and every B_j too: compare it with `pissa` and `lr_scale: {A: M, B: N}`. At
inference full, random and random_b are one LoRA of rank r. heuristic is one LoRA of rank M r; with
"pissa", groups of equal size never separate.

Not followed in the released code: it subtracts all of B0 A0 and merges (sum B)(sum A) whatever the
strategy, shares one tensor between all A_i, draws in evaluation and again on recomputation. What is
not drawn has gradient 0 here, not None, so that AdamW's momentum still moves it.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.core import (
    DeltaConfig,
    FrozenLinear,
    LowRankDelta,
    PlaitWarning,
    kaiming,
    less_start,
    option,
    register,
    seeded,
    svd_start,
)


@dataclass
class ColaConfig(DeltaConfig):
    """Options of collaborative LoRA."""

    num_A: int = option(2, "M, number of A.", least=1)
    num_B: int = option(3, "N, number of B.", least=1)
    strategy: Literal["full", "random", "random_b", "heuristic"] = option(
        "full", "Which A meets which B."
    )
    grouping: Literal["paper", "released"] = option(
        "paper", "heuristic: the paper's groups or those of its code."
    )
    init: Literal["pissa", "kaiming", "pissa_split"] = option("pissa", "Start values.")
    svd: Literal["randomized", "exact"] = option("randomized", "How W's principal part is found.")

    def __post_init__(self) -> None:
        super().__post_init__()
        heuristic = self.strategy == "heuristic"
        if heuristic and self.num_B < self.num_A:
            raise ValueError(
                f'strategy="heuristic" needs num_B >= num_A; {self.num_B} < {self.num_A}. Raise num_B.'
            )
        if self.init == "pissa_split" and not heuristic:
            raise ValueError(
                f'init="pissa_split" needs strategy="heuristic", not "{self.strategy}". Use "pissa".'
            )
        sizes = torch.bincount(self.groups()).tolist()
        if heuristic and self.init == "pissa" and len(set(sizes)) < len(sizes):
            text = (
                f'cola: groups of sizes {sizes} start alike with init="pissa", and groups of equal '
                f"size never separate: the product has rank {len(set(sizes))} r, not {self.num_A} r. "
                'Use init="pissa_split".'
            )
            warnings.warn(text, PlaitWarning, stacklevel=3)

    def groups(self) -> Tensor:
        """Index of the A that each B meets under heuristic, (N,)."""
        M, N = self.num_A, self.num_B
        if self.grouping == "paper":
            return torch.arange(N).clamp(max=M - 1)
        each = N // M  # consecutive ones; the left-over ones go to A_1, A_2, ...
        return torch.cat([torch.arange(M).repeat_interleave(each), torch.arange(N - M * each)])


@register(
    "cola",
    ColaConfig,
    paper="2505.15471",
    title="CoLA (collaborative)",
    formula="dW = s (sum_ij P_ji B_j A_i - k B0 A0)",
    parameters="r (M in + N out)",
    rank="2 r; heuristic (M + 1) r",
    names=("CoLA",),
)
class Cola(LowRankDelta):
    """See the module."""

    config: ColaConfig

    def __init__(self, base: FrozenLinear, config: ColaConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        M, N, r, n_in, n_out = (
            config.num_A,
            config.num_B,
            config.r,
            base.in_features,
            base.out_features,
        )
        groups, blocks = config.groups(), M if config.init == "pissa_split" else 1
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        A, B = kaiming(gen, M, r, n_in), torch.zeros(N, n_out, r)
        if config.init != "kaiming":
            self.A0, self.B0 = base.start(
                lambda W: svd_start(W, blocks * r, self.scaling, config.svd, gen),
                (blocks * r, n_in),
                (n_out, blocks * r),
            )
            members = groups if blocks == M else torch.zeros_like(groups)  # the block of each B
            share = torch.bincount(members).to(self.B0).reciprocal()[:, None, None]
            A = (self.A0 * (1 / (M // blocks))).unflatten(0, (blocks, r)).expand(M, r, n_in)
            B = (self.B0.unflatten(1, (blocks, r)).movedim(1, 0) * share)[members]
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.register_buffer("draw", None, persistent=False)
        if config.strategy in ("random", "random_b"):
            self.count_steps()
            self.after_step()

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (M in + N out)."""
        return config.r * (config.num_A * in_features + config.num_B * out_features)

    def after_step(self) -> None:
        """Draw the pairing of the next step: equal on every rank, recomputation and resume."""
        if self.t is not None:
            sizes = (self.config.num_B, (self.config.num_A,))
            high, shape = sizes if self.config.strategy == "random" else (sizes[1][0], (sizes[0],))
            gen = seeded(self.config.seed, self.steps, self.base.name)
            self.draw = torch.randint(high, shape, generator=gen).to(self.A.device)

    loaded = after_step

    def fold_A(self, A: Tensor) -> Tensor:
        """V A: (M, ..) to (k, ..)."""
        match self.config.strategy:
            case "random_b":
                return A[self.draw] if self.training else A.mean(0, keepdim=True)
            case "random" if not self.training:
                return A.sum(0, keepdim=True)
            case "full":
                return A.sum(0, keepdim=True)
        return A

    def fold_B(self, B: Tensor) -> Tensor:
        """U B: (N, ..) to (k, ..)."""
        match self.config.strategy:
            case "heuristic":
                return B.new_zeros(self.config.num_A, *B.shape[1:]).index_add(0, self.groups, B)
            case "random":
                return B[self.draw] if self.training else B.mean(0, keepdim=True)
            case "random_b" if self.training:
                return B
        return B.sum(0, keepdim=True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Rows [V A - V A0; A0], columns [U B | U B - U B0]: k r + r0 ranks."""
        a, b = self.fold_A(self.A), self.fold_B(self.B)  # (k, r, in), (k, out, r)
        if self.A0 is None:
            return a.flatten(0, 1), b.movedim(0, 1).flatten(1)
        share_a = self.fold_A(a.new_full((self.config.num_A, 1, 1), 1 / self.config.num_A))
        share_b = self.fold_B(b.new_full((self.config.num_B, 1, 1), 1 / self.config.num_B))
        if self.config.init == "pissa_split":
            share_a = share_b = torch.ones_like(share_a)
        return less_start(a, b, self.A0, self.B0, share_a, share_b)
