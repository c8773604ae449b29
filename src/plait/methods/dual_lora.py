"""Dual LoRA: one branch says how far each weight moves, the other in which direction.

    dW = g s relu(B A) * sgn(D C)          * is element-wise; arXiv 2512.03402

    A: (r1, in)   B: (out, r1)   magnitude, >= 0
    C: (r2, in)   D: (out, r2)   direction, sgn(z) = +1 if z > 0 else -1, so sgn(0) = -1
    s = lora_alpha / sqrt(r1 r2), twice LoRA's at equal r and lora_alpha where r1 = r2 = r / 2
    g = min(1, k / gate_steps) in optimizer step k = 1, 2, ...; after t steps, evaluated, with k = t

Start: all factors Gaussian, because with B = 0, relu'(0) = 0 keeps every gradient at zero. The gate
makes a fresh adapter the base model. The paper asks for a warm-up from dW = 0 and gives neither its
form nor the standard deviation: both are ours.

sgn passes the incoming gradient straight through, clipped to [-1, 1] (ste="clip", the paper) or not
("identity"); it does not gate by |z|. The direction learns only where the magnitude is positive.

Limits: a weight-gradient GEMM is needed, so a step costs at least 1.5 frozen ones, as in full
fine-tuning. dW has full rank: merging is exact, export to a plain LoRA is not. The clip depends on
the loss scale: where it acts, accumulated micro-batches differ from one big batch.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.core import DeltaConfig, DenseDelta, FrozenLinear, PlaitWarning, option, register
from plait.core.init import gaussian


@dataclass
class DualLoraConfig(DeltaConfig):
    """Options of Dual LoRA; trainable parameters equal those of LoRA with the same `r`."""

    r: int = option(8, "r1 + r2. The scale is 2 lora_alpha / r at r1 = r2.", least=1)
    r1: int | None = option(None, "Rank of the magnitude; None: r / 2.", least=1)
    r2: int | None = option(None, "Rank of the direction; None: r - r1.", least=1)
    init_std: float = option(0.02, "Standard deviation of A, B, C, D (ours).", above=0)
    gate_steps: int = option(100, "Optimizer steps until g = 1 (ours); 0: no gate.", least=0)
    ste: Literal["clip", "identity"] = option(
        "clip", "Gradient of sgn: clipped to [-1, 1] (paper) or as it is."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for r in (self.r, *self.rank_pattern.values()):
            self.split(r)
        if self.gate_steps == 0 and self.init_weights:
            text = "dual_lora: gate_steps = 0, so the start is not the base model."
            warnings.warn(text, PlaitWarning, stacklevel=3)

    def split(self, r: int) -> tuple[int, int]:
        """Ranks (r1, r2) of magnitude and direction."""
        if self.r1 is None and self.r2 is None:
            if r % 2:
                raise ValueError(
                    f"r = {r} cannot be split into two equal ranks. Give an even r, or r1 and r2 "
                    "with r1 + r2 = r."
                )
            return r // 2, r // 2
        r1 = r - (self.r2 or 0) if self.r1 is None else self.r1
        r2 = r - r1 if self.r2 is None else self.r2
        if min(r1, r2) < 1 or r1 + r2 != r:
            raise ValueError(f"r1 = {r1}, r2 = {r2}: both must be 1 or more and sum to r = {r}.")
        return r1, r2


@register(
    "dual_lora",
    DualLoraConfig,
    paper="2512.03402",
    formula="dW = g s relu(B A) * sgn(D C)",
    rank="min(in, out)",
)
class DualLora(DenseDelta):
    """See the module."""

    config: DualLoraConfig
    no_pairs = "sign(D C) and relu(B A) change with the basis"
    alive = (("A",), ("B",))  # relu'(0) = 0: a zero magnitude never learns

    def __init__(self, base: FrozenLinear, config: DualLoraConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        (r1, r2), std = config.split(config.r), config.init_std
        self.scaling = config.lora_alpha / math.sqrt(r1 * r2)
        self.A = nn.Parameter(gaussian(gen, r1, base.in_features, std=std))
        self.B = nn.Parameter(gaussian(gen, base.out_features, r1, std=std))
        self.C = nn.Parameter(gaussian(gen, r2, base.in_features, std=std))
        self.D = nn.Parameter(gaussian(gen, base.out_features, r2, std=std))
        self.count_steps()

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """(r1 + r2)(in + out)."""
        return sum(config.split(config.r)) * (in_features + out_features)

    def randomize(self, gen: torch.Generator) -> None:
        """A random start with the gate open."""
        super().randomize(gen)
        self.t = torch.tensor(self.config.gate_steps)

    def gate(self) -> Tensor | float:
        """g: of the step under way in training (at g = 0 nothing learns), of t in evaluation."""
        if self.t is None or not self.config.gate_steps:
            return 1.0
        return ((self.t + int(self.training)) / self.config.gate_steps).clamp(max=1)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """g relu(B A) * sgn(D C) for rows start:stop, (stop - start, in)."""
        magnitude = torch.relu(self.B[start:stop] @ self.A)
        direction = Sign.apply(self.D[start:stop] @ self.C, self.config.ste == "clip")
        return self.gate() * magnitude * direction

    def signed(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float, bool]:
        """A, B, C, D, g s and whether sgn clips."""
        t, training = [] if self.t is None else [self.t], self.training
        gate = self.kept.get(("gate", training), t, lambda: float(self.gate()))
        of: Any = self._parameters  # nn.Module's own way to them takes longer than a product
        return of["A"], of["B"], of["C"], of["D"], self.scaling * gate, self.config.ste == "clip"

    def check_step(self) -> None:
        """Raise ValueError under fp16 autocast: the clip would depend on the loss scale."""
        if self.training and self.config.ste == "clip" and self.autocast() == torch.float16:
            raise ValueError(
                'dual_lora: ste="clip" depends on the loss scale of fp16. Use bf16, or '
                'ste="identity".'
            )


class Sign(torch.autograd.Function):
    """sgn(z) with the straight-through gradient, dL/dz = clip(dL/dsgn, -1, 1)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, clip: bool) -> Tensor:
        """+1 where z > 0, else -1."""
        ctx.clip = clip
        return torch.where(z > 0, 1.0, -1.0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient, clipped if asked."""
        return (grads[0].clamp(-1, 1) if ctx.clip else grads[0]), None
