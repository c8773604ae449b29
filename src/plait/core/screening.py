"""Importance of ranks and budgets over layers, for methods that keep the best ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def buffer_names(names: Sequence[str]) -> tuple[str, ...]:
    """The optional buffers that `observe` keeps for parameters of these names."""
    return tuple(f"{mean}_{name}" for name in names for mean in ("Ibar", "Ubar"))


@torch.no_grad()
def observe(module: nn.Module, names: Sequence[str], beta1: float, beta2: float) -> None:
    """Average the importance I = |p grad| of each named parameter and its deviation, entry-wise.

    Ibar = beta1 Ibar + (1 - beta1) I;  Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|, with the new Ibar.
    p is the value after the step, grad that of the step, as in AdaLoRA (arXiv 2303.10512).

    Raises:
        RuntimeError: a parameter without a gradient; its importance would silently be zero.
    """
    for name in names:
        p = module.get_parameter(name)
        if p.grad is None:
            raise RuntimeError(
                f"{name} has no gradient after the step, so its importance is unknown. Clear "
                "gradients after optimizer.step() and its hooks, not before."
            )
        importance = (p * p.grad).abs()
        mean, deviation = (getattr(module, b) for b in buffer_names([name]))
        mean = (1 - beta1) * importance + (0 if mean is None else beta1 * mean)
        deviation = (1 - beta2) * (importance - mean).abs() + (
            0 if deviation is None else beta2 * deviation
        )
        setattr(module, f"Ibar_{name}", mean)
        setattr(module, f"Ubar_{name}", deviation)


def score(module: nn.Module, name: str) -> Tensor:
    """Ibar * Ubar of a parameter, in its shape."""
    return getattr(module, f"Ibar_{name}") * getattr(module, f"Ubar_{name}")


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
