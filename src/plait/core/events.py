"""Events: hooks that run a method's schedule and penalty around every optimizer step.

torch's public global hooks see every optimizer step of the process, so no training loop has to
call anything. Before a step, the gradients of the penalties are added to `.grad`, once per step
however many micro-batches were accumulated. After it, each Delta increments `t` and runs
`after_step`; then `after_all` runs over the layers of each adapter. Steps that a gradient scaler
skips are not counted. The guard raises if a method that needs these events trained without them.

A step that is called by another optimizer's step (SAM, Lookahead, a subclass that calls
`super().step()`) is a part of it and fires nothing. If several optimizers share an adapter, its
events fire once all of them have stepped.
"""

import functools
import gc
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

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

_deltas: "WeakSet[Delta]" = WeakSet()
_untrained: "WeakSet[Delta]" = WeakSet()  # those of which no step was seen, without events too
_listeners: "WeakSet[Listener]" = WeakSet()
_installed: list[Any] = []
_stepping: list[Any] = []  # the optimizers whose step is being completed

# By optimizer: what to call after its step; the rounds that its step is a part of; the parameters
# of an adapter that it lacks, with the optimizers that hold some of those.
_rates: WeakKeyDictionary[Optimizer, list[Callable[[], None]]] = WeakKeyDictionary()
_joined: "WeakKeyDictionary[Optimizer, list[tuple[ref[Any], Round]]]" = WeakKeyDictionary()
_partners: WeakKeyDictionary[Optimizer, tuple[set[int], list[ref[Any]]]] = WeakKeyDictionary()

# The open round of each adapter, by its first Delta, and of each listener.
_rounds: "WeakKeyDictionary[Any, Round]" = WeakKeyDictionary()

# The code that runs the step of every optimizer, with the hooks around it.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__


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

    def skipped_step(self, optimizer: Optimizer) -> None:
        """Called in place of both if a gradient scaler makes the step do nothing."""

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
    """Fire the events of a Delta from now on, if it has any, and note when it is trained."""
    if delta.needs_events:
        _deltas.add(delta)
    if not delta.stepped:
        _untrained.add(delta)
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


def _ids(*optimizers: Optimizer) -> set[int]:
    """The identities of the parameters of some optimizers."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(p) for group in groups for p in group["params"]}


def parts(optimizer: Any) -> list[Any]:
    """The optimizers that move the parameters: those inside a wrapper, else the optimizer itself.

    SAM, Lookahead and torch's ZeroRedundancyOptimizer keep the wrapped optimizer as an attribute.
    """
    attributes = getattr(optimizer, "__dict__", {}).values()
    values = (v for a in attributes for v in (a if isinstance(a, list | tuple) else [a]))
    inside = [v for v in values if isinstance(v, Optimizer) and v is not optimizer]
    return [part for one in inside for part in parts(one)] or [optimizer]


def _around() -> list[Optimizer]:
    """The optimizers whose steps, further up the stack, called the step that runs this hook."""
    frame, stepping = sys._getframe(), []
    while frame is not None:
        if frame.f_code is _HOOKED_STEP:
            stepping.append(frame.f_locals["self"])
        frame = frame.f_back
    return stepping[1:]


def _by_adapter(selects: Callable[["Delta"], bool]) -> list[list["Delta"]]:
    """The watched Deltas that are selected, a list for each adapter, in layer order."""
    adapters: dict[int, list[Delta]] = {}
    for delta in sorted(filter(selects, _deltas), key=lambda d: d.order):
        adapters.setdefault(id(delta.adapter), []).append(delta)
    return list(adapters.values())


def _trained(deltas: Iterable["Delta"]) -> dict[int, nn.Parameter]:
    """The parameters that train, by id; a shared one is there once."""
    each = (d.parameters() if d._modules else d._parameters.values() for d in deltas)
    return {id(p): p for own in each for p in own if p is not None and p.requires_grad}


def _own_rates(held: Collection[int]) -> dict[int, float | None]:
    """The parameters that weight decay skips, by id -> their own base learning rate, or None."""
    rates = {
        id(delta.get_parameter(name)): lr
        for delta in _deltas
        for name, lr in delta.own_rates().items()
    }
    return {p: lr for p, lr in rates.items() if p in held}


def _unscale(optimizer: Optimizer) -> None:
    """Unscale the gradients if the scaler left that to a fused optimizer."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None:
                p.grad.div_(scale)
        optimizer.grad_scale = None  # type: ignore[attr-defined]


# Rounds ---------------------------------------------------------------------------------------


