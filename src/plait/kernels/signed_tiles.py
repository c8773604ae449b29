"""The closed form of dW = c relu(B A) * sgn(D C), tile by tile over output rows.

Per tile of rows i, in buffers that are allocated once a call:

    P = B_i A    Z = D_i C    R = relu(P)    N = where(Z > 0, R, -R)          (rows, in), fp32
    forward      y_i = x (W_i + c N)^T + b_i
    backward     dx += dy_i (W_i + c N)      G = dy_i^T x
                 GP = G sgn(N), which is 0 where P <= 0        dB_i = c GP A^T   dA += c B_i^T GP
                 GZ = clip(c G R, -1, 1) for ste = "clip"      dD_i = GZ C^T     dC += D_i^T GZ

Three products a tile forward and eight backward. `whole`, W + c N kept from an earlier micro-batch,
takes the place of the tiles in y and dx; P and Z are computed again, because the masks cannot be
read back from a sum that was rounded.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.dense_tiles import MANY_TILES, tiles
from plait.kernels.low_rank import scaled_mm, shaped


class _Buffers:
    """What one call writes its tiles into; the last tile may be lower.

    A layer of one tile needs none: its tensors are made by the operations themselves.
    """

    def __init__(self, A: Tensor, height: int, dtype: torch.dtype, out_features: int) -> None:
        self.single, self.dtype = height >= out_features, dtype
        if self.single:
            return
        n_in = A.shape[1]
        self.P, self.Z, self.N = A.new_empty(3, height, n_in).unbind()
        self.positive = A.new_empty(height, n_in, dtype=torch.bool)
        self.W = A.new_empty(height, n_in, dtype=dtype)

    def rows(
        self, A: Tensor, B: Tensor, C: Tensor, D: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """R, Z and N of rows start:stop."""
        if self.single:
            P, Z = torch.mm(B, A).relu_(), torch.mm(D, C)
            return P, Z, torch.where(Z > 0, P, -P)
        n = stop - start
        P, Z, N, positive = self.P[:n], self.Z[:n], self.N[:n], self.positive[:n]
        torch.mm(B[start:stop], A, out=P).relu_()
        torch.mm(D[start:stop], C, out=Z)
        torch.gt(Z, 0, out=positive)
        torch.neg(P, out=N)
        torch.where(positive, P, N, out=N)
        return P, Z, N

    def weight(self, N: Tensor, base: Tensor | None, c: float) -> Tensor:
        """W + c N in the dtype of the computation."""
        if self.single:
            W = N * c if base is None else torch.add(base, N, alpha=c)
            return W if W.dtype == self.dtype else W.to(self.dtype)
        W = self.W[: len(N)]
        if base is None:
            return torch.mul(N, c, out=W)
        return torch.add(base, N, alpha=c, out=W)


class SignedTiles(torch.autograd.Function):
    """y = x (W + dW)^T + b, or x dW^T without W."""

    @staticmethod
    def forward(
        ctx: Any,
        c: float,
        clip: bool,
        height: int,
        dtype: torch.dtype,
        whole: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
    ) -> Tensor:
        """Compute y (.., out) in `dtype`.

        Args:
            c: factor of the update, not negative.
            clip: whether the gradient of sgn is clipped to [-1, 1].
            height: rows of a tile.
            dtype: of x, W and y in the products.
            whole: W + dW (out, in) in `dtype`, or None.
            x: (.., in).
            weight: (out, in), frozen, or None. bias: (out,), only with a weight.
            A, C: (r, in). B, D: (out, r). All fp32 or all fp64.
        """
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.dtype == dtype else flat.to(dtype)
        shift = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        out_features = len(B)
        if whole is None and height >= out_features:
            buffers = _Buffers(A, height, dtype, out_features)
            N = buffers.rows(A, B, C, D, 0, out_features)[2]
            whole_now: Tensor | None = buffers.weight(N, weight, c)
        else:
            whole_now = whole
        if whole_now is not None:
            y = F.linear(flat, whole_now, shift)
        else:
            buffers = _Buffers(A, height, dtype, out_features)
            y = flat.new_empty(len(flat), out_features)
            for start, stop in tiles(out_features, height):
                N = buffers.rows(A, B, C, D, start, stop)[2]
                rows = buffers.weight(N, None if weight is None else weight[start:stop], c)
                torch.mm(flat, rows.t(), out=y[:, start:stop])
            if shift is not None:
                y += shift
        ctx.c, ctx.clip, ctx.height, ctx.dtype, ctx.whole = c, clip, height, dtype, whole
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        trains = True in ctx.needs_input_grad[8:]
        ctx.save_for_backward(flat if trains else None, weight, A, B, C, D)
        return y if x.ndim == 2 else shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, the bias and the factors."""
        flat, weight, A, B, C, D = ctx.saved_tensors
        needs, c, out_features, dtype = ctx.needs_input_grad, ctx.c, len(B), ctx.dtype
        height = min(ctx.height, out_features)
        dy = grads[0].reshape(-1, out_features)
        dx: Tensor | None = None
        dA: Any = None
        dB: Any = None
        dC: Any = None
        dD: Any = None
        trains = True in needs[8:]
        by_tile = needs[5] and ctx.whole is None
        if needs[5] and ctx.whole is not None:
            dx = torch.mm(dy, ctx.whole)
        many = out_features > MANY_TILES * height
        wide = torch.promote_types(dtype, torch.float32) if many else dtype
        single = height >= out_features
        if trains and not single:
            dA, dB, dC, dD = (torch.zeros_like(A), torch.empty_like(B),
                              torch.zeros_like(C), torch.empty_like(D))  # fmt: skip
        rows_needed = tiles(out_features, height) if trains or by_tile else ()
        buffers = _Buffers(A, height, dtype, out_features)
        G = A.new_empty(height if trains and not single else 0, A.shape[1])
        narrow = None if dtype == A.dtype else torch.empty_like(G, dtype=dtype)
        for start, stop in rows_needed:
            R, Z, N = buffers.rows(A, B, C, D, start, stop)
            dy_rows = dy[:, start:stop]
            if by_tile:
                base = None if weight is None else weight[start:stop]
                rows = buffers.weight(N, base, c)
                if dx is None:
                    dx = torch.mm(dy_rows, rows).to(wide)
                elif dx.dtype == dtype:
                    dx.addmm_(dy_rows, rows)
                else:
                    dx += torch.mm(dy_rows, rows)
            if not trains:
                continue
            if single:
                dA, dB, dC, dD = _all_rows(ctx, dy, flat, A, B, C, D, R, Z, N)
                continue
            n = stop - start
            g = G[:n]
            if narrow is None:
                torch.mm(dy_rows.t(), flat, out=g)
            else:
                g.copy_(torch.mm(dy_rows.t(), flat, out=narrow[:n]))
            if needs[10] or needs[11]:
                torch.mul(g, R, out=Z)
                if ctx.clip and c > 0:
                    Z.clamp_(-1 / c, 1 / c)
                dD[start:stop].addmm_(Z, C.t(), beta=0, alpha=c)
                dC.addmm_(D[start:stop].t(), Z, alpha=c)
            if needs[8] or needs[9]:
                N.sign_().mul_(g)
                dB[start:stop].addmm_(N, A.t(), beta=0, alpha=c)
                dA.addmm_(B[start:stop].t(), N, alpha=c)
        if dx is not None:
            dx = dx.to(ctx.x_dtype).view(ctx.shape)
        dbias = dy.sum(0) if needs[7] else None
        return None, None, None, None, None, dx, None, dbias, dA, dB, dC, dD


