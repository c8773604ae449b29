"""AdaLoRA's schedule runs without being called."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import plait
from plait.core.events import check_events
from plait.testing import tiny
from plait.testing.helpers import adamw
from plait.upstream.adalora import drive_adalora
from tests.support.trainer import arguments, rows


def adalora(**options: Any) -> Any:
    """The tiny Llama with upstream's AdaLoRA."""
    defaults = {
        "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8,
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    with tiny.seed():
        return get_peft_model(tiny.llama(), AdaLoraConfig(**{**defaults, **options}))


def live_ranks(model: Any) -> int:
    """Ranks whose singular value is not masked."""
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


def adalora_steps(model: Any, optimizer: Any, first: int, last: int, by_hand: bool = False) -> None:
    model.train()
    for step in range(first, last):
        ids = tiny.tokens(key=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if by_hand:
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()


def test_adalora_is_driven() -> None:
    """As its authors call it by hand; without us nothing is pruned."""
    driven, called, silent = adalora(), adalora(), adalora()
    drive_adalora(driven)
    for model, by_hand in ((driven, False), (called, True), (silent, False)):
        adalora_steps(model, adamw(model, 1e-2), 0, 8, by_hand)
    assert live_ranks(silent) == 4 * 4
    assert live_ranks(driven) == live_ranks(called) == 4 * 2
    for name, value in called.state_dict().items():
        assert torch.equal(driven.state_dict()[name], value), name
    check_events(driven)


def test_adalora_under_trainer(tmp_path: Path) -> None:
    model = adalora(total_step=6)
    drive_adalora(model)
    options = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2)
    Trainer(model=model, args=options, train_dataset=rows()).train()  # type: ignore[arg-type]
    assert live_ranks(model) == 4 * 2


def test_callback_drives_adalora(tmp_path: Path) -> None:
    """Where nobody has: else its schedule would run twice as fast."""
    for by_hand in (False, True):
        model = adalora(total_step=6)
        if by_hand:
            drive_adalora(model)
        options = arguments(tmp_path, max_steps=6)
        callbacks: list[TrainerCallback] = [plait.PlaitCallback()]
        Trainer(model=model, args=options, train_dataset=rows(), callbacks=callbacks).train()  # type: ignore[arg-type]
        assert live_ranks(model) == 4 * 2
        assert model.base_model.plait_schedule.t == 6


def test_adalora_without_steps_is_found() -> None:
    model = adalora()
    drive_adalora(model)
    with pytest.raises(plait.EventNeverFired, match="adalora: training ended and its schedule nev"):
        check_events(model)


def test_adalora_starts_where_a_run_was_left() -> None:
    """The sixth step of eight is the one that prunes to the target."""
    left = {}
    for start in (0, 4):
        model = adalora()
        drive_adalora(model, start=start)
        adalora_steps(model, adamw(model, 1e-2), 0, 2)
        left[start] = live_ranks(model)
    assert left[4] == 4 * 2 < left[0]


def test_adalora_is_checked_first() -> None:
    with pytest.raises(ValueError, match="drive_adalora: the model has no AdaLoRA adapter"):
        drive_adalora(get_peft_model(tiny.llama(), LoraConfig()))
    with pytest.raises(ValueError, match="init_r == target_r == 3 leaves nothing to allocate"):
        drive_adalora(adalora(init_r=3, target_r=3))