@dataclass
class Round:
    """One step of an adapter or of a listener; several optimizers may make it together.

    Attributes:
        waiting: ids of the parameters that have yet to step.
        layers: the adapter's Deltas, weakly referenced; none for a listener.
        optimizers: those whose part is completed, weakly referenced.
        total: the penalty, a scalar; None until it is computed.
        gradients: those of the penalty, of the parameters that have yet to step.
    """

    waiting: set[int]
    layers: "Sequence[ref[Delta]]" = ()
    optimizers: list[ref[Any]] = field(default_factory=list)
    total: torch.Tensor | float | None = None
    gradients: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)

    @property
    def deltas(self) -> list["Delta"]:
        """The layers that are still alive."""
        return [delta for layer in self.layers if (delta := layer()) is not None]

    def penalise(self, held: Collection[int], again: bool) -> torch.Tensor | float:
        """Add the penalty's gradient to the parameters of one optimizer; return the penalty.

        Args:
            held: ids of the optimizer's parameters.
            again: compute the gradient again, because a closure computed those of the loss again.
        """
        if again or self.total is None:
            self.total, self.gradients = penalty_gradients(self.deltas)
        for p in [p for p in self.gradients if id(p) in held]:
            grad = self.gradients.pop(p)
            p.grad = grad if p.grad is None else p.grad + grad
        return self.total


def _join(optimizer: Optimizer, held: set[int], closed: bool) -> list[tuple[Any, Round]]:
    """The rounds that a step is a part of: of adapters, then of listeners.

    Args:
        optimizer: about to step.
        held: ids of its parameters, without those of a step around this one.
        closed: whether a closure will compute the gradients.

    Raises:
        ValueError: the optimizer steps twice before another one that shares an adapter with it.
    """
    units: list[tuple[Any, dict[int, nn.Parameter], list[Delta]]]
    units = [(deltas[0], _trained(deltas), deltas) for deltas in _by_adapter(lambda _: True)]
    units += [(one, {id(p): p for p in one.parameters()}, []) for one in list(_listeners)]
    joined = []
    for key, params, deltas in units:
        part = held & params.keys()
        if not part:
            continue
        current = _rounds.get(key)
        if current is None or not current.optimizers:  # none, or one whose first step failed
            current = _rounds[key] = _open(optimizer, part, params, deltas, closed)
        elif not part <= current.waiting:
            del _rounds[key]
            waiting = {p for p in params if p in current.waiting}
            raise ValueError(_stepped_twice(key, optimizer, waiting))
        joined.append((key, current))
    return joined


def _open(
    optimizer: Optimizer,
    part: set[int],
    params: dict[int, nn.Parameter],
    deltas: list["Delta"],
    closed: bool,
) -> Round:
    """Open a round that waits for `part` and for what other optimizers will step.

    An optimizer whose gradients are not finite is not waited for: a gradient scaler skips it.
    """
    waiting = set(part)
    missing = {i: p for i, p in params.items() if i not in part and p.requires_grad}
    if missing:
        # Layers without a forward and without gradients are not in use.
        idle = [d for d in deltas if not d.forwards and not closed]
        resting = {i for i, p in _trained(idle).items() if p.grad is None}
        for other in _others(optimizer, set(missing)):
            ids = _ids(other) & missing.keys() - resting
            grads = (g for i in ids if (g := missing[i].grad) is not None)
            if all(bool(whole(g).isfinite().all()) for g in grads):
                waiting |= ids
    layers = [ref(d) for d in deltas if not waiting.isdisjoint(_trained([d]))]
    return Round(waiting, layers)


def _others(optimizer: Optimizer, missing: set[int]) -> list[Optimizer]:
    """The other optimizers of the process that hold some of the missing parameters.

    torch keeps no list of optimizers, so the garbage collector is asked, once for an optimizer.
    """
    if optimizer not in _partners:
        _partners.clear()  # the optimizers may be others by now
    elif _partners[optimizer][0] != missing:
        del _partners[optimizer]
    if optimizer not in _partners:
        holding = _find_holding(optimizer, missing)
        if holding:  # some may only wait to be collected
            del holding
            gc.collect()
            holding = _find_holding(optimizer, missing)
        _partners[optimizer] = missing, [ref(other) for other in holding]
    return [other for one in _partners[optimizer][1] if (other := one()) is not None]


def _find_holding(optimizer: Optimizer, missing: set[int]) -> list[Optimizer]:
    optimizers = [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]
    return [
        one
        for one in optimizers
        if one is not optimizer
        and hasattr(one, "param_groups")
        and not missing.isdisjoint(_ids(one))
    ]


