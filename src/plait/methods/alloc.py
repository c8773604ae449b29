"""Allocating LoRA (ALoRA, AB-LoRA): ranks move to the layers where leaving them out hurts.

    dW = s B diag(live) A     A: (slots, in)   B: (out, slots)   live: (slots,) 0/1 buffer
    slots = spare * r, the first r live at the start;  s = lora_alpha / r, kept throughout

How ranks are scored on a development batch and moved: see plait/gates/alloc.py. Give the batch with
plait.set_development_batch(model, batch); plait train takes validation rows. Other methods whose
ranks can restart can use the gate: `gates: [alloc]`. arXiv 2403.16187.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.core import FreeConfig, FreeDelta, register
from plait.gates.alloc import AllocGate, AllocOptions


@dataclass
class AllocLoraConfig(AllocOptions, FreeConfig):
    """Options of allocating LoRA; `r` is the mean rank of a layer."""


@register(
    "alloc",
    AllocLoraConfig,
    paper="2403.16187",
    formula="dW = s B diag(live) A",
    rank="live ranks",
    names=("ALoRA", "AB-LoRA"),
)
class AllocLora(FreeDelta):
    """See the module."""

    own_gates = (AllocGate,)
    config: AllocLoraConfig
    live_ranks: Tensor

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """spare r (in + out), of which r (in + out) live at the start."""
        return cls.slots_of(config) * (in_features + out_features)
