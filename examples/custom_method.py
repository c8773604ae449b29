"""Gated LoRA: a method of your own in one file, outside the package.

    dW = s B diag(g) A      A: (r, in)   B: (out, r)   g: (r,)   s = lora_alpha / r

Start: A Kaiming-uniform, B = 0, g = 1. Registering it gives it the whole host: peft's interface,
merge, exact export, `plait` on the command line, and the contract tests.

    python examples/custom_method.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import plait
from plait.core import option
from plait.core.init import kaiming


@dataclass
class GatedLoraConfig(plait.DeltaConfig):
    """Options beside those that every method has."""

    gate_start: float = option(1.0, "Start value of the gate g.", above=0)


@plait.register("gated", GatedLoraConfig, paper="none", formula="dW = s B diag(g) A", rank="r")
class GatedLora(plait.LowRankDelta):
    """See the module."""

    def __init__(self, base, config: GatedLoraConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(kaiming(gen, config.r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, config.r))
        self.g = nn.Parameter(torch.full((config.r,), config.gate_start))

    @classmethod
    def count(cls, config: GatedLoraConfig, in_features: int, out_features: int) -> int:
        """r (in + out + 1)."""
        return config.r * (in_features + out_features + 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return self.A, self.B

    def gate(self) -> Tensor:
        """One number for each rank."""
        return self.g


if __name__ == "__main__":
    from peft import get_peft_model

    net = nn.Sequential(nn.Linear(20, 10))
    get_peft_model(net, GatedLoraConfig(r=4, target_modules=["0"])).print_trainable_parameters()