def _stepped_twice(key: Any, optimizer: Optimizer, waiting: set[int]) -> str:
    """The error's text if one of several optimizers steps again before all have stepped."""
    adapter = getattr(key, "adapter", None)
    name = type(key).__name__ if adapter is None else adapter.key
    others = [o() for _, refs in _partners.values() for o in refs]
    kinds = {type(o).__name__ for o in others if o is not None and not waiting.isdisjoint(_ids(o))}
    return (
        f"{name}: {type(optimizer).__name__} steps a second time, and {len(waiting)} parameters of "
        f"the adapter wait for {' and '.join(sorted(kinds)) or 'another optimizer'}. Step all "
        "optimizers of an adapter once after each backward. If one is not in use any more, delete "
        "it, or freeze its parameters: requires_grad_(False)."
    )


# Hooks ------------------------------------------------------------------------------------------


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    around, everything = _around(), _ids(optimizer)
    held = everything - _ids(*around)
    if held:
        _joined.pop(optimizer, None)
    if _skipped(optimizer):
        for listener in list(_listeners):
            if any(id(p) in held for p in listener.parameters()):
                listener.skipped_step(optimizer)
        return None
    eventless = [delta for delta in _untrained if not delta.needs_events]
    for delta in [d for d in eventless if not held.isdisjoint(_trained([d]))]:
        delta.stepped = True
        _untrained.discard(delta)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    joined = _join(optimizer, held, closure is not None)
    if joined:
        _unscale(optimizer)
        _joined[optimizer] = [(ref(key), current) for key, current in joined]
    for key, _ in joined:
        if isinstance(key, Listener):
            key.before_step(optimizer)
    corrections = []
    if parts(optimizer) == [optimizer]:  # a wrapper leaves the rates to what it wraps
        movers = [one for one in around if parts(one) == [one]]
        corrections = free_from_decay(optimizer, _own_rates(everything - _ids(*movers)))
    if corrections:
        _rates[optimizer] = [after for _, after in corrections]

    def complete(again: bool) -> Any:
        rounds = [current for _, current in joined if current.layers]
        total = sum(current.penalise(held, again) for current in rounds)
        for before, _ in corrections:
            before()
        return total

    if closure is None:
        complete(again=False)
        return None
    if not joined and not corrections:
        return None

    # A closure computes the gradients again, after this hook.
    @functools.wraps(closure)
    def penalised() -> Any:
        loss = closure()
        total = complete(again=True)
        return loss if loss is None else loss + total

    if len(args) > 1:
        return (args[0], penalised, *args[2:]), kwargs
    return args, {**kwargs, "closure": penalised}


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for finish in _rates.pop(optimizer, []):
        finish()
    held = _ids(optimizer) - _ids(*_around())
    for key, current in _joined.pop(optimizer, []) if held else ():
        current.waiting -= held
        current.optimizers.append(ref(optimizer))
        unit = key()
        if current.waiting or unit is None:
            continue
        _rounds.pop(unit, None)
        with _completing(*(one() for one in current.optimizers)):
            if current.layers:
                after_step_of(current.deltas)
            else:
                unit.after_step(optimizer)


@contextmanager
def _completing(*optimizers: Any) -> Iterator[None]:
    """Tell `forget` which optimizers are stepping, within the context."""
    _stepping.extend(part for one in optimizers if one is not None for part in parts(one))
    try:
        yield
    finally:
        _stepping.clear()


@torch.no_grad()
def forget(p: nn.Parameter, index: Any = ...) -> None:
    """Zero the stepping optimizers' state of some entries of a parameter, such as its moments.

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


def penalty_gradients(
    deltas: list["Delta"],
) -> tuple[torch.Tensor | float, dict[nn.Parameter, torch.Tensor]]:
    """Check what the method needs; return its penalty, a scalar, and the gradient of that.

    Raises:
        ValueError: total_steps is needed and unknown, or the method refuses its gradients.
    """
    first = deltas[0]
    if needs_total_steps(first):
        _ = first.total_steps
    for delta in deltas:
        delta.before_step()
    first.check_schedule()
    with torch.enable_grad():
        total = _penalty(deltas)
    if total is None:
        return 0.0, {}
    if not total.requires_grad:  # what it is about is frozen
        return total, {}
    params = list(_trained(deltas).values())
    grads = torch.autograd.grad(total, params, allow_unused=True)  # no hooks of a wrapper run
    pairs = zip(params, grads, strict=True)
    return total.detach(), {p: grad for p, grad in pairs if grad is not None}


def needs_total_steps(delta: "Delta") -> bool:
    """Whether a schedule of the method or of its gates depends on the length of training."""
    return delta.adapter.total_steps_needed or any(g.total_steps_needed for g in delta.gates)


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
        _untrained.discard(delta)
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
