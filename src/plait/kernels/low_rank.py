"""One autograd Function for every update of low rank, the product of the frozen layer included.

    z = x A^T               (T, R_in)    T = all tokens of the call
    h = mix(g m z)          (T, R_out)   g: a gate, m: a random mask of ranks, both optional
    y = x W^T + b + s h B^T (T, out)     in place: no second tensor of T x out

    dh = s dy B             dB = s dy^T h            dz, dg, dmix from dh, on T x R numbers
    dA = dz^T x             dx = dy W + dz A         in place

All products are bracketed through rank space; none of the weight's size is formed. x, z and masks
are kept for the backward, h is not. A product whose gradient nobody needs is left out. Factors are
cast to the dtype of the computation, x never is.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["none", "matrix", "reduce", "expand", "pair", "table"]
Pull = Callable[[Any, Tensor], tuple[Tensor, ...]]


class Plan:
    """What all calls with the same weights have in common.

    The gradients go to `leaves`, the last arguments of the Function. Without `A` and `B` these are
    the factors themselves. With them, factors that were computed from the leaves beforehand, `of_A`
    leaves come first, then `of_B`, and `pull_A` and `pull_B` carry the gradients on to them. The
    gate, if there is one, and what the mix needs, M or G, follow as leaves.

    Attributes:
        scale: s.
        kind: of the mix; "matrix" takes a leaf M (R_out, R_in), routers a leaf G (n, in).
        A: (R_in, in), the router's G below it if `stacked`; None: the leaves.
        B: (out, R_out), or None likewise.
        of_A, of_B: how many leaves A and B were computed from.
        pull_A: (leaves, gradient of the trained rows of A) -> a gradient for each leaf of A.
        pull_B: (leaves, gradient of the trained columns of B) -> a gradient for each leaf of B.
        own_z: (T, R_in) -> the columns that belong to trained rows of A; None: all.
        own_h: (T, R_out) -> what trained columns of B are multiplied by, (T, ..); None: h.
        gated: whether a gate is among the leaves.
        spread, unspread: from a gate to the rank axis, and the gradient back; None: it has R_in.
        groups: of the rank axis, for routers and tables.
        stacked: whether A holds the router, too.
        weigh: (logits (.., n), rows) -> weights, where they are no plain softmax.
        keeps_leaves: whether the pulls read the leaves.
    """

    __slots__ = (
        "A", "B", "gated", "groups", "keeps_leaves", "kind", "of_A", "of_B", "own_h", "own_z",
        "pull_A", "pull_B", "scale", "spread", "stacked", "unspread", "weigh",
    )  # fmt: skip

    def __init__(self, scale: float, kind: Kind = "none", gated: bool = False) -> None:
        self.scale, self.kind, self.gated = scale, kind, gated
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.of_A = self.of_B = self.groups = 1
        self.stacked = self.keeps_leaves = False
        self.pull_A: Pull | None = None
        self.pull_B: Pull | None = None
        self.own_z: Callable[[Tensor], Tensor] | None = None
        self.own_h: Callable[[Tensor], Tensor] | None = None
        self.spread: Callable[[Tensor], Tensor] | None = None
        self.unspread: Callable[[Tensor], Tensor] | None = None
        self.weigh: Callable[..., Tensor] | None = None


def product(
    plan: Plan,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    drop: tuple[Tensor, float] | None,
    mask: Tensor | None,
    index: Tensor | None,
    rows: Any,
    leaves: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The forward, without a graph.

    Args:
        plan: see there.
        dtype: of the computation.
        x: (.., in).
        weight: (out, in) of the frozen layer, or None.
        bias: (out,), only with a weight.
        y: (.., out) to add to in place, only without a weight.
        drop: which inputs of A are kept (T, in), and 1 / (1 - p); None: all.
        mask: factor on z (T, R_in) or None.
        index: group of each token (T,), for a table.
        rows: what `weigh` gets.
        leaves: see Plan.

    Returns:
        y (.., out), the tokens (T, in), z (T, R_in), the router's logits (T, n) or None.
    """
    tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    tokens = tokens if tokens.dtype == dtype else tokens.to(dtype)
    A, B, rest = _factors(plan, dtype, leaves)
    source = tokens if drop is None else tokens * drop[0]
    z, logits = F.linear(source, A), None
    if plan.stacked:
        z, logits = z.tensor_split([len(A) - len(rest[-1])], dim=1)
    if drop is not None:
        z = z.mul_(drop[1])
    if logits is None and plan.kind in ("reduce", "expand", "pair"):
        logits = F.linear(tokens, rest[-1])
    h = _mixed(plan, z, logits, mask, index, rest, x.shape[:-1], rows)[0]
    if weight is not None:
        base = weight if weight.dtype == dtype else weight.to(dtype)
        shift = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
        out = F.linear(tokens, base, shift).addmm_(h, B.t(), alpha=plan.scale)
    elif y is not None:
        y.view(-1, len(B)).addmm_(h, B.t(), alpha=plan.scale)
        return y, tokens, z, logits
    else:
        out = F.linear(h if plan.scale == 1 else h * plan.scale, B)
    return (out if x.ndim == 2 else out.view(*x.shape[:-1], len(B))), tokens, z, logits


