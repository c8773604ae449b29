"""Gates: what multiplies the rank axis of a LowRankDelta.

A gate acts on rank k of a layer: on row k of every A and column k of every B and, if the start is
subtracted, on the whole update b_k a_k - b0_k a0_k of that rank. So a fresh adapter equals the base
model whatever the gate is, and a rank with gate 0 adds nothing. Several gates multiply; every
method of low rank accepts a list of them in its config's `gates`.

A gate is a dataclass of options and holds no tensors: it declares them on its Delta, so that they
are trained, saved and moved with the factors.
"""

import functools
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from plait.core.config import check_option, did_you_mean
from plait.core.rates import Rates

if TYPE_CHECKING:
    from plait.core.low_rank import LowRankDelta


@dataclass
class Gate:
    """One kind of gate with its options.

    Attributes:
        key: its name in `gates`.
        allocates: whether it decides how many ranks a layer has, in place of the method's own rule.
        rank_axes: its parameters -> their rank axis.
    """

    key: ClassVar[str] = ""
    allocates: ClassVar[bool] = False
    rank_axes: ClassVar[dict[str, int]] = {}
    # Tensors of its Delta that `value` reads in evaluation, or None: unknown.
    reads: ClassVar[tuple[str, ...] | None] = None
    leaf: ClassVar[str | None] = None  # the trained tensor of which `value` is `factor` times
    blind: ClassVar[bool] = True  # whether `mask` looks at the shape and dtype of z alone

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str) and float in (hints[f.name], *typing.get_args(hints[f.name])):
                try:  # PyYAML reads 1e-4 as a string
                    setattr(self, f.name, float(value))
                except ValueError:
                    text = f"gates: {self.key}: {f.name} = {value!r} is not a number. Give one."
                    raise ValueError(text) from None
            check_option(f.name, hints[f.name], f.metadata, getattr(self, f.name))

    @classmethod
    def of(cls, config: Any) -> Self:
        """The gate with the options that a method's config holds under the same names."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @property
    def sees(self) -> bool:
        """Whether `mask` may look at the activations; who overrides it states `blind` with it."""
        return not (self.blind and states(type(self), "blind", "mask"))

    @property
    def total_steps_needed(self) -> bool:
        """Whether its schedule needs the length of training."""
        return False

    def slots(self, ranks: int) -> int:
        """How many ranks the factors must have room for."""
        return ranks

    def check(self, delta_cls: type["LowRankDelta"]) -> None:
        """Raise ValueError if the gate cannot act on a method."""

    def count(self, ranks: int) -> int:
        """Trainable numbers of the gate on a layer."""
        return 0

    def prepare(self, delta: "LowRankDelta", ranks: int, gen: torch.Generator) -> None:
        """Declare tensors on a Delta under construction."""

    def value(self, delta: "LowRankDelta") -> Tensor | None:
        """The gate (ranks,) in the Delta's current mode, or None for 1."""
        return None

    def factor(self, delta: "LowRankDelta") -> Tensor | None:
        """What the `leaf` is multiplied by (ranks,), or None for 1."""
        return None

    def mask(self, delta: "LowRankDelta", z: Tensor, ranks: int) -> Tensor | None:
        """A factor (.., ranks) per token of z (.., R_in), used in training, or None."""
        return None

    def start_of(self, index: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Start values by parameter of ranks (k,) that restart."""
        return {}

    def own_rates(self, delta: "LowRankDelta") -> Rates:
        """The parameters that weight decay skips, with their own base learning rates."""
        return {}

    def penalty(self, deltas: "Sequence[LowRankDelta]") -> Tensor | None:
        """A scalar over all layers of an adapter whose gradient enters once per step, or None."""
        return None

    def check_schedule(self, delta: "LowRankDelta") -> None:
        """Raise ValueError if the schedule cannot run; called for one layer before each step."""

    def after_step(self, delta: "LowRankDelta") -> None:
        """Called for each layer after every completed optimizer step."""

    def after_all(self, deltas: "Sequence[LowRankDelta]") -> None:
        """Called with all layers of an adapter, after every after_step."""


G = TypeVar("G", bound=type[Gate])
_gates: dict[str, type[Gate]] = {}


def register_gate(key: str) -> Callable[[G], G]:
    """Class decorator: let configs name a gate in `gates`.

    Raises:
        ValueError: the key is taken.
    """

    def wrap(cls: G) -> G:
        if key in _gates:
            raise ValueError(f"register_gate: the key {key!r} is taken by {_gates[key]}.")
        cls.key = key
        _gates[key] = cls
        return cls

    return wrap


def gates() -> list[type[Gate]]:
    """All kinds of gates, in the order of registration."""
    return list(_gates.values())


def parse(spec: str | dict[str, Any]) -> Gate:
    """A gate from its entry in `gates`: a name, or a mapping with `name` and options.

    Raises:
        ValueError: an unknown name or option, with the nearest that exists; a value out of range.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in _gates:
        raise ValueError(f"gates: {name!r} is not known. {did_you_mean(str(name), _gates)}")
    known = [f.name for f in fields(_gates[name])]
    for key in options:
        if key not in known:
            raise ValueError(f"gates: {name}: {key} is not known. {did_you_mean(key, known)}")
    return _gates[name](**options)


def gates_of(config: Any, delta_cls: type["LowRankDelta"]) -> list[Gate]:
    """The gates of a layer: those of the method, then those that the config adds.

    Raises:
        ValueError: as parse; a kind twice; a gate that cannot act on the method.
    """
    all_gates = [kind.of(config) for kind in delta_cls.own_gates]
    all_gates += [parse(spec) for spec in config.gates or ()]
    keys = [gate.key for gate in all_gates]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"gates: {key} acts on {config.key} twice. Give it once.")
    for gate in all_gates:
        gate.check(delta_cls)
    return all_gates


@functools.cache
def states(cls: type, fact: str, about: str) -> bool:
    """Whether a class states a fact for its own `about`: who overrides that states both again."""
    places = {}
    for place, one in enumerate(cls.__mro__):
        for name in (fact, about):
            if name in vars(one):
                places.setdefault(name, place)
    return fact in places and places[fact] <= places.get(about, len(cls.__mro__))
