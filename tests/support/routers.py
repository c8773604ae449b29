"""What routers compute, seen below autograd: in the fused form and in plain operations alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plait.kernels import configure


@contextmanager
def form(fused: bool) -> Iterator[None]:
    """The fused form of low rank, or plain operations."""
    configure(fused=fused)
    try:
        yield
    finally:
        configure(fused=True)


class Weights(NamedTuple):
    """One softmax.

    Attributes:
        computed_in: the dtype that the softmax is taken in.
        dtype: of the weights.
        error: largest difference from the fp64 softmax of the same logits.
    """

    computed_in: torch.dtype
    dtype: torch.dtype
    error: float


class Softmaxes(TorchDispatchMode):
    """Notes each softmax that runs.

    Attributes:
        seen: in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Weights] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and note."""
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._softmax:
            logits, dim, widens = args
            exact = torch.softmax(logits.detach().double(), dim)
            error = float((found.detach().double() - exact).abs().max())
            computed_in = torch.float32 if widens else logits.dtype
            self.seen.append(Weights(computed_in, found.dtype, error))
        return found
