"""Random bases from a seed: the same numbers on every device, in every process, without storage.

NumPy's raw Philox stream, which NumPy keeps stable, read as uint32, low half first:

    u = Philox(key=[seed, crc32(tag)])        value_n = ((u_n >> 8) - 2^23) 2^-23, in [-1, 1), fp32
    element (i, row, col) of a basis is n = (i rows + row) cols + col
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

CHECKED = 1024  # values that a checksum covers
CHUNK = 2**24  # numbers that are mixed at a time, and generated if a basis is not kept


def values(seed: int, tag: str, start: int, count: int) -> NDArray[np.float32]:
    """Values start .. start + count of a stream, fp32 in [-1, 1)."""
    generator = np.random.Philox(key=[seed, zlib.crc32(tag.encode())])
    whole = start // 8 * 8  # a block of the generator is 8 values
    generator.advance(whole // 8)
    pairs = generator.random_raw(-(-(start + count - whole) // 2))
    u = pairs.astype("<u8").view("<u4")[start - whole :][:count]
    return ((u >> 8).astype(np.int32) - 2**23).astype(np.float32) * np.float32(2.0**-23)


class Basis:
    """`count` matrices (rows, cols) of a seed and a tag, rounded to a dtype.

    Made by `basis`, one object for all layers that ask for the same; copies of a model share it.
    """

    def __init__(
        self, seed: int, tag: str, count: int, rows: int, cols: int, dtype: torch.dtype
    ) -> None:
        self.key = (seed, tag, count, rows, cols, dtype)
        self.seed, self.tag, self.count = seed, tag, count
        self.rows, self.cols, self.dtype = rows, cols, dtype
        self.kept: dict[torch.device, Tensor] = {}

    def __reduce__(self) -> Any:
        return basis, self.key

    def __deepcopy__(self, memo: Any) -> "Basis":
        return self

    def part(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Matrices start:stop, (stop - start, rows cols)."""
        size = self.rows * self.cols
        flat = values(self.seed, self.tag, start * size, (stop - start) * size)
        with torch.inference_mode(False):  # a kept one serves training as well
            return torch.from_numpy(flat).view(stop - start, size).to(device, self.dtype)

    def parts(self, device: torch.device, keep: bool) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, matrices) of the whole, a few at a time: kept, or made now."""
        kept = self.kept.get(device) if keep else None
        if keep and kept is None:
            kept = self.part(0, self.count, device)
            if type(kept) is Tensor:  # not the fake tensor of a tracer, which holds no numbers
                self.kept[device] = kept
        step = max(1, CHUNK // (self.rows * self.cols))
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            yield start, stop, self.part(start, stop, device) if kept is None else kept[start:stop]


_known: "WeakValueDictionary[tuple[Any, ...], Basis]" = WeakValueDictionary()


def basis(seed: int, tag: str, count: int, rows: int, cols: int, dtype: torch.dtype) -> Basis:
    """The basis of a seed and a tag, the same object for all who ask."""
    key = (seed, tag, count, rows, cols, dtype)
    known = _known.get(key)
    if known is None:
        known = _known[key] = Basis(*key)
    return known


def first_values(basis: Basis) -> int:
    """Checksum of the first 1024 values."""
    size = min(CHECKED, basis.count * basis.rows * basis.cols)
    return zlib.crc32(values(basis.seed, basis.tag, 0, size).astype("<f4").tobytes())


_mixture: Any = torch.compiler.disable(lambda w, *how: Mixture.apply(w, *how))  # NumPy's values


def mixture(w: Tensor, basis: Basis, keep: bool) -> Tensor:
    """sum_i w_i M_i / sqrt(k), (rows, cols) in the dtype of w, under autocast too.

    w: weights (k,) of the k matrices. keep: hold the basis in memory from now on, so that later
    compiled graphs have no break.
    """
    kept = basis.kept.get(w.device) if keep and torch.compiler.is_compiling() else None
    if kept is not None:
        return ((w[None] @ kept.to(w.dtype))[0] / basis.count**0.5).view(basis.rows, basis.cols)
    return _mixture(w, basis, keep)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A mixture is taken in the dtype of its weights: autocast would round every basis value."""
    known = torch.amp.is_autocast_available(device.type)
    on = known and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def inner(grad: Tensor, basis: Basis, keep: bool) -> Tensor:
    """<M_i, grad> / sqrt(k) for all i, (k,): the gradient of a mixture's weights.

    grad: (rows, cols), of the mixture. basis, keep: as in `mixture`.
    """
    flat = grad.reshape(-1, 1).to(torch.promote_types(grad.dtype, torch.float32))
    kept = basis.kept.get(flat.device) if keep else None
    if kept is not None and kept.dtype == flat.dtype and not torch._C._is_any_autocast_enabled():
        return (kept @ flat)[:, 0] / math.sqrt(basis.count)
    with _no_autocast(flat.device):
        products = [m.to(flat.dtype) @ flat for _, _, m in basis.parts(flat.device, keep)]
    return torch.cat(products)[:, 0] / math.sqrt(basis.count)


class Mixture(torch.autograd.Function):
    """The mixture and its gradient; the basis itself is not saved for the backward."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, basis: Basis, keep: bool) -> Tensor:
        """Mix; w: (k,)."""
        ctx.basis, ctx.keep = basis, keep
        ctx.save_for_backward(w)
        total = w.new_zeros(basis.rows * basis.cols)
        with _no_autocast(w.device):
            for start, stop, matrices in basis.parts(w.device, keep):
                total += (w[None, start:stop] @ matrices.to(w.dtype))[0]
        return (total / math.sqrt(basis.count)).view(basis.rows, basis.cols)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """dw_i = <M_i, grad> / sqrt(k)."""
        (w,) = ctx.saved_tensors
        return inner(grads[0].to(w.dtype), ctx.basis, ctx.keep), None, None
