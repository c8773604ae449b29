"""SoRA: LoRA with a trained gate on each rank, driven to zero by a proximal step.

    dW = s B diag(g) A     A: (r, in)   B: (out, r)   g: (r,)   s = lora_alpha / r

Start: A Kaiming, B = 0, g ~ N(0, 1). s keeps the r of the start. Penalty, proximal step and the
schedule of its threshold: see plait/gates/sparse.py. `plait.prune` removes ranks with gate 0 for
good; export leaves them out in any case. Other methods can use the gate: `gates: [sora]`.
arXiv 2311.11696.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from plait.core import FreeConfig, FreeDelta, register
from plait.gates.sparse import SparseGate, SparseOptions


@dataclass
class SoraConfig(SparseOptions, FreeConfig):
    """Options of SoRA; `r` is the largest rank."""


@register("sora", SoraConfig, paper="2311.11696", formula="dW = s B diag(g) A", rank="r, then kept")
class Sora(FreeDelta):
    """See the module."""

    own_gates = (SparseGate,)
    config: SoraConfig
    g: nn.Parameter

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out + 1)."""
        return cls.slots_of(config) * (in_features + out_features + 1)
