"""The registry: what a method is called, what it says of itself, and how to find it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from plait.core import bridge
from plait.core.config import DeltaConfig, did_you_mean
from plait.core.delta import Delta

D = TypeVar("D", bound=type[Delta])


@dataclass(frozen=True)
class Method:
    """One row of `plait methods`.

    Attributes:
        key: name in configs.
        config, delta: the method's classes.
        paper: arXiv id or venue.
        formula: of dW, one line.
        rank: attainable rank of dW.
        names: other names, ambiguous ones included.
    """

    key: str
    config: type[DeltaConfig]
    delta: type[Delta]
    paper: str
    formula: str
    rank: str
    names: tuple[str, ...] = ()

    @property
    def mergeable(self) -> bool:
        """Whether the update can be merged into the base weight."""
        return self.delta.mergeable

    @property
    def exact_export(self) -> bool:
        """Whether a plain LoRA holds the update exactly."""
        return self.delta.exact_export

    @property
    def summary(self) -> str:
        """First line of the method file's docstring."""
        doc = sys.modules[self.delta.__module__].__doc__ or self.delta.__doc__ or self.key
        return doc.strip().splitlines()[0]

    @property
    def title(self) -> str:
        """The paper's name of the method."""
        return self.summary.partition(":")[0]

    @property
    def parameters(self) -> str:
        """Trainable parameters of a layer, as a formula: first line of the docstring of `count`."""
        return (self.delta.count.__doc__ or "").strip().partition("\n")[0].rstrip(".")


_methods: dict[str, Method] = {}


def register(
    key: str,
    config: type[DeltaConfig],
    *,
    paper: str,
    formula: str = "",
    rank: str = "",
    names: tuple[str, ...] = (),
) -> Callable[[D], D]:
    """Class decorator: make a Delta known to peft, the command line and the contract tests.

    Example:
        >>> import plait
        >>> plait.find("dual_lora").paper
        '2512.03402'

    Args:
        key: lower-case name; the peft type becomes `PLAIT_<KEY>`.
        config: the method's DeltaConfig subclass, used by this method alone.
        paper: arXiv id or venue.
        formula, rank, names: see Method.

    Raises:
        ValueError: the key or the config class is taken, or the key is not a lower-case identifier.
    """

    def wrap(delta: D) -> D:
        if not (key.isidentifier() and key.islower()):
            raise ValueError(f"register: key {key!r} is not a lower-case identifier. Rename it.")
        if key in _methods:
            raise ValueError(f"register: the key {key!r} is taken by {_methods[key].delta}.")
        if config.key:
            raise ValueError(
                f"register: {config.__name__} belongs to {config.key!r}. Subclass it for {key!r}."
            )
        config.key, config.delta_cls = key, delta
        bridge.host(key, config, delta)
        _methods[key] = Method(key, config, delta, paper, formula, rank, names)
        return delta

    return wrap


def list_methods() -> list[Method]:
    """All registered methods, in the order of registration."""
    return list(_methods.values())


def find(name: str) -> Method:
    """The method of a key.

    Raises:
        ValueError: unknown; the message suggests the nearest key.
    """
    if name in _methods:
        return _methods[name]
    raise ValueError(f"Method {name!r} is not known. {did_you_mean(name, _methods)}")
