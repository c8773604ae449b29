"""LowRankDelta: an update of low rank, dW = s B_cat mix(gate A_cat).

A method declares stacked factors, gates on the rank axis and a mix; forward, weight, folding for
merge and export, and rank follow here.
"""

import copy
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, NamedTuple

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
from plait.kernels import grouped
from plait.kernels.cache import Notes, same, traced
from plait.kernels.choose import switches
from plait.kernels.grouped import Segments
from plait.kernels.low_rank import ROUTERS, Call, Kind, Plan, fused, product
from plait.kernels.reference import up


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
        # By whether gradients are on; see _prepared and together.
        self.noted: dict[bool, Any] = Notes()
        self.crews: dict[bool, _Crew] = Notes()
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
        """Always; where the fused form does not apply, `joint` adds the two products.

        A class that overrides `forward` alone is called, see core/bridge.py.
        """
        return True

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
        graph = torch.is_grad_enabled()
        dtype = computes_in(x)
        ready = self._planned(x, dtype, graph, rows)
        if ready is None:
            # The frozen layer first, as in upstream's LoRA: gradients of x are summed in order.
            y = F.linear(x, weight, bias) if weight is not None else y
            update = self._plain(x, rows, self.mixer)
            return update if y is None else y + update.to(y.dtype)
        plan, leaves, trains, tasks = ready
        kept, raised, mask = self._draw(x, dtype)
        index = None
        if plan.kind == "table":
            index = tasks.groups(x.shape[:-1], rows).reshape(-1).to(x.device)  # type: ignore
        call = Call(plan, dtype, kept, raised, mask, index, rows)
        if graph and (
            trains
            or x.requires_grad
            or (bias is not None and bias.requires_grad)
            or (y is not None and y.requires_grad)
        ):
            return fused(call, x, weight, bias, y, *leaves)
        return product(call, x, weight, bias, y, leaves)[0]

    @classmethod
    def together(
        cls,
        deltas: Sequence[Any],
        rows: Segments,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None = None,
    ) -> Tensor | None:
        """As `joint`, by stacked factors; see kernels/grouped.py."""
        dtype, graph = computes_in(x), torch.is_grad_enabled()
        crew = deltas[0].crews.get(graph)
        if crew is None or not crew.holds(deltas, dtype):
            crew = _crew(deltas, x, dtype, graph)
            if crew is None:
                return None
            if crew.noted and not traced():
                deltas[0].crews[graph] = crew
        kept, mask, raised = None, None, None
        if crew.draws:
            sizes = zip(deltas, rows.rows, strict=True)
            drawn = []
            for delta, own in sizes:
                with delta.drawing(x.device):
                    drawn.append(delta._draw(x[: len(own)], dtype))
            kept, mask = (rows.spread([part[i] for part in drawn]) for i in (0, 2))
            raised = None if kept is None else tuple(part[1] for part in drawn)
        flat = crew.leaves
        call = grouped.Batch(
            crew.plans, crew.counts, crew.ranks, rows, dtype, kept, raised, mask, None
        )
        if not flat and crew.noted and not traced():  # all that is computed from is watched
            if rows.idle not in crew.stacks:
                with torch.inference_mode(False), torch.no_grad():
                    crew.stacks[rows.idle] = grouped.stacks_of(call, ())
            call = call._replace(stacks=crew.stacks[rows.idle])
        if graph and (
            crew.trains
            or x.requires_grad
            or (bias is not None and bias.requires_grad)
            or (y is not None and y.requires_grad)
        ):
            return grouped.Grouped.apply(call, x, weight, bias, y, *flat)  # type: ignore
        return grouped.product(call, x, weight, bias, y, flat)[0]

    def _planned(
        self, x: Tensor, dtype: torch.dtype, graph: bool, rows: Rows | None
    ) -> tuple[Plan, tuple[Tensor, ...], bool, Any] | None:
        """As `_prepared`, or None where the fused form does not apply; for tasks it needs rows."""
        if self.training:
            self.check_training()
        whole = not (self.training and self.input_dropout)
        ready = self._ready(x, dtype, whole, graph)
        if ready is not None:
            return ready
        # Where the plan holds the mix, no graph of it is made: recomputation under gradient
        # checkpointing finds the plan, makes none either, and must save equally many tensors.
        held = len(self.closed or ()) > 2 and _facts(type(self)).closes
        with torch.no_grad() if held else nullcontext():
            declared = self.mix()
        kind = _kind(declared)
        if kind is None or not self._fuses(x) or (rows is None and kind == "table"):
            return None
        return self._prepared(x, dtype, whole, graph, kind, declared, rows or NOWHERE)

    def _ready(
        self, x: Tensor, dtype: torch.dtype, whole: bool, graph: bool
    ) -> tuple[Plan, tuple[Tensor, ...], bool, Any] | None:
        """What `_prepared` returned before, where everything that it depends on is as it was."""
        noted = self.noted.get(graph)
        if noted is None or x.ndim < 2 or not _calm():
            return None
        state, places, sources, copies, requires, result = noted
        if state != (self.training, dtype, whole, self.scaling):
            return None
        for where, name, tensor in places:
            if where.get(name) is not tensor:
                return None
        if graph and requires != [leaf.requires_grad for leaf in result[1]]:
            return None
        if not _REPLACED.isdisjoint(self.__dict__):
            return None
        return result if copies is None or same(sources, copies) else None

    def _prepared(
        self,
        x: Tensor,
        dtype: torch.dtype,
        whole: bool,
        graph: bool,
        kind: Kind,
        declared: Any,
        rows: Rows,
    ) -> tuple[Plan, tuple[Tensor, ...], bool, Any]:
        """Plan, leaves, whether one of them needs a gradient, and the task table if there is one.

        It is noted for the next call if what it depends on is stated and found in the parameters
        and buffers.
        """
        trains = graph and self._trains()
        sources, task = None, None
        known = self._folds() and self.reads is not None
        opened = self.training or trains or not known
        if opened:
            plan, leaves, sources = self._open(dtype, kind, declared, whole)
        else:
            if kind == "table":
                index = declared.groups(x.shape[:-1], rows)
                if index.numel() and bool((index == index.reshape(-1)[0]).all()):
                    task = int(index.reshape(-1)[0])  # one task for all rows: its part of A alone
            plan, leaves, sources = self._fold(dtype, kind, declared, task)
        trains = graph and any(leaf.requires_grad for leaf in leaves)
        result = plan, leaves, trains, declared if plan.kind == "table" else None
        own = self.__dict__
        found = {id(t): (d, n, t) for d in (own["_parameters"], own["_buffers"])
                 for n, t in d.items()}  # fmt: skip
        tensors = [*leaves, *(sources or [])]
        # A table's plan in evaluation depends on the tasks of the batch; one history must not
        # give other roundings than another.
        if known and (kind != "table" or opened) and all(id(t) in found for t in tensors):
            state = (self.training, dtype, whole, self.scaling)
            places = [found[id(t)] for t in tensors]
            copies = None if sources is None else self.kept.copies(sources)
            if sources is None or copies is not None:
                requires = [leaf.requires_grad for leaf in leaves]
                self.noted[graph] = (state, places, sources, copies, requires, result)
        return result

    def _plain(self, x: Tensor, rows: Rows, mix: Mix) -> Tensor:
        """The update by torch operations alone: where the fused form does not apply."""
        A, B = self.factors()
        z = self.down(x, A.to(x.dtype))
        mask = self.rank_mask(z) if self.training else None
        z = z if mask is None else z * mask
        return up(z, B, self.scaling, self.gate(), lambda z: mix(z, x, rows))

    def _fuses(self, x: Tensor) -> bool:
        """Whether the fused form applies: what the method overrides and who is calling allow it."""
        if x.ndim < 2 or not _facts(type(self)).standard or not _calm(traces=True):
            return False
        if self.training:
            if not self.one_mask:
                return False
            for gate in self.gates:
                if gate.sees:
                    return False
        return _REPLACED.isdisjoint(self.__dict__)

    def _trains(self) -> bool:
        """Whether anything of it needs a gradient."""
        for p in self._parameters.values():
            if p is not None and p.requires_grad:
                return True
        return bool(self._modules) and any(p.requires_grad for p in self.parameters())

    @property
    def draws(self) -> bool:
        """Whether a call may draw masks."""
        if not self.training:
            return False
        if self.input_dropout or self.dropout or _facts(type(self)).masks:
            return True
        return any(type(gate).mask is not Gate.mask for gate in self.gates)

    def _draw(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float, Tensor | None]:
        """The random masks of a call: inputs that are kept with their factor; a factor on z."""
        if not (self.draws and x.numel()):
            return None, 1.0, None
        kept, p = None, self.input_dropout
        if p:
            shape = (x.numel() // x.shape[-1], x.shape[-1])
            kept = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
        like = x if x.dtype == dtype else x.new_empty((*x.shape[:-1], 0), dtype=dtype)
        mask = self.rank_mask(like)
        mask = mask if mask is None or mask.ndim == 2 else mask.reshape(-1, mask.shape[-1])
        return kept, 1 / (1 - p), mask

    # Plans: what calls with the same weights have in common -------------------------------------

    closed: ClassVar[tuple[tuple[str, ...], ...] | None] = None
    # Tensors whose numbers `close` looks at, beside config, mode and shapes, or None: unknown.
    closes_by: ClassVar[tuple[str, ...] | None] = None
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
    ) -> tuple[Plan, tuple[Tensor, ...], list[Tensor] | None]:
        """The plan of a call that may train, its leaves, what was computed from; no folding.

        Args:
            dtype: of the computation.
            kind, declared: the mix.
            whole: whether A and a router read the same numbers, because no input is dropped.
        """
        facts, gates = _facts(type(self)), self.gates
        names = self.closed if facts.closes and not self._modules else None
        gate, held = None, False  # the gate's leaf; whether the plan holds the gate
        if not facts.plain_gate:
            gate = self.gate()
        elif gates:
            held = (
                names is not None
                and len(gates) == 1
                and gates[0].leaf is not None
                and states(type(gates[0]), "leaf", "value")
                and facts.spreads
            )
            gate = getattr(self, gates[0].leaf) if held else self.live()  # type: ignore[arg-type]
            if gate is not None and not facts.spreads:
                gate = self.spread(gate)
        routes = kind in ROUTERS
        stacked = routes and whole and names is not None and facts.knows_mix
        gated = gate is not None
        key = (dtype, kind, gated, held, stacked, self.training, self.scaling)
        sources = None
        if names is None:
            plan = self.kept.get(key, [], lambda: self._direct(kind, declared, gated))
            leaves = self.factors()
        else:
            sources = self._sources(held)
            plan = self.kept.get(
                key,
                sources,
                lambda: self._closed(dtype, kind, declared, gated, held, stacked),
            )
            own = self.__dict__
            parameters, buffers = own["_parameters"], own["_buffers"]
            leaves = tuple(
                [parameters[n] if n in parameters else buffers[n] for n in names[0]]
                + [parameters[n] if n in parameters else buffers[n] for n in names[1]]
            )
        if gated:
            leaves = (*leaves, gate)
        if routes:
            leaves = (*leaves, declared.G)
        elif kind == "matrix":
            if names is not None and len(names) > 2:
                leaves = (*leaves, *(getattr(self, name) for name in names[2]))
            else:
                leaves = (*leaves, declared.M if isinstance(declared, Matrix) else declared)
        return plan, leaves, sources

    def _direct(self, kind: Kind, declared: Any, gated: bool) -> Plan:
        """A plan whose leaves are the factors."""
        plan = Plan(self.scaling, kind, gated)
        cls = type(self)
        if gated and _facts(cls).plain_gate and _facts(cls).spreads and (
            cls.spread is not LowRankDelta.spread or self.rank_groups > 1
        ):  # fmt: skip
            plan.spread, plan.unspread = self.spread, self.unspread
        plan.groups = _groups(kind, declared)
        if kind in ROUTERS and declared.top_k is not None:
            plan.weigh = declared.of_logits
        return plan

    def _closed(
        self, dtype: torch.dtype, kind: Kind, declared: Any, gated: bool, held: bool, stacked: bool
    ) -> Plan:
        """A plan that holds the factors, and the gate if `held`."""
        names = self.closed
        assert names is not None
        plan = self._pulling(kind, declared, gated)
        A, B, M = self._computed()
        plan.A = torch.cat([A, declared.G]) if stacked else A
        # Copies: a factor may be a view of the parameter that the optimizer is about to change.
        plan.A, plan.B = plan.A.to(dtype, copy=True), B.to(dtype, copy=True)
        plan.of_A, plan.of_B, plan.stacked = len(names[0]), len(names[1]), stacked
        if len(names) > 2:
            plan.M = as_mix(M).constant(len(A)).to(dtype, copy=True)  # type: ignore
        if held:
            (gate,) = self.gates
            plan.gate = self.gate().to(dtype, copy=True)  # type: ignore[union-attr]
            factor, unspread = gate.factor(self), self.unspread
            factor = None if factor is None else factor.clone()
            spreads = plan.unspread is not None

            def pull(dg: Tensor) -> Tensor:
                dg = unspread(dg) if spreads else dg
                return dg if factor is None else dg * factor

            plan.unspread = pull
        return plan

    def _pulling(self, kind: Kind, declared: Any, gated: bool) -> Plan:
        """A plan with its pulls, which are made once if what they depend on is stated."""

        def make() -> Plan:
            plan = self._direct(kind, declared, gated)
            self.close(plan)
            return plan

        if not states(type(self), "closes_by", "close"):
            return make()
        named = {**self._parameters, **self._buffers}
        sources = [named[n] for n in self.closes_by or () if named.get(n) is not None]
        key = ("pulls", kind, gated, self.training, self.scaling)
        return copy.copy(self.kept.get(key, sources, make))  # type: ignore[arg-type]

    def _fold(
        self, dtype: torch.dtype, kind: Kind, declared: Any, task: int | None
    ) -> tuple[Plan, tuple[Tensor, ...], list[Tensor] | None]:
        """As `_open`, in evaluation: gate and constant mix are folded into the factors.

        Args:
            dtype, kind, declared: as there.
            task: that of all rows, if there is one.
        """
        plain = kind not in ("matrix", "table") and self.closed is None
        if plain and (not self.gates or self.live() is None):
            return self._open(dtype, kind, declared, whole=True)
        key, sources = ("fold", dtype, kind, task, self.scaling), self._sources(gates=True)
        plan = self.kept.get(key, sources, lambda: self._folded(dtype, kind, declared, task))
        return plan, ((declared.G,) if kind in ROUTERS else ()), sources

    def _folded(self, dtype: torch.dtype, kind: Kind, declared: Any, task: int | None) -> Plan:
        """The plan of `_fold`."""
        A, B, M = self._computed()
        gate, routes = self.gate(), kind in ROUTERS
        A = A if gate is None else gate[:, None] * A
        if kind == "matrix":
            matrix = as_mix(M).constant(len(A)).to(A)  # type: ignore[union-attr]
            A, B = (matrix @ A, B) if len(matrix) <= matrix.shape[1] else (A, B @ matrix)
        if task is not None:
            A = A.unflatten(0, (len(declared.tasks), -1))[task]
        constant = kind in ("none", "matrix") or task is not None
        if constant and not traced():  # which ranks are zero is a matter of numbers
            alive = (A != 0).any(1) & (B != 0).any(0)
            A, B = A[alive], B[:, alive]
        plan = self._direct("none" if constant else kind, declared, gated=False)
        plan.groups, plan.of_A, plan.of_B = _groups(kind, declared), 0, 0
        plan.stacked = routes
        A = torch.cat([A, declared.G]) if routes else A
        plan.A, plan.B = A.to(dtype, copy=True), B.to(dtype, copy=True)
        return plan

    def _computed(self) -> tuple[Tensor, Tensor, Any]:
        """The factors and what `mix` declares, outside autocast."""
        kind = next(self.parameters()).device.type
        known = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if known else nullcontext():
            return (*self.factors(), self.mix())

    def _folds(self) -> bool:
        """Whether all that evaluation reads is stated, so that it can be folded and kept."""
        if not _facts(type(self)).folds or self._modules:
            return False
        for gate in self.gates:
            if gate.reads is None or not states(type(gate), "reads", "value"):
                return False
        return True

    def _sources(self, gates: bool) -> list[Tensor] | None:
        """The tensors that factors, mix and, if asked, gates read; None if they are not stated."""
        if not _facts(type(self)).reads:
            return None
        names, own = self.reads, self.__dict__
        parameters, buffers = own["_parameters"], own["_buffers"]
        for gate in self.gates if gates else ():
            names = (*names, *(gate.reads or ()))  # type: ignore[misc]
        found = []
        for name in names:  # type: ignore[union-attr]
            t = parameters.get(name)
            t = buffers.get(name) if t is None else t
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


