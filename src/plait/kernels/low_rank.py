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

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["none", "matrix", "reduce", "expand", "pair", "table"]
Pull = Callable[[Any, Tensor], tuple[Tensor, ...]]


class Plan:
    """What all calls with the same weights have in common.

    The gradients go to `leaves`, the last arguments of the Function: those of A, of B, of the gate
    and of the mix. A leaf is the factor itself (A, B, the gate, M or a router's G), unless the plan
    holds that factor, computed from the leaves beforehand; then a pull carries its gradient on.

    Attributes:
        scale: s.
        kind: of the mix; "matrix" multiplies by M (R_out, R_in), routers by G (n, in).
        A: (R_in, in), the router's G below it if `stacked`; None: the first leaf.
        B: (out, R_out), or None likewise.
        gate: (R_in,), or None: a leaf, if `gated`.
        M: (R_out, R_in), or None: the last leaf, if the mix has one.
        of_A, of_B: numbers of leaves of A and of B.
        pull_A: (leaves, gradient of the trained rows of A) -> a gradient for each leaf of A.
        pull_B: (leaves, gradient of the trained columns of B) -> a gradient for each leaf of B.
        pull_M: (leaves of M, gradient of M) -> a gradient for each of them.
        own_z: (T, R_in) -> the columns that belong to trained rows of A; None: all.
        own_h: (T, R_out) -> what trained columns of B are multiplied by, (T, ..); None: h.
        gated: whether there is a gate with a leaf.
        spread: from the gate's leaf to the rank axis; None: it has R_in. unspread: the gradient.
        groups: of the rank axis, for routers and tables.
        stacked: whether A holds the router, too.
        weigh: (logits (.., n), rows) -> weights, where they are no plain softmax.
        keeps_leaves: whether the pulls read the leaves.
    """

    __slots__ = (
        "A", "B", "M", "gate", "gated", "groups", "keeps_leaves", "kind", "of_A", "of_B", "own_h",
        "own_z", "pull_A", "pull_B", "pull_M", "scale", "spread", "stacked", "unspread", "weigh",
    )  # fmt: skip

    def __init__(self, scale: float, kind: Kind = "none", gated: bool = False) -> None:
        self.scale, self.kind, self.gated = scale, kind, gated
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.M: Tensor | None = None
        self.gate: Tensor | None = None
        self.of_A = self.of_B = self.groups = 1
        self.stacked = self.keeps_leaves = False
        self.pull_A: Pull | None = None
        self.pull_B: Pull | None = None
        self.pull_M: Pull | None = None
        self.own_z: Callable[[Tensor], Tensor] | None = None
        self.own_h: Callable[[Tensor], Tensor] | None = None
        self.spread: Callable[[Tensor], Tensor] | None = None
        self.unspread: Callable[[Tensor], Tensor] | None = None
        self.weigh: Callable[..., Tensor] | None = None


class Call(NamedTuple):
    """What one call has beside its tensors of activations and weights.

    Attributes:
        plan: see there.
        dtype: of the computation.
        kept: which inputs of A are kept (T, in), bool; None: all.
        raised: 1 / (1 - p), by which z is multiplied for that.
        mask: factor on z (T, R_in), or None.
        index: group of each token (T,), for a table.
        rows: what the plan's `weigh` gets.
    """

    plan: Plan
    dtype: torch.dtype
    kept: Tensor | None
    raised: float
    mask: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    rows: Any


ROUTERS = ("reduce", "expand", "pair")


