"""AdaLoRA in training: its schedule, its checkpoints, and what peft warns of without reason.

Upstream expects the training loop to call `update_and_allocate` itself, and saves neither the
pruned ranks, which may come back, nor the averages of importance.
"""

import json
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import Optimizer

from plait.core.events import EventNeverFired, Listener, listen

METHOD = "adalora"
SINGULAR_VALUES = "lora_E"  # in the names of what the schedule prunes
STATE = "adalora.safetensors"  # beside a checkpoint's adapter

# Schedule ---------------------------------------------------------------------------------------


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


def total_step(tuner: Any) -> int | None:
    """The length of the schedule of a tuner, in optimizer steps."""
    return tuner.peft_config[tuner.trainable_adapter_name].total_step


def is_driven(tuner: Any) -> bool:
    """Whether `drive_adalora` was called for a tuner."""
    return "plait_schedule" in vars(tuner)


def adalora_of(model: nn.Module) -> Any:
    """The AdaLoRA tuner of a model that trains one; None if it trains another method."""
    return next(iter(adalora_tuners(model)), None)


def check_total_step(model: nn.Module, steps: int) -> None:
    """Raise ValueError if AdaLoRA's schedule does not end with the training's last step."""
    tuner = adalora_of(model)
    if tuner is None:
        return
    planned = tuner.peft_config[tuner.trainable_adapter_name].total_step
    if planned != steps:
        raise ValueError(
            f"method.total_step is {planned}, but training has {steps} optimizer steps, so "
            f"adalora's schedule would not end where training does. Set it to {steps}, or leave "
            "it out."
        )


# Checkpoints ------------------------------------------------------------------------------------


def save_adalora(tuner: Any, folder: Path) -> None:
    """Write what resuming needs besides the adapter: pruned ranks and averages of importance."""
    allocator = tuner.rankallocator
    tensors = {
        f"weight/{n}": p.detach() for n, p in tuner.model.named_parameters() if p.requires_grad
    }
    for average in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        tensors |= {f"{average}/{n}": t for n, t in vars(allocator)[average].items()}
    pattern = tuner.peft_config[tuner.trainable_adapter_name].rank_pattern
    metadata = {"rank_pattern": json.dumps(pattern)}
    contiguous = {key: t.contiguous() for key, t in tensors.items()}
    save_file(contiguous, folder / STATE, metadata=metadata)


def load_adalora(tuner: Any, folder: Path) -> None:
    """Restore what save_adalora wrote."""
    allocator = tuner.rankallocator
    weights = {n: p for n, p in tuner.model.named_parameters() if p.requires_grad}
    with safe_open(folder / STATE, framework="pt") as file, torch.no_grad():
        allocator.reset_ipt()
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, _, name = key.partition("/")
            tensor = file.get_tensor(key)
            if kind == "weight":
                weights[name].copy_(tensor)
            else:
                vars(allocator)[kind][name] = tensor.to(weights[name].device)
        metadata = file.metadata()
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = json.loads(
        metadata["rank_pattern"]
    )


@contextmanager
def upstream_noise() -> Iterator[None]:
    """Silence two warnings of peft 0.21.2 that are wrong about AdaLoRA.

    It takes a layer pruned to rank 0 for a lost shard, and the pattern of kept ranks for LoRA's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        yield
