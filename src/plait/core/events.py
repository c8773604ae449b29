"""Events: what happens between optimizer steps, fired by themselves.

torch's public global hooks see every optimizer step of the process. Before a step the penalties'
gradients are added to `.grad`, once whatever the accumulation; after it each Delta's `t` advances,
its `after_step` runs, then `after_all` over the layers of each adapter. A step that a gradient
scaler skips does not count. Nobody has to call anything: upstream AdaLoRA, whose schedule has to
be called, trains as a plain gated LoRA under Trainer.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import TrainerCallback

from plait.core.sharding import put, whole

if TYPE_CHECKING:
    from plait.core.delta import Delta

MANY_FORWARDS = 50  # training forwards without an event that no accumulation explains

_deltas: "weakref.WeakSet[Delta]" = weakref.WeakSet()
_listeners: "weakref.WeakSet[Listener]" = weakref.WeakSet()
_installed: list[Any] = []
_rates: dict[int, list[Callable[[], None]]] = {}  # what to finish after a step, by optimizer
_stepping: list[Optimizer] = []  # the optimizer whose step is being completed


class PlaitWarning(UserWarning):
    """Every warning of plait."""


class EventNeverFired(RuntimeError):
    """A method with a schedule or a penalty trained and no optimizer step was seen."""


class Listener:
    """Something beside the Deltas that is called around the optimizer steps of its parameters.

    Listeners come after the Deltas' own events. Whoever makes one keeps it alive.
    """

    def parameters(self) -> Iterable[nn.Parameter]:
        """A step counts if its optimizer holds one of these."""
        raise NotImplementedError

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before a step, gradients complete and unscaled."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after a completed step, gradients still present."""


def listen(listener: Listener) -> None:
    """Call a listener around the optimizer steps from now on, as long as it is alive."""
    _listeners.add(listener)
    _install()


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
    """Whether this step trains nothing.

    A gradient scaler makes one of a fused optimizer a no-op. torch.distributed.checkpoint takes one
    on gradients of 0, its learning rate put to 0 meanwhile, so that there is a state to load into.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None and bool(found):
        return True
    if not optimizer.defaults.get("lr") or any(g.get("lr", 1) for g in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    return bool(grads) and not any(bool(whole(grad).any()) for grad in grads)


def _ids(optimizer: Optimizer) -> set[int]:
    """The identities of the parameters of an optimizer."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _held(optimizer: Optimizer) -> list[list["Delta"]]:
    """The watched Deltas whose first trained parameter this optimizer holds, by adapter."""
    if not _deltas:
        return []
    held = _ids(optimizer)

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
    held, listeners = _held(optimizer), _listening(optimizer)
    if held or listeners:
        _unscale(optimizer)
    for listener in listeners:
        listener.before_step(optimizer)
    freed = _free_from_decay(optimizer, held)
    _rates[id(optimizer)] = [after for _, after in freed]
    closure = args[1] if len(args) > 1 else kwargs.get("closure")

    def penalise() -> Any:
        total = sum(before_step(deltas) for deltas in held)
        for before, _ in freed:
            before()
        return total

    if closure is None or not held:
        penalise()
        return None

    # A closure computes the gradients anew, after this hook.
    return args[:1], {"closure": lambda: closure() + penalise()}


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _skipped(optimizer):
        return
    for finish in _rates.pop(id(optimizer), []):
        finish()
    with _completing(optimizer):
        for deltas in _held(optimizer):
            after_step_of(deltas)
        for listener in _listening(optimizer):
            listener.after_step(optimizer)


# Optimizers that add weight decay to the gradient; all others take it off the weight.
_COUPLED = ("SGD", "ASGD", "Adagrad", "Adadelta", "Adamax", "RMSprop")


def _coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if "decoupled_weight_decay" in group:
        return not group["decoupled_weight_decay"]
    older = type(optimizer) is torch.optim.Adam  # before torch 2.7 Adam does not say
    return older or type(optimizer).__name__ in _COUPLED


