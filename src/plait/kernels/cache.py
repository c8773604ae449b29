"""What is computed from weights, kept for as long as the weights hold the same numbers.

Weights change in ways that leave no trace: fused optimizers do not raise a tensor's version, and
writes through `.data`, or through NumPy's view of the memory, raise nothing and call no hook. So a
value is kept with a copy of the numbers that it was computed from and is used again only where
these are equal to the last bit. The comparison reads r (in + out) numbers. On accelerators it
would wait for the device: nothing is kept there. Nor is anything kept or used while a tracer is at
work: its tensors hold no numbers, and a value from before would be a constant of its graph.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

V = TypeVar("V")
_PLAIN = (Tensor, nn.Parameter)
_MODES = torch._C._TorchDispatchModeKey
_TRACERS = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)

try:  # of the C library: the fastest exact comparison of memory, some 3 times that of torch.equal
    _memcmp = ctypes.PyDLL(None).memcmp
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _memcmp.restype = ctypes.c_int
except (AttributeError, OSError, TypeError):  # a platform that keeps it elsewhere
    _memcmp = None


class _Copy(NamedTuple):
    """The numbers of a tensor at some time, and where they were."""

    place: int
    size: int
    dtype: torch.dtype
    shape: torch.Size
    copy_place: int
    copy: Tensor


class Kept:
    """Values by key, each with copies of the tensors that it was computed from.

    Attributes:
        made: how many values were computed, for tests and reports.
    """

    def __init__(self) -> None:
        self.values: dict[Any, tuple[list[_Copy], Any]] = {}
        self.made = 0

    def __deepcopy__(self, memo: Any) -> "Kept":
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def copies(self, sources: Sequence[Tensor]) -> list[_Copy] | None:
        """The copies of a value that was computed from these tensors, or None."""
        if traced():
            return None
        for copies, _ in self.values.values():
            if copies and same(sources, copies):
                return copies
        return None

    def get(self, key: Any, sources: Sequence[Tensor] | None, make: Callable[[], V]) -> V:
        """The value of a key: the kept one where all sources are as they were, else a new one.

        Under a tracer it is always a new one, which is not kept.

        Args:
            key: all that the value depends on besides the sources.
            sources: tensors whose numbers it depends on; None: unknown, so it is computed anew.
            make: computes it; it runs without gradients.
        """
        tracer = traced()
        kept = None if tracer else self.values.get(key)
        if kept is not None and sources is not None and same(sources, kept[0]):
            return kept[1]
        self.made += 1
        # Leaving inference mode switches gradients on, so they are switched off inside.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
            if tracer:
                return value
            if sources is None or not all(map(_comparable, sources)):
                self.values.pop(key, None)
            else:
                self.values[key] = [_copied(t) for t in sources], value
        return value


class Notes(dict):
    """A dictionary that copies and pickles as an empty one."""

    def __deepcopy__(self, memo: Any) -> "Notes":
        return Notes()

    def __reduce__(self) -> Any:
        return Notes, ()


def traced() -> bool:
    """Whether the operations of this thread are recorded, or run on tensors without numbers.

    So it is under fake tensors, make_fx and torch.jit.trace. Modes that only watch, such as
    FlopCounterMode, do not count.
    """
    if torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def _comparable(t: Tensor) -> bool:
    """Whether a tensor's numbers lie in the memory of this process, in order."""
    return type(t) in _PLAIN and t.device.type == "cpu" and t.is_contiguous()


def _copied(t: Tensor) -> _Copy:
    copy = t.detach().clone()
    size = t.numel() * t.element_size()
    return _Copy(t.data_ptr(), size, t.dtype, t.shape, copy.data_ptr(), copy)


def same(now: Sequence[Tensor], then: Sequence[_Copy]) -> bool:
    """Whether all tensors are where they were, with the same bits."""
    if len(now) != len(then):
        return False
    for t, (place, size, dtype, shape, copy_place, copy) in zip(now, then, strict=True):
        # On another device the address is another one.
        if (
            type(t) not in _PLAIN
            or t.data_ptr() != place
            or t.dtype is not dtype
            or t.shape != shape
        ):
            return False
        if not t.is_contiguous():
            return False
        if _memcmp is None:
            if not torch.equal(t, copy):
                return False
        elif _memcmp(place, copy_place, size):
            return False
    return True
