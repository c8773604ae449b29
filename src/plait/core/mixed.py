"""Mixed batches outside the adapted layers: heads, saved modules, trained tokens and biases.

`model(..., adapter_names=[...])` names an adapter for each row. The adapted layers read the route;
modules that peft duplicates for each adapter, and biases that an adapter trains in the base model,
do not. Forward hooks here replace their output by that of each row's own adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.route import Route

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
        if adapter == owner:
            return module.forward(*inputs)
        trained: Any = module._parameters["bias"]
        module._parameters["bias"] = nn.Parameter(bias.to(trained), requires_grad=False)
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
