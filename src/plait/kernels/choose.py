"""Switches between the fast forms and the plain ones."""

from dataclasses import dataclass
from typing import Literal

Dense = Literal["tiles", "cached"]


@dataclass
class Switches:
    """What is in force; see `configure`."""

    fused: bool = True
    dense: Dense = "tiles"


switches = Switches()


def configure(fused: bool | None = None, dense: Dense | None = None) -> None:
    """Choose between forms that compute the same; None leaves a switch as it is.

    Args:
        fused: the fast form of updates of low rank and of Dual LoRA, True by default. False: plain
            operations, differentiable twice.
        dense: what Dual LoRA keeps between the micro-batches of an optimizer step. "tiles" keeps
            nothing. "cached" keeps W + dW of each layer, a second copy of the adapted weights, and
            saves computing it again.

    Raises:
        ValueError: an unknown value of `dense`.
    """
    if dense not in (None, "tiles", "cached"):
        raise ValueError(f'configure: dense = {dense!r} is not known. Use "tiles" or "cached".')
    switches.fused = switches.fused if fused is None else fused
    switches.dense = switches.dense if dense is None else dense
