"""What one optimizer step is: steps inside steps, and several optimizers over one adapter."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import plait
from plait.core import events
from plait.testing.case import Case
from plait.testing.helpers import batch, deltas, relative, steps, trained, wrap
from tests.support import chains

DMC = Case("dual_module", {"tinit": 1, "tfinal": 2, "deltaT": 1, "orth_reg_weight": 0.5})
SORA = Case("sora", {"xi": 0.05, "l1_weight": 1.0, "gate_lr": 5e-2})
ADAMW = {"lr": 1e-3, "weight_decay": 0.5}

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


# Steps inside steps ------------------------------------------------------------------------------


class Clipped(torch.optim.AdamW):
    """A subclass that calls the step of its parent."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 1e6)
        return super().step(closure)


class ClippedSgd(torch.optim.SGD):
    """As Clipped; SGD adds its decay to the gradient."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Steps the optimizer that it keeps, as SAM and Lookahead do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)


class Sam(Wrapper):
    """Ascends by rho g, computes the gradient again and steps from where it was."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        held = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        old = [p.clone() for p in held]
        for p in held:
            p += 1e-9 * p.grad  # as good as nothing: the result is that of the inner optimizer
        with torch.enable_grad():
            closure()
        for p, value in zip(held, old, strict=True):
            p.copy_(value)
        return self.inner.step()


class Lookahead(Wrapper):
    """Moves the slow weights half of the way every second step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self.count = 0
        self.slow = [p.detach().clone() for g in inner.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss, self.count = self.inner.step(closure), self.count + 1
        fast = [p for g in self.param_groups for p in g["params"]]
        for slow, p in zip(self.slow, fast, strict=True) if self.count % 2 == 0 else ():
            slow += 0.5 * (p.detach() - slow)
            p.data.copy_(slow)
        return loss


NESTED: dict[str, tuple[Make, Make]] = {
    "subclass": (
        lambda p: torch.optim.AdamW(p, **ADAMW),
        lambda p: Clipped(p, **ADAMW),
    ),
    "sgd_subclass": (
        lambda p: torch.optim.SGD(p, **ADAMW),
        lambda p: ClippedSgd(p, **ADAMW),
    ),
    "wrapper": (
        lambda p: torch.optim.AdamW(p, **ADAMW),
        lambda p: Wrapper(torch.optim.AdamW(p, **ADAMW)),
    ),
    "wrapped_sgd": (
        lambda p: torch.optim.SGD(p, **ADAMW),
        lambda p: Wrapper(torch.optim.SGD(p, **ADAMW)),
    ),
    "wrapped_subclass": (
        lambda p: torch.optim.AdamW(p, **ADAMW),
        lambda p: Wrapper(Wrapper(Clipped(p, **ADAMW))),
    ),
    "zero": (
        lambda p: torch.optim.AdamW(p, **ADAMW),
        lambda p: ZeroRedundancyOptimizer(p, optimizer_class=torch.optim.AdamW, **ADAMW),
    ),
}


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A process group of this process alone, for ZeroRedundancyOptimizer."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hook_all_classes() -> None:
    """torch hooks a class's step when the first optimizer of just that class is made."""
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        cls([nn.Parameter(torch.zeros(1))], lr=0.1)


