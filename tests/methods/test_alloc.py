"""Allocating LoRA: the importance of a rank, moving ranks between layers, new ranks, resume."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

import plait
from plait.testing import tiny
from plait.testing.helpers import adamw, batch, deltas, layers, logits, one_layer, steps, wrap
from plait.upstream.export import to_lora
from tests.support.allocation import CASE, give, live

# Formula, start --------------------------------------------------------------------------------


def test_published_defaults() -> None:
    config = plait.AllocLoraConfig()
    assert (config.r, config.rounds, config.n_A, config.spare) == (8, 8, None, 2)


@settings(max_examples=20)
@given(
    n_in=st.integers(1, 7), n_out=st.integers(1, 7), r=st.integers(1, 3), spare=st.integers(1, 3),
    key=st.integers(0, 9), pissa=st.booleans(),
)  # fmt: skip
def test_update_is_the_loop_over_live_ranks(
    n_in: int, n_out: int, r: int, spare: int, key: int, pissa: bool
) -> None:
    """Outputs and gradients; a dead rank gets none."""
    init = "pissa" if pissa else "kaiming"
    model, host = one_layer(CASE, n_in, n_out, r=r, spare=spare, init=init)
    delta: Any = host.plait_delta["default"]
    assert delta.A.shape == (spare * r, n_in)
    assert delta.B.shape == (n_out, spare * r)
    assert delta.live_ranks.tolist() == [1.0] * r + [0.0] * (r * (spare - 1))
    delta.live_ranks.copy_((tiny.numbers(spare * r, key=key) > 0).double())
    if pissa:
        delta.A0.copy_(tiny.numbers(*delta.A0.shape))
        delta.B0.copy_(tiny.numbers(*delta.B0.shape, key=1))
    x, dy = tiny.numbers(3, n_in), tiny.numbers(3, n_out, key=2)
    s = delta.config.lora_alpha / r
    slow = torch.zeros(3, n_out, dtype=torch.float64)
    for t in range(3):
        for k in range(spare * r):
            term = (delta.A[k] @ x[t]) * delta.B[:, k]
            if pissa:
                term = term - (delta.A0[k] @ x[t]) * delta.B0[:, k]
            slow[t] = slow[t] + s * delta.live_ranks[k] * term
    fast = model.train()(x) - layers(model)[0].base_layer(x)
    assert float((fast - slow).detach().abs().max()) < 1e-10
    params = [delta.A, delta.B]
    gradients = torch.autograd.grad(fast, params, dy)
    for found, wanted in zip(gradients, torch.autograd.grad(slow, params, dy), strict=True):
        assert float((found - wanted).abs().max()) < 1e-10 * max(float(wanted.abs().max()), 1)
    dead = delta.live_ranks == 0
    assert not gradients[0][dead].any()
    assert not gradients[1][:, dead].any()


# Rounds ----------------------------------------------------------------------------------------


def test_a_model_with_a_batch_can_be_pickled() -> None:
    model = give(wrap(CASE, init_weights=False))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_missing_event() -> None:
    model = wrap(CASE).train()
    for _ in range(51):
        model(**batch(model, rows=1)).loss.backward()
    text = (
        r"alloc: 51 training forwards, 0 optimizer steps seen\. .*call plait\.after_step\(model\)"
    )
    with pytest.raises(plait.EventNeverFired, match=text):
        model.state_dict()


# Resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_resume_is_exact(after: int, init: str, tmp_path: Path) -> None:
    """In the middle of a round and just after one, with the optimizer's state."""
    options = {"r": 2, "n_A": 3, "init": init}
    whole = give(wrap(CASE, **options))
    steps(whole, adamw(whole, 1e-2), 8, key=None)
    half = give(wrap(CASE, **options))
    optimizer = adamw(half, 1e-2)
    steps(half, optimizer, after, key=None)
    half.save_pretrained(tmp_path)
    resumed = give(PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True))
    assert live(resumed) == live(half)
    second = adamw(resumed, 1e-2)
    second.load_state_dict(optimizer.state_dict())
    resumed.train()
    for step in range(after, 8):
        resumed(**batch(resumed, key=step)).loss.backward()
        second.step()
        second.zero_grad()
    assert live(whole) != [2] * 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_trainer_resumes_exactly(tmp_path: Path) -> None:
    """8 steps equal 3 steps, a checkpoint between two rounds and 5 steps."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def run(folder: str, resume: bool = False, callbacks: tuple = ()) -> Any:
        model = give(wrap(CASE, r=2, n_A=3, every=0.25, total_steps=None))
        options = TrainingArguments(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=2, use_cpu=True,
            report_to=[], disable_tqdm=True, learning_rate=1e-2, logging_strategy="no",
            max_steps=8, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2,
        )  # fmt: skip
        rows: Any = [{"input_ids": t, "labels": t} for t in tiny.tokens(8)]
        trainer = Trainer(
            model, options, train_dataset=rows, callbacks=[plait.PlaitCallback(), *callbacks]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole")
    run("parts", callbacks=(Stop(),))
    resumed = run("parts", resume=True)
    assert live(whole) != [2] * 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# Export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_export_with_unequal_ranks(init: str, tmp_path: Path) -> None:
    model = give(wrap(CASE, r=2, n_A=3, init=init))
    steps(model, adamw(model, 2e-2), 8, key=None)
    with torch.no_grad():
        deltas(model)[4].live_ranks.zero_()  # and one without any
    expected = logits(model)
    export = to_lora(model)
    times = 2 if init == "pissa" else 1
    assert [part.rank for part in export.layers] == [times * k for k in live(model)]
    assert len(set(live(model))) > 2
    assert export.error == 0
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    shut = deltas(model)[4].base.name
    zeros = [x for name, x in export.tensors.items() if shut in name]  # for servers that stack it
    assert len(zeros) == 2
    assert not any(x.any() for x in zeros)
    with torch.no_grad():
        found = stock(input_ids=tiny.tokens()).logits
    assert float((found - expected).abs().max()) < 1e-6
    model.merge_adapter()
    assert float((logits(model) - expected).abs().max()) < 1e-6
