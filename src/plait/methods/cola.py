"""CoLA (collaborative): M matrices A and N matrices B that work together (2505.15471, ACL 2025).

    dW = s (sum_ij P_ji B_j A_i - k B0 A0)      A: (M, r, in)   B: (N, out, r)   s = lora_alpha / r

    strategy    pairing P in training                       in evaluation       k = sum(P) / (M N)
    full        every A with every B                        the same            1
    random      each A meets a B that is drawn each step    1/N everywhere      1/N
    random_b    each B meets an A that is drawn each step   1/M everywhere      1/M
    heuristic   A_i with B_i for i < M, A_M with the rest   the same            1/M

Start "pissa": A_i = A0/M, B_j = B0/N, s B0 A0 the best rank-r part of W: the base model for every
strategy and draw. "kaiming": A_i Kaiming, B_j = 0, no A0. "pissa_split" (ours, heuristic only):
block i of the singular triples for group i. P = U V folds into the factors, without a loop. full
trains as one LoRA of rank r with learning rates M lr for A and N lr for B, because all A_i get the
same gradient, as do all B_j: control arm `pissa` with `lr_scale: {A: M, B: N}`. At inference full,
random and random_b have rank r, heuristic M r. Released code, not followed: (sum B)(sum A) always.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.core import DeltaConfig, FrozenLinear, Pair, PlaitWarning, option, register
from plait.core.init import kaiming, seeded
from plait.methods._folded import Folded


@dataclass
class ColaConfig(DeltaConfig):
    """Options of collaborative LoRA."""

    num_A: int = option(2, "M, number of A.", least=1)
    num_B: int = option(3, "N, number of B.", least=1)
    strategy: Literal["full", "random", "random_b", "heuristic"] = option("full", "Pairing.")
    grouping: Literal["paper", "released"] = option("paper", "Groups of heuristic: whose.")
    init: Literal["pissa", "kaiming", "pissa_split"] = option("pissa", "Start values.")
    svd: Literal["randomized", "exact"] = option("randomized", "How W's principal part is found.")

    def __post_init__(self) -> None:
        super().__post_init__()
        heuristic, sizes = self.strategy == "heuristic", self.groups().bincount().tolist()
        if heuristic and self.num_B < self.num_A:
            raise ValueError(f"num_B = {self.num_B}: heuristic needs num_A = {self.num_A} or more.")
        if self.init == "pissa_split" and not heuristic:
            raise ValueError(f'init="pissa_split" needs "heuristic", not "{self.strategy}".')
        if heuristic and self.init == "pissa" and len(set(sizes)) < len(sizes):
            text = f"cola: groups of equal size {sizes} never separate from a pissa start; the "
            text += f"product has rank {len(set(sizes))} r, not {self.num_A} r. Use pissa_split."
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
    formula="dW = s (sum_ij P_ji B_j A_i - k B0 A0)",
    rank="2 r; heuristic (M + 1) r",
)
class Cola(Folded):
    """See the module."""

    config: ColaConfig

    def __init__(self, base: FrozenLinear, config: ColaConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        M, N, r = config.num_A, config.num_B, config.r
        groups, blocks = config.groups(), M if config.init == "pissa_split" else 1
        self.groups = nn.Buffer(groups, persistent=False)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        A, B = kaiming(gen, M, r, base.in_features), torch.zeros(N, base.out_features, r)
        if config.init != "kaiming":
            self.A0, self.B0 = A0, B0 = base.principal(blocks * r, self.scaling, config.svd, gen)
            members = groups if blocks == M else torch.zeros_like(groups)  # the block of each B
            share = torch.bincount(members).to(B0).reciprocal()[:, None, None]
            A = A0.unflatten(0, (blocks, r)).expand(M, -1, -1) * (1 / (M // blocks))
            B = (B0.unflatten(1, (blocks, r)).movedim(1, 0) * share)[members]
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.register_buffer("draw", None, persistent=False)
        if config.strategy in ("random", "random_b"):
            self.count_steps()
            self.loaded()

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (M in + N out)."""
        return config.r * (config.num_A * in_features + config.num_B * out_features)

    @property
    def needs_events(self) -> bool:
        """Only if pairings are drawn or a gate has a schedule."""
        return self.t is not None

    def loaded(self) -> None:
        """Draw the pairing of the next step, alike on all processes, recomputed and resumed."""
        if self.config.strategy in ("random", "random_b"):
            M, N = self.config.num_A, self.config.num_B
            high, drawn = (N, M) if self.config.strategy == "random" else (M, N)
            gen = seeded(self.config.seed, self.steps, self.base.name)
            self.draw = torch.randint(high, (drawn,), generator=gen).to(self.A.device)

    after_step = loaded

    def free_pairs(self) -> list[Pair]:
        """All A with all B; heuristic: each A with its group of B. The start is a constant."""
        A, B = tuple(range(self.config.num_A)), tuple(range(self.config.num_B))
        slices = [((i,), tuple(j for j in B if self.groups[j] == i)) for i in A]
        slices = slices if self.config.strategy == "heuristic" else [(A, B)]
        return [Pair(self.base.name, self.A, self.B, self.scaling, a, b) for a, b in slices]