def stepped(case: Case, make: Make, closed: bool, count: int = 4) -> Any:
    """A model after some steps, by an optimizer whose step may get a closure."""
    hook_all_classes()
    model = wrap(case)
    optimizer = make(list(trained(model).values()))
    model.train()
    for key in range(count):

        def closure(model: Any = model, key: int = key, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = model(**batch(model, key=key)).loss
            loss.backward()
            return loss

        if not closed or isinstance(optimizer, Sam):
            closure()
        optimizer.step(closure) if closed else optimizer.step()
    return model.eval()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("case", [SORA, DMC], ids=str)
@pytest.mark.parametrize("kind", NESTED)
def test_a_step_inside_a_step_is_one(kind: str, case: Case, closed: bool, group: None) -> None:
    """Counters, penalties, proximal steps and decay are those of the inner optimizer alone."""
    plain, nested = (stepped(case, make, closed) for make in NESTED[kind])
    assert {d.steps for d in deltas(nested)} == {4}
    for name, value in plain.state_dict().items():
        assert torch.equal(nested.state_dict()[name], value), name


def test_sam_takes_one_step() -> None:
    plain = stepped(SORA, lambda p: torch.optim.AdamW(p, **ADAMW), closed=False)
    sam = stepped(SORA, lambda p: Sam(torch.optim.AdamW(p, **ADAMW)), closed=True)
    assert {d.steps for d in deltas(sam)} == {4}
    for name, value in plain.state_dict().items():
        assert relative(sam.state_dict()[name].float(), value.float()) < 1e-4, name


def test_lookahead_takes_one_step() -> None:
    model = stepped(SORA, lambda p: Lookahead(torch.optim.AdamW(p, **ADAMW)), closed=False)
    assert {d.steps for d in deltas(model)} == {4}


def test_an_error_in_a_step_does_not_hide_the_next() -> None:
    hook_all_classes()
    model = wrap(SORA).train()
    optimizer = Wrapper(torch.optim.AdamW(trained(model).values(), **ADAMW))

    def broken() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    assert {d.steps for d in deltas(model)} == {0}
    steps(model, optimizer, 2)
    assert {d.steps for d in deltas(model)} == {2}


def test_a_step_of_another_model_inside_a_closure_counts_for_it() -> None:
    outer, inner = wrap(SORA).train(), wrap(SORA).train()
    first = torch.optim.SGD(trained(outer).values(), lr=0.1)
    second = torch.optim.SGD(trained(inner).values(), lr=0.1)

    def closure() -> Any:
        steps(inner, second, 1)
        loss = outer(**batch(outer)).loss
        loss.backward()
        return loss

    first.step(closure)
    assert {d.steps for d in deltas(outer)} == {d.steps for d in deltas(inner)} == {1}


def test_a_wrapper_forgets_the_state_of_the_inner_optimizer() -> None:
    model = wrap(SORA)
    inner = torch.optim.AdamW(trained(model).values(), **ADAMW)
    outer = Wrapper(inner)
    steps(model, outer, 2)
    p = next(iter(trained(model).values()))
    assert inner.state[p]["exp_avg_sq"].any() or inner.state[p]["exp_avg"].any()
    with events._completing(outer):
        events.forget(p)
    assert not inner.state[p]["exp_avg"].any()
    assert not inner.state[p]["exp_avg_sq"].any()


def test_a_chain_resets_the_state_of_the_inner_optimizer() -> None:
    ends = []
    for wrapped in (False, True):
        model = chains.wrap()
        plan = plait.ChainPlan.chain(2, lr="global")
        chain = plait.chain.start(model, plan, total_steps=4)
        inner = chains.adamw(model)
        optimizer: Any = Wrapper(inner) if wrapped else inner
        for key in range(4):
            x, y = chains.data(model, key)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        chain.finish()
        assert chain.ledger.step == 4
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


# Several optimizers ------------------------------------------------------------------------------


def split(model: Any, kind: str) -> list[list[nn.Parameter]]:
    """The trained parameters of a model, in the groups of several optimizers."""
    params = list(trained(model).values())
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim == 1]
    return {
        "one": [params],
        "matrices first": [matrices, vectors],
        "vectors first": [vectors, matrices],
        "each layer": [[p for p in d.parameters() if p.requires_grad] for d in deltas(model)],
        "each parameter": [[p] for p in reversed(params)],
    }[kind]


def together(kind: str, count: int = 6, **options: Any) -> Any:
    """A model after some steps of several SGDs, each stepped once after a backward."""
    model = wrap(DMC, total_steps=8, **options).train()
    optimizers = [torch.optim.SGD(params, lr=0.05) for params in split(model, kind)]
    for key in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(**batch(model, key=key)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "kind", ["matrices first", "vectors first", "each layer", "each parameter"]
)
def test_several_optimizers_are_one(kind: str) -> None:
    """Penalty, importance and the choice of ranks over all layers, bit for bit."""
    one, several = together("one").state_dict(), together(kind).state_dict()
    for name, value in one.items():
        assert torch.equal(several[name], value), name


def test_events_come_once_after_the_last_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    original = events.after_step_of
    monkeypatch.setattr(
        events,
        "after_step_of",
        lambda some: (seen.append((some[0].steps, len(some))), original(some))[1],
    )
    model = together("each layer", count=3)
    assert seen == [(t, len(deltas(model))) for t in range(3)]


