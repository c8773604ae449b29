"""How many ranks an update uses, from its singular values s_1 >= s_2 >= .. >= 0.

    stable rank      ||dW||_F^2 / ||dW||_2^2 = sum s_i^2 / s_1^2
    effective rank   exp H(p), p_i = s_i / sum s: m equal values give m (Roy and Vetterli, 2007)
    numerical rank   how many s_i > max(out, in) 2^-23 s_1, the rounding of fp32 factors

1 <= stable rank <= numerical rank and 1 <= effective rank <= number of s_i > 0. All are 0 for a dW
of zero.
"""

import torch
from torch import Tensor

from plait.inspect.routing import entropy

EPS = torch.finfo(torch.float32).eps  # 2^-23: factors are trained in fp32


def stable_rank(s: Tensor) -> float:
    """Stable rank of singular values (m,), largest first."""
    return float((s / s[0]).square().sum()) if len(s) and s[0] else 0.0


def effective_rank(s: Tensor) -> float:
    """Exponential of the entropy of singular values (m,), taken as a distribution."""
    return float(entropy(s / s.sum()).exp()) if len(s) and s[0] else 0.0


def numerical_rank(s: Tensor, shape: tuple[int, ...], eps: float = EPS) -> int:
    """Singular values (m,) above the rounding of a matrix of a shape.

    Args:
        s: largest first.
        shape: (out, in).
        eps: relative spacing of the numbers that the matrix was made of.
    """
    return int((s > max(shape) * eps * s[0]).sum()) if len(s) else 0
