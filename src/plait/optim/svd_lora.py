"""SVDLoRA: the dense step and its best rank-r part, the reference that LoRSum approximates.

    dW <- SVD_r(dW - lr step(G))        A = sqrt(Sigma / s) V^T    B = U sqrt(Sigma / s)

dW, G: (out, in)   A: (r, in)   B: (out, r)   step: G, or heavy-ball momentum mu M + (1 - tau) G.

Limits: it needs G as a dense matrix and a decomposition of it in each step. For tests and small
models. arXiv 2509.19977, 2602.16456.
"""

import torch
from torch import Tensor


def truncated(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V^T (r, in) of the best rank-r part of W (out, in)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def svd_lora(
    A: Tensor,
    B: Tensor,
    G: Tensor,
    *,
    lr: float,
    scaling: float = 1.0,
    M: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step.

    Args:
        A: (r, in). B: (out, r). G: (out, in), the gradient of dW = scaling B A.
        lr: of the dense step.
        scaling: s.
        M: (out, in), the last momentum; None: zero.
        momentum, dampening: mu and tau.

    Returns:
        A (r, in), B (out, r) and the momentum (out, in).
    """
    M = (1 - dampening) * G if M is None else momentum * M + (1 - dampening) * G
    U, S, Vh = truncated(scaling * B @ A - lr * M, len(A))
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root, M
