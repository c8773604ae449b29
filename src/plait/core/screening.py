"""Importance of ranks and budgets over layers, for methods that keep the best ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def buffer_names(names: Sequence[str]) -> tuple[str, ...]:
    """The optional buffers that `observe` keeps for parameters of these names."""
    return tuple(f"{mean}_{name}" for name in names for mean in ("Ibar", "Ubar"))


def prepare(delta: Any, names: Sequence[str]) -> None:
    """Register the averages of importance of these parameters, zero."""
    for name in names:
        for buffer in buffer_names([name]):
            delta.register_buffer(buffer, torch.zeros_like(delta.get_parameter(name)))


def finish(delta: Any, names: Sequence[str]) -> None:
    """Drop the averages: the final choice is made."""
    for buffer in buffer_names(names):
        setattr(delta, buffer, None)


@torch.no_grad()
def observe(delta: Any, names: Sequence[str]) -> None:
    """Average the importance I = |p grad| of each named parameter and its deviation, entry-wise.

    Ibar = beta1 Ibar + (1 - beta1) I;  Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|, new Ibar.
    p is the value after the step, grad that of the step, as in AdaLoRA (arXiv 2303.10512); the
    decays are the config's beta1 and beta2.

    Raises:
        RuntimeError: a parameter without a gradient; its importance would silently be zero.
    """
    beta1, beta2 = delta.config.beta1, delta.config.beta2
    for name in names:
        p = delta.get_parameter(name)
        if p.grad is None:
            raise RuntimeError(
                f"{delta.base.name}.{name} has no gradient after the step, so its importance is "
                "unknown. Clear gradients after optimizer.step() and its hooks, not before."
            )
        importance = (p * p.grad).abs()
        mean, deviation = (getattr(delta, b) for b in buffer_names([name]))
        mean = (1 - beta1) * importance + (0 if mean is None else beta1 * mean)
        deviation = (1 - beta2) * (importance - mean).abs() + (
            0 if deviation is None else beta2 * deviation
        )
        setattr(delta, f"Ibar_{name}", mean)
        setattr(delta, f"Ubar_{name}", deviation)


def score(delta: Any, name: str) -> Tensor:
    """Ibar * Ubar of a parameter, in its shape."""
    return getattr(delta, f"Ibar_{name}") * getattr(delta, f"Ubar_{name}")


def window(delta: Any) -> tuple[int, int]:
    """First and last step of a Delta's screening, by its config's tinit, tfinal and total_steps.

    tinit: steps before it starts, or their share of the total if a float; tfinal: steps after its
    end, likewise.

    Raises:
        ValueError: total_steps is unknown, or no step is left.
    """
    total, ends = delta.total_steps, (delta.config.tinit, delta.config.tfinal)
    before, after = (int(n * total) if isinstance(n, float) else n for n in ends)
    if before >= total - after:
        raise ValueError(
            f"{delta.adapter.key}: tinit = {before} and tfinal = {after} leave no step to screen "
            f"in total_steps = {total}. Lower them."
        )
    return before, total - after


def due(t: int, first: int, last: int, every: int) -> bool:
    """Whether step t screens: every so often between first and last, and at last."""
    return t == last or (first < t < last and t % every == 0)


def budget(t: int, first: int, last: int, start: int, end: int, power: int) -> int:
    """Ranks alive after step t: `start` until `first`, `end` from `last`, a power law between."""
    if t <= first:
        return start
    if t >= last:
        return end
    return int(end + (start - end) * (1 - (t - first) / (last - first)) ** power)


def best(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """0/1 masks of the `count` best ranks over all layers; ties go to the lower (layer, rank)."""
    joined = torch.cat(list(scores))
    order = torch.sort(joined, descending=True, stable=True).indices
    mask = torch.zeros_like(joined)
    mask[order[:count]] = 1
    return list(mask.split([len(s) for s in scores]))