_REPLACED = frozenset(("down", "factors", "mix", "gate"))  # by attributes of an object, as in tests


def _calm(traces: bool = False) -> bool:
    """Whether the fused form may run: it is switched on, and nobody transforms the operations.

    Args:
        traces: whether a tracer may be at work.
    """
    return not (
        not switches.fused
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (not traces and traced())
    )


class _Crew(NamedTuple):
    """Adapters of one layer that are computed together, and what tells that they are as they were.

    Attributes:
        deltas: in the order of the stacks.
        dtype: of the computation.
        noted: what each of them noted, see LowRankDelta._prepared; None: not noted.
        training, scaling: of each.
        places: where all their tensors must be found.
        watched: tensors that must hold the same bits, with their copies, of each.
        requires: whether each leaf needs a gradient.
        checks: those whose class, or whose owner of shared tensors, checks training forwards.
        draws: whether one of them draws masks.
        trains: whether one of the leaves needs a gradient.
        plans, counts, ranks, leaves: for kernels/grouped.py.
        stacks: of plans without leaves, without and with a slice of zeros.
    """

    deltas: list[Any]
    dtype: torch.dtype
    noted: bool
    training: list[bool]
    scaling: list[float]
    places: list[tuple[dict[str, Any], str, Tensor]]
    watched: list[tuple[list[Tensor], Any]]
    requires: list[bool]
    checks: list[Any]
    draws: bool
    trains: bool
    plans: tuple[Plan, ...]
    counts: tuple[int, ...]
    ranks: tuple[tuple[int, int], ...]
    leaves: list[Tensor]
    stacks: dict[bool, grouped.Stacks]

    def holds(self, deltas: Sequence[Any], dtype: torch.dtype) -> bool:
        """Whether all that it was made of is as it was."""
        if not self.noted or self.deltas != deltas or self.dtype != dtype or not _calm():
            return False
        for delta, training, scaling in zip(deltas, self.training, self.scaling, strict=True):
            own = delta.__dict__
            if own["training"] != training or own["scaling"] != scaling:
                return False
            if not _REPLACED.isdisjoint(own):
                return False
        for where, name, tensor in self.places:
            if where.get(name) is not tensor:
                return False
        if self.requires != [leaf.requires_grad for leaf in self.leaves]:
            return False
        for delta in self.checks:
            delta.check_training()
        return all(same(sources, copies) for sources, copies in self.watched)