def _factors(
    plan: Plan, dtype: torch.dtype, leaves: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A, B, then the gate (on the rank axis) and what the mix needs, in the computation's dtype."""
    rest = leaves[plan.of_A + plan.of_B :]
    if plan.A is not None and plan.B is not None:
        A, B = plan.A, plan.B
    else:
        A, B = leaves[0], leaves[1]
        A = A if A.dtype == dtype else A.to(dtype)
        B = B if B.dtype == dtype else B.to(dtype)
    if not rest:
        return A, B, rest
    if plan.gated and plan.spread is not None:
        rest = (plan.spread(rest[0]), *rest[1:])
    return A, B, tuple(t if t.dtype == dtype else t.to(dtype) for t in rest)


def _mixed(
    plan: Plan,
    z: Tensor,
    logits: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    rest: tuple[Tensor, ...],
    lead: Any,
    rows: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h (T, R_out), z after mask and gate (T, R_in), and the router's weights (T, n) or None."""
    if mask is not None:
        z = z * mask
    if plan.gated:
        z = z * rest[0]
    kind = plan.kind
    if kind == "none":
        return z, z, None
    if kind == "matrix":
        return F.linear(z, rest[-1]), z, None
    if kind == "table":
        assert index is not None
        parts = z.unflatten(-1, (plan.groups, -1))  # (T, n, r)
        return parts.gather(1, _entries(index, parts)).squeeze(1), z, None
    assert logits is not None
    if plan.weigh is None:
        w = torch.softmax(logits, -1, dtype=_wide(logits.dtype))
    else:
        w = plan.weigh(logits.view(*lead, logits.shape[-1]), rows).reshape(logits.shape)
    narrow = w if w.dtype == z.dtype else w.to(z.dtype)
    if kind == "expand":
        return (narrow.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2), z, w
    parts = z.unflatten(-1, (plan.groups, -1))
    if kind == "pair":
        return (narrow.unsqueeze(-1) * parts).flatten(-2), z, w
    return (narrow.unsqueeze(-1) * parts).sum(1), z, w


def _entries(index: Tensor, parts: Tensor) -> Tensor:
    """The index of each token's group, (T, 1, r)."""
    return index.view(-1, 1, 1).expand(-1, 1, parts.shape[-1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class LowRank(torch.autograd.Function):
    """`product` with its backward; arguments as there, the leaves at the end.

    With `y` the result is y itself, changed in place: nobody else may need its old value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        dtype: torch.dtype,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        drop: tuple[Tensor, float] | None,
        mask: Tensor | None,
        index: Tensor | None,
        rows: Any,
        *leaves: Tensor,
    ) -> Tensor:
        """Compute y (.., out) in `dtype`."""
        out, tokens, z, logits = product(
            plan, dtype, x, weight, bias, y, drop, mask, index, rows, leaves
        )
        if y is not None:
            ctx.mark_dirty(y)
        needs = ctx.needs_input_grad
        first = _LEAVES
        trains_A = True in needs[first : first + plan.of_A]
        routed = logits is not None and needs[first + len(leaves) - 1]
        ctx.plan, ctx.dtype, ctx.rows = plan, dtype, rows
        ctx.shape, ctx.x_dtype, ctx.trains_A, ctx.routed = x.shape, x.dtype, trains_A, routed
        ctx.keep = None if drop is None else drop[1]
        ctx.save_for_backward(
            tokens if trains_A or routed else None,
            z,
            logits,
            weight if needs[2] else None,
            None if drop is None else drop[0],
            mask,
            index,
            *(leaves if plan.A is None or plan.keeps_leaves else leaves[plan.of_A + plan.of_B :]),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, the bias, y and the leaves."""
        plan: Plan = ctx.plan
        tokens, z, logits, weight, kept, mask, index, *saved = ctx.saved_tensors
        needs, count = ctx.needs_input_grad, plan.of_A + plan.of_B
        whole = plan.A is None or plan.keeps_leaves
        leaves = tuple(saved) if whole else (*[z] * count, *saved)  # the pulls read none of these
        A, B, rest = _factors(plan, ctx.dtype, leaves)
        dy = grads[0] if grads[0].ndim == 2 else grads[0].reshape(-1, len(B))
        dh = torch.mm(dy, B)
        if plan.scale != 1:
            dh.mul_(plan.scale)
        lead = ctx.shape[:-1]
        h, gated, w = _mixed(plan, z, logits, mask, index, rest, lead, ctx.rows)
        found: list[Tensor | None] = [None] * len(leaves)

        if True in needs[_LEAVES + plan.of_A : _LEAVES + count]:
            h = h if plan.own_h is None else plan.own_h(h)
            dB = torch.mm(dy.t(), h if plan.scale == 1 else h * plan.scale)
            found[plan.of_A : count] = [dB] if plan.pull_B is None else plan.pull_B(leaves, dB)

        needs_G = ctx.routed
        needs_rest = needs[_LEAVES + count :]
        dz, dmix = _unmixed(plan, dh, gated, logits, w, index, rest, lead, ctx.rows, needs_rest)
        dlogits = dmix if plan.kind in ("reduce", "expand", "pair") else None
        if plan.kind == "matrix" and needs_rest[-1]:
            found[-1] = dmix
        if plan.gated:
            masked = z if mask is None else z * mask
            if needs_rest[0]:
                dg = (dz * masked).sum(0)
                found[count] = dg if plan.unspread is None else plan.unspread(dg)
            dz = dz * rest[0]
        if mask is not None:
            dz = dz * mask
        if ctx.keep is not None:
            dz = dz * ctx.keep

        if ctx.trains_A or needs_G:
            source = tokens if kept is None else tokens * kept
            own = dz if plan.own_z is None else plan.own_z(dz)
            if plan.stacked and ctx.trains_A and needs_G:
                both = torch.mm(torch.cat([own, dlogits], dim=1).t(), source)
                dA, found[-1] = both[: own.shape[1]], both[own.shape[1] :]
            else:
                dA = torch.mm(own.t(), source) if ctx.trains_A else None
                found[-1] = torch.mm(dlogits.t(), tokens) if needs_G else found[-1]
            if dA is not None:
                found[: plan.of_A] = [dA] if plan.pull_A is None else plan.pull_A(leaves, dA)

        dx = None
        if needs[2]:
            if weight is not None:
                dx = torch.mm(dy, weight if weight.dtype == ctx.dtype else weight.to(ctx.dtype))
            if plan.stacked:
                dz = torch.cat([dz, dlogits], dim=1)
            if kept is not None:
                part = torch.mm(dz, A).mul_(kept)
                dx = part if dx is None else dx.add_(part)
            else:
                dx = torch.mm(dz, A) if dx is None else dx.addmm_(dz, A)
            if dlogits is not None and not plan.stacked:
                dx.addmm_(dlogits, rest[-1])
            dx = dx if dx.dtype == ctx.x_dtype else dx.to(ctx.x_dtype)
            dx = dx if len(ctx.shape) == 2 else dx.view(ctx.shape)
        dbias = dy.sum(0) if needs[4] else None
        dy_in = grads[0] if needs[5] else None
        return None, None, dx, None, dbias, dy_in, None, None, None, None, *found


_LEAVES = 10  # arguments of the Function before the leaves


def _unmixed(
    plan: Plan,
    dh: Tensor,
    z: Tensor,
    logits: Tensor | None,
    w: Tensor | None,
    index: Tensor | None,
    rest: tuple[Tensor, ...],
    lead: Any,
    rows: Any,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of z (T, R_in), after mask and gate, and of M or of the logits (T, n)."""
    kind = plan.kind
    if kind == "none":
        return dh, None
    if kind == "matrix":
        return torch.mm(dh, rest[-1]), torch.mm(dh.t(), z) if needs[-1] else None
    if kind == "table":
        assert index is not None
        parts = dh.unsqueeze(1)  # (T, 1, r)
        dz = dh.new_zeros(len(dh), plan.groups, dh.shape[1])
        return dz.scatter_(1, _entries(index, parts), parts).flatten(1), None
    assert w is not None
    assert logits is not None
    narrow = w if w.dtype == dh.dtype else w.to(dh.dtype)
    if kind == "expand":
        parts = dh.unflatten(-1, (plan.groups, -1))
        dz = (narrow.unsqueeze(-1) * parts).sum(1)
        dw = (parts * z.unsqueeze(1)).sum(-1)
    elif kind == "pair":
        parts = dh.unflatten(-1, (plan.groups, -1))
        dz = (narrow.unsqueeze(-1) * parts).flatten(-2)
        dw = (parts * z.unflatten(-1, (plan.groups, -1))).sum(-1)
    else:
        dz = (narrow.unsqueeze(-1) * dh.unsqueeze(-2)).flatten(-2)
        dw = (z.unflatten(-1, (plan.groups, -1)) * dh.unsqueeze(1)).sum(-1)
    dw = dw if dw.dtype == w.dtype else dw.to(w.dtype)
    if plan.weigh is None:
        dlogits = w * (dw - (w * dw).sum(-1, keepdim=True))
    else:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            again = plan.weigh(leaf.view(*lead, leaf.shape[-1]), rows)
            (dlogits,) = torch.autograd.grad(again, leaf, dw.view_as(again))
    return dz, dlogits if dlogits.dtype == dh.dtype else dlogits.to(dh.dtype)
