"""LowRankDelta: an update of low rank, dW = s B_cat mix(gate A_cat).

A method declares stacked factors, gates on the rank axis and a mix; forward, weight, folding for
merge and export, and rank follow here.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from plait.core import events
from plait.core.config import DeltaConfig
from plait.core.delta import Delta, FrozenLinear, NotMergeable, Pair, computes_in, mode
from plait.core.gate import Gate, gates_of, states
from plait.core.init import kaiming, seeded
from plait.core.mix import Matrix, Mix, Pairing, TaskTable, TokenRouter, as_mix
from plait.core.route import NOWHERE, Rows
from plait.core.sharding import put, refuse_sharded
from plait.kernels.choose import switches
from plait.kernels.low_rank import Kind, LowRank, Plan, product
from plait.kernels.reference import up

_ROUTERS = ("reduce", "expand", "pair")


class LowRankDelta(Delta):
    """dW = s B_cat mix(gate A_cat): a sum of products, mixed in rank space.

    The rank axis is a row of groups of `ranks` ranks; a gate acts on rank k of every group.

    Attributes:
        gates: the gates of the method and those that the config adds.
        ranks: ranks of a group, slots without a live rank included.
    """

    own_gates: ClassVar[tuple[type[Gate], ...]] = ()  # gates that are part of the method
    # Parameters and buffers with a rank axis -> that axis; needed by gates that restart ranks.
    rank_axes: ClassVar[dict[str, int]] = {}

    def __init__(self, base: FrozenLinear, config: DeltaConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.gates = gates_of(config, type(self))
        self.ranks = type(self).slots_of(config)
        for gate in self.gates:
            gate.prepare(self, self.ranks, seeded(config.seed, base.name, gate.key))

    @classmethod
    def check_gates(cls, config: Any) -> None:
        """Raise ValueError for unknown gates or options and gates that cannot act on the method."""
        gates_of(config, cls)

    @classmethod
    def count_gates(cls, config: Any) -> int:
        """Those of the gates that the config adds; the formula has the gates of the method."""
        added = gates_of(config, cls)[len(cls.own_gates) :]
        ranks = cls.slots_of(config)
        return sum(gate.count(ranks) for gate in added)

    @classmethod
    def allocates(cls, config: Any) -> bool:
        """Whether one of its gates moves ranks."""
        return any(gate.allocates for gate in gates_of(config, cls))

    @classmethod
    def gated(cls, config: Any) -> int:
        """Ranks of a layer that gates act on."""
        return config.r

    @classmethod
    def slots_of(cls, config: Any) -> int:
        """Ranks that the factors have room for: `gated`, or more if a gate needs spare ones."""
        ranks = cls.gated(config)
        return max([ranks, *(gate.slots(ranks) for gate in gates_of(config, cls))])

    @property
    def all_rank_axes(self) -> dict[str, int]:
        """rank_axes, those of the gates included."""
        return {**self.rank_axes, **{n: a for g in self.gates for n, a in g.rank_axes.items()}}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_cat (R_in, in) and B_cat (out, R_out)."""
        raise NotImplementedError

    def pairs(self) -> list[Pair]:
        """As in Delta; a gate ties the basis to single ranks, so with one there are no pairs."""
        if self.gates:
            keys = ", ".join(gate.key or "its own" for gate in self.gates)
            raise self.pairless(f"a gate ({keys}) belongs to single ranks")
        return self.free_pairs()

    def free_pairs(self) -> list[Pair]:
        """The pairs of the method without gates."""
        return super().pairs()

    def live(self) -> Tensor | None:
        """The product of the gates, (ranks,), or None."""
        product = None
        for gate in self.gates:
            value = gate.value(self)
            if value is not None:
                product = value if product is None else product * value
        return product

    @property
    def rank_groups(self) -> int:
        """Number of groups on the rank axis; overridden if computing the factors is expensive."""
        return len(self.factors()[0]) // self.ranks

    def spread(self, g: Tensor) -> Tensor:
        """Repeat a gate (.., ranks) over the whole rank axis, (.., R_in)."""
        groups = self.rank_groups
        return g if groups == 1 else g.repeat(*[1] * (g.ndim - 1), groups)

    def unspread(self, dg: Tensor) -> Tensor:
        """The gradient of a gate (ranks,) from that of its spread (R_in,)."""
        return dg.view(-1, self.ranks).sum(0)

    def gate(self) -> Tensor | None:
        """Factor on the rank axis (R_in,), or None."""
        g = self.live()
        return None if g is None else self.spread(g)

    def mix(self) -> Mix | Tensor | None:
        """None (R_in == R_out), a constant matrix (R_out, R_in), a token router or a task table."""
        return None
    @property
    def mixer(self) -> Mix:
        """What `mix` declares, to be called."""
        return as_mix(self.mix())

    @property
    def depends_on(self) -> Literal["token", "task"] | None:
        """As the mix does."""
        return self.mixer.depends_on

    @property
    def tasks(self) -> Sequence[str]:
        """Those of a task table."""
        return self.mixer.tasks

    @property
    def input_dropout(self) -> float:
        """The share of inputs that training leaves out, one mask a call."""
        return self.dropout

    @property
    def one_mask(self) -> bool:
        """Whether `down` is a product with one mask for all of A: not overridden, or not in use."""
        return True

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Rank activations (.., R_in) of x (.., in); input dropout acts here, one mask a call."""
        return F.linear(F.dropout(x, self.input_dropout, self.training), A)

    def rank_mask(self, z: Tensor) -> Tensor | None:
        """Random factor (.., R_in) on z (.., R_in) in training, or None: those of the gates.

        Unless a gate `sees` the activations, z is any tensor with their leading axes and dtype.
        """
        product = None
        for gate in self.gates:
            mask = gate.mask(self, z, self.ranks)
            if mask is not None:
                mask = self.spread(mask)
                product = mask if product is None else product * mask
        return product

    @torch.no_grad()
    def revive(self, index: Tensor, gen: torch.Generator) -> None:
        """Restart ranks with an update of zero and no state in the stepping optimizer.

        Args:
            index: of the ranks (k,).
            gen: generator of the draws.
        """
        fresh = self.start_of(index, gen)
        for gate in self.gates:
            fresh |= gate.start_of(index, gen)
        for name, value in fresh.items():
            p = self.get_parameter(name)
            axis = self.all_rank_axes[name] % p.ndim
            entries = (*(slice(None) for _ in range(axis)), index)
            put(p, entries, value.to(p.device, p.dtype))
            events.forget(p, entries)

    def start_of(self, index: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Start values of some ranks by parameter: LoRA's, or those that are subtracted."""
        fresh = {}
        for name in ("A", "B"):
            p, start = self.get_parameter(name), self._buffers.get(f"{name}0")
            axis = self.rank_axes[name]
            shape = list(p.shape)
            shape[axis] = len(index)
            if start is not None:
                fresh[name] = start.index_select(axis, index).expand(shape)
            else:
                fresh[name] = kaiming(gen, *shape) if name == "A" else torch.zeros(shape)
        return fresh

    # The forward -------------------------------------------------------------------------------

    def forward(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """s mix(gate x A^T) B^T: (.., in) to (.., out), computed in the dtype of x."""
        return self.joint(x, None, None, rows)

    adds: ClassVar[bool] = True

    def joins(self, x: Tensor, transposed: bool) -> bool:
        """Where the fused form applies."""
        return _kind(self.mix()) is not None and self._fuses(x)

    def joint(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows = NOWHERE,
        y: Tensor | None = None,
    ) -> Tensor:
        """The update, added to the frozen layer's output: x W^T + b + s mix(gate x A^T) B^T.

        Args:
            x: (.., in).
            weight: the frozen weight (out, in), or None: the update alone, or added to `y`.
            bias: (out,), only with a weight.
            rows: as in `forward`.
            y: (.., out), only without a weight; it may be changed in place.
        """
        if self.training:
            self.check_training()
        declared = self.mix()
        kind = _kind(declared)
        if kind is None or not self._fuses(x):
            update = self._plain(x, rows, as_mix(declared))
            y = F.linear(x, weight, bias) if weight is not None else y
            return update if y is None else y + update.to(y.dtype)
        dtype = computes_in(x)
        drop = mask = index = None
        if self.training and x.numel():
            drop, mask = self._draw(x, dtype)
        if kind == "table":
            index = declared.groups(x.shape[:-1], rows).reshape(-1).to(x.device)  # type: ignore
        graph = torch.is_grad_enabled()
        trains = graph and self._trains()
        if self.training or trains or not self._foldable(declared):
            plan, leaves = self._open(dtype, kind, declared, drop is None)
        else:
            plan, leaves = self._fold(dtype, kind, declared, index)
        others = (x, bias, y)
        if graph and (trains or any(t is not None and t.requires_grad for t in others)):
            return LowRank.apply(
                plan, dtype, x, weight, bias, y, drop, mask, index, rows, *leaves
            )  # type: ignore[return-value]
        return product(plan, dtype, x, weight, bias, y, drop, mask, index, rows, leaves)[0]

    def _plain(self, x: Tensor, rows: Rows, mix: Mix) -> Tensor:
        """The update by torch operations alone: where the fused form does not apply."""
        A, B = self.factors()
        z = self.down(x, A.to(x.dtype))
        mask = self.rank_mask(z) if self.training else None
        z = z if mask is None else z * mask
        return up(z, B, self.scaling, self.gate(), lambda z: mix(z, x, rows))

    def _fuses(self, x: Tensor) -> bool:
        """Whether the fused form applies: what the method overrides and who is calling allow it."""
        own = self.__dict__
        return (
            switches.fused
            and not torch.compiler.is_compiling()
            and _standard(type(self))
            and not ("down" in own or "factors" in own or "mix" in own or "gate" in own)
            and self.one_mask
            and not (self.training and any(gate.sees for gate in self.gates))
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and x.ndim > 1
        )

    def _trains(self) -> bool:
        """Whether anything of it needs a gradient."""
        for p in self._parameters.values():
            if p is not None and p.requires_grad:
                return True
        return bool(self._modules) and any(p.requires_grad for p in self.parameters())

    def _draw(
        self, x: Tensor, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, float] | None, Tensor | None]:
        """The random masks of a call: inputs that are kept with their factor; a factor on z."""
        drop, p = None, self.input_dropout
        if p:
            shape = (x.numel() // x.shape[-1], x.shape[-1])
            kept = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
            drop = kept, 1 / (1 - p)
        like = x if x.dtype == dtype else x.new_empty((*x.shape[:-1], 0), dtype=dtype)
        mask = self.rank_mask(like)
        return drop, None if mask is None else mask.reshape(-1, mask.shape[-1])

    # Plans: what calls with the same weights have in common -------------------------------------

    closed: ClassVar[tuple[tuple[str, ...], tuple[str, ...]] | None] = None
    # Tensors that factors() and mix() read, beside training mode and config, or None: unknown.
    reads: ClassVar[tuple[str, ...] | None] = None

    def close(self, plan: Plan) -> None:
        """Set the plan's pulls: from the gradients of A_cat and B_cat to those of `closed`.

        For methods whose factors are computed from other tensors. `closed` names these tensors,
        those of A and those of B; it may be a property and None where `factors` returns them as
        they are. Who overrides `factors` states both again, else autograd does the work.
        """
        raise NotImplementedError

    def _open(
        self, dtype: torch.dtype, kind: Kind, declared: Any, whole: bool
    ) -> tuple[Plan, tuple[Tensor, ...]]:
        """The plan of a call that may train, with its leaves; gate and mix stay apart.

        Args:
            dtype: of the computation.
            kind, declared: the mix.
            whole: whether A and a router read the same numbers, because no input is dropped.
        """
        cls, gate, spreads = type(self), None, False
        if cls.gate is not LowRankDelta.gate:
            gate = self.gate()
        elif self.gates:
            gate = self.live()
            if gate is not None:
                spreads = states(cls, "unspread", "spread")
                gate = gate if spreads else self.spread(gate)
        names = self.closed if states(cls, "closed", "factors") and not self._modules else None
        routes = kind in _ROUTERS
        stacked = routes and whole and names is not None and self._knows_mix
        weighs = routes and declared.top_k is not None
        key = (dtype, kind, gate is not None, spreads, stacked, weighs, self.training, self.scaling)

        def make() -> Plan:
            plan = Plan(self.scaling, kind, gate is not None)
            if spreads and (cls.spread is not LowRankDelta.spread or self.rank_groups > 1):
                plan.spread, plan.unspread = self.spread, self.unspread
            plan.groups = _groups(kind, declared)
            if weighs:
                plan.weigh = declared.of_logits
            if names is None:
                return plan
            A, B = self._computed()
            plan.A = torch.cat([A, declared.G.detach()]) if stacked else A
            plan.A, plan.B = plan.A.to(dtype, copy=True), B.to(dtype, copy=True)
            plan.of_A, plan.of_B = (len(part) for part in names)
            plan.stacked = stacked
            self.close(plan)
            return plan

        if names is None:
            plan, leaves = self.kept.get(key, [], make), self.factors()
        else:
            plan = self.kept.get(key, self._sources(gates=False), make)
            leaves = tuple(getattr(self, name) for part in names for name in part)
        if gate is not None:
            leaves = (*leaves, gate)
        if routes:
            leaves = (*leaves, declared.G)
        elif kind == "matrix":
            leaves = (*leaves, declared.M if isinstance(declared, Matrix) else declared)
        return plan, leaves

    def _fold(
        self, dtype: torch.dtype, kind: Kind, declared: Any, index: Tensor | None
    ) -> tuple[Plan, tuple[Tensor, ...]]:
        """The plan of a call in evaluation: gate and constant mix are folded into the factors."""
        task = None
        if index is not None and len(index) and bool((index == index[0]).all()):
            task = int(index[0])  # one task for all rows: its part of A alone
        plain = kind not in ("matrix", "table") and self.closed is None
        if plain and (not self.gates or self.live() is None):
            return self._open(dtype, kind, declared, whole=True)
        routes = kind in _ROUTERS
        key = ("fold", dtype, kind, task, self.scaling)

        def make() -> Plan:
            A, B = self._computed()
            gate = self.gate()
            A = A if gate is None else gate.detach()[:, None] * A
            constant: Kind = kind
            if kind == "matrix":
                M = (declared.M if isinstance(declared, Matrix) else declared).detach().to(A)
                A, B = (M @ A, B) if len(M) <= M.shape[1] else (A, B @ M)
                constant = "none"
            if task is not None:
                A, constant = A.unflatten(0, (len(declared.tasks), -1))[task], "none"
            if constant == "none":
                alive = (A != 0).any(1) & (B != 0).any(0)
                A, B = A[alive], B[:, alive]
            plan = Plan(self.scaling, constant)
            plan.groups = _groups(kind, declared)
            plan.of_A = plan.of_B = 0
            plan.stacked = routes
            if routes and declared.top_k is not None:
                plan.weigh = declared.of_logits
            A = torch.cat([A, declared.G.detach()]) if routes else A
            plan.A, plan.B = A.to(dtype, copy=True), B.to(dtype, copy=True)
            return plan

        sources = self._sources(gates=True)
        plan = self.kept.get(key, sources, make)
        return plan, ((declared.G,) if routes else ())

    def _computed(self) -> tuple[Tensor, Tensor]:
        """The factors, without a graph and outside autocast."""
        kind = next(self.parameters()).device.type
        known = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if known else nullcontext():
            return self.factors()

    @property
    def _knows_mix(self) -> bool:
        """Whether `reads` covers the mix, too."""
        return self.reads is not None and states(type(self), "reads", "mix")

    def _foldable(self, declared: Any) -> bool:
        """Whether all that evaluation reads is stated, so that it can be folded and kept."""
        cls = type(self)
        return (
            self._knows_mix
            and states(cls, "reads", "factors")
            and cls.gate is LowRankDelta.gate
            and not self._modules
            and all(g.reads is not None and states(type(g), "reads", "value") for g in self.gates)
        )

    def _sources(self, gates: bool) -> list[Tensor] | None:
        """The tensors that factors, mix and, if asked, gates read; None if they are not stated."""
        if self.reads is None or not states(type(self), "reads", "factors"):
            return None
        names = self.reads
        for gate in self.gates if gates else ():
            names = (*names, *(gate.reads or ()))
        found = []
        for name in names:
            t = self._parameters.get(name)
            t = self._buffers.get(name) if t is None else t
            if t is not None:
                found.append(t)
        return found

    @torch.no_grad()
    def folded(
        self, task: str | None = None, approx: Literal["mean"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate and mix folded in: dW = s B A with A (k, in), B (out, k), zero ranks left out.

        Args:
            task: which task of a task table.
            approx: "mean" takes a router as uniform; exact only where it is.

        Raises:
            NotMergeable: a token router without approx, a task table without a task.
            ValueError: an unknown task, or the adapter is sharded (FSDP2).
        """
        refuse_sharded(self, f"dW of {self.base.name}")
        with mode(self, training=False):
            A, B = self.factors()
            gate, mix = self.gate(), self.mixer
        if gate is not None:
            A = gate[:, None] * A
        try:
            M = mix.constant(len(A), task, approx)
        except NotMergeable as error:
            raise NotMergeable(f"{self.adapter.key} cannot be merged: {error}") from None
        if M is not None:
            M = M.to(A)
            rho = int(torch.linalg.matrix_rank(M))
            if rho == len(M):
                A = M @ A
            elif rho == M.shape[1]:
                B = B @ M
            else:  # M = L R of rank rho; never wider than its rank
                U, S, Vh = torch.linalg.svd(M, full_matrices=False)
                A, B = Vh[:rho] @ A, B @ (U[:, :rho] * S[:rho])
        alive = (A != 0).any(1) & (B != 0).any(0)
        return A[alive], B[:, alive]

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in); `choice` as in folded."""
        A, B = self.folded(**choice)
        return self.scaling * (B @ A)

    def rank(self) -> int:
        """Attainable rank of dW: rows of A after the mix, for routers those of one token."""
        with mode(self, training=False):
            mix = self.mixer
            A, B = self.factors()
        inner = min(A.shape[0], B.shape[1])
        M = mix.constant(len(A)) if mix.depends_on is None else None
        if M is not None:
            inner = int(torch.linalg.matrix_rank(M.float()))
        return min(inner, self.base.in_features, self.base.out_features)


@functools.cache
def _standard(cls: type) -> bool:
    """Whether the way of a forward is that of LowRankDelta, whatever the formula is."""
    names = ("forward", "joint", "mixer", "_plain")
    same = all(getattr(cls, name) is getattr(LowRankDelta, name) for name in names)
    return same and states(cls, "one_mask", "down")


def _kind(declared: Any) -> Kind | None:
    """The kind of a declared mix; None if only calling it tells."""
    if declared is None or type(declared) is Pairing:
        return "none"
    if isinstance(declared, Tensor) or type(declared) is Matrix:
        return "matrix"
    if type(declared) is TokenRouter and declared.tap is None:
        return declared.kind
    return "table" if type(declared) is TaskTable else None


def _groups(kind: Kind, declared: Any) -> int:
    """Groups of the rank axis that a router or a table chooses from."""
    if kind in _ROUTERS:
        return len(declared.G)
    return len(declared.tasks) if kind == "table" else 1


def less_start(
    a: Tensor,
    b: Tensor,
    A0: Tensor,
    B0: Tensor,
    share_a: Tensor | float = 1.0,
    share_b: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """sum_i b_i a_i minus its start, as stacked factors.

    The start of term i is (share_b B0)(share_a A0), from one block for all terms or a block for
    each. It is computed as b (a - a0) + (b - b0) a0: both parts are exactly zero at the start, so a
    bf16 forward sees the small difference and not the rounding of two large products.

    Args:
        a: (k, r, in). b: (k, out, r).
        A0: (r, in) or (k r, in). B0: (out, r) or (out, k r).
        share_a, share_b: (k, 1, 1) or a number.

    Returns:
        A_cat (k r + r0, in) and B_cat (out, k r + r0), r0 = rows of A0.
    """
    r = a.shape[1]
    a0 = A0.unflatten(0, (-1, r))  # (blocks, r, in)
    b0 = B0.unflatten(1, (-1, r)).movedim(1, 0)  # (blocks, out, r)
    extra = share_a * (b - share_b * b0)
    if len(a0) == 1:
        extra = extra.sum(0, keepdim=True)
    columns = torch.cat([b, extra])  # (k + blocks, out, r)
    return (
        torch.cat([(a - share_a * a0).flatten(0, 1), A0]),
        columns.movedim(0, 1).flatten(1),
    )


def close_folds(plan: Plan, V: Tensor, U: Tensor, r: int, share: Tensor | float | None) -> None:
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
    plan.pull_A = lambda _, dA: (of_A(dA.unflatten(0, (k, r))),)
    plan.pull_B = lambda _, dB: (of_B(dB.unflatten(1, (k, r)).movedim(1, 0)),)


def _with_start(count: int, share: Tensor | float, h: Tensor) -> Tensor:
    own, start = h[:, :count], h[:, count:]
    if isinstance(share, float):
        return own + share * start
    shares = share.reshape(-1, 1).to(h.dtype)
    return (own.unflatten(1, (len(shares), -1)) + shares * start.unsqueeze(1)).flatten(1)


def _unfolding(V: Tensor) -> Callable[[Tensor], Tensor]:
    """grads -> V^T grads: from gradients (k, ..) of sums to those of the slices (n, ..)."""
    n = V.shape[1]
    slices, sums = V.t().nonzero().unbind(1)
    values = V[sums, slices]
    alike = bool((values == 1).all())
    if len(V) == 1 and alike:
        return lambda grads: grads.expand(n, *grads.shape[1:])
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
