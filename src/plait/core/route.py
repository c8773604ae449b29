"""Route: which adapter and which task each row of a batch uses.

`model(..., adapter_names=[...])` and `model(..., task_ids=ids)` set it and the layers read it, in
training too. Gradient checkpointing runs layers again during the backward, after the forward has
ended: they then get the rows of that forward, or an error if several forwards could be meant.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.precision import narrowed


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of the rows of one batch; every attribute has one entry per row, or is None.

    Attributes:
        names: adapter names.
        task_ids: (batch,).
        sample_types: (batch,), for balance losses.
        mask: (batch, tokens), 0 at padding.
    """

    names: tuple[str, ...] | None = None
    task_ids: Tensor | None = None
    sample_types: Tensor | None = None
    mask: Tensor | None = None

    def expanded(self, rows: int) -> "Rows":
        """Repeat every entry if generation multiplied the rows (beams, returned sequences)."""

        def repeated(value: Any) -> Any:
            if value is None or not len(value) or rows <= len(value) or rows % len(value):
                return value
            times = rows // len(value)
            if isinstance(value, Tensor):
                return value.repeat_interleave(times, dim=0)
            return tuple(n for n in value for _ in range(times))

        return Rows(*(repeated(getattr(self, f.name)) for f in fields(self)))

    def of(self, index: Tensor) -> "Rows":
        """Select rows by index (k,) and drop the names."""
        tensors = (self.task_ids, self.sample_types, self.mask)
        return Rows(None, *(None if t is None else t[index.to(t.device)] for t in tensors))

    def same(self, other: "Rows") -> bool:
        """Whether both hold equal values."""
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

    Attributes:
        default_task: index of the task in evaluation without task_ids.
        wants_mask: whether a layer asks for the padding mask.
        scope: rows of a whole call, such as generate.
        captured: arguments taken from the PeftModel's forward in progress.
        current: rows of the base model's forward in progress.
        last: rows of the last forward with gradients.
        mixed: whether other rows came before `last` since the last backward.
        replayed: whether a backward has run since the last forward.
        used: whether any call was routed; nothing is looked up before the first one.
    """

    default_task: int | None = None
    wants_mask: bool = False
    scope: Rows | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    current: Rows | None = None
    last: Rows = NOWHERE
    mixed: bool = False
    replayed: bool = True
    used: bool = False

    def install(self, model: nn.Module) -> None:
        """Watch the forwards of the base model, and remove arguments that it does not know."""
        model.register_forward_pre_hook(self.begin_forward, with_kwargs=True)
        model.register_forward_hook(self.end_forward, always_call=True)

    def capture_args(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Pre-hook of a PeftModel: with a task_type its forward would drop these arguments."""
        for name in EXTRA:
            if name in kwargs:  # an outer PeftModel may have captured them already
                self.captured[name] = kwargs.pop(name)
        return args, kwargs

    def clear_args(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of a PeftModel: its forward has ended."""
        self.captured = {}

    def begin_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Pre-hook of the base model: take the rows out of its arguments and remember them."""
        extra = {n: kwargs.pop(n, self.captured.get(n)) for n in EXTRA}
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

    def end_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of the base model: its forward has ended."""
        self.current = None

    @contextmanager
    def routing(self, names: tuple[str, ...] | None, task_ids: Tensor | None) -> Iterator[None]:
        """Route every forward within the context."""
        before, self.scope = self.scope, Rows(names, task_ids)
        self.used = True
        try:
            yield
        finally:
            self.scope = before

    @contextmanager
    def narrowed(self, rows: Rows) -> Iterator[None]:
        """Route what runs within the context as these rows of the batch."""
        before, self.current = self.current, rows
        try:
            yield
        finally:
            self.current = before

    def current_rows(self, count: int) -> Rows:
        """The rows of the layer call in progress.

        Args:
            count: rows of the layer's input; more than the call's if generation multiplied them.

        Raises:
            RuntimeError: recomputation after several forwards with different rows.
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
        rows = self.current or self.scope or NOWHERE
        return rows if self.scope is None else rows.expanded(count)


# Outside the adapted layers: saved modules, trained tokens, biases ------------------------------

BASE = "__base__"  # peft's name for "no adapter" in a mixed batch


def by_rows(
    route: Route, module: str, args: Sequence[Any], run: Callable[[str, Any], Any]
) -> Tensor:
    """The output of a module, each row computed by its own adapter.

    Args:
        route: names the adapter of each row.
        module: its name, for errors.
        args: of the module's forward: one tensor (rows, ..).
        run: takes an adapter's name and its rows, returns their output.

    Returns:
        (rows, ..), in the order of the input.

    Raises:
        ValueError: not one name for each row, another argument than one tensor, or outputs that
            do not fit into one tensor.
    """
    x = args[0] if len(args) == 1 else None
    if not isinstance(x, Tensor):
        raise ValueError(
            f"adapter_names: {module} has a copy for each adapter and takes {len(args)} arguments; "
            "a mixed batch can only split one tensor. Call the model once for each adapter."
        )
    rows = route.current_rows(len(x))
    names = rows.names or ()
    if len(names) != len(x):
        raise ValueError(
            f"adapter_names has {len(names)} entries, the batch at {module} has {len(x)} rows. "
            "Give one name for each row."
        )
    order, parts = [], {}
    for name in dict.fromkeys(names):
        order += (places := [i for i, n in enumerate(names) if n == name])
        index = torch.tensor(places, device=x.device)
        with route.narrowed(replace(rows.of(index), names=(name,) * len(places))):
            parts[name] = run(name, x[index])
    shapes = {n: tuple(part.shape[1:]) for n, part in parts.items() if isinstance(part, Tensor)}
    if len(shapes) < len(parts) or len(set(shapes.values())) > 1:
        raise ValueError(
            f"adapter_names: the outputs of {module} do not fit into one tensor: {shapes}. Call "
            "the model once for each adapter."
        )
    return torch.cat(list(parts.values()))[torch.tensor(order, device=x.device).argsort()]


def split_saved(
    layer: Any,
    name: str,
    run: Callable[[Any, str, Any], Any],
    module: Any,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> Tensor | None:
    """Forward hook of a module that peft duplicates for each adapter; acts in mixed batches.

    Args:
        layer: any adapted layer, which knows the route and whether adapters are disabled.
        name: of the module.
        run: computes rows by one adapter's duplicate, or by the base model's module.
        module, args, kwargs, output: what torch passes to a hook.
    """
    inputs = (*args, *kwargs.values())
    # Not module.disable_adapters: peft sets it as well if the active adapter has no duplicate.
    if layer.disable_adapters or _names(layer.route, inputs) is None:
        return None
    return by_rows(layer.route, name, inputs, lambda adapter, x: run(module, adapter, x))


def split_bias(
    layer: Any,
    owner: str,
    name: str,
    bias: Tensor,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """Forward hook of a base module of which an adapter trains the bias.

    Rows that do not use that adapter get the bias from before it was added.

    Args:
        layer: any adapted layer, which knows the route and the active adapters.
        owner: the adapter that trains biases.
        name: of the module.
        bias: its bias before the adapter.
        module, args, kwargs, output: what torch passes to a hook.
    """
    inputs = (*args, *kwargs.values())
    names = _names(layer.route, inputs)

    def run(adapter: str, *inputs: Any) -> Any:
        with narrowed(module, inputs):
            if adapter == owner:
                return module.forward(*inputs)
            trained: Any = module._parameters["bias"]
            before = bias.to(module.bias)  # type: ignore[arg-type]
            vars(module).pop("bias", None)  # it hides the parameter
            module._parameters["bias"] = nn.Parameter(before, requires_grad=False)
            try:
                return module.forward(*inputs)
            finally:
                module._parameters["bias"] = trained

    if layer.disable_adapters or (names is None and owner not in layer.active_adapters):
        return run(BASE, *inputs)
    if names is None or set(names) == {owner}:
        return None
    return by_rows(layer.route, name, inputs, run)


def _names(route: Route, inputs: Sequence[Any]) -> tuple[str, ...] | None:
    """The adapter of each row, or None if the batch is not mixed."""
    first = next((x for x in inputs if isinstance(x, Tensor) and x.ndim), None)
    return None if first is None else route.current_rows(len(first)).names
