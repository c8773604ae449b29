"""DropLoRA: LoRA whose ranks are dropped at random while it trains.

    training     y = W x + s B (z / (1 - p) * (A x))     z in {0, 1}, P(z = 1) = 1 - p
    otherwise    z / (1 - p) = 1: plain LoRA
    A: (r, in)   B: (out, r)   s = lora_alpha / r        arXiv 2508.17337

Start: as LoRA. lora_dropout acts on x as usual. A dropped rank gets no gradient; a step may drop
all ranks of a layer. How z is drawn: see plait/gates/drop.py. The released "dynamic pruning", not
followed, merges another function than it evaluates. Other methods can use the gate: `gates:
[droplora]`.
"""

from dataclasses import dataclass

from plait.core import FreeConfig, FreeDelta, option, register
from plait.gates.drop import DropGate, DropOptions


@dataclass
class DropLoraConfig(DropOptions, FreeConfig):
    """Options of DropLoRA."""

    lora_dropout: float = option(
        0.05, "Dropout on the update's input, a fraction.", least=0, below=1
    )


@register(
    "droplora",
    DropLoraConfig,
    paper="2508.17337",
    formula="dW = s B diag(z / (1 - p)) A, z = 1 - p in evaluation",
    rank="r",
)
class DropLora(FreeDelta):
    """See the module."""

    own_gates = (DropGate,)
    config: DropLoraConfig