def product(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    leaves: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The forward, without a graph.

    Args:
        call: see there.
        x: (.., in).
        weight: (out, in) of the frozen layer, or None.
        bias: (out,), only with a weight.
        y: (.., out) to add to in place, only without a weight.
        leaves: see Plan.

    Returns:
        y (.., out), the tokens (T, in), z (T, R_in), and of a router the logits and the weights.
    """
    plan, dtype, kept, raised, mask, index, rows = call
    tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if tokens.dtype != dtype:
        tokens = tokens.to(dtype)
    A, B, gate, M = factors_of(plan, dtype, leaves)
    z, logits, w = F.linear(tokens if kept is None else tokens * kept, A), None, None
    if plan.stacked:
        z, logits = z[:, : -plan.groups], z[:, -plan.groups :]
    if kept is not None:
        z = z.mul_(raised)
    if plan.kind in ROUTERS:
        logits = F.linear(tokens, M) if logits is None else logits  # type: ignore[arg-type]
        if plan.weigh is None:
            w = torch.softmax(logits, -1, dtype=torch.promote_types(dtype, torch.float32))
        else:
            lead = (*x.shape[:-1], logits.shape[-1])
            w = plan.weigh(logits.view(lead), rows).reshape(logits.shape)
    h = mixed(plan, z, w, mask, gate, M, index)[0]
    scale = plan.scale
    if weight is not None:
        if weight.dtype != dtype:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        out = F.linear(tokens, weight, bias).addmm_(h, B.t(), alpha=scale)
    elif y is not None:
        y.view(-1, B.shape[0]).addmm_(h, B.t(), alpha=scale)
        return y, tokens, z, logits, w
    else:
        out = F.linear(h if scale == 1 else h * scale, B)
    if x.ndim != 2:
        out = shaped(out, x)
    return out, tokens, z, logits, w


def shaped(out: Tensor, x: Tensor) -> Tensor:
    """A fresh tensor (T, out) with the leading axes of x (.., in).

    Not a view to autograd: whoever gets it may change it in place, as an output of nn.Linear.
    """
    return torch.ops.aten._unsafe_view.default(out, [*x.shape[:-1], out.shape[-1]])


def factors_of(
    plan: Plan, dtype: torch.dtype, leaves: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A, B, the gate on the rank axis and M or G, in the dtype of the computation."""
    A, B, gate, M = plan.A, plan.B, plan.gate, plan.M
    if A is None or B is None:
        A, B = leaves[0], leaves[1]
        if A.dtype != dtype:
            A = A.to(dtype)
        if B.dtype != dtype:
            B = B.to(dtype)
    if plan.gated and gate is None:
        gate = leaves[plan.of_A + plan.of_B]
        gate = gate if plan.spread is None else plan.spread(gate)
        if gate.dtype != dtype:
            gate = gate.to(dtype)
    if plan.kind not in ("none", "table") and M is None:
        M = leaves[-1]
        if M.dtype != dtype:
            M = M.to(dtype)
    return A, B, gate, M


def mixed(
    plan: Plan,
    z: Tensor,
    w: Tensor | None,
    mask: Tensor | None,
    gate: Tensor | None,
    M: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h (T, R_out), and z after mask and gate (T, R_in)."""
    if mask is not None:
        z = z * mask
    if gate is not None:
        z = z * gate
    kind = plan.kind
    if kind == "none":
        return z, z
    if kind == "matrix":
        return F.linear(z, M), z  # type: ignore[arg-type]
    if kind == "table":
        parts = z.unflatten(-1, (plan.groups, -1))  # (T, n, r)
        return parts.gather(1, _entries(index, parts)).squeeze(1), z  # type: ignore[arg-type]
    narrow = _as(w, z).unsqueeze(-1)  # type: ignore[arg-type]
    if kind == "expand":
        return (narrow * z.unsqueeze(-2)).flatten(-2), z
    weighted = narrow * z.unflatten(-1, (plan.groups, -1))
    return weighted.flatten(-2) if kind == "pair" else weighted.sum(1), z


def _entries(index: Tensor, parts: Tensor) -> Tensor:
    """The index of each token's group, (T, 1, r)."""
    return index.view(-1, 1, 1).expand(-1, 1, parts.shape[-1])


def _as(t: Tensor, like: Tensor) -> Tensor:
    return t if t.dtype == like.dtype else t.to(like.dtype)


class LowRank(torch.autograd.Function):
    """`product` with its backward; arguments as there, the leaves one by one.

    With `y` the result is y itself, changed in place: nobody else may need its old value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        *leaves: Tensor,
    ) -> Tensor:
        """Compute y (.., out) in the dtype of the computation."""
        out, tokens, z, logits, w = product(call, x, weight, bias, y, leaves)
        if y is not None:
            ctx.mark_dirty(y)
        plan, needs = call.plan, ctx.needs_input_grad
        routed = w is not None and needs[-1]
        trains_A = True in needs[_LEAVES : _LEAVES + plan.of_A]
        ctx.call, ctx.x_shape, ctx.x_dtype, ctx.trains_A = call, x.shape, x.dtype, trains_A
        ctx.save_for_backward(
            tokens if trains_A or routed else None,
            z,
            logits if plan.weigh is not None else None,
            w,
            weight if needs[1] else None,
            *leaves,
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, the bias, y and the leaves; a second derivative raises RuntimeError."""
        return _once(ctx, grads[0]) if torch.is_grad_enabled() else _backward(ctx, grads[0])


# Torch's own `apply` unwraps arguments of functorch's transforms first; there are none here.
fused = super(torch.autograd.Function, LowRank).apply  # type: ignore[misc]
_LEAVES = 5  # arguments of the Function before the leaves


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    plan, dtype, kept, raised, mask, index, rows = ctx.call
    tokens, z, logits, w, weight, *leaves = ctx.saved_tensors
    needs, count, scale = ctx.needs_input_grad, plan.of_A + plan.of_B, plan.scale
    A, B, gate, M = factors_of(plan, dtype, leaves)
    dy = grad if grad.ndim == 2 else grad.reshape(-1, B.shape[0])
    found: list[Tensor | None] = [None] * len(leaves)
    h, gated = mixed(plan, z, w, mask, gate, M, index)
    if True in needs[_LEAVES + plan.of_A : _LEAVES + count]:
        own = h if plan.own_h is None else plan.own_h(h)
        dB = scaled_mm(dy.t(), own, scale)
        found[plan.of_A : count] = [dB] if plan.pull_B is None else plan.pull_B(leaves, dB)

    dz = torch.mm(dy, B)
    simple = plan.kind == "none" and gate is None
    if not simple and scale != 1:
        dz.mul_(scale)
    last = scale if simple else 1  # what dA and dx are still to be multiplied by
    dlogits = None
    if plan.kind == "matrix":
        if True in needs[_LEAVES + count + plan.gated :]:
            dM = torch.mm(dz.t(), gated)
            after = count + plan.gated
            own = leaves[after:]
            found[after:] = [dM] if plan.pull_M is None else plan.pull_M(own, dM)
        dz = torch.mm(dz, M)  # type: ignore[arg-type]
    elif plan.kind == "table":
        parts = dz.unsqueeze(1)  # (T, 1, r)
        dz = dz.new_zeros(dz.shape[0], plan.groups, dz.shape[1])
        dz = dz.scatter_(1, _entries(index, parts), parts).flatten(1)
    elif plan.kind != "none":
        dz, dlogits = unrouted(plan, dz, gated, logits, w, ctx.x_shape[:-1], rows)
    if gate is not None:
        if plan.gated and needs[_LEAVES + count]:
            dg = (dz * (z if mask is None else z * mask)).sum(0)
            found[count] = dg if plan.unspread is None else plan.unspread(dg)
        dz = dz * gate
    if mask is not None:
        dz = dz * mask
    if kept is not None:
        dz = dz * raised

    routed = dlogits is not None and needs[-1]
    both = torch.cat([dz, dlogits], dim=1) if plan.stacked else dz  # type: ignore[list-item]
    if ctx.trains_A:
        own = dz if plan.own_z is None else plan.own_z(dz)
        source = tokens if kept is None else tokens * kept
        if plan.stacked and routed:
            stack = both if plan.own_z is None else torch.cat([own, dlogits], dim=1)  # type: ignore[list-item]
            dA = torch.mm(stack.t(), source)
            dA, found[-1] = dA[: -plan.groups], dA[-plan.groups :]
        else:
            dA = scaled_mm(own.t(), source, last)
        found[: plan.of_A] = [dA] if plan.pull_A is None else plan.pull_A(leaves, dA)
    if routed and found[-1] is None:
        found[-1] = torch.mm(dlogits.t(), tokens)  # type: ignore[union-attr]

    dx = None
    if needs[1]:
        if weight is not None:
            dx = torch.mm(dy, weight if weight.dtype == dtype else weight.to(dtype))
        if kept is not None:
            part = torch.mm(both, A).mul_(kept)
            part = part if last == 1 else part.mul_(last)
            dx = part if dx is None else dx.add_(part)
        else:
            dx = scaled_mm(both, A, last) if dx is None else dx.addmm_(both, A, alpha=last)
        if dlogits is not None and not plan.stacked:
            dx.addmm_(dlogits, M)  # type: ignore[arg-type]
        if dx.dtype != ctx.x_dtype:
            dx = dx.to(ctx.x_dtype)
        if len(ctx.x_shape) != 2:
            dx = dx.view(ctx.x_shape)
    return (
        None,
        dx,
        None,
        dy.sum(0) if needs[3] else None,
        grad if needs[4] else None,
        *found,
    )


_once = once_differentiable(_backward)


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, the scale in the product."""
    if scale == 1 or not b.shape[0]:
        return torch.mm(a, b)
    return torch.addmm(b[:1], a, b, beta=0, alpha=scale)  # with beta = 0 the first is not read


def unrouted(
    plan: Plan,
    dh: Tensor,
    z: Tensor,
    logits: Tensor | None,
    w: Tensor,
    lead: Any,
    rows: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of z (T, R_in), after mask and gate, and of a router's logits (T, n)."""
    narrow = _as(w, dh).unsqueeze(-1)
    if plan.kind == "reduce":
        parts = dh.unsqueeze(1)
        dz, dw = (narrow * parts).flatten(1), (z.unflatten(-1, (plan.groups, -1)) * parts).sum(-1)
    else:
        parts = dh.unflatten(-1, (plan.groups, -1))
        if plan.kind == "expand":
            dz, dw = (narrow * parts).sum(1), (parts * z.unsqueeze(1)).sum(-1)
        else:
            dz = (narrow * parts).flatten(1)
            dw = (parts * z.unflatten(-1, (plan.groups, -1))).sum(-1)
    dw = _as(dw, w)
    if plan.weigh is None:
        return dz, _as(torch._softmax_backward_data(dw, w, -1, w.dtype), dh)  # type: ignore[attr-defined]
    assert logits is not None
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        again = plan.weigh(leaf.view(*lead, leaf.shape[-1]), rows)
        (dlogits,) = torch.autograd.grad(again, leaf, dw.view_as(again))
    return dz, _as(dlogits, dh)
