"""How alike two factors or two updates are: cosines, and angles between the spaces they span.

    cos(X, Y) = <X, Y>_F / (||X||_F ||Y||_F)
    angles 0 <= theta_1 <= .. <= theta_m <= pi/2 between span X and span Y, m the smaller dimension
    overlap = mean of cos^2 theta = ||Qx^T Qy||_F^2 / m, in [0, 1]

The basis of a factor is arbitrary: R A spans the rows of A for every invertible R, and B R^-1
undoes R in the product. Angles and overlap do not change with R; the cosine does. Two independent
random spaces of dimensions k and l in R^n have the expected overlap max(k, l) / n.

The angles come from sines where they are small and from cosines elsewhere: arccos alone knows
angles below 1e-8 only as 0 or noise (Bjoerck and Golub, Math. Comp. 27, 1973; Knyazev and
Argentati, SIAM J. Sci. Comput. 23, 2002).
"""

import torch
from torch import Tensor

from plait.inspect.spectrum import numerical_rank
from plait.inspect.update import Update


def cosine(x: Tensor | Update, y: Tensor | Update) -> float | None:
    """Cosine of two matrices as vectors; None where one is zero or the shapes differ.

    Args:
        x, y: both tensors of one shape, or both updates of one layer.
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.shape != y.shape:
            return None
        x, y = Update(x), Update(y)
    assert isinstance(x, Update)
    assert isinstance(y, Update)
    size = (max(x.inner(x), 0.0) * max(y.inner(y), 0.0)) ** 0.5
    return min(1.0, max(-1.0, x.inner(y) / size)) if size else None


def basis(columns: Tensor) -> Tensor:
    """Orthonormal basis (n, m) of the span of columns (n, k); m is their numerical rank."""
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    return U[:, : numerical_rank(S, tuple(columns.shape))]


def principal_angles(x: Tensor, y: Tensor) -> Tensor:
    """Principal angles in radians, smallest first, between two spans of columns.

    Args:
        x: (n, k). y: (n, l). Numerically dependent columns count once.

    Returns:
        (m,), m the smaller of the two dimensions; empty where a matrix is zero.
    """
    x, y = basis(x), basis(y)
    if x.shape[1] < y.shape[1]:
        x, y = y, x
    if not y.shape[1]:
        return x.new_zeros(0)
    across = x.T @ y  # (k, m)
    cos = torch.linalg.svdvals(across).clamp(max=1)
    sin = torch.linalg.svdvals(y - x @ across).clamp(max=1).flip(0)
    return torch.where(cos.square() > 0.5, sin.asin(), cos.acos())


def overlap(angles: Tensor) -> float | None:
    """Mean cos^2 of principal angles, in [0, 1]; None without angles."""
    return float(angles.cos().square().mean()) if len(angles) else None


def chance(x: Tensor, y: Tensor) -> float:
    """Expected overlap of two random spans of the shapes of x (n, k) and y (n, l)."""
    return min(1.0, max(x.shape[1], y.shape[1]) / x.shape[0])
