"""Prune: remove ranks whose trained gate is zero from an adapter for good.

Rows of A and A0, columns of B and B0, and entries of the gate are removed; the rest computes the
same update. The config's rank and alpha patterns name each layer's rank, with an alpha that keeps
the scale s, so that the smaller adapter is saved and loaded like any other.
"""

import re
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from plait.core.bridge import PlaitLayer
from plait.core.delta import Delta, mode
from plait.core.free import FreeDelta
from plait.core.sharding import refuse_sharded


@torch.no_grad()
def prune(model: PeftModel, adapter: str = "default") -> dict[str, int]:
    """Remove the ranks of an adapter whose trained gate is zero, as `sora` leaves them.

    A layer whose gates are all zero keeps one rank of gate 0, because peft has no rank 0. The
    parameters are new objects: make a new optimizer before training on.

    Args:
        model: a PeftModel with an adapter of `sora`, or of a method of free factors with the gate
            in its `gates`.
        adapter: its name.

    Returns:
        Layer name -> ranks kept.

    Raises:
        ValueError: no such adapter, an adapter whose ranks do not reach zero or cannot be removed,
            or a sharded model (FSDP2).
    """
    layers = [m for m in model.modules() if isinstance(m, PlaitLayer) and adapter in m.plait_delta]
    if not layers:
        names = ", ".join(model.peft_config)
        raise ValueError(
            f"prune: no adapter of plait is named {adapter!r}. The model has: {names}."
        )
    for layer in layers:
        _check(layer.plait_delta[adapter], adapter)  # type: ignore[arg-type]
    refuse_sharded(model, "prune")
    kept = {layer.name: _shrink(layer.plait_delta[adapter]) for layer in layers}
    config: Any = model.peft_config[adapter]
    resolved: dict[str, Any] = {layer.name: layer.plait_delta[adapter].config for layer in layers}
    config.rank_pattern = {_exactly(n): c.r for n, c in resolved.items() if c.r != config.r}
    config.alpha_pattern = {
        _exactly(n): c.lora_alpha for n, c in resolved.items() if c.lora_alpha != config.lora_alpha
    }
    return kept


def _check(delta: Delta, adapter: str) -> None:
    """Raise ValueError if ranks of this Delta cannot be removed."""
    why = None
    if not isinstance(delta, FreeDelta):
        why = "its factors have no row and column for each rank alone"
    elif any(gate.allocates for gate in delta.gates):
        why = "its dead ranks are the room that others grow into"
    elif not any(gate.rank_axes for gate in delta.gates):
        why = "none of its gates trains to zero"
    if why:
        raise ValueError(
            f"prune: {delta.adapter.key} cannot lose ranks for good: {why}. Export it, "
            f"plait.to_lora(model, {adapter!r}): ranks that do nothing are left out there."
        )


def _shrink(delta: Any) -> int:
    """Keep the ranks of one layer whose gate is not zero; return their number."""
    with mode(delta, training=False):
        index = delta.live().nonzero()[:, 0]
    if not len(index):
        index = index.new_zeros(1)
    for name, axis in delta.all_rank_axes.items():
        old = getattr(delta, name)
        if old is not None:
            fewer = old.index_select(axis, index)
            trained = isinstance(old, nn.Parameter)
            setattr(delta, name, nn.Parameter(fewer, old.requires_grad) if trained else fewer)
    delta.ranks = delta.config.r = len(index)
    delta.config.lora_alpha = delta.scaling * len(index)
    return len(index)


def _exactly(name: str) -> str:
    """A pattern that is this layer's name and no other's end."""
    return f"^{re.escape(name)}"
