"""Where an update points, seen from the weight: W = sum_i w_i u_i v_i^T, w_1 >= w_2 >= ..

    left    ||U_k^T dW||_F^2 / ||dW||_F^2     share of dW that writes into W's top output directions
    right   ||dW V_k||_F^2 / ||dW||_F^2       share of dW that reads W's top input directions
    cosine  <dW, W_k>_F / (||dW||_F ||W_k||_F), W_k = U_k diag(w) V_k^T, W's best rank-k part

A dW without any relation to W has the expected shares k / out and k / in and the cosine 0. A
negative cosine says that training shrank what W does most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.inspect.update import Update


@dataclass(frozen=True)
class Alignment:
    """The three numbers of one update; None where it or W is zero."""

    left: float | None
    right: float | None
    cosine: float | None


def principal(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top k singular triples of W (out, in), fp64: U (out, k), w (k,), V (in, k).

    They come from the eigenvectors of the smaller Gram matrix: exact for leading triples, and
    several times cheaper than a full SVD.
    """
    wide = W.shape[0] <= W.shape[1]
    values, vectors = torch.linalg.eigh(W @ W.T if wide else W.T @ W)  # smallest first
    near = vectors[:, -k:].flip(1)
    w = values[-k:].flip(0).clamp(min=0).sqrt()
    far = (W.T if wide else W) @ near
    far = far / torch.where(w > 0, w, 1.0)
    return (near, w, far) if wide else (far, w, near)


def alignment(dW: Update, parts: tuple[Tensor, Tensor, Tensor]) -> Alignment:
    """Shares and cosine of an update.

    Args:
        dW: of the layer.
        parts: from `principal`.
    """
    U, w, V = parts
    square = dW.inner(dW)
    if square <= 0:
        return Alignment(None, None, None)
    written, read = dW.left(U), dW.right(V)  # (k, in), (out, k)
    inner = ((U * read).sum(0) * w).sum()
    size = square**0.5 * float(torch.linalg.norm(w))
    return Alignment(
        left=float(written.square().sum()) / square,
        right=float(read.square().sum()) / square,
        cosine=float(inner) / size if size else None,
    )
