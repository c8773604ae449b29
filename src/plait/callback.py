"""What adapters learn from transformers' Trainer: the length of training and the accumulation."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from plait.core.events import adapters_of
from plait.upstream.adalora import adalora_tuners, drive_adalora, is_driven


class PlaitCallback(TrainerCallback):
    """Prepares every plait adapter at the start of training, under Trainer and TRL.

    It sets `total_steps` and the number of micro-batches in an optimizer step, refuses gradient
    clipping with optimizers that must see the raw gradients, and drives upstream's AdaLoRA unless
    `drive_adalora` was called before. Optional: other training loops set these themselves.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare the adapters of `kwargs["model"]`.

        Raises:
            ValueError: as check_clipping and drive_adalora do.
        """
        model = kwargs["model"]
        check_clipping(kwargs.get("optimizer"), args.max_grad_norm)
        set_total_steps(model, state.max_steps)
        set_micro_batches(model, args.gradient_accumulation_steps)
        tuners = adalora_tuners(model)
        if tuners and not any(map(is_driven, tuners)):
            drive_adalora(model, state.global_step)


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Set `total_steps` of every adapter whose config does not have it."""
    for deltas in adapters_of(model):
        if deltas[0].adapter.total_steps is None:
            deltas[0].adapter.total_steps = total_steps


def set_micro_batches(model: nn.Module, count: int) -> None:
    """Set the number of micro-batches in an optimizer step, for every adapter of a model.

    Losses of activations, such as molora's balance loss, are averaged over them. PlaitCallback and
    plait train call this; a training loop of your own has to if it accumulates gradients.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"set_micro_batches: count = {count}. Give 1 or more.")
    for deltas in adapters_of(model):
        adapter: Any = deltas[0].adapter
        adapter.micro_batches = count


def check_clipping(optimizer: Any, max_grad_norm: float | None) -> None:
    """Refuse to clip the raw gradients for an optimizer that clips by itself.

    Args:
        optimizer: may be wrapped by accelerate, or None.
        max_grad_norm: of the trainer; None and 0 mean no clipping.

    Raises:
        ValueError: the optimizer is lora_rite or lorsum and gradients are to be clipped.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if max_grad_norm and getattr(inner, "own_clipping", False):
        raise ValueError(
            f"{inner.key}: max_grad_norm = {max_grad_norm:g} clips the gradients of A and B before "
            "the step, which makes it depend on their basis. Set max_grad_norm=0; the optimizer "
            "has a clip of its own."
        )
