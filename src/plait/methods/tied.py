"""Tied-LoRA: one pair of factors for all layers of a shape, two vectors for each layer.

    dW = s diag(v) B diag(u) A     A: (r, in)   B: (out, r)   shared by layers of equal in, out, r
                                   u: (r,)   v: (out,)   of each layer      s = lora_alpha / r

`train` names what is trained, any subset of A, B, u, v. Start (ours): A Kaiming-uniform, B = 0, u
= v = 1; if B is not trained, B Kaiming-uniform and v = 0. The gradients of A and B sum over
the layers. VeRA is the case train = (u, v) with u = 0.1. arXiv 2311.09578; u and v are known
second-hand, the paper's numbered variants are not known to us.

The first layer of each shape owns A and B and saves them; so get_peft_model is needed, injecting
layers into a model without a tuner is refused. Exact as a plain LoRA, layer by layer.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.core import DeltaConfig, FrozenLinear, LowRankDelta, register, seeded
from plait.core.init import kaiming

NAMES = ("A", "B", "u", "v")


@dataclass
class TiedLoraConfig(DeltaConfig):
    """Options of Tied-LoRA."""

    train: list[str] = field(
        default_factory=lambda: list(NAMES),
        metadata={"help": "What is trained: any of A, B (shared), u, v (of each layer)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = list(self.train)
        if not self.train or not set(self.train) <= set(NAMES):
            raise ValueError(f"train = {self.train}. Give some of {', '.join(NAMES)}.")
        if not {"B", "v"} & set(self.train):
            raise ValueError(
                f"train = {self.train}: without B and v the update stays zero. Add one of them."
            )


@register(
    "tied",
    TiedLoraConfig,
    paper="2311.09578",
    formula="dW = s diag(v) B diag(u) A",
    rank="r",
    names=("Tied-LoRA",),
)
class TiedLora(LowRankDelta):
    """See the module."""

    no_restart = "tied's A and B are shared by layers, which would restart one by one"
    no_pairs = "A and B are shared by layers, each with vectors of its own between them"
    shared: ClassVar[tuple[str, ...]] = ("A", "B")
    closed = (("A", "u"), ("B", "v"))
    reads = NAMES
    closes_by = ()
    config: TiedLoraConfig
    A: Tensor
    B: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, base: FrozenLinear, config: TiedLoraConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        r, n_in, n_out = config.r, base.in_features, base.out_features
        gen = seeded(config.seed, "tied", r, n_in, n_out)  # alike in every layer of the shape
        learns_B = "B" in config.train
        start = {
            "A": kaiming(gen, r, n_in),
            "B": torch.zeros(n_out, r) if learns_B else kaiming(gen, n_out, r),
            "u": torch.ones(r),
            "v": torch.ones(n_out) if learns_B else torch.zeros(n_out),
        }
        for name in NAMES:
            trained = name in config.train
            setattr(self, name, nn.Parameter(start[name]) if trained else nn.Buffer(start[name]))

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r + out, and r (in + out) once for each shape."""
        return config.r * ("u" in config.train) + out_features * ("v" in config.train)

    @classmethod
    def count_shared(cls, config: Any, in_features: int, out_features: int) -> int:
        """A and B."""
        return config.r * (
            in_features * ("A" in config.train) + out_features * ("B" in config.train)
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(u) A (r, in) and diag(v) B (out, r)."""
        return self.u[:, None] * self.A, self.v[:, None] * self.B

    def close(self, plan: Any) -> None:
        """Product rule."""
        plan.keeps_leaves = True
        plan.pull_A = lambda p, dA: (p[1][:, None] * dA, (dA * p[0]).sum(1))
        plan.pull_B = lambda p, dB: (p[3][:, None] * dB, (dB * p[2]).sum(1))
