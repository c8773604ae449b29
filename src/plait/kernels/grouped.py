"""Many adapters in one batch: one product of the frozen layer, stacked factors for the updates.

The rows of a batch form groups of equally many consecutive rows, each of one adapter. With the
factors of adapter k in slice k of a stack, all groups are multiplied at once:

    y = x W^T + b                     (T, out), once
    z = x_g A_k^T    h = mix(z)       batched products of x as (groups, tokens, in)
    y_g += s_k h B_k^T                in place

    dz = s_k dy_g B_k                 dB_k = s_k dy_g^T h        dA_k = dz^T x_g
    dx = dy W;  dx_g += dz A_k        in place

Where each adapter has one group, the stacks are used as they are; else their slices are gathered,
r (in + out) numbers a group, and the gradients of the groups of an adapter are added up. Unlike
ranks are padded with zeros. Rows without an adapter meet a slice of zeros.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.low_rank import ROUTERS, Plan, factors_of, mixed, shaped, unrouted


class Segments:
    """Which adapter each group of rows belongs to.

    Attributes:
        count: rows of the batch.
        adapters: names, in the order of their first rows; rows of other names have no adapter.
        rows: those of each adapter, in order.
        groups: number of groups, equally many consecutive rows each.
        order: the slice of each group, len(adapters) for one without an adapter; None: group k has
            slice k.
        idle: whether there are rows without an adapter.
        sorted: whether the rows of adapter after adapter are all rows in order.
    """

    def __init__(self, names: Sequence[str], known: frozenset[str]) -> None:
        self.count = len(names)
        self.adapters = [name for name in dict.fromkeys(names) if name in known]
        places = {name: k for k, name in enumerate(self.adapters)}
        slices = [places.get(name, len(places)) for name in names]
        self.rows = [[i for i, k in enumerate(slices) if k == own] for own in places.values()]
        starts = [i for i in range(self.count) if i and slices[i - 1] != slices[i]]
        each = math.gcd(self.count, *starts)
        order = slices[::each]
        self.groups, self.idle = len(order), len(places) in slices
        self.order = None if order == list(range(len(places))) else order
        self.sorted = [i for rows in self.rows for i in rows] == list(range(self.count))
        self._index: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor | None:
        """`order` as a tensor (groups,), or None."""
        if self.order is None:
            return None
        if device not in self._index:
            self._index[device] = torch.tensor(self.order, device=device)
        return self._index[device]

    def spread(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """Masks of the tokens of each adapter, (T_k, n) or None for ones, as one mask (T, n)."""
        first = next(((k, p) for k, p in enumerate(parts) if p is not None), None)
        if first is None:
            return None
        k, like = first
        widths = {None if p is None else p.shape[1] for p in parts}
        if self.sorted and widths == {like.shape[1]}:
            return torch.cat(parts)  # type: ignore[arg-type]
        width = max(width for width in widths if width is not None)
        tokens = len(like) // len(self.rows[k])
        whole = like.new_ones(self.count, tokens, width)
        for rows, part in zip(self.rows, parts, strict=True):
            if part is not None:
                whole[rows, :, : part.shape[1]] = part.view(len(rows), tokens, -1)
        return whole.view(-1, width)


@functools.lru_cache(maxsize=256)
def segments(names: tuple[str, ...], known: frozenset[str]) -> Segments:
    """The segments of a batch whose rows have these adapters."""
    return Segments(names, known)


class Batch(NamedTuple):
    """What one call has beside its tensors of activations and weights.

    Attributes:
        plans: one for each adapter, alike but for the ranks.
        counts: numbers of their leaves.
        ranks: (R_in, R_out) of each.
        segments: see there.
        dtype: of the computation.
        kept: which inputs of the A are kept (T, in), bool; None: all.
        raised: 1 / (1 - p) of each adapter, (K,), by which z is multiplied for that; None: 1.
        mask: factor on z (T, R_in), or None.
        stacks: of these plans, if they were made before.
    """

    plans: tuple[Plan, ...]
    counts: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]
    segments: Segments
    dtype: torch.dtype
    kept: Tensor | None
    raised: tuple[float, ...] | None
    mask: Tensor | None
    stacks: "Stacks | None"


class Stacks(NamedTuple):
    """The factors of all adapters, by slices: A, B, gates (K, R_in), M or G, and s (K, 1, 1)."""

    A: Tensor
    B: Tensor
    gate: Tensor | None
    M: Tensor | None
    scale: Tensor | float

    def gathered(self, index: Tensor | None) -> "Stacks":
        """Those of each group."""
        if index is None:
            return self
        return Stacks(*(t[index] if isinstance(t, Tensor) else t for t in self))  # type: ignore


def alike(plans: Sequence[Plan], leaves: Sequence[tuple[Tensor, ...]]) -> bool:
    """Whether these adapters can be computed together: one mix; with a router, one shape."""
    first = plans[0]
    facts = {(p.kind, p.groups, p.stacked, p.gated, p.weigh) for p in plans}
    if len(facts) > 1 or first.kind == "table" or first.weigh is not None:
        return False
    if first.kind not in ROUTERS:
        return True
    return len({ranks(p, own) for p, own in zip(plans, leaves, strict=True)}) == 1


def ranks(plan: Plan, leaves: Sequence[Tensor]) -> tuple[int, int]:
    """(R_in, R_out)."""
    A, B = (leaves[0], leaves[1]) if plan.A is None or plan.B is None else (plan.A, plan.B)
    return len(A) - (plan.groups if plan.stacked else 0), B.shape[1]


def _stacked(parts: Sequence[Any], more: int) -> Tensor | None:
    """(K + more, ..): the parts, padded with zeros to one shape, then slices of zeros."""
    if parts[0] is None:
        return None
    sizes = {p.shape for p in parts}
    if len(sizes) == 1 and not more:
        return torch.stack(parts)  # type: ignore[arg-type]
    whole = parts[0].new_zeros(len(parts) + more, *map(max, zip(*sizes, strict=True)))
    for own, part in zip(whole, parts, strict=False):
        own[tuple(map(slice, part.shape))] = part
    return whole


def stacks_of(call: Batch, leaves: Sequence[Tensor]) -> Stacks:
    """The factors of all adapters, with a slice of zeros if there are rows without one."""
    parts, at = [], 0
    for plan, count in zip(call.plans, call.counts, strict=True):
        parts.append(factors_of(plan, call.dtype, leaves[at : at + count]))
        at += count
    A, B, gate, M = (_stacked(own, call.segments.idle) for own in zip(*parts, strict=True))
    scales = [plan.scale for plan in call.plans]
    scale: Tensor | float = scales[0]
    if len(set(scales)) > 1:
        scale = A.new_tensor([*scales, 0.0][: len(A)]).view(-1, 1, 1)  # type: ignore[union-attr]
    return Stacks(A, B, gate, M, scale)  # type: ignore[arg-type]


def _raised(call: Batch, own: Stacks, index: Tensor | None) -> Tensor | float | None:
    """What z is multiplied by where inputs are dropped: a number, or one for each group."""
    if call.raised is None:
        return None
    if len(set(call.raised)) == 1:
        return call.raised[0]
    all_of_them = own.A.new_tensor([*call.raised, 1.0]).view(-1, 1, 1)
    return all_of_them[: len(own.A)] if index is None else all_of_them[index]


def _mix(call: Batch, z: Tensor, w: Tensor | None, own: Stacks) -> tuple[Tensor, Tensor]:
    """s h and z after mask and gate, both (groups, tokens, ..)."""
    first = call.plans[0]
    if call.mask is not None:
        z = z * call.mask.view(z.shape)
    if own.gate is not None:
        z = z * own.gate.unsqueeze(1)
    if first.kind == "matrix":
        h = torch.bmm(z, own.M.mT)  # type: ignore[union-attr]
    elif first.kind == "none":
        h = z
    else:
        h = mixed(first, z.flatten(0, 1), w, None, None, None, None)[0]
        h = h.view(*z.shape[:2], -1)
    one = isinstance(own.scale, float | int) and own.scale == 1
    return (h if one else h * own.scale), z


def product(
    call: Batch,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    leaves: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Stacks]:
    """The forward, without a graph.

    Args:
        call: see there.
        x: (rows, .., in).
        weight: (out, in) of the frozen layer, or None.
        bias: (out,), only with a weight.
        y: (rows, .., out), contiguous, to add to in place, where there is no weight.
        leaves: those of adapter after adapter.

    Returns:
        y (rows, .., out), the tokens (T, in), z (groups, tokens, R_in), of routers the weights
        (T, n), and the stacks.
    """
    first, dtype, groups = call.plans[0], call.dtype, call.segments.groups
    tokens = x.reshape(-1, x.shape[-1])
    tokens = tokens if tokens.dtype == dtype else tokens.to(dtype)
    stacks, index = call.stacks, call.segments.index(x.device)
    stacks = stacks_of(call, leaves) if stacks is None else stacks
    own = stacks.gathered(index)
    source = tokens if call.kept is None else tokens * call.kept
    z, w = torch.bmm(source.view(groups, -1, x.shape[-1]), own.A.mT), None
    if first.kind in ROUTERS:
        if first.stacked:
            z, logits = z[..., : -first.groups], z[..., -first.groups :]
        else:
            logits = torch.bmm(tokens.view(groups, -1, x.shape[-1]), own.M.mT)  # type: ignore
        wide = torch.promote_types(dtype, torch.float32)
        w = torch.softmax(logits.flatten(0, 1), -1, dtype=wide)
    raised = _raised(call, own, index)
    z = z if raised is None else z * raised
    h = _mix(call, z, w, own)[0]
    if weight is not None:
        if weight.dtype != dtype:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        out = F.linear(tokens, weight, bias)
        out.view(groups, -1, out.shape[-1]).baddbmm_(h, own.B.mT)
        out = out if x.ndim == 2 else shaped(out, x)
    else:
        assert y is not None
        y.view(groups, -1, y.shape[-1]).baddbmm_(h.to(y.dtype), own.B.mT.to(y.dtype))
        out = y
    return out, tokens, z, w, stacks


class Grouped(torch.autograd.Function):
    """`product` with its backward; arguments as there, the leaves one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Batch,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        *leaves: Tensor,
    ) -> Tensor:
        """Compute y (rows, .., out) in the dtype of the computation."""
        out, tokens, z, w, stacks = product(call, x, weight, bias, y, leaves)
        if y is not None:
            ctx.mark_dirty(y)
        needs = ctx.needs_input_grad
        trains = True in needs[_LEAVES:]
        reads = any(plan.keeps_leaves for plan in call.plans)
        ctx.call, ctx.x_shape, ctx.x_dtype, ctx.scale = call, x.shape, x.dtype, stacks.scale
        kept = (tokens if trains else None, z, w, weight if needs[1] else None, *stacks[:4])
        ctx.save_for_backward(*kept, *(leaves if reads else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, the bias, y and the leaves."""
        tokens, z, w, weight, A, B, gates, Ms, *leaves = ctx.saved_tensors
        call, needs, grad = ctx.call, ctx.needs_input_grad, grads[0]
        first, segments = call.plans[0], call.segments
        stacks, index = Stacks(A, B, gates, Ms, ctx.scale), segments.index(grad.device)
        own, adapters = stacks.gathered(index), len(call.plans)
        flat = grad.reshape(-1, grad.shape[-1])
        dy = (flat if flat.dtype == call.dtype else flat.to(call.dtype)).view(
            segments.groups, -1, grad.shape[-1]
        )
        h, gated = _mix(call, z, w, own)

        def of_each(parts: Tensor) -> Tensor:
            """From the gradients of groups to those of adapters."""
            if index is None:
                return parts
            return parts.new_zeros(len(A), *parts.shape[1:]).index_add_(0, index, parts)

        dB = of_each(torch.bmm(dy.mT, _owned(call, h, "own_h")))
        dh = torch.bmm(dy, own.B)
        one = isinstance(own.scale, float | int) and own.scale == 1
        dh = dh if one else dh * own.scale
        dM = dg = dG = dlogits = None
        if first.kind == "none":
            dz = dh
        elif first.kind == "matrix":
            dM = of_each(torch.bmm(dh.mT, gated))
            dz = torch.bmm(dh, own.M)  # type: ignore[arg-type]
        else:
            lead = (dh.shape[0] * dh.shape[1],)
            dz, dlogits = unrouted(
                first, dh.flatten(0, 1), gated.flatten(0, 1), None, w, lead, None
            )
            dz, dlogits = (t.view(*dh.shape[:2], -1) for t in (dz, dlogits))
        if own.gate is not None:
            seen = z if call.mask is None else z * call.mask.view(z.shape)
            dg = of_each((dz * seen).sum(1))
            dz = dz * own.gate.unsqueeze(1)
        if call.mask is not None:
            dz = dz * call.mask.view(dz.shape)
        raised = _raised(call, own, index)
        dz = dz if raised is None else dz * raised
        both = torch.cat([dz, dlogits], dim=-1) if first.stacked else dz  # type: ignore[list-item, arg-type]
        dA = None
        if tokens is not None:
            x = tokens.view(segments.groups, -1, tokens.shape[-1])
            source = x if call.kept is None else (tokens * call.kept).view(x.shape)
            trained = _owned(call, dz, "own_z")
            if first.stacked:
                trained = torch.cat([trained, dlogits], dim=-1)  # type: ignore
            dA = of_each(torch.bmm(trained.mT, source))
            if first.stacked:
                dA, dG = dA[:, : -first.groups], dA[:, -first.groups :]
            elif dlogits is not None:
                dG = of_each(torch.bmm(dlogits.mT, x))
        dx = None
        if needs[1]:
            dx = _input_gradient(call, flat.to(call.dtype), weight, both, own, dlogits)
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        slices = [None if t is None else t.unbind() for t in (dA, dB, dg, dM, dG)]
        found: list[Tensor | None] = []
        for k in range(adapters):
            at = len(found)
            until = at + call.counts[k]
            of_k = [None if t is None else t[k] for t in slices]
            asked = needs[_LEAVES + at : _LEAVES + until]
            found += _pulled(call.plans[k], call.ranks[k], asked, leaves[at:until], *of_k)
        return (
            None,
            dx,
            None,
            flat.sum(0) if needs[3] else None,
            grad if needs[4] else None,
            *found,
        )


_LEAVES = 5  # arguments of the Function before the leaves


def _owned(call: Batch, t: Tensor, which: Literal["own_z", "own_h"]) -> Tensor:
    """What trained rows of A or columns of B meet: (groups, tokens, ..) of (groups, tokens, R)."""
    if getattr(call.plans[0], which) is None:
        return t
    order, side = call.segments.order or range(len(call.plans)), which == "own_h"
    parts = [
        getattr(call.plans[k], which)(one[:, : call.ranks[k][side]])
        for k, one in zip(order, t, strict=True)
        if k < len(call.plans)
    ]
    if len(parts) == len(t):
        return _stacked(parts, 0)  # type: ignore[return-value]
    whole = t.new_zeros(*t.shape[:2], max(part.shape[1] for part in parts))
    busy = [g for g, k in enumerate(order) if k < len(call.plans)]
    for g, part in zip(busy, parts, strict=True):
        whole[g, :, : part.shape[1]] = part
    return whole


def _input_gradient(
    call: Batch,
    dy: Tensor,
    weight: Tensor | None,
    both: Tensor,
    own: Stacks,
    dlogits: Tensor | None,
) -> Tensor:
    """dx (T, in), from dy (T, out) and the gradients of z and of logits."""
    groups, n_in = call.segments.groups, own.A.shape[-1]
    if weight is None:
        dx = dy.new_zeros(len(dy), n_in)
    else:
        dx = torch.mm(dy, weight if weight.dtype == dy.dtype else weight.to(dy.dtype))
    parts = dx.view(groups, -1, n_in)
    if call.kept is None:
        parts.baddbmm_(both, own.A)
    else:
        dx.addcmul_(torch.bmm(both, own.A).view(dx.shape), call.kept.to(dx.dtype))
    if dlogits is not None and not call.plans[0].stacked:
        parts.baddbmm_(dlogits, own.M)  # type: ignore[arg-type]
    return dx


def _pulled(
    plan: Plan,
    ranks: tuple[int, int],
    needs: Sequence[bool],
    leaves: Sequence[Tensor],
    dA: Tensor | None,
    dB: Tensor | None,
    dg: Tensor | None,
    dM: Tensor | None,
    dG: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of one adapter's leaves, from those of its slices."""
    found: list[Tensor | None] = [None] * len(needs)
    if True not in needs:
        return found
    count = plan.of_A + plan.of_B
    if dA is not None and True in needs[: plan.of_A]:
        width = ranks[0] if plan.own_z is None else plan.own_z(dA.new_empty(1, ranks[0])).shape[1]
        own = dA if len(dA) == width else dA[:width]
        found[: plan.of_A] = [own] if plan.pull_A is None else plan.pull_A(leaves, own)
    if dB is not None and True in needs[plan.of_A : count]:
        width = ranks[1] if plan.own_h is None else plan.own_h(dB.new_empty(1, ranks[1])).shape[1]
        own = dB if dB.shape[1] == width else dB[:, :width]
        found[plan.of_A : count] = [own] if plan.pull_B is None else plan.pull_B(leaves, own)
    if plan.gated and dg is not None and needs[count]:
        own = dg if len(dg) == ranks[0] else dg[: ranks[0]]
        found[count] = own if plan.unspread is None else plan.unspread(own)
    if dG is not None and needs[-1]:
        found[-1] = dG
    after = count + plan.gated
    if dM is not None and True in needs[after:]:
        own = dM[: ranks[1], : ranks[0]]
        found[after:] = [own] if plan.pull_M is None else plan.pull_M(leaves[after:], own)
    return found
