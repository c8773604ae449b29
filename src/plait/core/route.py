"""Route: which adapter and which task each row of a batch uses.

Set by `model(..., adapter_names=[...])` and `model(..., task_ids=ids)`; read by the layers. Rows
are routed in training as well. Gradient checkpointing runs layers again during the backward, when
the forward is over: the route of that forward is replayed, or refused where it cannot be known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of the rows of one batch, each with one entry a row, or None.

    names: of adapters. task_ids: (batch,). sample_types: (batch,), for balance losses. mask:
    (batch, tokens), 0 at padding.
    """

    names: tuple[str, ...] | None = None
    task_ids: Tensor | None = None
    sample_types: Tensor | None = None
    mask: Tensor | None = None

    def expanded(self, rows: int) -> "Rows":
        """Repeated for beams or returned sequences, where generation multiplied the rows."""

        def repeated(value: Any) -> Any:
            if value is None or not len(value) or rows <= len(value) or rows % len(value):
                return value
            times = rows // len(value)
            if isinstance(value, Tensor):
                return value.repeat_interleave(times, dim=0)
            return tuple(n for n in value for _ in range(times))

        return Rows(*(repeated(getattr(self, f.name)) for f in fields(self)))

    def of(self, own: Tensor) -> "Rows":
        """Some rows only, without names; own: their indices."""
        tensors = (self.task_ids, self.sample_types, self.mask)
        return Rows(None, *(None if t is None else t[own.to(t.device)] for t in tensors))

    def same(self, other: "Rows") -> bool:
        """Whether both say the same."""
        return self.names == other.names and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in (
                (getattr(self, name), getattr(other, name))
                for name in ("task_ids", "sample_types", "mask")
            )
        )


NOWHERE = Rows()
EXTRA = ("task_ids", "sample_types")  # arguments of a forward that the base model never sees


@dataclass
class Route:
    """State shared by the layers of one tuner.

    default_task: index for evaluation without task_ids. wants_mask: whether a layer asks for the
    padding mask. scope: rows given to a whole call, such as generate. given: what the PeftModel's
    forward in progress got. current: rows of the base model's forward in progress. last: rows of
    the last forward with gradients; mixed: whether others came before it since the last backward.
    """

    default_task: int | None = None
    wants_mask: bool = False
    scope: Rows | None = None
    given: dict[str, Tensor] = field(default_factory=dict)
    current: Rows | None = None
    last: Rows = NOWHERE
    mixed: bool = False
    replayed: bool = True
    used: bool = False  # nothing is looked up before the first routed call

    def install(self, model: nn.Module) -> None:
        """Watch the forwards of the base model; it never sees task_ids and their like."""
        model.register_forward_pre_hook(self.enter, with_kwargs=True)
        model.register_forward_hook(self.leave, always_call=True)

    def take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Take task_ids out of a PeftModel's arguments: with a task_type it would drop them."""
        for name in EXTRA:
            if name in kwargs:  # an outer PeftModel may have taken them before
                self.given[name] = kwargs.pop(name)
        return args, kwargs

    def give(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The PeftModel's forward is over."""
        self.given = {}

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Take task_ids out of the arguments; note the route of this forward."""
        extra = {n: kwargs.pop(n, self.given.get(n)) for n in EXTRA}
        scope = self.scope or NOWHERE
        mask = kwargs.get("attention_mask") if self.wants_mask else None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        ids = scope.task_ids if extra["task_ids"] is None else extra["task_ids"]
        self.current = Rows(scope.names, ids, extra["sample_types"], mask)
        self.used = self.used or not self.current.same(NOWHERE)
        if self.used and torch.is_grad_enabled():
            self.mixed = not self.replayed and (self.mixed or not self.last.same(self.current))
            self.last, self.replayed = self.current, False
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The forward is over."""
        self.current = None

    @contextmanager
    def over(self, names: tuple[str, ...] | None, task_ids: Tensor | None) -> Iterator[None]:
        """Route every forward inside."""
        before, self.scope = self.scope, Rows(names, task_ids)
        self.used = True
        try:
            yield
        finally:
            self.scope = before

    def now(self, rows: int) -> Rows:
        """The route of the layer call in progress, expanded to its number of rows.

        Raises:
            RuntimeError: recomputation after several forwards with different routes.
        """
        if not self.used:
            return NOWHERE
        if self.current is None and torch._C._current_graph_task_id() != -1:  # in a backward
            self.replayed = True
            if self.mixed:
                raise RuntimeError(
                    "Two forwards with different adapter_names or task_ids, or with different "
                    "sample_types or padding masks of a balance loss, before one backward under "
                    "gradient checkpointing. Call backward after each forward, or switch "
                    "gradient checkpointing off."
                )
            return self.last
        found = self.current or self.scope or NOWHERE
        return found if self.scope is None else found.expanded(rows)