@torch.no_grad()
def _free_from_decay(
    optimizer: Optimizer, held: list[list["Delta"]]
) -> list[tuple[Callable[[], None], Callable[[], None]]]:
    """Keep weight decay, and another learning rate than their own, from what a Delta names.

    Whatever groups the user's optimizer has: a step is linear in the learning rate, so what it did
    to a parameter can be scaled, and its decay be put back. Returns, for each parameter, what to
    call when its gradient is complete and what to call after the step.
    """
    own = {
        id(delta.get_parameter(name)): lr
        for deltas in held
        for delta in deltas
        for name, lr in delta.own_rates().items()
    }
    found = []
    for group in optimizer.param_groups if own else ():
        decay = group.get("weight_decay") or 0.0
        coupled = _coupled(optimizer, group)
        for p in (p for p in group["params"] if id(p) in own):
            wanted, rate = own[id(p)], group["lr"]
            if wanted is None and not decay:
                continue
            start = group.get("initial_lr", rate)
            if rate is None or (wanted is not None and not start):
                raise ValueError(
                    f"{type(optimizer).__name__}: lr = {rate}, so a gate's step can be neither "
                    "freed from weight decay nor given its own learning rate. Give lr above 0."
                )
            scale = 1.0 if wanted is None else wanted / float(start)
            back = 0.0 if coupled else float(rate) * decay
            old = p.detach().clone() if back or scale != 1 else p
            found.append(
                (
                    functools.partial(_uncouple, p, decay if coupled else 0.0),
                    functools.partial(_rescale, p, old, scale, back),
                )
            )
    return found


@torch.no_grad()
def _uncouple(p: nn.Parameter, decay: float) -> None:
    """Take off the gradient what the optimizer is about to add to it."""
    if decay and p.grad is not None:
        p.grad = p.grad - decay * p


@torch.no_grad()
def _rescale(p: nn.Parameter, old: torch.Tensor, scale: float, back: float) -> None:
    """p = old + scale * (its step without weight decay)."""
    if old is not p and p.grad is not None:
        p.copy_(old + scale * (p - old + back * old))


@contextmanager
def _completing(optimizer: Optimizer | None) -> Iterator[None]:
    """Let `forget` know whose step it is."""
    _stepping.extend([] if optimizer is None else [optimizer])
    try:
        yield
    finally:
        _stepping.clear()


def _listening(optimizer: Optimizer) -> list[Listener]:
    """The listeners that this optimizer's step concerns."""
    if not _listeners:
        return []
    held = _ids(optimizer)
    return [one for one in list(_listeners) if any(id(p) in held for p in one.parameters())]


@torch.no_grad()
def forget(p: nn.Parameter, index: Any = ...) -> None:
    """Zero what the stepping optimizer remembers of a parameter's entries, such as its moments.

    Args:
        p: the parameter.
        index: of the entries that start anew; all by default.
    """
    for optimizer in _stepping:
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                codes = state.get(name.replace("state", "qmap"))  # bitsandbytes keeps 8-bit codes
                if value.dtype == torch.uint8 and codes is not None:
                    value[index] = int(codes.abs().argmin())
                else:
                    put(value, index, 0)


def before_step(deltas: list["Delta"]) -> torch.Tensor | float:
    """Add the penalties' gradient to `.grad`, check what the method needs; returns the penalty."""
    first = deltas[0]
    if first.adapter.total_steps_needed or any(g.total_steps_needed for g in first.gates):
        _ = first.total_steps
    for delta in deltas:
        delta.before_step()
    first.check_schedule()
    with torch.enable_grad():
        total = _penalty(deltas)
    if total is None:
        return 0.0
    trained = (p for delta in deltas for p in delta.parameters() if p.requires_grad)
    params = list({id(p): p for p in trained}.values())  # a shared one once
    grads = torch.autograd.grad(total, params, allow_unused=True)  # no hooks of a wrapper run
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad + grad
    return total.detach()


def _penalty(deltas: list["Delta"]) -> torch.Tensor | None:
    """The mean over the layers of an adapter, and what its gates add; or None."""
    terms = [p / len(deltas) for p in (delta.penalty() for delta in deltas) if p is not None]
    gated: Any = deltas
    terms += [p for p in (g.penalty(gated) for g in deltas[0].gates) if p is not None]
    return torch.stack(terms).sum() if terms else None


@torch.no_grad()
def after_step_of(deltas: list["Delta"]) -> None:
    """Advance t, then after_step of each layer, then after_all."""
    for delta in deltas:
        if delta.t is not None:
            delta.t += 1
        delta.forwards = 0
        delta.stepped, delta.fresh = True, False
        delta.after_step()
        for gate in delta.gates:
            gate.after_step(delta)  # type: ignore[arg-type]
    type(deltas[0]).after_all(deltas)
    for gate in deltas[0].gates:
        gate.after_all(deltas)  # type: ignore[arg-type]


