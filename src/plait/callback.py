"""What adapters learn from transformers' Trainer: the length of training and the accumulation."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from plait.chain.engine import chain_of
from plait.core.events import (
    EventNeverFired,
    Listener,
    PlaitWarning,
    adapters_of,
    listen,
    needs_total_steps,
)
from plait.upstream.adalora import (
    METHOD,
    SINGULAR_VALUES,
    adalora_tuners,
    drive_adalora,
    is_driven,
    total_step,
)

_BEFORE = "plait_before_run"  # attribute of a config: its values before PlaitCallback filled them


class PlaitCallback(TrainerCallback):
    """Prepares every plait adapter at the start of training, under Trainer and TRL.

    It sets `total_steps` and the number of micro-batches in an optimizer step for the time of the
    run, refuses gradient clipping with optimizers that must see the raw gradients, and drives
    upstream's AdaLoRA unless `drive_adalora` was called before. It warns if a given `total_steps`
    is not the Trainer's, and raises if an optimizer step was not followed by plait's events.
    Optional: other training loops set these themselves.
    """

    def __init__(self) -> None:
        self._counts: list[_Steps] = []
        self._first = 0  # the Trainer's step that this run starts from
        self._skipped = 0  # steps that accelerate's gradient scaler left out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare the adapters of `kwargs["model"]`.

        Raises:
            ValueError: as check_clipping and drive_adalora do.
        """
        model = kwargs["model"]
        check_clipping(kwargs.get("optimizer"), args.max_grad_norm)
        restore_options(model)  # after a run that did not reach its end
        warn_of_other_length(model, state.max_steps)
        for deltas in adapters_of(model):
            adapter: Any = deltas[0].adapter
            before = {"micro_batches": adapter.micro_batches}
            if adapter.total_steps is None:
                before["total_steps"] = None
            vars(adapter).setdefault(_BEFORE, before)
        set_total_steps(model, state.max_steps)
        set_micro_batches(model, args.gradient_accumulation_steps)
        tuners = adalora_tuners(model)
        if tuners and not any(map(is_driven, tuners)):
            drive_adalora(model, state.global_step)
        self._first, self._skipped = state.global_step, 0
        adapters = [(deltas[0].adapter.key, deltas) for deltas in adapters_of(model)]
        counts = [_Steps(key, deltas) for key, deltas in adapters]
        counts += [_Steps(METHOD, [tuner], SINGULAR_VALUES) for tuner in tuners]
        self._counts = [count for count in counts if any(True for _ in count.parameters())]
        for count in self._counts:
            listen(count)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the events so far; set the number of micro-batches of the step that begins.

        Raises:
            EventNeverFired: as on_train_end does.
        """
        self._check_counts(state.global_step)
        if args.gradient_accumulation_steps > 1 and self._counts:
            count = _micro_batches(args, state.global_step, kwargs.get("train_dataloader"))
            set_micro_batches(kwargs["model"], count)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step that accelerate's gradient scaler left out."""
        self._skipped += bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that events followed every optimizer step; put the filled options back.

        Raises:
            EventNeverFired: the Trainer made more optimizer steps than plait saw, or fewer.
        """
        restore_options(kwargs["model"])
        try:
            self._check_counts(state.global_step)
        finally:
            self._counts = []

    def _check_counts(self, step: int) -> None:
        made = step - self._first - self._skipped
        for count in self._counts:
            if count.completed + count.skipped != made and any(True for _ in count.parameters()):
                raise EventNeverFired(
                    f"{count.key}: the Trainer made {made} optimizer steps, and plait's events "
                    f"followed {count.completed + count.skipped} of them, so the method's "
                    "schedule and penalty did not run as they should. DeepSpeed hides its steps "
                    "from torch's hooks: train without it, in one process, with DDP or with "
                    "FSDP2. For an optimizer that is not a torch.optim.Optimizer call "
                    "plait.after_step(model) in a callback's on_step_end; for all others do not."
                )


class _Steps(Listener):
    """Counts the optimizer steps of an adapter: completed, and skipped by a gradient scaler."""

    def __init__(self, key: str, modules: Sequence[nn.Module], named: str = "") -> None:
        self.key, self.modules, self.named = key, modules, named
        self.completed = self.skipped = 0

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those that train, and whose name contains `named`."""
        every = (pair for module in self.modules for pair in module.named_parameters())
        return (p for name, p in every if p.requires_grad and self.named in name)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count."""
        self.completed += 1

    def skipped_step(self, optimizer: Optimizer) -> None:
        """Count."""
        self.skipped += 1


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Set `total_steps` of every adapter whose config does not have it."""
    for deltas in adapters_of(model):
        if deltas[0].adapter.total_steps is None:
            deltas[0].adapter.total_steps = total_steps


def restore_options(model: nn.Module) -> None:
    """Put back what PlaitCallback replaced in the configs of a model's adapters, if anything."""
    for deltas in adapters_of(model):
        options = vars(deltas[0].adapter)
        options.update(options.pop(_BEFORE, {}))


def warn_of_other_length(model: nn.Module, total_steps: int) -> None:
    """Warn if a schedule is planned for another number of steps than the Trainer makes."""
    if chain_of(model) is not None:  # whose links have lengths of their own
        return
    planned = [
        (deltas[0].adapter.key, "total_steps", deltas[0].adapter.total_steps)
        for deltas in adapters_of(model)
        if needs_total_steps(deltas[0])
    ]
    planned += [(METHOD, "total_step", total_step(tuner)) for tuner in adalora_tuners(model)]
    for key, option, steps in planned:
        if steps is not None and steps != total_steps:
            warnings.warn(
                f"{key}: {option} is {steps}, but the Trainer makes {total_steps} optimizer "
                f"steps, so the schedule does not end where training does. Set it to "
                f"{total_steps}, or leave it out and PlaitCallback sets it.",
                PlaitWarning,
                stacklevel=3,
            )


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


def _micro_batches(args: Any, step: int, loader: Any) -> int:
    """Micro-batches of the Trainer's step after `step` steps: the last of an epoch may have fewer.

    loader: the Trainer's; one without a length cannot tell, and all steps count as full.
    """
    full = args.gradient_accumulation_steps
    try:
        batches = len(loader)
    except TypeError:
        return full
    steps = max(1, -(-batches // full))  # of an epoch
    return batches % full or full if (step + 1) % steps == 0 else full


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
