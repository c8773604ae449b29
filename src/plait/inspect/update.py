"""Update: one dW (out, in) in fp64, kept as the product B A where it is one, else dense."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """dW = B A, or dW = B where A is None.

    Attributes:
        B: (out, k), or the dense (out, in).
        A: (k, in) or None. k may be 0: a dW of zeros.
    """

    B: Tensor
    A: Tensor | None = None

    def left(self, U: Tensor) -> Tensor:
        """U^T dW: (out, m) to (m, in)."""
        return U.T @ self.B if self.A is None else (U.T @ self.B) @ self.A

    def right(self, V: Tensor) -> Tensor:
        """The product dW V: (in, m) to (out, m)."""
        return self.B @ V if self.A is None else self.B @ (self.A @ V)

    def inner(self, other: "Update") -> float:
        """Frobenius inner product <dW, dW'>; factors are never multiplied out."""
        if self.A is None and other.A is None:
            return float((self.B * other.B).sum())
        if self.A is None or other.A is None:
            dense, low = (self, other) if self.A is None else (other, self)
            return float((dense.right(low.A.T) * low.B).sum())  # type: ignore[union-attr]
        return float(((self.B.T @ other.B) * (self.A @ other.A.T)).sum())

    def singular_values(self) -> Tensor:
        """Singular values, largest first: min(k, out, in) of a product, min(out, in) dense."""
        if self.A is None:
            return torch.linalg.svdvals(self.B)
        if not len(self.A):
            return self.A.new_zeros(0)
        # dW = Qb (Rb Ra^T) Qa^T: those of the small matrix in the middle.
        Rb, Ra = torch.linalg.qr(self.B, mode="r").R, torch.linalg.qr(self.A.T, mode="r").R
        return torch.linalg.svdvals(Rb @ Ra.T)

    def untouched(self) -> float | None:
        """Share of entries that are exactly 0; None for a product, whose zeros say nothing."""
        return None if self.A is not None else float((self.B == 0).double().mean())