def test_a_closure_of_one_of_several_optimizers() -> None:
    """Each closure computes the gradients again; the penalty is added again, and once."""
    ends = []
    for kind in ("one", "each layer"):
        model = wrap(DMC, total_steps=8).train()
        optimizers = [torch.optim.SGD(params, lr=0.0) for params in split(model, kind)]

        def closure(model: Any = model, optimizers: Any = optimizers) -> Any:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = model(**batch(model)).loss
            loss.backward()
            return loss

        grads: dict[nn.Parameter, Any] = {}
        for optimizer in optimizers:
            optimizer.step(closure)
            grads |= {p: p.grad.clone() for g in optimizer.param_groups for p in g["params"]}
        assert {d.steps for d in deltas(model)} == {1}
        ends.append([grads[p] for p in trained(model).values()])
    for one, several in zip(*ends, strict=True):
        assert relative(several, one) < 1e-6


def test_an_optimizer_that_runs_ahead_is_refused() -> None:
    model = wrap(DMC, total_steps=8).train()
    ahead, behind = (torch.optim.SGD(p, lr=0.1) for p in split(model, "matrices first"))
    model(**batch(model)).loss.backward()
    ahead.step()
    text = (
        rf"dual_module: SGD steps a second time, and {len(deltas(model))} parameters of the "
        r"adapter wait for SGD\. Step all optimizers of an adapter once after each backward\. If "
        r"one is not in use any more, delete it, or freeze its parameters: "
        r"requires_grad_\(False\)\."
    )
    with pytest.raises(ValueError, match=text):
        ahead.step()
    assert {d.steps for d in deltas(model)} == {0}
    ahead.step()
    behind.step()
    assert {d.steps for d in deltas(model)} == {1}


@pytest.mark.parametrize("remedy", ["delete", "freeze"])
def test_the_remedies_for_an_optimizer_that_does_not_step(remedy: str) -> None:
    model = wrap(SORA).train()
    first, second = split(model, "matrices first")
    optimizers = [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(second, lr=0.1)]
    if remedy == "delete":
        del optimizers[1]
    else:
        for p in second:
            p.requires_grad_(False)
    steps(model, optimizers[0], 3)
    assert {d.steps for d in deltas(model)} == {3}


def test_a_part_of_an_adapter_that_alone_is_trained_steps_alone() -> None:
    """No other optimizer holds the rest: nobody is waited for."""
    model = wrap(SORA)
    optimizer = torch.optim.SGD(deltas(model)[0].parameters(), lr=0.1)
    steps(model, optimizer, 2)
    assert [d.steps for d in deltas(model)] == [2] + [0] * (len(deltas(model)) - 1)


def test_an_optimizer_that_a_scaler_skips_is_not_waited_for() -> None:
    model = wrap(SORA).train()
    groups = split(model, "matrices first")
    optimizers = [torch.optim.SGD(params, lr=1e-3) for params in groups]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for key, broken in enumerate([None, 0, None, 1, None]):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(**batch(model, key=key)).loss).backward()
        if broken is not None:
            groups[broken][0].grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert {d.steps for d in deltas(model)} == {key + 1}


def test_optimizers_that_step_in_the_backward() -> None:
    """One for each parameter, as soon as its gradient is there."""
    model = wrap(Case("dual_lora", {"gate_steps": 8})).train()
    made = {p: torch.optim.SGD([p], lr=0.1) for p in trained(model).values()}

    def act(p: Any) -> None:
        made[p].step()
        made[p].zero_grad()

    for p in made:
        p.register_post_accumulate_grad_hook(act)
    for key in range(3):
        model(**batch(model, key=key)).loss.backward()
        assert {d.steps for d in deltas(model)} == {key + 1}


def test_two_models_with_optimizers_of_their_own_do_not_wait() -> None:
    one = wrap(SORA)
    two = copy.deepcopy(one)
    first, second = (torch.optim.SGD(trained(m).values(), lr=0.1) for m in (one, two))
    for model in (one, two):
        model.train()(**batch(model)).loss.backward()
    first.step()
    assert ({d.steps for d in deltas(one)}, {d.steps for d in deltas(two)}) == ({1}, {0})
    second.step()
    assert {d.steps for d in deltas(two)} == {1}