def _crew(deltas: Sequence[Any], x: Tensor, dtype: torch.dtype, graph: bool) -> _Crew | None:
    """The adapters of a mixed batch with their plans, or None if they cannot be grouped."""
    plans, leaves, notes = [], [], []
    for delta in deltas:
        ready = delta._planned(x, dtype, graph, None)
        if ready is None:
            return None
        plans.append(ready[0])
        leaves.append(ready[1])
        note = delta.noted.get(graph)
        notes.append(note if note is not None and note[-1] is ready else None)
    if not grouped.alike(plans, leaves):
        return None
    flat = [leaf for own in leaves for leaf in own]
    noted = [note for note in notes if note is not None]
    trains = type(deltas[0]).check_step is not Delta.check_step
    return _Crew(
        deltas=list(deltas),
        dtype=dtype,
        noted=len(noted) == len(deltas),
        training=[delta.training for delta in deltas],
        scaling=[delta.scaling for delta in deltas],
        places=[place for note in noted for place in note[1]],
        watched=[(note[2], note[3]) for note in noted if note[3] is not None],
        requires=[leaf.requires_grad for leaf in flat],
        checks=[d for d in deltas if d.training and (trains or d.owner)],
        draws=any(delta.draws for delta in deltas),
        trains=graph and any(leaf.requires_grad for leaf in flat),
        plans=tuple(plans),
        counts=tuple(map(len, leaves)),
        ranks=tuple(map(grouped.ranks, plans, leaves)),
        leaves=flat,
        stacks={},
    )


