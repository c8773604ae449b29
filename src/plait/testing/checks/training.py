"""Checks of the start, of training, and of what training leaves alone."""

from tempfile import TemporaryDirectory

import pytest
import torch
from peft import PeftModel

import plait
from plait import EventNeverFired, LowRankDelta, PlaitWarning
from plait.core.events import MANY_FORWARDS
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    depends_on_input,
    layers,
    logits,
    random_state_kept,
    relative,
    steps,
    trained,
    wrap,
)


def start_is_the_base(case: Case) -> None:
    """A fresh adapter gives the base model's output, bit for bit or to the stated rounding."""
    expected = base_logits(tiny.llama())
    model = wrap(case)
    error = relative(logits(model), expected)
    assert error <= case.start_error, f"a fresh adapter changes the output by {error}"
    for layer in layers(model):
        if not depends_on_input(layer.plait_delta["default"]):
            error = float(layer.get_delta_weight("default").abs().max() / layer.base_weight().max())
            assert error <= case.start_error, f"dW of a fresh adapter is not zero: {error}"


def random_start_differs(case: Case) -> None:
    """init_weights=False gives a function that differs from the base and between adapters."""
    base = base_logits(tiny.llama())
    model = wrap(case, init_weights=False)
    assert relative(logits(model), base) > 1e-4, "init_weights=False starts at the base model"
    again = wrap(case, init_weights=False)
    assert torch.equal(logits(model), logits(again)), "a random start cannot be repeated"
    model.add_adapter("other", case.config(init_weights=False))
    first = logits(model)
    model.set_adapter("other")
    assert relative(logits(model), first) > 1e-4, "two adapters start alike"


def starts_are_reproducible(case: Case) -> None:
    """Equal seeds give equal factors, other seeds other factors."""
    one, two, other = wrap(case), wrap(case), wrap(case, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), f"{name} is drawn anew"
    drawn = [n for n, p in trained(one).items() if p.any()]
    differs = any(not torch.equal(trained(one)[n], trained(other)[n]) for n in drawn)
    for a, b in zip(deltas(one), deltas(other), strict=True):  # what is drawn may not be trained
        if isinstance(a, LowRankDelta):
            pairs = zip(a.factors(), b.factors(), strict=True)
            differs |= any(not torch.equal(p, q) for p, q in pairs)
    assert differs, "the seed changes nothing"


# Training --------------------------------------------------------------------------------------


def only_the_delta_trains(case: Case) -> None:
    """Parameters outside the Delta need no gradient and keep their bits in training."""
    base = tiny.llama()
    frozen = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = wrap(case, base)
    prefix = f"plait_{case.key}_delta"
    outside = [n for n in trained(model) if prefix not in n]
    assert not outside, f"these train as well: {outside}"
    inside = {id(p) for delta in deltas(model) for p in delta.parameters()}
    assert {id(p) for p in trained(model).values()} == inside, "a Delta's parameter does not train"
    steps(model, adamw(model, case.lr), 3)
    model.get_base_model()
    now = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    for name, value in frozen.items():
        assert torch.equal(value, now[name]), f"training changed {name}"


