"""Events: what happens between optimizer steps, fired by themselves.

torch's public global hooks see every optimizer step of the process. Before a step the penalties'
gradients are added to `.grad`, once whatever the accumulation; after it each Delta's `t` advances,
its `after_step` runs, then `after_all` over the layers of each adapter. A step that a gradient
scaler skips does not count. Nobody has to call anything: upstream AdaLoRA, whose schedule has to
be called, trains as a plain gated LoRA under Trainer.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import TrainerCallback

if TYPE_CHECKING:
    from plait.core.delta import Delta

MANY_FORWARDS = 50  # training forwards without an event that no accumulation explains

_deltas: "weakref.WeakSet[Delta]" = weakref.WeakSet()
_adalora: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()  # steps seen
_installed: list[Any] = []


class PlaitWarning(UserWarning):
    """Every warning of plait."""


class EventNeverFired(RuntimeError):
    """A method with a schedule or a penalty trained and no optimizer step was seen."""


def watch(delta: "Delta") -> None:
    """Fire the events of a Delta, if it has any, from now on."""
    if delta.needs_events:
        _deltas.add(delta)
        _install()


def _install() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before))
        _installed.append(register_optimizer_step_post_hook(_after))


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler made this step of a fused optimizer a no-op."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _held(optimizer: Optimizer) -> list[list["Delta"]]:
    """The watched Deltas whose first trained parameter this optimizer holds, by adapter."""
    if not _deltas:
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def trains(delta: "Delta") -> bool:
        first = next((p for p in delta.parameters() if p.requires_grad), None)
        return first is not None and id(first) in held

    return _by_adapter(trains)


def _by_adapter(wanted: Callable[["Delta"], bool]) -> list[list["Delta"]]:
    """The watched Deltas that are wanted, a list for each adapter, in layer order."""
    adapters: dict[int, list[Delta]] = {}
    for delta in sorted(filter(wanted, _deltas), key=lambda d: d.order):
        adapters.setdefault(id(delta.adapter), []).append(delta)
    return list(adapters.values())


def _unscale(optimizer: Optimizer) -> None:
    """Free the gradients from the scale that a scaler leaves to a fused optimizer to take out."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                p.grad.div_(scale)
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    if _skipped(optimizer):
        return None
    held = _held(optimizer)
    if held or any(_holds(optimizer, tuner) for tuner in _adalora):
        _unscale(optimizer)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None or not held:
        for deltas in held:
            before_step(deltas)
        return None

    def with_penalties() -> Any:  # a closure computes the gradients anew, after this hook
        return closure() + sum(before_step(deltas) for deltas in held)

    return args[:1], {"closure": with_penalties}


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _skipped(optimizer):
        return
    for deltas in _held(optimizer):
        after_step_of(deltas)
    for tuner in list(_adalora):
        if _holds(optimizer, tuner):
            _adalora[tuner] += 1
            tuner.update_and_allocate(_adalora[tuner])


def before_step(deltas: list["Delta"]) -> torch.Tensor | float:
    """Add the penalties' gradient to `.grad`, check what the method needs; returns the penalty."""
    if deltas[0].adapter.total_steps_needed:
        _ = deltas[0].total_steps
    with torch.enable_grad():
        total = _penalty(deltas)
    if total is None:
        return 0.0
    params = [p for delta in deltas for p in delta.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, params, allow_unused=True)  # no hooks of a wrapper run
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad + grad
    return total.detach()


def _penalty(deltas: list["Delta"]) -> torch.Tensor | None:
    """The mean over the layers of an adapter, or None."""
    terms = [p for p in (delta.penalty() for delta in deltas) if p is not None]
    return torch.stack(terms).sum() / len(deltas) if terms else None


@torch.no_grad()
def after_step_of(deltas: list["Delta"]) -> None:
    """Advance t, then after_step of each layer, then after_all."""
    for delta in deltas:
        if delta.t is not None:
            delta.t += 1
        delta.forwards = 0
        delta.stepped, delta.fresh = True, False
        delta.after_step()
    type(deltas[0]).after_all(deltas)


