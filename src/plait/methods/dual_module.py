"""Dual-Module Collaborative LoRA: a shared module from W's principal part and a screened expert.

    dW = s (B_s A_s - B_s0 A_s0 + B_e diag(E keep) A_e)     s = lora_alpha / r,  r = r_s + r_e

    A_s: (r_s, in)  B_s: (out, r_s)  start: the best rank-r_s part of W, subtracted again
    A_e: (r_e, in)  B_e: (out, r_e)  E: (r_e,) trained gate, starts at 0;  keep: (r_e,) 0/1 buffer

Penalty: orth_reg_weight * mean of ||A_e A_e^T - I||_F and ||B_e^T B_e - I||_F, not squared.
Events: each step averages |p grad| of A_e, B_e, E. Every deltaT steps after tinit the best b(t)
ranks of all layers keep their E, the others get 0 and may regrow; tfinal steps before the end the
choice goes to `keep`. b(t) falls quadratically from sum r_e to sum target_r. r_e may be 0.

ACML 2025, PMLR 304: the method of the abstract; the released code is not followed (SVD of a random
weight, E = B_e = 0 that no gradient leaves). Delta mode, Gaussian expert, event order are ours.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core import DeltaConfig, FrozenLinear, LowRankDelta, option, register, whole
from plait.core.init import gaussian
from plait.core.low_rank import less_start
from plait.gates import screening


@dataclass
class DualModuleLoraConfig(screening.ScreeningOptions, DeltaConfig):
    """Options of Dual-Module Collaborative LoRA; `total_steps` is needed to train."""

    r: int = option(8, "Total rank, shared plus expert.", least=1)
    lora_alpha: float | None = option(None, "s = lora_alpha / r; None: r.", above=0)  # type: ignore[assignment]
    shared_r: int | None = option(None, "Shared rank r_s; None: r // 4, at least 1.", least=1)
    target_r: int | None = option(None, "Mean expert ranks kept; None: 5/6 of them.", least=1)
    orth_reg_weight: float = option(0.1, "Weight of the penalty; 0: none.", least=0)
    orth: Literal["expert", "cross"] = option("expert", "cross: against the shared (ours).")
    init_std: float = option(0.02, "Standard deviation of A_e and B_e.", above=0)
    svd: Literal["randomized", "exact"] = option("randomized", "How W's principal part is found.")

    def __post_init__(self) -> None:
        self.lora_alpha = self.r if self.lora_alpha is None else self.lora_alpha  # type: ignore
        super().__post_init__()
        for r in (self.r, *self.rank_pattern.values()):
            shared, expert = self.ranks(r)
            target = screening.Screening.of(self).target(expert)
            if expert < 0 or target > expert > 0:
                text = f"r = {r}, shared_r = {shared}, target_r = {target}: give shared_r up to r"
                raise ValueError(f"{text} and target_r up to r - shared_r = {expert}.")

    def ranks(self, r: int) -> tuple[int, int]:
        """(r_s, r_e) of a layer of total rank r."""
        shared = max(1, r // 4) if self.shared_r is None else self.shared_r
        return shared, r - shared


@register(
    "dual_module",
    DualModuleLoraConfig,
    paper="ACML 2025, PMLR 304",
    formula="dW = s (B_s A_s - B_s0 A_s0 + B_e diag(E keep) A_e)",
    rank="2 r_s + r_e",
)
class DualModule(LowRankDelta):
    """See the module."""

    closed = (("A_s", "A_e"), ("B_s", "B_e"))
    reads = ("A_s", "A_e", "B_s", "B_e", "A_s0", "B_s0")
    closes_by = ()
    input_dropout = 0.0  # type: ignore[assignment]  # see rank_mask
    config: DualModuleLoraConfig
    alive = (("E", "B_e"),)  # with both zero no gradient ever leaves zero
    rank_axes: ClassVar[dict[str, int]] = {"A_e": -2, "B_e": -1, "E": -1}
    own_gates = (screening.Screening,)
    screened = ("A_e", "B_e")
    optional_buffers = screening.buffer_names((*screened, "E"))
    E: nn.Parameter

    def __init__(self, base: FrozenLinear, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        shared, expert = config.ranks(config.r)[0], self.ranks
        A0, B0 = base.principal(shared, self.scaling, config.svd, gen)
        self.A_s0, self.B_s0 = nn.Buffer(A0), nn.Buffer(B0)
        self.A_s, self.B_s = nn.Parameter(A0.clone()), nn.Parameter(B0.clone())
        self.A_e = nn.Parameter(gaussian(gen, expert, base.in_features, std=config.init_std))
        self.B_e = nn.Parameter(gaussian(gen, base.out_features, expert, std=config.init_std))
        screening.average(self)

    @classmethod
    def gated(cls, config: Any) -> int:
        """Gates act on the expert."""
        return config.ranks(config.r)[1]

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out) + r_e."""
        shared, expert = config.ranks(config.r)[0], cls.slots_of(config)
        return (shared + expert) * (in_features + out_features) + expert

    def factors(self) -> tuple[Tensor, Tensor]:
        """Rows [A_s - A_s0; A_s0; A_e], columns [B_s | B_s - B_s0 | B_e]: 2 r_s + r_e ranks."""
        A, B = less_start(self.A_s[None], self.B_s[None], self.A_s0, self.B_s0)
        return torch.cat([A, self.A_e]), torch.cat([B, self.B_e], dim=1)

    def spread(self, g: Tensor) -> Tensor:
        """[1; 1; g]."""
        return torch.cat([g.new_ones(*g.shape[:-1], 2 * len(self.A_s)), g], dim=-1)

    def start_of(self, index: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Gaussian factors and E = 0: an update of zero that gradients reach."""
        k, std = len(index), self.config.init_std
        A, B = (gaussian(gen, k, n, std=std) for n in (self.A_e.shape[1], len(self.B_e)))
        return {"A_e": A, "B_e": B.T, "E": torch.zeros(k)}

    def unspread(self, dg: Tensor) -> Tensor:
        """The expert's."""
        return dg[2 * len(self.A_s) :]

    def rank_mask(self, z: Tensor) -> Tensor | None:
        """Dropout acts on the expert's rank activations only, one mask for each."""
        mask = None
        if self.dropout:
            ones = z.new_ones(*z.shape[:-1], len(self.E))
            mask = self.spread(F.dropout(ones, self.dropout))
        gates = super().rank_mask(z)
        return gates if mask is None else mask if gates is None else mask * gates

    def close(self, plan: Any) -> None:
        """The start lies between the modules; B_s has its columns and those of the start."""
        r = len(self.A_s)
        plan.pull_A = lambda _, dA: (dA[:r], dA[2 * r :])
        plan.pull_B = lambda _, dB: (dB[:, :r] + dB[:, r : 2 * r], dB[:, 2 * r :])

    def penalty(self) -> Tensor | None:
        """orth_reg_weight * mean of the two norms; the host takes the mean over the layers."""
        if not self.config.orth_reg_weight or not len(self.E):
            return None
        A, B = whole(self.A_e), whole(self.B_e)
        if self.config.orth == "cross":
            gaps = whole(self.A_s) @ A.T, whole(self.B_s).T @ B
        else:
            eye = torch.eye(len(A)).to(A)
            gaps = A @ A.T - eye, B.T @ B - eye
        norms = torch.stack([torch.linalg.norm(gap) for gap in gaps])
        return self.config.orth_reg_weight * norms.mean()