def gradients_reach_everything(case: Case) -> None:
    """Within three steps every trained tensor gets a gradient that is not zero."""
    model = wrap(case)
    optimizer = adamw(model, case.lr)
    reached: set[str] = set()
    model.train()
    for step in range(3):
        model(**batch(model, key=step)).loss.backward()
        reached |= {n for n, p in trained(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    dead = sorted(set(trained(model)) - reached)
    assert not dead, f"no gradient in three steps: {dead}"


def loss_falls(case: Case) -> None:
    """30 steps on one batch lower its loss by 0.1 nats, and evaluation mode keeps the gain."""
    model = wrap(case, total_steps=30)
    losses = steps(model, adamw(model, case.lr), 30)
    assert losses[-1] < losses[0] - 0.1, f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in 30 steps"
    with torch.no_grad():
        final = float(model(**batch(model)).loss)
    assert final < losses[0] - 0.1, f"evaluation mode gives loss {final:.3f} after training"


def optimizers_agree(case: Case) -> None:
    """Fused, foreach and loop AdamW train alike; no cached value survives a step."""
    ends = []
    for kind in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        model = wrap(case)
        logits(model)  # fills what a method may keep between forwards
        # A larger eps: Adam makes steps of full size out of rounding where gradients are near 0.
        steps(model, adamw(model, 1e-3, eps=1e-6, **kind), 5, key=None)
        fresh = wrap(case)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(fresh)), f"{kind}: stale values after a step"
        model.train()
        fresh.train()
        assert torch.equal(logits(model), logits(fresh)), f"{kind}: stale values in training"
        ends.append(model.eval())
    for other in ends[1:]:
        for name, value in trained(ends[0]).items():
            assert relative(trained(other)[name], value) < 1e-5, f"{name} depends on the optimizer"


def micro_batches_add_up(case: Case) -> None:
    """4 micro-batches of 2 give the gradients of one batch of 8, with the penalty."""
    gradients = []
    for parts in (1, 4):
        model = wrap(case, init_weights=False, **case.additive)
        inputs = batch(model, rows=8)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
        model.train()
        for part in range(parts):
            rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
            loss = model(**{name: value[rows] for name, value in inputs.items()}).loss
            (loss / parts).backward()
        optimizer.step()
        gradients.append({n: p.grad for n, p in trained(model).items()})
    for name, grad in gradients[0].items():
        assert relative(gradients[1][name], grad) < 1e-5, f"{name}: accumulation is not one batch"


def resume_is_exact(case: Case) -> None:
    """A run that is saved after 5 steps and resumed for 5 has the bits of one of 10 steps."""
    whole = wrap(case)
    steps(whole, adamw(whole, case.lr), 10, key=None)
    half = wrap(case)
    optimizer = adamw(half, case.lr)
    steps(half, optimizer, 5, key=None)
    with TemporaryDirectory() as folder:
        half.save_pretrained(folder)
        resumed = PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    second = adamw(resumed, case.lr)
    second.load_state_dict(optimizer.state_dict())
    resumed.train()
    for step in range(5, 10):
        resumed(**batch(resumed, key=step)).loss.backward()
        second.step()
        second.zero_grad()
    resumed.eval()
    end = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, end[name]), f"{name} differs after a resume"
    assert torch.equal(logits(whole), logits(resumed))


def events_fire(case: Case) -> None:
    """Each optimizer step is counted once; training without events raises."""
    model = wrap(case)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    steps(model, optimizer, 3)
    declared = [d for d in deltas(model) if d.t is not None or d.needs_events]
    for delta in declared:
        assert delta.stepped, "no event came in three steps"
        assert delta.t is None or int(delta.t) == 3, f"t = {int(delta.t)} after three steps"
    if not declared:
        return

    model = wrap(case)
    model.train()
    one = {k: v[:1, :4] if v.ndim > 1 else v[:1] for k, v in batch(model).items()}
    for n in range(MANY_FORWARDS + 1):
        model(**one).loss.backward()
        if n == 0:
            with pytest.warns(PlaitWarning, match=f"{case.key}: 1 training forwards, 0 optimizer"):
                model.state_dict()
    with pytest.raises(EventNeverFired, match=f"{case.key}: .*call plait.after_step"):
        model.state_dict()
    plait.after_step(model)
    model.state_dict()


def experts_part(case: Case) -> None:
    """After training, slices of the `experts` differ and slices of the `alike` are equal."""
    model = wrap(case)
    steps(model, adamw(model, case.lr), 9, key=None)
    for delta in deltas(model):
        for name in case.experts:
            slices = delta.get_parameter(name)
            for i in range(len(slices)):
                for j in range(i):
                    assert relative(slices[i], slices[j]) > 1e-6, f"{name}[{i}] equals {name}[{j}]"
        for name in case.alike:
            slices = delta.get_parameter(name)
            assert all(torch.equal(s, slices[0]) for s in slices), f"{name} parted"


def storages_are_distinct(case: Case) -> None:
    """No two parameters, and no two slices of one, share memory."""
    model = wrap(case)
    seen: dict[int, str] = {}
    for name, p in trained(model).items():
        assert p.untyped_storage().nbytes() >= p.numel() * p.element_size(), f"{name} is expanded"
        assert p.is_contiguous(), f"{name} is not contiguous"
        for i, part in enumerate(p if p.ndim > 2 else [p]):
            place = f"{name}[{i}]"
            assert part.data_ptr() not in seen, (
                f"{place} shares memory with {seen[part.data_ptr()]}"
            )
            seen[part.data_ptr()] = place


def random_state_is_kept(case: Case) -> None:
    """Construction, evaluation, events, saving and loading leave the global generators alone."""
    base, again = tiny.llama(), tiny.llama()
    with TemporaryDirectory() as folder:
        with random_state_kept():
            model = wrap(case, base)
        with random_state_kept():
            logits(model)
        optimizer = adamw(model, case.lr)
        model.train()
        for step in range(3):
            model(**batch(model, key=step)).loss.backward()
            with random_state_kept():
                optimizer.step()
        with random_state_kept():
            model.save_pretrained(folder)
            PeftModel.from_pretrained(again, folder)
