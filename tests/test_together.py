"""Arms that train together end where each ends by itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import plait
from plait import Arm, train_together
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import relative, trained

STEPS = 4
CASES = [
    Case("cola", {"r": 2, "strategy": "random"}),
    Case("droplora", {"lora_dropout": 0.3}),
    Case("dual_lora", {"gate_steps": 3}),
    Case("dual_module", {"tinit": 1, "tfinal": 1, "deltaT": 1, "lora_dropout": 0.2}),
    Case("hydra", {"num_B": 3, "lora_dropout": 0.2}),
    Case("nola", {"num_basis_A": 5, "num_basis_B": 6}),
    Case("shared_b", {"r": 2, "routing": "task", "tasks": ["law", "care"]}),
    Case("sora", {}),
    Case("tied", {}),
]
DRAWING = ("droplora", "dual_module", "hydra")
RANKED = ("cola", "droplora", "sora", "dual_module")


def batches(key: int, rows: int = 2, length: int = 8, tasks: bool = False) -> list[Any]:
    """The inputs of all steps."""
    found = []
    for step in range(STEPS):
        ids = tiny.tokens(rows, length, 10 * key + step)
        more = {"task_ids": torch.arange(rows) % 2} if tasks else {}
        found.append({"input_ids": ids, "labels": ids, **more})
    return found


def alone(arm: Arm) -> tuple[Any, list[float]]:
    """A loop of its own, as one writes it for one adapter."""
    model: Any = get_peft_model(tiny.llama(), replace(arm.config))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(trained(model).values(), arm.lr, weight_decay=arm.weight_decay)
    for config in model.peft_config.values():
        config.total_steps = STEPS
    losses = []
    model.train()
    with tiny.seed(arm.config.seed if arm.seed is None else arm.seed):
        for step, batch in enumerate(arm.batches):
            loss = model(**batch).loss
            loss.backward()
            if arm.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained(model).values(), arm.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = arm.lr * (1 if arm.schedule is None else arm.schedule(step))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return model, losses


def arms_of(case: Case) -> list[Arm]:
    """Three arms that differ in all that may differ."""
    tasks = bool(case.options.get("tasks"))
    length = 8 if case.key in DRAWING else 6
    other = {"r": 3, "lora_alpha": 5.0} if case.key in RANKED else {}
    return [
        Arm("first", case.config(), batches(1, tasks=tasks), lr=1e-2),
        Arm("second", case.config(seed=5, **other), batches(2, tasks=tasks), 3e-2, 0.1, seed=9),
        Arm(
            "third",
            case.config(seed=7),
            batches(3, rows=3, length=length, tasks=tasks),
            lr=2e-2,
            schedule=lambda step: 1 - step / STEPS,
            max_grad_norm=0.1,
        ),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_arm_is_its_separate_run(case: Case) -> None:
    """Losses and all parameters, with masks, schedules, penalties and clipping of their own."""
    arms = arms_of(case)
    model, losses = train_together(tiny.llama(), arms)
    for arm in arms:
        own, expected = alone(arm)
        assert losses[arm.name] == pytest.approx(expected, rel=1e-5)
        found = dict(model.named_parameters())
        for name, p in trained(own).items():
            other = found[name.replace(".default.", f".{arm.name}.")]
            assert relative(other, p) < 2e-4, name  # AdamW's first steps are signs of gradients
        moved = [p for p in trained(own).values() if p.numel()]
        assert moved


def test_a_wrong_row_would_be_found() -> None:
    """A control: one arm with the batches of another."""
    arms = arms_of(CASES[0])
    arms[1] = replace(arms[1], batches=arms[0].batches)
    losses = train_together(tiny.llama(), arms)[1]
    assert losses["second"] != pytest.approx(alone(arms_of(CASES[0])[1])[1], rel=1e-5)


def test_the_process_keeps_its_random_numbers() -> None:
    with tiny.seed(1):
        expected = torch.rand(3)
    with tiny.seed(1):
        train_together(tiny.llama(), arms_of(Case("droplora", {"lora_dropout": 0.3})))
        assert torch.equal(torch.rand(3), expected)


def test_another_loss() -> None:
    arms = arms_of(CASES[0])
    _, losses = train_together(
        tiny.llama(), arms, lambda logits, batch: 2 * logits.mean() * batch["labels"].numel()
    )
    assert all(len(own) == STEPS for own in losses.values())


def test_masks_of_padding_and_of_recomputation_are_refused() -> None:
    arms = arms_of(Case("droplora", {}))
    arms[2] = replace(arms[2], batches=batches(3, length=6))
    with pytest.raises(ValueError, match="step 0 has rows of unequal length"):
        train_together(tiny.llama(), arms)
    base = tiny.llama()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would draw"):
        train_together(base, arms_of(Case("droplora", {})))


def test_what_cannot_train_together_is_refused() -> None:
    one, two, _ = arms_of(CASES[0])
    base = tiny.llama()
    for arms, text in (
        ([], "there is no arm"),
        ([one, replace(two, name="first")], "two arms have one name"),
        ([replace(one, name="lr 0.1")], "has a dot"),
        ([one, replace(two, config=Case("sora", {}).config())], "of the methods cola, sora"),
        ([one, replace(two, batches=two.batches[:2])], "unequal steps"),
        ([replace(one, config=Case("alloc", {}).config())], "by forwards with this adapter"),
        ([replace(one, config=CASES[0].config(bias="all"))], "first trains bias"),
        ([replace(one, config=CASES[0].config(modules_to_save=["lm_head"]))], "modules_to_save"),
    ):
        with pytest.raises(ValueError, match=text):
            train_together(base, arms)
    base.model.layers[0].mlp.dropout = nn.Dropout(0.1)
    with pytest.raises(ValueError, match="the base model has dropout"):
        train_together(base, [one])
    base = tiny.llama()
    base.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        train_together(base, [one])
    arm = replace(one, config=CASES[0].config(target_modules=["linear"], task_type=None))
    with pytest.raises(ValueError, match="has no loss_function"):
        train_together(tiny.OneLinear(7, 5), [arm])
    assert plait.train_together is train_together
