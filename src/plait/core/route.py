"""Route: which adapter and which task each row of a batch uses.

Set by `model(..., adapter_names=[...])` and `model(..., task_ids=ids)`; read by the layers. Rows
are routed in training as well. Gradient checkpointing runs layers again during the backward, when
the forward is over: the route of that forward is replayed, or refused where it cannot be known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Rows:
    """The route of one batch: adapter names and task ids, one for each row, or None."""

    names: tuple[str, ...] | None = None
    task_ids: Tensor | None = None

    def expanded(self, rows: int) -> "Rows":
        """Repeated for beams or returned sequences, where generation multiplied the rows."""
        names, ids = self.names, self.task_ids
        if names and rows > len(names) and rows % len(names) == 0:
            names = tuple(n for n in names for _ in range(rows // len(names)))
        if ids is not None and rows > len(ids) and rows % len(ids) == 0:
            ids = ids.repeat_interleave(rows // len(ids), dim=0)
        return Rows(names, ids)

    def same(self, other: "Rows") -> bool:
        """Whether both route alike."""
        if (self.task_ids is None) != (other.task_ids is None) or self.names != other.names:
            return False
        return self.task_ids is None or torch.equal(self.task_ids, other.task_ids)  # type: ignore[arg-type]


NOWHERE = Rows()


@dataclass
class Route:
    """State shared by the layers of one tuner.

    default_task: index for evaluation without task_ids. scope: rows given to a whole call, such as
    generate. given: task_ids of the PeftModel's forward in progress. current: rows of the base
    model's forward in progress. last: rows of the last forward with gradients; mixed: whether
    others came before it since the last backward.
    """

    default_task: int | None = None
    scope: Rows | None = None
    given: Tensor | None = None
    current: Rows | None = None
    last: Rows = NOWHERE
    mixed: bool = False
    replayed: bool = True
    used: bool = False  # nothing is looked up before the first routed call

    def install(self, model: nn.Module) -> None:
        """Watch the forwards of the base model; it never sees task_ids."""
        model.register_forward_pre_hook(self.enter, with_kwargs=True)
        model.register_forward_hook(self.leave, always_call=True)

    def take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Take task_ids out of a PeftModel's arguments: with a task_type it would drop them."""
        self.given = kwargs.pop("task_ids", self.given)  # an outer PeftModel has taken them before
        return args, kwargs

    def give(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The PeftModel's forward is over."""
        self.given = None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Take task_ids out of the arguments; note the route of this forward."""
        ids = kwargs.pop("task_ids", self.given)
        scope = self.scope or NOWHERE
        self.current = Rows(scope.names, scope.task_ids if ids is None else ids)
        self.used = self.used or self.current.names is not None or ids is not None
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
                    "Two forwards with different adapter_names or task_ids before one backward "
                    "under gradient checkpointing. Call backward after each forward, or switch "
                    "gradient checkpointing off."
                )
            return self.last
        found = self.current or self.scope or NOWHERE
        return found if self.scope is None else found.expanded(rows)
