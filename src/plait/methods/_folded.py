"""Factors of CoLA: sums of the A_i and of the B_j, by the strategy, and how gradients go back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import LowRankDelta, traced
from plait.core.low_rank import less_start


class Folded(LowRankDelta):
    """Sums of slices, a = V A and b = U B, less a start; see plait/methods/cola.py."""

    closed = (("A",), ("B",))
    reads = ("A", "B", "A0", "B0", "draw")
    closes_by = ("draw",)
    config: Any  # a ColaConfig
    A: nn.Parameter
    B: nn.Parameter
    A0: Tensor | None
    B0: Tensor | None
    draw: Tensor
    groups: Tensor

    def fold_A(self, A: Tensor) -> Tensor:
        """V A: (M, ..) to (k, ..)."""
        strategy = self.config.strategy
        if strategy == "random_b":
            return A[self.draw] if self.training else A.mean(0, keepdim=True)
        alone = strategy == "heuristic" or (strategy == "random" and self.training)
        return A if alone else A.sum(0, keepdim=True)

    def fold_B(self, B: Tensor) -> Tensor:
        """U B: (N, ..) to (k, ..)."""
        strategy = self.config.strategy
        if strategy == "heuristic":
            return B.new_zeros(self.config.num_A, *B.shape[1:]).index_add(0, self.groups, B)
        if strategy == "random":
            return B[self.draw] if self.training else B.mean(0, keepdim=True)
        return B if strategy == "random_b" and self.training else B.sum(0, keepdim=True)

    def shares(self) -> tuple[Tensor, Tensor]:
        """Shares of A0 and B0 in each term, (k, 1, 1)."""
        of_A, of_B = (p.new_full((len(p), 1, 1), 1 / len(p)) for p in (self.A, self.B))
        return self.fold_A(of_A), self.fold_B(of_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Rows [V A - V A0; A0], columns [U B | U B - U B0]: k r + r0 ranks."""
        a, b = self.fold_A(self.A), self.fold_B(self.B)  # (k, r, in), (k, out, r)
        if self.A0 is None or self.B0 is None:
            return a.flatten(0, 1), b.movedim(0, 1).flatten(1)
        # A0 holds one block, of which every term has a share, or a block for each.
        shares = () if len(self.A0) > self.config.r else self.shares()
        return less_start(a, b, self.A0, self.B0, *shares)

    def close(self, plan: Any) -> None:
        """Folding is linear in the slices."""
        V, U = (torch.eye(len(p), dtype=p.dtype, device=p.device) for p in (self.A, self.B))
        share: Tensor | float | None = None
        if self.A0 is not None:
            share = 1.0 if len(self.A0) > self.config.r else self.shares()[0].flatten()
        close_folds(plan, self.fold_A(V), self.fold_B(U), self.config.r, share)


def close_folds(plan: Any, V: Tensor, U: Tensor, r: int, share: Tensor | float | None) -> None:
    """Complete the plan of factors whose slices are sums: a = V A, b = U B.

    With a start, as `less_start` subtracts it, the gradient of b_i meets the activations of a_i and
    a share of those of A0.

    Args:
        plan: to complete.
        V: (k, M), numbers of A in each a. U: (k, N), likewise of B.
        r: rows of one A.
        share: `share_a` of less_start, (k,) or a number; None: no start.
    """
    k = len(V)
    if share is not None:
        plan.own_z = lambda dz: dz[:, : k * r]
        plan.own_h = partial(_with_start, k * r, share)
    of_A, of_B = _unfolding(V), _unfolding(U)
    if (
        k == 1 and not traced() and bool((V == 1).all() and (U == 1).all())
    ):  # all slices get the same gradient
        M, N = V.shape[1], U.shape[1]
        plan.pull_A = lambda _, dA: (dA.expand(M, -1, -1),)
        plan.pull_B = lambda _, dB: (dB.expand(N, -1, -1),)
        return
    plan.pull_A = lambda _, dA: (of_A(dA.unflatten(0, (k, r))),)
    plan.pull_B = lambda _, dB: (of_B(dB.unflatten(1, (k, r)).movedim(1, 0)),)


def _with_start(count: int, share: Tensor | float, h: Tensor) -> Tensor:
    own, start = h[:, :count], h[:, count:]
    if not isinstance(share, Tensor):
        return own + share * start
    shares = share.reshape(-1, 1).to(h.dtype)
    return (own.unflatten(1, (len(shares), -1)) + shares * start.unsqueeze(1)).flatten(1)


def _unfolding(V: Tensor) -> Callable[[Tensor], Tensor]:
    """grads -> V^T grads: from gradients (k, ..) of sums to those of the slices (n, ..)."""
    n = V.shape[1]
    if traced():  # the numbers of V cannot be looked at
        return lambda grads: torch.tensordot(V.t().to(grads.dtype), grads, 1)
    slices, sums = V.t().nonzero().unbind(1)
    values = V[sums, slices]
    alike = bool((values == 1).all())
    each_once = torch.equal(slices, torch.arange(n, device=V.device))
    if each_once and alike and torch.equal(sums, slices):
        return lambda grads: grads

    def unfold(grads: Tensor) -> Tensor:
        parts = grads[sums]
        if not alike:
            parts = parts * values.view(-1, *[1] * (grads.ndim - 1))
        if each_once:
            return parts
        return parts.new_zeros(n, *grads.shape[1:]).index_add_(0, slices, parts)

    return unfold
