"""Delta: the trainable update dW (out, in) of one frozen linear layer.

A method subclasses LowRankDelta (stacked factors, gate, mix) or DenseDelta (rows of dW) and states
its mathematics. Forward, weight, merge, export, counting, saving and scheduling are derived here
and in the rest of core, once.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core import events
from plait.core.config import DeltaConfig
from plait.core.gate import Gate, gates_of
from plait.core.init import kaiming, seeded, svd_start
from plait.core.mix import TaskTable, TokenRouter
from plait.core.route import Rows
from plait.core.sharding import put, refuse_sharded, whole
from plait.kernels.dense_tiles import DenseTiles, tile_rows
from plait.kernels.low_rank import up

_order = itertools.count()


class NotMergeable(ValueError):
    """The update depends on the input, so no single weight holds it."""


@dataclass
class FrozenLinear:
    """What a Delta may know of its layer.

    name: full module name. in_features, out_features: of the layer, whatever its storage layout.
    dtype: of the factors, float32, or float64 on an fp64 base. read: gives the weight.
    """

    name: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    blank: bool = False  # start values are zeros: saved or random ones replace them

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), dequantised, in the factors' dtype."""
        return self.read().detach().to(self.dtype)

    def principal(
        self, rank: int, scaling: float, svd: Literal["randomized", "exact"], gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A0 (rank, in), B0 (out, rank): scaling B0 A0 is the weight's best rank-`rank` part.

        Zeros where saved or random values are about to replace them: no SVD at load.
        """
        if self.blank:
            return torch.zeros(rank, self.in_features), torch.zeros(self.out_features, rank)
        return svd_start(self.weight, rank, scaling, svd, gen)


@dataclass(frozen=True, eq=False)
class Pair:
    """Free factors on which one change of basis acts: (A, B) -> (R A, B R^-1) leaves dW unchanged.

    name: of the layer. A: (r, in), or (n, r, in) of which the pair has the slices A_slices, side by
    side on `in`. B: (out, r), or (n, out, r) of which it has B_slices, stacked on `out`. Slices are
    None for a 2-D factor. scaling: s.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    A_slices: tuple[int, ...] | None = None
    B_slices: tuple[int, ...] | None = None


class Delta(nn.Module):
    """The update of one layer. Subclasses declare; the constructor receives the layer's facts.

    Attributes:
        config: this layer's options (`r`, `lora_alpha` resolved from the patterns).
        adapter: the adapter's config, one object for all its layers; holds `total_steps`.
        base: facts of the frozen layer.
        scaling: s.
        t: completed optimizer steps (int64 buffer), where the method counts them, else None.
    """

    mergeable: ClassVar[bool] = True
    exact_export: ClassVar[bool] = True
    # Groups of parameters of which one must be non-zero, or no gradient could ever leave zero.
    alive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # Buffers that a file may lack or that a method drops on its way, see _load_from_state_dict.
    optional_buffers: ClassVar[tuple[str, ...]] = ()
    wants_mask: bool = False  # whether the forward uses the batch's padding mask
    # Tensors that all layers of one shape share; the first such layer owns and saves them.
    shared: ClassVar[tuple[str, ...]] = ()
    no_restart: ClassVar[str | None] = None  # why `restart` cannot be, for a chain; None: it can
    # Why the method has no pairs, for the error of `pairs`.
    no_pairs: ClassVar[str] = "it states no pairs of free factors"

    t: Tensor | None

    def __init__(self, base: FrozenLinear, config: DeltaConfig, gen: torch.Generator) -> None:
        """Set what all methods share; a subclass adds parameters drawn from `gen`."""
        super().__init__()
        self.base, self.config, self.adapter = base, config, config
        self.scaling = config.lora_alpha / config.r
        self.dropout = config.lora_dropout
        self.order = next(_order)  # layers in the order of the model
        self.forwards = 0  # training forwards since the start or the last event
        self.stepped = False  # an event came
        self.fresh = True  # at its start, before the first step: the update may be zero
        self.awaits_weights = False  # made from a saved config, weights not loaded yet
        self.gates: list[Gate] = []
        self.owner: list[Delta] = []  # who holds the shared tensors, where it is another Delta
        self.register_buffer("t", None)
        self.register_state_dict_pre_hook(_check_fired)

    # What a method may declare -------------------------------------------------------------

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """Trainable parameters of one layer, by the method's formula."""
        raise NotImplementedError

    @classmethod
    def check_gates(cls, config: Any) -> None:
        """Refuse gates that cannot act on the method."""
        if config.gates:
            raise ValueError(
                f"gates = {config.gates}: {config.key} has no rank axis that a gate could act on. "
                "Leave gates out."
            )

    @classmethod
    def allocates(cls, config: Any) -> bool:
        """Whether ranks move between layers, scored on a development batch."""
        return False

    @classmethod
    def count_shared(cls, config: Any, in_features: int, out_features: int) -> int:
        """Trainable parameters that all layers of one shape and rank share, counted once."""
        return 0

    def penalty(self) -> Tensor | None:
        """A scalar whose gradient enters once per optimizer step, or None.

        The adapter's penalty is the mean over its layers.
        """
        return None

    def after_step(self) -> None:
        """What happens after each completed optimizer step, gradients still present, t advanced."""

    @classmethod
    def after_all(cls, deltas: Sequence[Any]) -> None:
        """What happens once a step over all layers of an adapter, after every after_step."""

    def pairs(self) -> list[Pair]:
        """The pairs of free factors, each slice of a parameter in one of them.

        Raises:
            ValueError: the method has none.
        """
        raise self.pairless(self.no_pairs)

    def pairless(self, why: str) -> ValueError:
        """The error of a layer without free pairs."""
        return ValueError(
            f"{self.base.name}: {self.adapter.key} has no pairs (A, B) that can change their basis "
            f"freely: {why}. Train it with AdamW."
        )

    def check_schedule(self) -> None:
        """Raise ValueError where total_steps leaves no room for a schedule."""
        for gate in self.gates:
            gate.check_schedule(self)  # type: ignore[arg-type]

    def loaded(self) -> None:
        """Recompute what is derived from saved state."""

    def check_step(self) -> None:
        """Refuse a training forward that the method cannot serve."""

    def _check_training(self) -> None:
        """Refuse a training forward: for the method, or where what is shared has parted."""
        self.check_step()
        for owner in self.owner:
            for name, p in self._parameters.items():
                if name in self.shared and p is not owner._parameters[name]:
                    raise ValueError(
                        f"{self.adapter.key}: {name} of {self.base.name} is no longer that of "
                        f"{owner.base.name}, which it shares. FSDP2 parts them in units of single "
                        "blocks: shard the model as one unit, fully_shard(model), or use DDP."
                    )

    def before_step(self) -> None:
        """Refuse an optimizer step whose gradients are not what the method needs."""

    # What the core provides ---------------------------------------------------------------------

    def count_steps(self) -> None:
        """Count completed optimizer steps in the buffer `t`; makes the event required."""
        self.t = torch.zeros((), dtype=torch.int64)

    @property
    def alike(self) -> tuple[int, int, int]:
        """Rank and shape (r, in, out): layers that agree in it share tensors."""
        return self.config.r, self.base.in_features, self.base.out_features

    @property
    def steps(self) -> int:
        """Completed optimizer steps."""
        return 0 if self.t is None else int(self.t)

    @property
    def total_steps(self) -> int:
        """Planned optimizer steps.

        Raises:
            ValueError: unknown; the message names the ways to give it.
        """
        if self.adapter.total_steps is None:
            raise ValueError(
                f"{self.adapter.key}: total_steps is not known and this method has a schedule. "
                f"Give {type(self.adapter).__name__}(total_steps=...), add plait.PlaitCallback() "
                "to the Trainer, or use plait train."
            )
        return self.adapter.total_steps

    def own_rates(self) -> dict[str, float | None]:
        """Parameters that decay never reaches -> their own base learning rate, or None."""
        return {name: lr for gate in self.gates for name, lr in gate.own_rates(self).items()}  # type: ignore[arg-type]

    def borrow(self, owner: "Delta") -> None:
        """Use the shared tensors of another Delta of the same adapter, shape and rank."""
        self.owner = [owner]
        for name in self.shared:
            if name in owner._parameters:
                self.register_parameter(name, owner._parameters[name])
            else:
                self.register_buffer(name, owner._buffers[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Delta":
        """Move or cast; shared tensors that were replaced stay those of the owner."""
        super()._apply(fn, recurse)
        if self.owner:
            self.borrow(self.owner[0])
        return self

    @property
    def needs_events(self) -> bool:
        """Whether training without optimizer-step events would be wrong."""
        cls = type(self)
        return self.t is not None or any(
            vars_of(cls, name) is not vars_of(Delta, name)
            for name in ("penalty", "after_step", "after_all", "before_step")
        )

    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast region that the call is in, or None."""
        device = next(self.parameters()).device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def randomize(self, gen: torch.Generator) -> None:
        """A random start with dW != 0 (`init_weights=False`, for tests)."""
        self.fresh = False
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=gen) * 0.1)

    @torch.no_grad()
    def restart(self, gen: torch.Generator) -> None:
        """Start anew, as on a fresh layer of the weight that `base` now reads; for chains.

        Parameters keep their objects and get new values, their gradients go; all buffers (t,
        averages, masks) are those of a fresh Delta.
        """
        blank = replace(self.base, blank=False)  # a loaded adapter restarts from the weight, too
        fresh = type(self)(blank, self.config, gen)
        for name, p in self.named_parameters():
            p.copy_(fresh.get_parameter(name))
            p.grad = None
        first = next(self.parameters())
        for name, module in fresh.to(first.device, first.dtype).named_modules():
            for buffer, value in module._buffers.items():
                setattr(self.get_submodule(name), buffer, value)
        self.forwards, self.fresh = 0, True
        self.loaded()

    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in), scaled, in the factors' dtype.

        Raises:
            NotMergeable: the update depends on the input.
        """
        raise NotImplementedError

    def rank(self) -> int:
        """Attainable rank of dW."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; the copy is watched like the original."""
        super().__setstate__(state)
        events.watch(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load, with optional buffers taken or dropped as the file has them."""
        ours = [k for k in state_dict if k.startswith(prefix)]
        if ours:
            device = next(self.parameters()).device
            for name in self.optional_buffers:
                saved = state_dict.get(prefix + name)
                setattr(
                    self, name, None if saved is None else torch.empty_like(saved, device=device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.owner:  # what it holds may have been replaced just now
            self.borrow(self.owner[0])
            missing = args[2]
            missing[:] = [k for k in missing if k.removeprefix(prefix) not in self.shared]
        if ours:
            self.awaits_weights = False
            self.fresh = self.t is not None and not self.t.is_meta and not self.steps
            self._check_alive()
            self.loaded()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save; shared tensors stand in the file once, with their owner."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.shared if self.owner else ():
            destination.pop(prefix + name, None)

    def _check_alive(self) -> None:
        for group in self.alive:
            tensors = [p for p in map(self.get_parameter, group) if p.numel() and not p.is_meta]
            if tensors and not any(bool(whole(p).any()) for p in tensors):
                raise ValueError(
                    f"{self.adapter.key}: {' and '.join(group)} of {self.base.name} are all zero, "
                    "so no gradient can ever reach them. The file is not a trained adapter of this "
                    "method; train it again."
                )

    def extra_repr(self) -> str:
        """Shape and scale, for print(model)."""
        return (
            f"in={self.base.in_features}, out={self.base.out_features}, "
            f"r={self.config.r}, s={self.scaling:g}"
        )


class LowRankDelta(Delta):
    """dW = s B_cat mix(gate A_cat): a sum of products, mixed in rank space.

    The rank axis is groups of `ranks` ranks, one after the other; a gate acts on rank k of each.

    Attributes:
        gates: what acts on the rank axis.
        ranks: ranks that gates act on, slots without a live rank included.
    """

    own_gates: ClassVar[tuple[type[Gate], ...]] = ()  # that make the method
    # Parameters and buffers with a rank axis -> that axis; what gates that start ranks anew need.
    rank_axes: ClassVar[dict[str, int]] = {}

    def __init__(self, base: FrozenLinear, config: DeltaConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.gates = gates_of(config, type(self))
        self.ranks = type(self).slots_of(config)
        for gate in self.gates:
            gate.prepare(self, self.ranks, seeded(config.seed, base.name, gate.key))

    @classmethod
    def check_gates(cls, config: Any) -> None:
        """Refuse unknown gates and options, and gates that cannot act on the method."""
        gates_of(config, cls)

    @classmethod
    def allocates(cls, config: Any) -> bool:
        """Whether one of its gates does."""
        return any(gate.allocates for gate in gates_of(config, cls))

    @classmethod
    def gated(cls, config: Any) -> int:
        """Ranks of a layer that gates act on."""
        return config.r

    @classmethod
    def slots_of(cls, config: Any) -> int:
        """Ranks that the factors have room for: `gated`, or more where a gate wants spare ones."""
        ranks = cls.gated(config)
        return max([ranks, *(gate.slots(ranks) for gate in gates_of(config, cls))])

    @property
    def all_rank_axes(self) -> dict[str, int]:
        """rank_axes with those of the gates."""
        return {**self.rank_axes, **{n: a for g in self.gates for n, a in g.rank_axes.items()}}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_cat (R_in, in) and B_cat (out, R_out)."""
        raise NotImplementedError

    def pairs(self) -> list[Pair]:
        """As in Delta; a gate belongs to single ranks, so with one no basis is free."""
        if self.gates:
            keys = ", ".join(gate.key or "its own" for gate in self.gates)
            raise self.pairless(f"a gate ({keys}) belongs to single ranks")
        return self.free_pairs()

    def free_pairs(self) -> list[Pair]:
        """The pairs of the method without gates."""
        return super().pairs()

    def live(self) -> Tensor | None:
        """The product of the gates, (ranks,), or None."""
        values = [v for v in (gate.value(self) for gate in self.gates) if v is not None]
        return torch.stack(values).prod(0) if len(values) > 1 else next(iter(values), None)

    @property
    def rank_groups(self) -> int:
        """Groups of `ranks` ranks on the rank axis; overridden where factors cost something."""
        return len(self.factors()[0]) // self.ranks

    def spread(self, g: Tensor) -> Tensor:
        """A gate (.., ranks) on the whole rank axis, (.., R_in)."""
        return g.repeat(*[1] * (g.ndim - 1), self.rank_groups)

    def gate(self) -> Tensor | None:
        """Factor on the rank axis (R_in,), or None."""
        g = self.live()
        return None if g is None else self.spread(g)

    def mix(self) -> Tensor | TokenRouter | TaskTable | None:
        """None (R_in == R_out), a constant matrix (R_out, R_in), a token router or a task table."""
        return None

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Rank activations (.., R_in) of x (.., in); input dropout acts here, one mask a call."""
        return F.linear(F.dropout(x, self.dropout, self.training), A)

    @torch.no_grad()
    def revive(self, index: Tensor, gen: torch.Generator) -> None:
        """Start ranks anew, with an update of zero and no memory in the stepping optimizer.

        Args:
            index: of the ranks (k,).
            gen: of the draws.
        """
        fresh = self.start_of(index, gen)
        for gate in self.gates:
            fresh |= gate.start_of(index, gen)
        for name, value in fresh.items():
            p = self.get_parameter(name)
            axis = self.all_rank_axes[name] % p.ndim
            where = (*(slice(None) for _ in range(axis)), index)
            put(p, where, value.to(p.device, p.dtype))
            events.forget(p, where)

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

    def forward(
        self, x: Tensor, task_ids: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor:
        """s mix(gate x A^T) B^T: (.., in) to (.., out), computed in the dtype of x.

        Args:
            x: (.., in).
            task_ids: (batch,), for a task table only.
            rows: what else is known of the rows, for balance losses.
        """
        if self.training:
            self._check_training()
        A, B = self.factors()
        mix = self.mix()
        if isinstance(mix, TokenRouter):
            mix.rows = rows
            apply = lambda z: mix(x, z)  # noqa: E731
        elif isinstance(mix, TaskTable):
            if task_ids is None:
                raise ValueError(
                    f"{self.adapter.key}: no task_ids in this batch. Pass model(..., task_ids=...) "
                    f'or call set_task("{mix.tasks[0]}") for evaluation.'
                )
            apply = lambda z: mix(task_ids, z)  # noqa: E731
        elif mix is not None:
            apply = lambda z: F.linear(z, mix.to(z.dtype))  # noqa: E731
        else:
            apply = None
        z = self.down(x, A.to(x.dtype))
        for gate in self.gates if self.training else ():
            mask = gate.mask(self, z, self.ranks)
            z = z if mask is None else z * self.spread(mask)
        return up(z, B, self.scaling, self.gate(), apply)

    @torch.no_grad()
    def folded(
        self, task: str | None = None, approx: Literal["mean"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate and mix folded in: dW = s B A with A (k, in), B (out, k), zero ranks left out.

        Args:
            task: which task of a task table.
            approx: "mean" takes a uniform router; exact only where the router is uniform.

        Raises:
            NotMergeable: a token router without approx, a task table without a task.
        """
        refuse_sharded(self, f"dW of {self.base.name}")
        with mode(self, training=False):
            A, B = self.factors()
            gate, mix = self.gate(), self.mix()
        if gate is not None:
            A = gate[:, None] * A
        key = self.adapter.key
        if isinstance(mix, TokenRouter):
            if approx != "mean":
                raise NotMergeable(
                    f"{key} cannot be merged: its update depends on the token. "
                    'Use merge(approx="mean") or keep the adapter.'
                )
            mix = mix.uniform(len(A))
        elif isinstance(mix, TaskTable):
            if task is None:
                raise NotMergeable(
                    f"{key} cannot be merged: its update depends on the task. "
                    f"Name one of {', '.join(mix.tasks)}: merge(task=...)."
                )
            mix = mix.chosen(task, len(A))
        if mix is not None:
            mix = mix.to(A)
            rho = int(torch.linalg.matrix_rank(mix))
            if rho == len(mix):
                A = mix @ A
            elif rho == mix.shape[1]:
                B = B @ mix
            else:  # mix = L R of rank rho; never wider than its rank
                U, S, Vh = torch.linalg.svd(mix, full_matrices=False)
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
            mix = self.mix()
            A, B = self.factors()
        inner = min(A.shape[0], B.shape[1])
        if isinstance(mix, Tensor):
            inner = int(torch.linalg.matrix_rank(mix.float()))
        return min(inner, self.base.in_features, self.base.out_features)


class DenseDelta(Delta):
    """dW by an element-wise form, of full rank; computed in tiles of rows."""

    exact_export: ClassVar[bool] = False
    tile: int | None = None  # rows of a tile; None: by device

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of dW / s, (stop - start, in), in the factors' dtype."""
        raise NotImplementedError

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.scaling * self.weight_rows(start, stop)

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x dW^T (split form), or x (W + dW)^T + b with the base weight given (joint form).

        Args:
            x: (.., in).
            weight: frozen base weight (out, in), or None.
            bias: (out,), with weight.
        """
        if self.training:
            self._check_training()
        x = F.dropout(x, self.dropout, self.training)
        height = self.tile or tile_rows(self.base.in_features, x.device)
        x = x.to(self.autocast() or x.dtype)
        training = self.training  # the backward may run after eval(); the gate is the forward's

        def rows(start: int, stop: int) -> Tensor:
            with mode(self, training):
                return self._rows(start, stop)

        with torch.autocast(x.device.type, enabled=False):
            return DenseTiles.apply(
                rows, self.base.out_features, height, x, weight, bias, *self.parameters()
            )

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in), by the same code and tiles as the forward."""
        if choice.get("task") is not None:
            raise ValueError(
                f"{self.adapter.key} has no tasks; task = {choice['task']!r} was given."
            )
        refuse_sharded(self, f"dW of {self.base.name}")
        first = next(self.parameters())
        height = self.tile or tile_rows(self.base.in_features, first.device)
        out = self.base.out_features
        with mode(self, training=False):
            tiles = [self._rows(a, min(a + height, out)) for a in range(0, out, height)]
        return torch.cat(tiles)

    def rank(self) -> int:
        """Attainable rank of dW: full."""
        return min(self.base.in_features, self.base.out_features)


def _check_fired(delta: Delta, *_: Any) -> None:
    events.check_fired(delta)


def vars_of(cls: type, name: str) -> Any:
    """The function behind a method of a class, classmethods included."""
    found = getattr(cls, name)
    return getattr(found, "__func__", found)


def less_start(
    a: Tensor,
    b: Tensor,
    A0: Tensor,
    B0: Tensor,
    share_a: Tensor | float = 1.0,
    share_b: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Delta mode: sum_a b_a a_a less its start, as stacked factors.

    The start of term a is (share_b B0)(share_a A0), of one block for all terms or a block for each.
    b a - b0 a0 = b (a - a0) + (b - b0) a0: both parts are exactly zero at the start, so a bf16
    forward sees the small difference and not the rounding of two large products.

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


def planned(layers: Iterable[tuple[type[Delta], Any, int, int]]) -> int:
    """Trainable parameters of an adapter by the method's formulas.

    Args:
        layers: of each layer the Delta class, the layer's config, in and out.
    """
    total, shapes = 0, set()
    for cls, config, n_in, n_out in layers:
        total += cls.count(config, n_in, n_out)
        if issubclass(cls, LowRankDelta):  # gates that make the method stand in its formula
            own = len(cls.own_gates)
            ranks = cls.slots_of(config)
            total += sum(gate.count(ranks) for gate in gates_of(config, cls)[own:])
        if (config.r, n_in, n_out) not in shapes:
            shapes.add((config.r, n_in, n_out))
            total += cls.count_shared(config, n_in, n_out)
    return total


@contextmanager
def mode(delta: Delta, training: bool) -> Iterator[None]:
    """The Delta in training or evaluation mode, inside."""
    before, delta.training = delta.training, training
    try:
        yield
    finally:
        delta.training = before
