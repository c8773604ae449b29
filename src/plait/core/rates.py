"""Rates: parameters that weight decay skips and that may have a learning rate of their own.

A trained gate must not decay, and may need another learning rate than the factors. This holds
whatever parameter groups the user's optimizer has: an optimizer step is linear in the learning
rate, so afterwards the change of a parameter is rescaled and its decoupled decay is added back.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

# Parameter name -> its own base learning rate, or None for that of the optimizer.
Rates = dict[str, float | None]

# Optimizers that add weight decay to the gradient; all others subtract it from the weight.
_COUPLED = ("SGD", "ASGD", "Adagrad", "Adadelta", "Adamax", "RMSprop")


@torch.no_grad()
def free_from_decay(
    optimizer: Optimizer, rates: Mapping[int, float | None]
) -> list[tuple[Callable[[], None], Callable[[], None]]]:
    """Exempt parameters from weight decay and give them their own learning rate for one step.

    Args:
        optimizer: about to step.
        rates: id of a parameter -> its base learning rate; None: that of the optimizer.

    Returns:
        For each parameter concerned, a function to call once its gradient is complete, and one to
        call after the step.

    Raises:
        ValueError: the optimizer has no learning rate, or one of 0 where another is asked for.
    """
    corrections = []
    for group in optimizer.param_groups if rates else ():
        decay = group.get("weight_decay") or 0.0
        coupled = _coupled(optimizer, group)
        for p in (p for p in group["params"] if id(p) in rates):
            base_lr, lr = rates[id(p)], group.get("lr")
            if base_lr is None and not decay:
                continue
            start = group.get("initial_lr", lr)
            if lr is None or start is None or (base_lr is not None and not start):
                raise ValueError(
                    f"{type(optimizer).__name__}: lr = {lr}, so a gate's step can be neither "
                    "freed from weight decay nor given its own learning rate. Give lr above 0."
                )
            scale = 1.0 if base_lr is None else base_lr / float(start)
            added_back = 0.0 if coupled else float(lr) * decay
            old = p.detach().clone() if added_back or scale != 1 else p
            corrections.append(
                (
                    functools.partial(_uncouple, p, decay if coupled else 0.0),
                    functools.partial(_rescale, p, old, scale, added_back),
                )
            )
    return corrections


def _coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a parameter group adds weight decay to the gradient."""
    if "decoupled_weight_decay" in group:
        return not group["decoupled_weight_decay"]
    names = {cls.__name__ for cls in type(optimizer).__mro__}  # a subclass does as its parent does
    older = isinstance(optimizer, torch.optim.Adam)  # before torch 2.7 Adam does not say
    return older or not names.isdisjoint(_COUPLED)


@torch.no_grad()
def _uncouple(p: nn.Parameter, decay: float) -> None:
    """Subtract from the gradient the decay that the optimizer is about to add to it."""
    if decay and p.grad is not None:
        p.grad = p.grad - decay * p


@torch.no_grad()
def _rescale(p: nn.Parameter, old: Tensor, scale: float, added_back: float) -> None:
    """p = old + scale * (its step without weight decay)."""
    if old is not p and p.grad is not None:
        p.copy_(old + scale * (p - old + added_back * old))