def after_step(model: nn.Module, optimizer: Any = None) -> None:
    """Fire the events by hand, those of a chain too, for optimizers that are not torch optimizers.

    Call it after each step of the optimizer, before the gradients are cleared. Penalties are
    not added by this call: add `plait.penalty(model)` to the loss, once per optimizer step.

    Args:
        model: with plait's adapters.
        optimizer: anything with torch's `state`, for methods that start ranks anew.
    """
    inside = {id(p) for p in model.parameters()}
    with _completing(optimizer):
        for deltas in adapters_of(model):
            after_step_of(deltas)
        for listener in list(_listeners):
            if any(id(p) in inside for p in listener.parameters()):
                listener.after_step(optimizer)


def penalty(model: nn.Module) -> torch.Tensor | None:
    """The sum of the penalties of a model, for logging or for a hand-written loop."""
    sums = [p for p in map(_penalty, adapters_of(model)) if p is not None]
    return torch.stack(sums).sum() if sums else None


def adapters_of(model: nn.Module) -> list[list["Delta"]]:
    """The Deltas of a model that have events, a list for each adapter, in layer order."""
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
    for deltas in adapters_of(model):
        check_fired(deltas[0])
    for listener in list(_listeners):
        if isinstance(listener, AdaLoraSchedule) and listener.inside(model):
            listener.check()


class AdaLoraSchedule(Listener):
    """Calls upstream AdaLoRA's `update_and_allocate`, which nothing else calls."""

    def __init__(self, tuner: Any, start: int) -> None:
        self.tuner, self.t = weakref.ref(tuner), start

    def parameters(self) -> Iterable[nn.Parameter]:
        """Its gates."""
        tuner = self.tuner()
        named = [] if tuner is None else tuner.named_parameters()
        return (p for n, p in named if "lora_E" in n)

    def after_step(self, optimizer: Optimizer) -> None:
        """One more step."""
        self.t += 1
        self.tuner().update_and_allocate(self.t)  # type: ignore[union-attr]

    def inside(self, model: nn.Module) -> bool:
        """Whether it drives an adapter of this model."""
        return any(m is self.tuner() for m in model.modules())

    def check(self) -> None:
        """Raise EventNeverFired where no step came."""
        if not self.t:
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
    tuners = _adalora_tuners(model)
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


def _adalora_tuners(model: nn.Module) -> list[Any]:
    """The AdaLoRA tuners of a model that have an adapter to train."""
    from peft.tuners.adalora import AdaLoraModel

    tuners = [m for m in model.modules() if isinstance(m, AdaLoraModel)]
    return [tuner for tuner in tuners if "trainable_adapter_name" in vars(tuner)]


class PlaitCallback(TrainerCallback):
    """Optional, for Trainer and TRL: tells every plait adapter what only the Trainer knows.

    That is `total_steps`, and the micro-batches of an optimizer step. It refuses gradient clipping
    with optimizers that must see the raw gradients, and drives upstream's AdaLoRA where nobody has
    done so yet.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the adapters how many optimizer steps are planned, of how many micro-batches."""
        check_clipping(kwargs.get("optimizer"), args.max_grad_norm)
        set_total_steps(kwargs["model"], state.max_steps)
        set_micro_batches(kwargs["model"], args.gradient_accumulation_steps)
        tuners = _adalora_tuners(kwargs["model"])
        if tuners and not any("plait_schedule" in vars(tuner) for tuner in tuners):
            drive_adalora(kwargs["model"], state.global_step)


def set_total_steps(model: nn.Module, total_steps: int) -> None:
    """Set `total_steps` of every adapter whose config leaves it open."""
    for deltas in adapters_of(model):
        if deltas[0].adapter.total_steps is None:
            deltas[0].adapter.total_steps = total_steps


def set_micro_batches(model: nn.Module, count: int) -> None:
    """Tell the adapters how many micro-batches make an optimizer step.

    Losses of activations, such as molora's balance, enter as the mean over them. PlaitCallback and
    plait train tell it; a loop of your own that accumulates has to.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"set_micro_batches: count = {count}. Give 1 or more.")
    for deltas in adapters_of(model):
        adapter: Any = deltas[0].adapter
        adapter.micro_batches = count


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
