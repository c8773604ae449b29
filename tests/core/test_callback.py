"""PlaitCallback: options for the time of a run, and events that must follow the Trainer's steps."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import plait
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import deltas, trained, wrap

DMC = Case("dual_module", {"tinit": 1, "tfinal": 0.5, "deltaT": 1})


class Note(TrainerCallback):
    """Notes options of the adapter at the begin of each step; may fail at one."""

    def __init__(self, model: Any, fail_at: int | None = None) -> None:
        self.model, self.fail_at = model, fail_at
        self.seen: list[tuple[int | None, int | None]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.model.peft_config["default"]
        self.seen.append((config.total_steps, config.micro_batches))
        if state.global_step == self.fail_at:
            raise MemoryError


def trainer(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """12 rows in micro-batches of 2, with PlaitCallback."""
    optimizers = options.pop("optimizers", (None, None))
    arguments: Any = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
        "logging_strategy": "no", **options,
    }  # fmt: skip
    rows: Any = [{"input_ids": t, "labels": t} for t in tiny.tokens(12)]
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        callbacks=[plait.PlaitCallback(), *callbacks],
        optimizers=optimizers,
    )


def test_what_is_filled_in_does_not_outlive_the_run(tmp_path: Path) -> None:
    """Two runs of different length on one model, and one that is cut off between them."""
    model = wrap(DMC, total_steps=None)
    config = model.peft_config["default"]
    for steps, parts, fail_at in ((6, 2, None), (5, 3, 2), (3, 1, None)):
        note = Note(model, fail_at)
        made = trainer(model, tmp_path, note, max_steps=steps, gradient_accumulation_steps=parts)
        if fail_at is None:
            made.train()
            assert (config.total_steps, config.micro_batches) == (None, None)
        else:
            with pytest.raises(MemoryError):
                made.train()
        assert set(note.seen) == {(steps, parts)}


def test_what_was_given_stays(tmp_path: Path) -> None:
    model = wrap(DMC, total_steps=3)
    plait.set_micro_batches(model, 7)
    note = Note(model)
    trainer(model, tmp_path, note, max_steps=3).train()
    assert set(note.seen) == {(3, 1)}
    config = model.peft_config["default"]
    assert (config.total_steps, config.micro_batches) == (3, 7)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    """6 micro-batches of 2 rows by 4: a balance loss is a mean over those that are there."""
    model = wrap(Case("molora", {"num_experts": 4, "balance": "switch", "balance_weight": 0.1}))
    note = Note(model)
    trainer(model, tmp_path, note, max_steps=5, gradient_accumulation_steps=4).train()
    assert [count for _, count in note.seen] == [4, 2, 4, 2, 4]


def test_another_length_than_the_trainers_is_reported(tmp_path: Path) -> None:
    text = (
        "dual_module: total_steps is 50, but the Trainer makes 3 optimizer steps, so the schedule "
        "does not end where training does. Set it to 3, or leave it out and PlaitCallback sets it."
    )
    with pytest.warns(plait.PlaitWarning) as caught:
        trainer(wrap(DMC, total_steps=50), tmp_path, max_steps=3).train()
    assert text in [str(warning.message) for warning in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("error", plait.PlaitWarning)
        trainer(wrap(DMC, total_steps=4), tmp_path, max_steps=4).train()
        trainer(wrap(Case("sora"), total_steps=50), tmp_path, max_steps=3).train()  # no schedule


class Flat(torch.optim.SGD):
    """Steps copies of the parameters and writes them back, as DeepSpeed does."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        self.real = params
        super().__init__([torch.nn.Parameter(p.detach().clone()) for p in params], lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        copies = self.param_groups[0]["params"]
        for p, real in zip(copies, self.real, strict=True):
            p.grad = real.grad
        super().step(closure)
        for p, real in zip(copies, self.real, strict=True):
            real.copy_(p)


def flat(model: Any) -> Any:
    """Such an optimizer, with a schedule."""
    optimizer = Flat(list(trained(model).values()), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["dual_lora", "sora"])
def test_steps_that_plait_does_not_see_raise(name: str, steps: int, tmp_path: Path) -> None:
    """After the first one: at the begin of the second, or at the end of training."""
    model = wrap(Case(name))
    note = Note(model)
    text = (
        rf"{name}: the Trainer made 1 optimizer steps, and plait's events followed 0 of them, so "
        r"the method's schedule and penalty did not run as they should\. DeepSpeed hides its steps "
        r"from torch's hooks: train without it, in one process, with DDP or with FSDP2\. For an "
        r"optimizer that is not a torch\.optim\.Optimizer call plait\.after_step\(model\) in a "
        r"callback's on_step_end; for all others do not\."
    )
    with pytest.raises(plait.EventNeverFired, match=text):
        trainer(model, tmp_path, note, max_steps=steps, optimizers=flat(model)).train()
    assert len(note.seen) == 1


def test_events_by_hand_satisfy_the_callback(tmp_path: Path) -> None:
    class Fire(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            plait.after_step(kwargs["model"])

    model = wrap(Case("dual_lora", {"gate_steps": 8}))
    trainer(model, tmp_path, Fire(), max_steps=3, optimizers=flat(model)).train()
    assert {d.steps for d in deltas(model)} == {3}
    again = wrap(Case("dual_lora", {"gate_steps": 8}))
    with pytest.raises(plait.EventNeverFired, match=r"made 1 optimizer steps, .* followed 2 of"):
        trainer(again, tmp_path, Fire(), max_steps=3).train()


def test_a_method_without_events_needs_none(tmp_path: Path) -> None:
    model = wrap(Case("cola"))
    trainer(model, tmp_path, max_steps=2, optimizers=flat(model)).train()


def test_a_second_run_counts_from_where_it_starts(tmp_path: Path) -> None:
    model = wrap(Case("dual_lora", {"gate_steps": 8}))
    trainer(model, tmp_path, max_steps=3).train()
    trainer(model, tmp_path, max_steps=2).train()
    assert {d.steps for d in deltas(model)} == {5}


def test_adalora_whose_steps_are_hidden(tmp_path: Path) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=4, tinit=1, tfinal=1)
    model = get_peft_model(tiny.llama(), config)
    with pytest.raises(plait.EventNeverFired, match="adalora: the Trainer made 1 optimizer steps"):
        trainer(model, tmp_path, max_steps=4, optimizers=flat(model)).train()
    longer = AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1)
    with pytest.warns(
        plait.PlaitWarning, match="adalora: total_step is 9, but the Trainer makes 4"
    ):
        trainer(get_peft_model(tiny.llama(), longer), tmp_path, max_steps=4).train()
