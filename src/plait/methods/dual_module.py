"""Dual-Module Collaborative LoRA: a shared module from W's principal part and a screened expert.

    dW = s (B_s A_s - B_s0 A_s0 + B_e diag(E keep) A_e)     s = lora_alpha / r,  r = r_s + r_e

    A_s: (r_s, in)  B_s: (out, r_s)  start: the best rank-r_s part of W, subtracted again
    A_e: (r_e, in)  B_e: (out, r_e)  E: (r_e,) trained gate, starts at 0;  keep: (r_e,) 0/1 buffer

Penalty: orth_reg_weight * mean of ||A_e A_e^T - I||_F and ||B_e^T B_e - I||_F, not squared.
Events: each step averages |p grad| of A_e, B_e, E. Every deltaT steps between tinit and the last
tfinal steps the best b(t) ranks over all layers keep their E, the others are set to 0 and may
regrow; at the end the choice is written to `keep`. b(t) falls quadratically from sum r_e to sum
target_r. A layer with shared_r == r has no expert.

ACML 2025, PMLR 304: the method of the abstract. Not followed is the released code, which takes the
SVD of a random weight, starts at E = 0 and B_e = 0, which no gradient ever leaves, and reads
gradients after they were cleared. Delta mode, Gaussian expert and event order are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core import (
    DeltaConfig,
    FrozenLinear,
    LowRankDelta,
    gaussian,
    less_start,
    option,
    register,
    screening,
    svd_start,
)

SCREENED = ("A_e", "B_e", "E")


@dataclass
class DualModuleLoraConfig(DeltaConfig):
    """Options of Dual-Module Collaborative LoRA; `total_steps` is needed to train."""

    total_steps_needed: ClassVar[bool] = True

    r: int = option(8, "Total rank, shared plus expert.", least=1)
    lora_alpha: float | None = option(None, "s = lora_alpha / r; None: r.", above=0)  # type: ignore[assignment]
    shared_r: int | None = option(None, "Shared rank r_s; None: r // 4, at least 1.", least=1)
    target_r: int | None = option(
        None, "Expert ranks kept, mean over layers; None: r_e - r_e // 6.", least=1
    )
    tinit: int | float = option(0.15, "Steps (int) or share (float) before screening.", least=0)
    tfinal: int | float = option(
        0.5, "Steps (int) or share of them (float) after the final choice.", least=0
    )
    deltaT: int = option(10, "Steps between two screenings.", least=1)
    beta1: float = option(0.85, "Decay of the mean importance.", least=0)
    beta2: float = option(0.85, "Decay of its mean deviation.", least=0)
    orth_reg_weight: float = option(0.1, "Weight of the penalty; 0: none.", least=0)
    orth: Literal["expert", "cross"] = option(
        "expert", "Orthogonality within the expert, or of expert and shared module (ours)."
    )
    init_std: float = option(0.02, "Standard deviation of A_e and B_e.", above=0)
    svd: Literal["randomized", "exact"] = option("randomized", "How W's principal part is found.")

    def __post_init__(self) -> None:
        self.lora_alpha = self.r if self.lora_alpha is None else self.lora_alpha
        super().__post_init__()
        for r in (self.r, *self.rank_pattern.values()):
            shared, expert, target = self.ranks(r)
            if expert < 0 or target > expert > 0:
                raise ValueError(
                    f"r = {r}, shared_r = {shared}, target_r = {target}: shared_r must not exceed "
                    f"r, and target_r must not exceed r - shared_r = {expert}."
                )

    def ranks(self, r: int) -> tuple[int, int, int]:
        """(r_s, r_e, target_r) of a layer of total rank r."""
        shared = max(1, r // 4) if self.shared_r is None else self.shared_r
        expert = r - shared
        return shared, expert, expert - expert // 6 if self.target_r is None else self.target_r

    def schedule(self, total: int) -> tuple[int, int]:
        """First and last step of the screening, of `total` planned optimizer steps."""
        tinit, tfinal = (
            int(x * total) if isinstance(x, float) else x for x in (self.tinit, self.tfinal)
        )
        if tinit >= total - tfinal:
            raise ValueError(
                f"dual_module: tinit = {tinit} and tfinal = {tfinal} leave no step to screen in "
                f"total_steps = {total}. Lower them."
            )
        return tinit, total - tfinal


@register(
    "dual_module",
    DualModuleLoraConfig,
    paper="ACML 2025, PMLR 304",
    title="Dual-Module Collaborative LoRA (DMC)",
    formula="dW = s (B_s A_s - B_s0 A_s0 + B_e diag(E keep) A_e)",
    parameters="r (in + out) + r_e",
    rank="2 r_s + r_e",
    names=("DMC",),
)
class DualModule(LowRankDelta):
    """See the module."""

    config: DualModuleLoraConfig
    optional_buffers = screening.buffer_names(SCREENED)

    def __init__(self, base: FrozenLinear, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        (n_in, n_out), std = (base.in_features, base.out_features), config.init_std
        shared, expert, _ = config.ranks(config.r)
        A0, B0 = base.start(
            lambda W: svd_start(W, shared, self.scaling, config.svd, gen),
            (shared, n_in),
            (n_out, shared),
        )
        self.register_buffer("A_s0", A0)
        self.register_buffer("B_s0", B0)
        self.A_s, self.B_s = nn.Parameter(A0.clone()), nn.Parameter(B0.clone())
        self.A_e = nn.Parameter(gaussian(gen, expert, n_in, std=std))
        self.B_e = nn.Parameter(gaussian(gen, n_out, expert, std=std))
        self.E = nn.Parameter(torch.zeros(expert))
        self.register_buffer("keep", torch.ones(expert))
        for name in self.optional_buffers:
            self.register_buffer(name, torch.zeros_like(getattr(self, name[len("Ibar_") :])))
        self.count_steps()

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out) + r_e."""
        return config.r * (in_features + out_features) + config.ranks(config.r)[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Rows [A_s - A_s0; A_s0; A_e], columns [B_s | B_s - B_s0 | B_e]: 2 r_s + r_e ranks."""
        A, B = less_start(self.A_s[None], self.B_s[None], self.A_s0, self.B_s0)
        return torch.cat([A, self.A_e]), torch.cat([B, self.B_e], dim=1)

    def gate(self) -> Tensor:
        """[1; 1; E keep]."""
        return torch.cat([self.E.new_ones(2 * len(self.A_s)), self.E * self.keep])

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Dropout acts on the expert's rank activations only."""
        shared, expert = F.linear(x, A).split([2 * len(self.A_s), len(self.E)], dim=-1)
        return torch.cat([shared, F.dropout(expert, self.dropout, self.training)], dim=-1)

    def penalty(self) -> Tensor | None:
        """orth_reg_weight * mean of the two norms; the host takes the mean over the layers."""
        if not self.config.orth_reg_weight or not len(self.E):
            return None
        if self.config.orth == "cross":
            gaps = self.A_s @ self.A_e.T, self.B_s.T @ self.B_e
        else:
            eye = torch.eye(len(self.E), dtype=self.E.dtype, device=self.E.device)
            gaps = self.A_e @ self.A_e.T - eye, self.B_e.T @ self.B_e - eye
        norms = torch.stack([torch.linalg.norm(gap) for gap in gaps])
        return self.config.orth_reg_weight * norms.mean()

    def after_step(self) -> None:
        """Observe the importance, until the final choice."""
        if self.steps <= self.config.schedule(self.total_steps)[1]:
            screening.observe(self, SCREENED, self.config.beta1, self.config.beta2)

    @classmethod
    def after_all(cls, deltas: Sequence["DualModule"]) -> None:
        """Keep the best ranks over all layers, as many as the budget allows."""
        one, target = deltas[0], sum(d.config.ranks(d.config.r)[2] for d in deltas if len(d.E))
        t, (first, last) = one.steps, one.config.schedule(one.total_steps)
        if not (t == last or (first < t < last and t % one.config.deltaT == 0)):
            return
        scores = [
            screening.score(d, "E")
            + screening.score(d, "A_e").mean(1)
            + screening.score(d, "B_e").mean(0)
            for d in deltas
        ]
        alive = screening.budget(t, first, last, sum(map(len, scores)), target, power=2)
        for d, mask in zip(deltas, screening.best(scores, alive), strict=True):
            d.E.mul_(mask)
            if t == last:
                d.keep.copy_(mask)
                for name in cls.optional_buffers:
                    setattr(d, name, None)
