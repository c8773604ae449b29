"""Delta: the trainable update dW (out, in) of one frozen linear layer.

A method subclasses LowRankDelta (stacked factors, gates, mix) or DenseDelta (rows of dW) and states
its mathematics. What both kinds share is here: facts of the layer, counting, saving, scheduling.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.core import events
from plait.core.config import DeltaConfig
from plait.core.gate import Gate, states
from plait.core.init import svd_start
from plait.core.rates import Rates
from plait.core.route import NOWHERE, Rows
from plait.core.sharding import whole
from plait.kernels.cache import Kept
from plait.kernels.grouped import Segments
from plait.kernels.stream import Stream

_order = itertools.count()


class NotMergeable(ValueError):
    """The update depends on the input, so no single weight holds it."""


@dataclass
class FrozenLinear:
    """What a Delta may know of its layer.

    Attributes:
        name: full module name.
        in_features, out_features: of the layer, whatever its storage layout.
        dtype: of the factors: float64 on an fp64 base, else float32.
        read: returns the weight (out, in).
        blank: start values are zeros, because saved or random ones are about to replace them.
    """

    name: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    blank: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), dequantised, in the factors' dtype."""
        return self.read().detach().to(self.dtype)

    def principal(
        self, rank: int, scaling: float, svd: Literal["randomized", "exact"], gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A0 (rank, in), B0 (out, rank): scaling B0 A0 is the weight's best rank-`rank` part.

        Zeros for a blank layer, so that loading an adapter takes no SVD.
        """
        if self.blank:
            return torch.zeros(rank, self.in_features), torch.zeros(self.out_features, rank)
        return svd_start(self.weight, rank, scaling, svd, gen)


@dataclass(frozen=True, eq=False)
class Pair:
    """Free factors on which one change of basis acts: (A, B) -> (R A, B R^-1) leaves dW unchanged.

    Attributes:
        name: of the layer.
        A: (r, in), or (n, r, in) of which the pair has the slices A_slices, side by side on `in`.
        B: (out, r), or (n, out, r) of which the pair has the slices B_slices, stacked on `out`.
        scaling: s.
        A_slices, B_slices: None for a 2-D factor.
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
        t: completed optimizer steps (int64 buffer), or None if the method does not count them.
    """

    mergeable: ClassVar[bool] = True
    exact_export: ClassVar[bool] = True
    adds: ClassVar[bool] = False  # whether `joint` can add to an output in place
    # Groups of parameters of which one must be non-zero: else every gradient stays zero.
    alive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # Buffers that a file may lack because the method drops them while it trains.
    optional_buffers: ClassVar[tuple[str, ...]] = ()
    wants_mask: bool = False  # whether the forward uses the batch's padding mask
    # Tensors that all layers of one shape share; the first such layer owns and saves them.
    shared: ClassVar[tuple[str, ...]] = ()
    no_restart: ClassVar[str | None] = None  # why a chain cannot `restart` it; None: it can
    no_pairs: ClassVar[str] = "it states no pairs of free factors"  # the reason that `pairs` gives

    # Whether `joint` computes what `forward` does: who overrides forward states joint again.
    joint_is_forward: ClassVar[bool] = True

    t: Tensor | None

    def __init_subclass__(cls, **facts: Any) -> None:
        """Note what the class overrides."""
        super().__init_subclass__(**facts)
        cls.joint_is_forward = states(cls, "joint", "forward")

    def __init__(self, base: FrozenLinear, config: DeltaConfig, gen: torch.Generator) -> None:
        """Set what all methods share; a subclass adds parameters drawn from `gen`."""
        super().__init__()
        self.base, self.config, self.adapter = base, config, config
        self.scaling = config.lora_alpha / config.r
        self.dropout = config.lora_dropout
        self.order = next(_order)  # layers in the order of the model
        self.forwards = 0  # training forwards since the start or the last event
        self.stepped = False  # an optimizer step was seen
        self.fresh = True  # at its start, before the first step: the update may be zero
        self.awaits_weights = False  # made from a saved config, weights not loaded yet
        self.state_from: Literal["start", "file", "copy"] = "start"  # where its buffers come from
        self.adopted: list[float] = []  # fingerprint of the parameters when its state was copied
        self.gates: list[Gate] = []
        self.stream: Stream | None = None  # of its random masks in mixed batches; None: torch's
        self.kept = Kept()  # what calls with the same weights have in common
        self.owner: list[Delta] = []  # the Delta that holds the shared tensors, if not this one
        self.register_buffer("t", None)
        self.register_state_dict_pre_hook(_check_fired)

    # What a method may declare -------------------------------------------------------------

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """Trainable parameters of one layer, by the method's formula."""
        raise NotImplementedError

    @classmethod
    def count_shared(cls, config: Any, in_features: int, out_features: int) -> int:
        """Trainable parameters that all layers of one shape and rank share, counted once."""
        return 0

    @classmethod
    def count_gates(cls, config: Any) -> int:
        """Trainable parameters of the gates in the config's `gates`, of one layer."""
        return 0

    @classmethod
    def check_gates(cls, config: Any) -> None:
        """Raise ValueError for gates that cannot act on the method."""
        if config.gates:
            raise ValueError(
                f"gates = {config.gates}: {config.key} has no rank axis that a gate could act on. "
                "Leave gates out."
            )

    @classmethod
    def allocates(cls, config: Any) -> bool:
        """Whether ranks move between layers, scored on a development batch."""
        return False

    def forward(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """The update's output x dW^T.

        Args:
            x: (.., in), floating.
            rows: what is known of the rows of the batch: tasks, padding mask, sample types.

        Returns:
            (.., out).
        """
        raise NotImplementedError

    def joins(self, x: Tensor, transposed: bool) -> bool:
        """Whether `joint` computes the frozen layer's product as well, for this input.

        Args:
            x: (.., in).
            transposed: whether the layer stores its weight as (in, out).
        """
        return False

    def joint(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows = NOWHERE,
        y: Tensor | None = None,
    ) -> Tensor:
        """x (W + dW)^T + b, (.., out), where `joins`; with `y` x dW^T added to it, if `adds`."""
        raise NotImplementedError

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
        """The layer's output for a batch of several adapters, each row with its own dW.

        Args:
            deltas: those of `rows.adapters`, all of this class.
            rows: which adapter each row has.
            x: (rows, .., in).
            weight: frozen base weight (out, in), or None.
            bias: (out,), only with a weight.
            y: (rows, .., out), the output without updates, only without a weight; it may be changed
                in place.

        Returns:
            (rows, .., out), or None where these adapters cannot be computed together.
        """
        return None

    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in), scaled, in the factors' dtype.

        Args:
            choice: `task=` for a task table, `approx="mean"` for a token router.

        Raises:
            NotMergeable: the update depends on the input and the choice does not settle it.
            ValueError: the adapter is sharded (FSDP2).
        """
        raise NotImplementedError

    def folded(
        self, task: str | None = None, approx: Literal["mean"] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """A (k, in) and B (out, k) with dW = s B A, or None if no such factors exist.

        Args and errors are those of `weight`.
        """
        return None

    def rank(self) -> int:
        """Attainable rank of dW."""
        raise NotImplementedError

    @property
    def depends_on(self) -> Literal["token", "task"] | None:
        """The part of the input that dW depends on, or None."""
        return None

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks, if dW depends on the task."""
        return ()

    def penalty(self) -> Tensor | None:
        """A scalar whose gradient enters once per optimizer step, or None.

        The adapter's penalty is the mean over its layers.
        """
        return None

    def after_step(self) -> None:
        """Called after every completed optimizer step.

        Gradients are still set and `t` is already incremented.
        """

    @classmethod
    def after_all(cls, deltas: Sequence[Any]) -> None:
        """Called once per optimizer step with all layers of an adapter, after every after_step."""

    def pairs(self) -> list[Pair]:
        """The pairs of free factors; each slice of a parameter belongs to one of them.

        Raises:
            ValueError: the method has no pairs.
        """
        raise self.pairless(self.no_pairs)

    def pairless(self, why: str) -> ValueError:
        """The error of a layer without free pairs."""
        return ValueError(
            f"{self.base.name}: {self.adapter.key} has no pairs (A, B) that can change their basis "
            f"freely: {why}. Train it with AdamW."
        )

    def check_schedule(self) -> None:
        """Raise ValueError if total_steps leaves no room for a schedule."""
        for gate in self.gates:
            gate.check_schedule(self)  # type: ignore[arg-type]

    def loaded(self) -> None:
        """Called after weights were loaded: recompute what is derived from them."""

    def check_step(self) -> None:
        """Raise ValueError if the method cannot train here; called by each training forward."""

    def check_training(self) -> None:
        """Raise if the method cannot train here, or if a shared tensor has been replaced."""
        self.check_step()
        for owner in self.owner if self.owner else ():
            for name, p in self._parameters.items():
                if name in self.shared and p is not owner._parameters[name]:
                    raise ValueError(
                        f"{self.adapter.key}: {name} of {self.base.name} is no longer that of "
                        f"{owner.base.name}, which it shares. FSDP2 parts them in units of single "
                        "blocks: shard the model as one unit, fully_shard(model), or use DDP."
                    )

    def before_step(self) -> None:
        """Raise ValueError if the gradients of an optimizer step are not what the method needs."""

    # What the core provides ---------------------------------------------------------------------

    def count_steps(self) -> None:
        """Count completed optimizer steps in the buffer `t`; training then needs the events."""
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
            ValueError: it was not set; the message names the ways to set it.
        """
        if self.adapter.total_steps is None:
            raise ValueError(
                f"{self.adapter.key}: total_steps is not known and this method has a schedule. "
                f"Give {type(self.adapter).__name__}(total_steps=...), add plait.PlaitCallback() "
                "to the Trainer, or use plait train."
            )
        return self.adapter.total_steps

    def own_rates(self) -> Rates:
        """The parameters that weight decay skips, with their own base learning rates."""
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
        """Move or cast; shared tensors stay those of their owner."""
        super()._apply(fn, recurse)
        if self.owner:
            self.borrow(self.owner[0])
        return self

    @property
    def needs_events(self) -> bool:
        """Whether training without optimizer-step events would be wrong."""
        cls = type(self)  # looked up at each call: a class may get a hook after it was made
        return (
            self.t is not None
            or cls.penalty is not Delta.penalty
            or cls.after_step is not Delta.after_step
            or cls.before_step is not Delta.before_step
            or vars_of(cls, "after_all") is not vars_of(Delta, "after_all")
        )

    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast region that the call is in, or None."""
        if not torch._C._is_any_autocast_enabled():
            return None
        device = next(self.parameters()).device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    @property
    def draws(self) -> bool:
        """Whether a call may draw random masks."""
        return self.training and bool(self.dropout)

    def drawing(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which masks are drawn from the stream of its own, if it has one."""
        return nullcontext() if self.stream is None else self.stream.on(device)

    def randomize(self, gen: torch.Generator) -> None:
        """A random start with dW != 0 (`init_weights=False`, for tests)."""
        self.fresh = False
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=gen) * 0.1)

    @torch.no_grad()
    def restart(self, gen: torch.Generator) -> None:
        """Restart as a fresh Delta on the weight that `base` now reads; for chains.

        Parameters keep their identity, get start values and lose their gradients. All buffers (t,
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
        for buffer in self.optional_buffers:
            self.set_optional(buffer, self._buffers[buffer])
        self.forwards, self.fresh = 0, True
        self.loaded()

    # State beside the parameters ----------------------------------------------------------------

    def state(self) -> dict[str, Tensor | None]:
        """The buffers that are saved, by name, those of the method that are None included."""
        return {
            f"{prefix}.{name}".lstrip("."): value
            for prefix, module in self.named_modules()
            for name, value in module._buffers.items()
            if name not in module._non_persistent_buffers_set
            and not (module is self and self.owner and name in self.shared)
        }

    @property
    def lived(self) -> bool:
        """Whether it is past its start: trained, loaded or copied."""
        return self.stepped or self.state_from != "start"

    def copies(self, other: "Delta") -> bool:
        """Whether its parameters, but not its state, were copied from another adapter's Delta."""
        if self.stepped or self.state_from == "file" or type(self) is not type(other):
            return False
        if other.awaits_weights:
            return False
        mine, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if mine.keys() != theirs.keys() or not any(p.numel() for p in mine.values()):
            return False
        if not all(_equal(p, theirs[name]) for name, p in mine.items()):
            return False
        return self.state_from != "copy" or self._fingerprint() != self.adopted

    @torch.no_grad()
    def adopt(self, original: "Delta") -> None:
        """Copy the state of the Delta whose parameters this one has."""
        for name, value in original.state().items():
            module, _, buffer = name.rpartition(".")
            place = self.get_submodule(module)
            before = place._buffers.get(buffer)
            if _equal(before, value):
                continue
            if place is self and buffer in self.optional_buffers:
                self.set_optional(buffer, None if value is None else value.clone())
            elif before is not None and value is not None and before.shape == value.shape:
                before.copy_(value)
            else:
                setattr(place, buffer, None if value is None else value.clone())
        self.state_from, self.awaits_weights, self.fresh = "copy", False, original.fresh
        self.adopted = self._fingerprint()
        self.loaded()

    def _fingerprint(self) -> list[float]:
        """Numbers that change with the parameters."""
        wide = (whole(p.detach()).double() for p in self.parameters())
        return [float(value) for p in wide for value in (p.sum(), p.abs().sum())]

    def set_optional(self, name: str, value: Tensor | None) -> None:
        """Set an optional buffer, or drop it.

        A dropped one leaves an empty, unsaved buffer, so that two copies of a model have equally
        many: torch's AveragedModel pairs them by position.
        """
        setattr(self, name, value)
        self._buffers.pop(f"{name}_dropped", None)
        if value is None:
            device = next(self.parameters()).device
            empty = torch.zeros((), device="cpu" if device.type == "meta" else device)
            self.register_buffer(f"{name}_dropped", empty, persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; its events fire like those of the original."""
        super().__setstate__(state)
        events.watch(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; optional buffers that the file lacks are dropped."""
        has_keys = any(k.startswith(prefix) for k in state_dict)
        if has_keys:
            device = next(self.parameters()).device
            for name in self.optional_buffers:
                saved = state_dict.get(prefix + name)
                self.set_optional(
                    name, None if saved is None else torch.empty_like(saved, device=device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.owner:  # loading may have replaced the shared tensors
            self.borrow(self.owner[0])
            missing = args[2]
            missing[:] = [k for k in missing if k.removeprefix(prefix) not in self.shared]
        if has_keys:
            self.awaits_weights, self.state_from = False, "file"
            self.fresh = self.t is not None and not self.t.is_meta and not self.steps
            self._check_alive()
            self.loaded()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save; the owner alone writes shared tensors."""
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


def computes_in(x: Tensor) -> torch.dtype:
    """That of autocast if it is on, which leaves float64 alone; else that of x."""
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return x.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors, or shards of one, are equal; a meta tensor equals none."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    return torch.equal(whole(one), whole(other))


def _check_fired(delta: Delta, *_: Any) -> None:
    events.check_fired(delta)


def vars_of(cls: type, name: str) -> Any:
    """The function behind a method of a class, classmethods included."""
    method = getattr(cls, name)
    return getattr(method, "__func__", method)


def planned(layers: Iterable[tuple[type[Delta], Any, int, int]]) -> int:
    """Trainable parameters of an adapter by the method's formulas.

    Args:
        layers: (Delta class, the layer's config, in_features, out_features) of each layer.
    """
    total, shapes = 0, set()
    for cls, config, n_in, n_out in layers:
        total += cls.count(config, n_in, n_out) + cls.count_gates(config)
        if (config.r, n_in, n_out) not in shapes:
            shapes.add((config.r, n_in, n_out))
            total += cls.count_shared(config, n_in, n_out)
    return total


@contextmanager
def mode(delta: Delta, training: bool) -> Iterator[None]:
    """Put a Delta in training or evaluation mode within the context."""
    before, delta.training = delta.training, training
    try:
        yield
    finally:
        delta.training = before
