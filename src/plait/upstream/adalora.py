"""AdaLoRA's schedule: upstream expects the training loop to call `update_and_allocate` itself."""

import weakref
from collections.abc import Iterable
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from torch import nn
from torch.optim.optimizer import Optimizer

from plait.core.events import EventNeverFired, Listener, listen


class AdaLoraSchedule(Listener):
    """Calls `update_and_allocate` of one tuner after each optimizer step.

    Attributes:
        tuner: the AdaLoraModel, weakly referenced.
        t: completed optimizer steps.
    """

    def __init__(self, tuner: AdaLoraModel, start: int) -> None:
        self.tuner, self.t = weakref.ref(tuner), start

    def parameters(self) -> Iterable[nn.Parameter]:
        """The singular values `lora_E`."""
        tuner = self.tuner()
        named = [] if tuner is None else tuner.named_parameters()
        return (p for n, p in named if "lora_E" in n)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step and let upstream prune."""
        self.t += 1
        self.tuner().update_and_allocate(self.t)  # type: ignore[union-attr]

    def check(self, model: nn.Module) -> None:
        """Raise EventNeverFired if this model was trained without a step of the schedule."""
        if not self.t and any(m is self.tuner() for m in model.modules()):
            raise EventNeverFired(
                "adalora: training ended and its schedule never ran. Train with a torch optimizer."
            )


def drive_adalora(model: nn.Module, start: int = 0) -> None:
    """Call upstream AdaLoRA's `update_and_allocate` after each optimizer step from now on.

    Args:
        model: holds the AdaLoRA tuner.
        start: optimizer steps already completed, when a run is resumed.

    Raises:
        ValueError: the model has no AdaLoRA adapter to train, `total_step` is not set, or `init_r`
            equals `target_r`.
    """
    tuners = adalora_tuners(model)
    if not tuners:
        raise ValueError("drive_adalora: the model has no AdaLoRA adapter to train. Wrap it first.")
    for tuner in tuners:
        config: Any = tuner.peft_config[tuner.trainable_adapter_name]
        if not config.total_step:
            raise ValueError("adalora: total_step is not set. Give the number of optimizer steps.")
        if config.init_r == config.target_r:
            raise ValueError(
                f"adalora: init_r == target_r == {config.init_r} leaves nothing to allocate and "
                "fails in peft 0.21.2. Give init_r above target_r."
            )
        schedule = AdaLoraSchedule(tuner, start)
        vars(tuner)["plait_schedule"] = schedule  # kept alive by what it drives
        listen(schedule)


def adalora_tuners(model: nn.Module) -> list[Any]:
    """The AdaLoRA tuners of a model that have an adapter to train."""
    tuners = [m for m in model.modules() if isinstance(m, AdaLoraModel)]
    return [tuner for tuner in tuners if "trainable_adapter_name" in vars(tuner)]


def is_driven(tuner: Any) -> bool:
    """Whether `drive_adalora` was called for a tuner."""
    return "plait_schedule" in vars(tuner)
