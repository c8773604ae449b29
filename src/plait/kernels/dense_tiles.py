"""Forward and backward of a DenseDelta, tile by tile over output rows.

Naive autograd of dW = f(B A, D C) keeps five weight-sized tensors per layer. Here the rows of dW
are computed when they are needed and dropped after use; the backward computes them again:

    rows a:b    N = s dW[a:b]                       (b - a, in), fp32
    forward     y[:, a:b] = x (W[a:b] + N)^T        joint form: the base weight is at hand
                y[:, a:b] = x N^T                   split form: base_layer(x) is added outside
    backward    dx += dy[:, a:b] (W[a:b] + N)
                gradients of the factors from dy[:, a:b]^T x, by autograd through N alone

Tiles go over output rows only. Over tokens, a straight-through estimator that clips would act on
partial sums and give another gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.low_rank import shaped

CPU_TILE = 2**19  # entries; the buffers of a tile stay in the cache of a core
GPU_TILE = 2**22
MIN_ROWS = 64
MANY_TILES = 4  # from here on dx is summed in fp32: in bf16 its error grows with the tile count


def tile_rows(in_features: int, device: torch.device) -> int:
    """Rows of one tile: about 2^19 entries on a CPU, 2^22 elsewhere, at least 64 rows."""
    entries = CPU_TILE if device.type == "cpu" else GPU_TILE
    return max(MIN_ROWS, entries // in_features)


def tiles(out_features: int, height: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each tile of rows."""
    for start in range(0, out_features, height):
        yield start, min(start + height, out_features)


class DenseTiles(torch.autograd.Function):
    """y = x (W + dW)^T + b, or x dW^T without W; no (out, in) tensor enters the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Callable[[int, int], Tensor],
        out_features: int,
        height: int,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        """Compute y (.., out) in the dtype of x.

        Args:
            rows: rows(start, stop) -> (stop - start, in) in fp32 or wider, the scaled delta.
            out_features: number of rows of dW.
            height: rows of one tile.
            x: (.., in).
            weight: frozen base weight (out, in) for the joint form, or None.
            bias: (out,), only with weight.
            params: the tensors that rows depends on.
        """
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        y = flat.new_empty(flat.shape[0], out_features)
        for start, stop in tiles(out_features, height):
            torch.mm(flat, _tile(rows, weight, start, stop, x.dtype).t(), out=y[:, start:stop])
        if bias is not None:
            y += bias.to(y.dtype)
        ctx.rows, ctx.height = rows, height
        ctx.save_for_backward(x, weight, bias, *params)
        return y if x.ndim == 2 else shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Recompute each tile and push its gradient through rows."""
        x, weight, bias, *params = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        trained = [p for p, need in zip(params, ctx.needs_input_grad[6:], strict=True) if need]
        flat = x.reshape(-1, x.shape[-1])
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        out_features = dy.shape[1]
        many = out_features > MANY_TILES * ctx.height
        wide = torch.promote_types(x.dtype, torch.float32) if many else x.dtype
        dx = flat.new_zeros(flat.shape, dtype=wide) if need_x else None
        sums = [torch.zeros_like(p) for p in trained]
        for start, stop in tiles(out_features, ctx.height):
            dy_rows = dy[:, start:stop]
            if dx is not None:
                tile = _tile(ctx.rows, weight, start, stop, x.dtype)
                dx += dy_rows @ tile
            if trained:
                with torch.enable_grad():
                    delta = ctx.rows(start, stop)
                G = (dy_rows.t() @ flat).to(delta.dtype)  # dL/d(dW rows), all tokens at once
                for total, grad in zip(sums, torch.autograd.grad(delta, trained, G), strict=True):
                    total += grad
        gradients = iter(sums)
        return (
            None,
            None,
            None,
            dx.to(x.dtype).view_as(x) if dx is not None else None,
            None,
            dy.sum(0).to(bias.dtype) if need_bias else None,
            *(next(gradients) if need else None for need in ctx.needs_input_grad[6:]),
        )


def _tile(
    rows: Callable[[int, int], Tensor],
    weight: Tensor | None,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows start:stop of the effective weight in the compute dtype."""
    with torch.no_grad():
        delta = rows(start, stop)
        return (delta if weight is None else delta.add_(weight[start:stop])).to(dtype)