def _all_rows(
    ctx: Any,
    dy: Tensor,
    flat: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    R: Tensor,
    Z: Tensor,
    N: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of A, B, C and D where one tile holds all rows; Z and N are overwritten."""
    needs, c = ctx.needs_input_grad, ctx.c
    dA = dB = dC = dD = None
    g = torch.mm(dy.t(), flat)
    g = g if g.dtype == A.dtype else g.to(A.dtype)
    if needs[10] or needs[11]:
        torch.mul(g, R, out=Z)
        if ctx.clip and c > 0:
            Z.clamp_(-1 / c, 1 / c)
        dD, dC = scaled_mm(Z, C.t(), c), scaled_mm(D.t(), Z, c)
    if needs[8] or needs[9]:
        N.sign_().mul_(g)
        dB, dA = scaled_mm(N, A.t(), c), scaled_mm(B.t(), N, c)
    return dA, dB, dC, dD


def signed_weight(
    weight: Tensor,
    c: float,
    height: int,
    dtype: torch.dtype,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    """W + c N, (out, in) in `dtype`, by the same tiles as SignedTiles; arguments as there."""
    whole = torch.empty_like(weight, dtype=dtype)
    height = min(height, len(B))
    buffers = _Buffers(A, height, dtype, len(B))
    for start, stop in tiles(len(B), height):
        N = buffers.rows(A, B, C, D, start, stop)[2]
        torch.add(weight[start:stop], N, alpha=c, out=whole[start:stop])
    return whole