class _Facts(NamedTuple):
    """What a class states about itself; a subclass that overrides one part states both again.

    Attributes:
        standard: the way of a forward is that of LowRankDelta, whatever the formula is.
        closes: gradients of the factors have closed forms.
        reads: what the factors read is stated. knows_mix: and what the mix reads.
        plain_gate: the gate is the product of `gates`. spreads: and its gradient is stated.
        folds: all that evaluation reads is stated, gates apart.
        masks: it draws masks of its own, which need neither a gate nor dropout.
    """

    standard: bool
    closes: bool
    reads: bool
    knows_mix: bool
    plain_gate: bool
    spreads: bool
    folds: bool
    masks: bool


@functools.cache
def _facts(cls: type) -> _Facts:
    names = ("forward", "joint", "mixer", "_plain")
    same = all(getattr(cls, name) is getattr(LowRankDelta, name) for name in names)
    plain_gate = all(getattr(cls, n) is getattr(LowRankDelta, n) for n in ("gate", "live"))
    reads = cls.reads is not None and states(cls, "reads", "factors")  # type: ignore[attr-defined]
    knows_mix = reads and states(cls, "reads", "mix")
    return _Facts(
        standard=same and states(cls, "one_mask", "down"),
        closes=states(cls, "closed", "factors") and states(cls, "close", "factors"),
        reads=reads,
        knows_mix=knows_mix,
        plain_gate=plain_gate,
        spreads=states(cls, "unspread", "spread"),
        folds=knows_mix and plain_gate,
        masks=cls.rank_mask is not LowRankDelta.rank_mask,
    )


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
    if kind in ROUTERS:
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