def after_step(model: nn.Module) -> None:
    """Fire the events by hand, for optimizers that are not torch optimizers.

    Call it after each step of the optimizer, before the gradients are cleared. Penalties are
    not added by this call: add `plait.penalty(model)` to the loss, once per optimizer step.
    """
    for deltas in _of(model):
        after_step_of(deltas)


def penalty(model: nn.Module) -> torch.Tensor | None:
    """The sum of the penalties of a model, for logging or for a hand-written loop."""
    sums = [p for p in map(_penalty, _of(model)) if p is not None]
    return torch.stack(sums).sum() if sums else None


def _of(model: nn.Module) -> list[list["Delta"]]:
    inside = {id(m) for m in model.modules()}
    return _by_adapter(lambda delta: id(delta) in inside)


def check_fired(delta: "Delta") -> None:
    """The guard, run at save, merge and export.

    Raises:
        EventNeverFired: more than 50 training forwards and no event. Below that, a warning.
    """
    if not delta.needs_events or delta.stepped or not delta.forwards:
        return
    text = (
        f"{delta.adapter.key}: {delta.forwards} training forwards, 0 optimizer steps seen. This "
        "optimizer is not a torch.optim.Optimizer: call plait.after_step(model) after each of its "
        "steps."
    )
    if delta.forwards > MANY_FORWARDS:
        raise EventNeverFired(text)
    warnings.warn(text, PlaitWarning, stacklevel=3)


def check_events(model: nn.Module) -> None:
    """Run the guard over all layers of a model, for the end of a training run."""
    for deltas in _of(model):
        check_fired(deltas[0])
    for tuner in _adalora_models(model):
        if not _adalora[tuner]:
            raise EventNeverFired(
                "adalora: training ended and its schedule never ran. Train with a torch optimizer."
            )


def drive_adalora(model: nn.Module, start: int = 0) -> None:
    """Call upstream AdaLoRA's `update_and_allocate` after each optimizer step from now on.

    Args:
        model: holds the AdaLoRA tuner.
        start: optimizer steps already completed, when a run is resumed.

    Raises:
        ValueError: no AdaLoRA in the model, several trainable adapters, or no total_step.
    """
    tuners = _adalora_models(model, driven=False)
    if not tuners:
        raise ValueError("drive_adalora: the model has no AdaLoRA adapter. Wrap it first.")
    for tuner in tuners:
        config = tuner.peft_config[tuner.trainable_adapter_name]
        if not config.total_step:
            raise ValueError("adalora: total_step is not set. Give the number of optimizer steps.")
        if config.init_r == config.target_r:
            raise ValueError(
                f"adalora: init_r == target_r == {config.init_r} leaves nothing to allocate and "
                "fails in peft 0.21.2. Give init_r above target_r."
            )
        _adalora[tuner] = start
    _install()


def _adalora_models(model: nn.Module, driven: bool = True) -> list[Any]:
    from peft.tuners.adalora import AdaLoraModel

    return [
        m for m in model.modules() if isinstance(m, AdaLoraModel) and (not driven or m in _adalora)
    ]


def _holds(optimizer: Optimizer, tuner: Any) -> bool:
    """Whether the optimizer trains an AdaLoRA tuner."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in held for n, p in tuner.named_parameters() if "lora_E" in n)


class PlaitCallback(TrainerCallback):
    """Optional, for Trainer and TRL: fills `total_steps` of every plait adapter at the start.

    It also refuses gradient clipping with optimizers that must see the raw gradients.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the adapters how many optimizer steps are planned; check the clipping."""
        check_clipping(kwargs.get("optimizer"), args.max_grad_norm)
        set_total_steps(kwargs["model"], state.max_steps)


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Set `total_steps` of every adapter whose config leaves it open."""
    for deltas in _of(model):
        if deltas[0].adapter.total_steps is None:
            deltas[0].adapter.total_steps = total_steps


def check_clipping(optimizer: Any, max_grad_norm: float | None) -> None:
    """Refuse clipping of raw gradients for an optimizer that clips by itself.

    Args:
        optimizer: also as accelerate wraps it, or None.
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
