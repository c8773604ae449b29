"""What is computed from weights, kept for as long as the weights hold the same numbers.

Weights change in ways that leave no trace: fused optimizers do not raise a tensor's version, and
writes through `.data`, or through NumPy's view of the memory, raise nothing and call no hook. So a
value is kept with a copy of the numbers that it was computed from and is used again only where
these are equal to the last bit. The comparison reads r (in + out) numbers; NaN equals nothing and
is computed again. On accelerators a comparison would wait for the device: nothing is kept there.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

V = TypeVar("V")
_PLAIN = (Tensor, nn.Parameter)


class Kept:
    """Values by key, each with copies of the tensors that it was computed from.

    Attributes:
        made: how many values were computed, for tests and reports.
    """

    def __init__(self) -> None:
        self.values: dict[Any, tuple[list[Tensor], Any]] = {}
        self.made = 0

    def __deepcopy__(self, memo: Any) -> "Kept":
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def get(self, key: Any, sources: Sequence[Tensor] | None, make: Callable[[], V]) -> V:
        """The value of a key: the kept one where all sources are as they were, else a new one.

        Args:
            key: all that the value depends on besides the sources.
            sources: tensors whose numbers it depends on; None: unknown, so it is computed anew.
            make: computes it, without a graph.
        """
        kept = self.values.get(key)
        if kept is not None and sources is not None and _equal(sources, kept[0]):
            return kept[1]
        self.made += 1
        keeps = sources is not None and all(type(t) in _PLAIN and t.device.type == "cpu" for t in sources)
        # Leaving inference mode switches gradients on, so they are switched off inside.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
            if keeps and sources is not None:
                self.values[key] = [t.clone() for t in sources], value
            else:
                self.values.pop(key, None)
        return value


def _equal(now: Sequence[Tensor], then: Sequence[Tensor]) -> bool:
    if len(now) != len(then):
        return False
    for one, other in zip(now, then, strict=True):
        if type(one) not in _PLAIN or one.dtype != other.dtype or one.device != other.device:
            return False
        if not torch.equal(one, other):
            return False
    return True
