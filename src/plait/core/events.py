"""Events: hooks that run a method's schedule and penalty around every optimizer step.

torch's public global hooks see every optimizer step of the process, so no training loop has to
call anything. Before a step, the gradients of the penalties are added to `.grad`, once per step
however many micro-batches were accumulated. After it, each Delta increments `t` and runs
`after_step`; then `after_all` runs over the layers of each adapter. Steps that a gradient scaler
skips are not counted. The guard raises if a method that needs these events trained without them.
"""

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

from plait.core.rates import free_from_decay
from plait.core.sharding import put, whole

if TYPE_CHECKING:
    from plait.core.delta import Delta

MANY_FORWARDS = 50  # more training forwards without an event than accumulation explains

_deltas: "weakref.WeakSet[Delta]" = weakref.WeakSet()
_listeners: "weakref.WeakSet[Listener]" = weakref.WeakSet()
_installed: list[Any] = []
_rates: dict[int, list[Callable[[], None]]] = {}  # to call after a step, by optimizer
_stepping: list[Optimizer] = []  # the optimizer whose step is being completed


class PlaitWarning(UserWarning):
    """Every warning of plait."""


class EventNeverFired(RuntimeError):
    """A method with a schedule or a penalty was trained, but no optimizer step was seen."""


class Listener:
    """An object, other than a Delta, that is called around the optimizer steps of its parameters.

    Listeners run after the events of the Deltas. They are weakly referenced: keep them alive.
    """

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters; an optimizer's steps are of interest if it holds one of them."""
        raise NotImplementedError

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before a step, when the gradients are complete and unscaled."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after a completed step, while the gradients are still set."""

    def check(self, model: nn.Module) -> None:
        """Raise EventNeverFired if it should have acted on this model's training and never did."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, such as that of a running chain; it listens like the original."""
        self.__dict__.update(state)
        listen(self)


def listen(listener: Listener) -> None:
    """Call a listener around all optimizer steps from now on, as long as it is alive."""
    _listeners.add(listener)
    _install()


def watch(delta: "Delta") -> None:
    """Fire the events of a Delta from now on, if it has any."""
    if delta.needs_events:
        _deltas.add(delta)
        _install()


def _install() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before))
        _installed.append(register_optimizer_step_post_hook(_after))


def _skipped(optimizer: Optimizer) -> bool:
    """Whether this step trains nothing.

    A gradient scaler can turn the step of a fused optimizer into a no-op. torch.distributed's
    checkpointing steps with gradients and learning rate 0 to create a state that it can load into.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
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


def _by_adapter(selects: Callable[["Delta"], bool]) -> list[list["Delta"]]:
    """The watched Deltas that are selected, a list for each adapter, in layer order."""
    adapters: dict[int, list[Delta]] = {}
    for delta in sorted(filter(selects, _deltas), key=lambda d: d.order):
        adapters.setdefault(id(delta.adapter), []).append(delta)
    return list(adapters.values())


def _own_rates(held: list[list["Delta"]]) -> dict[int, float | None]:
    """The parameters that weight decay skips, by id -> their own base learning rate, or None."""
    return {
        id(delta.get_parameter(name)): lr
        for deltas in held
        for delta in deltas
        for name, lr in delta.own_rates().items()
    }


def _unscale(optimizer: Optimizer) -> None:
    """Unscale the gradients if the scaler left that to a fused optimizer."""
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
    corrections = free_from_decay(optimizer, _own_rates(held))
    _rates[id(optimizer)] = [after for _, after in corrections]
    closure = args[1] if len(args) > 1 else kwargs.get("closure")

    def penalise() -> Any:
        total = sum(before_step(deltas) for deltas in held)
        for before, _ in corrections:
            before()
        return total

    if closure is None or not held:
        penalise()
        return None

    # A closure computes the gradients again, after this hook.
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


@contextmanager
def _completing(optimizer: Optimizer | None) -> Iterator[None]:
    """Tell `forget` which optimizer is stepping, within the context."""
    _stepping.extend([] if optimizer is None else [optimizer])
    try:
        yield
    finally:
        _stepping.clear()


def _listening(optimizer: Optimizer) -> list[Listener]:
    """The listeners whose parameters this optimizer holds."""
    if not _listeners:
        return []
    held = _ids(optimizer)
    return [one for one in list(_listeners) if any(id(p) in held for p in one.parameters())]


@torch.no_grad()
def forget(p: nn.Parameter, index: Any = ...) -> None:
    """Zero the stepping optimizer's state of some entries of a parameter, such as its moments.

    Args:
        p: the parameter.
        index: of the entries that restart; all by default.
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
    """Check what the method needs and add the gradient of its penalty to `.grad`.

    Returns:
        The penalty, a scalar.

    Raises:
        ValueError: total_steps is needed and unknown, or the method refuses its gradients.
    """
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
    """The penalty of an adapter, mean over its layers plus those of its gates; None if none."""
    terms = [p / len(deltas) for p in (delta.penalty() for delta in deltas) if p is not None]
    gated: Any = deltas
    terms += [p for p in (g.penalty(gated) for g in deltas[0].gates) if p is not None]
    return torch.stack(terms).sum() if terms else None


@torch.no_grad()
def after_step_of(deltas: list["Delta"]) -> None:
    """Increment t and run after_step for each layer, then run after_all."""
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
    """Fire the events by hand, for optimizers that are not torch optimizers.

    Call it after each step of the optimizer, before the gradients are cleared. It fires the events
    of chains, too. It does not add penalties: add `plait.penalty(model)` to the loss, once per
    optimizer step.

    Args:
        model: with plait's adapters.
        optimizer: has a `state` like torch's; methods that restart ranks clear it there.
    """
    inside = {id(p) for p in model.parameters()}
    with _completing(optimizer):
        for deltas in _training(model):
            after_step_of(deltas)
        for listener in list(_listeners):
            if any(id(p) in inside for p in listener.parameters()):
                listener.after_step(optimizer)


def penalty(model: nn.Module) -> torch.Tensor | None:
    """The sum of all penalties of a model, for logging or a hand-written loop; None if none."""
    sums = [p for p in map(_penalty, _training(model)) if p is not None]
    return torch.stack(sums).sum() if sums else None


def _training(model: nn.Module) -> list[list["Delta"]]:
    """Those of adapters_of that train: not, for example, the frozen reference of a policy."""
    return [
        deltas
        for deltas in adapters_of(model)
        if any(p.requires_grad for delta in deltas for p in delta.parameters())
    ]


def adapters_of(model: nn.Module) -> list[list["Delta"]]:
    """The Deltas of a model that have events, a list for each adapter, in layer order."""
    inside = {id(m) for m in model.modules()}
    return _by_adapter(lambda delta: id(delta) in inside)


def check_fired(delta: "Delta") -> None:
    """The guard, run at save, merge and export: warn if training forwards saw no optimizer step.

    Raises:
        EventNeverFired: there were more than 50 training forwards.
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
    """Run the guard over all layers and listeners of a model, at the end of a training run."""
    for deltas in adapters_of(model):
        check_fired(deltas[0])
    for listener in list(_listeners):
        listener.check(model)
