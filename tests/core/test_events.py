"""Events: once for each completed optimizer step, whoever makes it; the guard where none comes."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import Trainer, TrainerCallback

import plait
from plait.core import events
from plait.core.events import check_events
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import adamw, batch, deltas, logits, relative, steps, trained, wrap
from tests.support.trainer import arguments, rows

DUAL = Case("dual_lora", {"gate_steps": 8})
DMC = Case("dual_module", {"tinit": 2, "tfinal": 2, "deltaT": 1})
COLA = Case("cola", {"strategy": "random"})


def seen(model: Any) -> set[int]:
    """The step counters of all layers."""
    return {delta.steps for delta in deltas(model)}


OPTIMIZERS = {
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw_loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_once_for_each_step(name: str) -> None:
    model = wrap(DUAL)
    optimizer = OPTIMIZERS[name](list(trained(model).values()))
    for count in (1, 2, 3):
        steps(model, optimizer, 1)
        assert seen(model) == {count}
    model(**batch(model)).loss.backward()
    assert seen(model) == {3}


def test_once_for_each_step_of_a_closure() -> None:
    """LBFGS evaluates several times in a step; the penalty is in every evaluation."""
    found = {}
    for weight in (0.0, 0.5):
        model = wrap(DMC, orth_reg_weight=weight)
        params = list(trained(model).values())
        optimizer = torch.optim.LBFGS(params, lr=1e-3, max_iter=4, tolerance_change=0)
        calls: list[float] = []

        def closure(model: Any = model, calls: list = calls, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = model(**batch(model)).loss
            loss.backward()
            calls.append(float(loss.detach()))
            return loss

        model.train()
        first = optimizer.step(closure)
        assert len(calls) > 1
        assert seen(model) == {1}
        optimizer.step(closure=closure)
        assert seen(model) == {2}
        found[weight] = (
            float(first.detach()),
            calls[0],
            [d.A_e.detach().clone() for d in deltas(model)],
        )
    assert found[0.0][0] == found[0.0][1]
    fresh = float(plait.penalty(wrap(DMC, orth_reg_weight=0.5)).detach())  # type: ignore[union-attr]
    assert found[0.5][0] - found[0.5][1] == pytest.approx(fresh, rel=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(found[0.0][2], found[0.5][2], strict=True))


def test_penalty_reaches_a_plain_closure() -> None:
    ends = []
    for closed in (False, True):
        model = wrap(DMC, orth_reg_weight=0.5).train()
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = model(**batch(model)).loss
            loss.backward()
            return loss

        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        ends.append(trained(model))
    for name, p in ends[0].items():
        assert torch.equal(p, ends[1][name]), name


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool) -> None:
    """And gradients that a fused optimizer gets scaled are as good as unscaled ones."""
    model, plain = (wrap(DMC, orth_reg_weight=0.5).train() for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3, fused=fused)
    control = torch.optim.AdamW(trained(plain).values(), lr=1e-3, fused=fused)
    for step, broken in enumerate([False, True, False, True, False]):
        loss = scaler.scale(model(**batch(model, key=step)).loss)
        loss.backward()
        if broken:
            next(iter(trained(model).values())).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        else:
            plain(**batch(plain, key=step)).loss.backward()
            control.step()
            control.zero_grad()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert seen(model) == seen(plain) == {3}
    for name, value in plain.state_dict().items():
        assert relative(model.state_dict()[name].float(), value.float()) < 1e-4, name


def test_a_step_that_only_makes_a_state_does_not_count() -> None:
    """torch's checkpointing takes one, of learning rate 0 on gradients of 0, before it loads."""
    model = wrap(DMC)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = adamw(model, 1e-2)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert seen(model) == {0}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a warm-up starts there, with gradients
    steps(model, optimizer, 1)
    assert seen(model) == {1}


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_under_trainer(accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of its default optimizer: three events, three penalties."""
    penalties = []
    original = events._penalty
    monkeypatch.setattr(events, "_penalty", lambda d: penalties.append(len(d)) or original(d))
    model = wrap(DMC, total_steps=None)
    config, lengths = model.peft_config["default"], []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lengths.append(config.total_steps)

    options = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=6)
    Trainer(
        model=model,
        args=options,
        train_dataset=rows(),  # type: ignore[arg-type]
        callbacks=[plait.PlaitCallback(), Note()],
    ).train()
    assert seen(model) == {6}
    assert penalties == [len(deltas(model))] * 6
    assert lengths == [6] * 6  # by PlaitCallback
    assert config.total_steps is None  # until the run ends


def test_trainer_resumes_exactly(tmp_path: Path) -> None:
    """6 steps equal 3 steps, a checkpoint and 3 steps, in the middle of a screening."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def run(folder: str, resume: bool = False, callbacks: tuple = ()) -> Any:
        model = wrap(DMC, total_steps=6)
        options = arguments(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = Trainer(model=model, args=options, train_dataset=rows(), callbacks=[*callbacks])  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole")
    run("parts", callbacks=(Stop(),))
    resumed = run("parts", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_given_number_of_steps_is_kept(tmp_path: Path) -> None:
    model = wrap(DMC, total_steps=50)
    callbacks: list[TrainerCallback] = [plait.PlaitCallback()]
    Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=callbacks).train()  # type: ignore[arg-type]
    assert model.peft_config["default"].total_steps == 50


def test_unknown_number_of_steps(tmp_path: Path) -> None:
    text = (
        r"dual_module: total_steps is not known and this method has a schedule\. Give "
        r"DualModuleLoraConfig\(total_steps=\.\.\.\), add plait\.PlaitCallback\(\) to the Trainer, "
        r"or use plait train\."
    )
    with pytest.raises(ValueError, match=text):
        Trainer(wrap(DMC, total_steps=None), arguments(tmp_path), train_dataset=rows()).train()  # type: ignore[arg-type]
    model = wrap(COLA, total_steps=None)  # a method that does not need it
    steps(model, adamw(model, 1e-3), 1)


# Who is watched --------------------------------------------------------------------------------


def test_only_the_adapters_of_the_optimizer_step() -> None:
    one, two = wrap(DUAL), wrap(DUAL)
    steps(one, adamw(one, 1e-3), 2)
    assert (seen(one), seen(two)) == ({2}, {0})
    one.add_adapter("other", DUAL.config())
    one.set_adapter("other")
    steps(one, adamw(one, 1e-3), 3)
    assert {d.steps for d in deltas(one)} == {2}
    assert {d.steps for d in deltas(one, "other")} == {3}


def test_an_unrelated_optimizer_is_left_alone() -> None:
    wrap(DMC)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert torch.equal(p, torch.full((3,), 0.9))


def test_copies_are_watched() -> None:
    model = copy.deepcopy(wrap(DUAL))
    steps(model, adamw(model, 1e-3), 2)
    assert seen(model) == {2}


def test_watching_keeps_nothing_alive() -> None:
    model = wrap(DUAL)
    gone = weakref.ref(deltas(model)[0])
    del model
    gc.collect()
    assert gone() is None


def test_frozen_adapters_do_not_step() -> None:
    model = wrap(DUAL)
    head = torch.nn.Parameter(torch.ones(1))
    for p in trained(model).values():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD([head], lr=0.1)
    (head * model(**batch(model)).loss).sum().backward()
    optimizer.step()
    assert seen(model) == {0}


# The guard -------------------------------------------------------------------------------------


def by_hand(model: Any, count: int) -> None:
    """Train without a torch optimizer."""
    model.train()
    one = {k: v[:1, :3] for k, v in batch(model).items()}
    for _ in range(count):
        model(**one).loss.backward()
        with torch.no_grad():
            for p in trained(model).values():
                if p.grad is not None:
                    p -= 1e-3 * p.grad
                p.grad = None


@pytest.mark.parametrize("case", [DUAL, DMC, COLA], ids=str)
def test_guard_at_save_merge_and_export(case: Case, tmp_path: Path) -> None:
    model = wrap(case)
    by_hand(model, 51)
    text = (
        rf"{case.key}: 51 training forwards, 0 optimizer steps seen\. This optimizer is not a "
        r"torch\.optim\.Optimizer: call plait\.after_step\(model\) after each of its steps\."
    )
    from plait.upstream.export import to_lora

    for action in (
        lambda: model.save_pretrained(tmp_path),
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: to_lora(model),
        lambda: check_events(model),
    ):
        with pytest.raises(plait.EventNeverFired, match=text):
            action()
    assert not list(tmp_path.glob("*.safetensors"))


def test_guard_warns_below_fifty_forwards() -> None:
    model = wrap(DUAL)
    by_hand(model, 50)
    with pytest.warns(plait.PlaitWarning, match="dual_lora: 50 training forwards, 0 optimizer"):
        check_events(model)


def test_guard_counts_training_forwards_only() -> None:
    model = wrap(DUAL)
    for _ in range(60):
        logits(model)  # evaluation
    model.train()
    for _ in range(60):
        logits(model)  # no gradient
    check_events(model)
    model.merge_adapter()


def test_guard_is_content_with_methods_without_events() -> None:
    model = wrap(Case("cola"))
    by_hand(model, 60)
    check_events(model)
    model.merge_adapter()


def test_guard_after_a_load_without_events(tmp_path: Path) -> None:
    """Steps of an earlier run do not excuse this one."""
    model = wrap(DUAL)
    steps(model, adamw(model, 1e-3), 3)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    by_hand(model, 51)
    with pytest.raises(plait.EventNeverFired):
        check_events(model)


def test_events_by_hand_equal_those_of_an_optimizer() -> None:
    ends = []
    for hooked in (True, False):
        model = wrap(DMC, orth_reg_weight=0.2)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        model.train()
        for key in range(10):
            loss = model(**batch(model, key=key)).loss
            if hooked:
                loss.backward()
                optimizer.step()
            else:
                (loss + plait.penalty(model)).backward()
                with torch.no_grad():
                    for p in trained(model).values():
                        assert p.grad is not None
                        p -= 0.1 * p.grad
                plait.after_step(model)
            model.zero_grad()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert relative(ends[1][name].float(), value.float()) < 1e-4, name


def test_every_listener_is_asked_at_the_end() -> None:
    class Silent(events.Listener):
        missed = True

        def parameters(self) -> list[torch.nn.Parameter]:
            return []

        def check(self, model: Any) -> None:
            if self.missed:
                raise plait.EventNeverFired("silent: no step")

    silent, model = Silent(), wrap(DUAL)
    events.listen(silent)
    with pytest.raises(plait.EventNeverFired, match="silent: no step"):
        check_events(model)
    silent.missed = False
    check_events(model)
