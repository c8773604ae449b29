"""Accumulated micro-batches are one batch: loss, gradient and result, for every task."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from plait.run.folder import RunFolder
from plait.run.train import train
from plait.run.trainer import RunTrainer
from plait.testing.helpers import relative
from tests.support.runs import copy_rows, film_rows, run_config, save_model, weights, write_rows

TASKS = [  # task, model
    ("causal_lm", "llama"),
    ("causal_lm", "gpt2"),
    ("classification", "bert"),
    ("classification", "llama"),
    ("regression", "bert"),
    ("regression", "llama"),
]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4},
    "sora": {"name": "sora", "r": 4, "xi": 1e-3, "l1_weight": 50.0},  # a penalty
    "dual_module": {"name": "dual_module", "r": 6, "orth_reg_weight": 0.5, "deltaT": 1},
}  # fmt: skip


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """Rows of unequal length."""
    if task == "causal_lm":
        rows = copy_rows(count)
        return [row | {"completion": "abcdefgh"[: 1 + i % 5]} for i, row in enumerate(rows)]
    rows = film_rows(count)
    if task == "regression":
        rows = [{"text": row["text"], "label": row["score"]} for row in rows]
    return rows


def without_dropout(file: Path) -> None:
    """Set all dropout of a model to 0: masks of micro-batches are not those of one batch."""
    config = json.loads(file.read_text())
    rates = {key: 0.0 for key in config if "drop" in key and isinstance(config[key], float)}
    file.write_text(json.dumps(config | rates))


def run(
    task: str, kind: str, size: int, parts: int, folder: Path, count: int = 10, **sections: Any
) -> RunFolder:
    """An epoch of some rows in micro-batches of `size`, `parts` of them in a step."""
    folder.mkdir(exist_ok=True)
    data = write_rows(folder / f"{task}.jsonl", rows_of(task, count))
    base = folder / kind
    if not base.is_dir():
        save_model(kind, base)
        without_dropout(base / "config.json")
    training = {
        "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": size,
        "gradient_accumulation_steps": parts, "learning_rate": 1e-3, **sections.pop("training", {}),
    }  # fmt: skip
    return train(
        run_config(
            base,
            data,
            folder / f"run-{task}-{size}-{parts}",
            model={"task": task},
            data={"validation": None},
            training=training,
            **{"method": METHODS["lora"], **sections},
        )
    )


def logged(folder: RunFolder) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(row["loss"], row["grad_norm"]) for row in folder.read_metrics() if "loss" in row]


@pytest.mark.parametrize(("task", "kind"), TASKS)
def test_micro_batches_are_one_batch(task: str, kind: str, tmp_path: Path) -> None:
    """The last step has fewer rows, and with 3 rows each its micro-batches differ in size."""
    whole = run(task, kind, 6, 1, tmp_path)
    for size, parts in ((1, 6), (3, 2)):
        folder = run(task, kind, size, parts, tmp_path)
        assert len(logged(folder)) == len(logged(whole)) == 2
        for one, other in zip(logged(whole), logged(folder), strict=True):
            assert other == pytest.approx(one, rel=1e-3)
        for name, value in weights(whole).items():
            assert relative(weights(folder)[name], value) < 2e-2, name  # Adam near gradients of 0


@pytest.mark.parametrize("method", ["sora", "dual_module"])
@pytest.mark.parametrize(("task", "kind"), [TASKS[0], TASKS[2]])
def test_with_penalties_and_clipping(task: str, kind: str, method: str, tmp_path: Path) -> None:
    sections = {"method": METHODS[method], "training": {"max_grad_norm": 0.05, "optim": "sgd"}}
    whole = run(task, kind, 6, 1, tmp_path, **sections)
    folder = run(task, kind, 1, 6, tmp_path, **sections)
    for one, other in zip(logged(whole), logged(folder), strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    for name, value in weights(whole).items():
        assert relative(weights(folder)[name].float(), value.float()) < 1e-4, name


def test_with_label_smoothing(tmp_path: Path) -> None:
    for task, kind in (TASKS[0], TASKS[2]):
        sections = {"training": {"label_smoothing_factor": 0.2}}
        whole = run(task, kind, 6, 1, tmp_path, **sections)
        folder = run(task, kind, 3, 2, tmp_path, **sections)
        for one, other in zip(logged(whole), logged(folder), strict=True):
            assert other == pytest.approx(one, rel=1e-3)


def test_the_logged_loss_is_that_of_the_rows(tmp_path: Path) -> None:
    """A classifier whose head is zero starts at ln 2, whatever is accumulated."""
    for size, parts in ((4, 1), (1, 4)):
        folder = run("classification", "bert", size, parts, tmp_path, count=4)
        assert logged(folder)[0][0] == pytest.approx(math.log(2), abs=0.2)


def test_a_loss_that_takes_the_number_of_items_and_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a model divides by it is measured, not read off its signature."""
    whole = run("causal_lm", "llama", 6, 1, tmp_path)
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    folder = run("causal_lm", "llama", 3, 2, tmp_path)
    for one, other in zip(logged(whole), logged(folder), strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_a_model_that_takes_no_number_of_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("classification", "bert", 6, 1, tmp_path)
    from transformers import BertForSequenceClassification

    monkeypatch.setattr(BertForSequenceClassification, "accepts_loss_kwargs", False, raising=False)
    folder = run("classification", "bert", 3, 2, tmp_path)
    for one, other in zip(logged(whole), logged(folder), strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_measuring_the_loss_draws_no_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    real = RunTrainer._measure_division

    def measure(self: Any, *args: Any) -> Any:
        states.append(torch.get_rng_state())
        answer = real(self, *args)
        states.append(torch.get_rng_state())
        return answer

    monkeypatch.setattr(RunTrainer, "_measure_division", measure)
    method = {**METHODS["lora"], "lora_dropout": 0.5}
    run("causal_lm", "llama", 1, 2, tmp_path, method=method)
    assert len(states) == 2
    assert torch.equal(*states)


def mean_over_the_step(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    """The `compute_loss_func` that docs/peft.md gives to users of a plain Trainer."""
    loss = functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / num_items_in_batch


@pytest.mark.parametrize("given", [False, True])
def test_what_a_plain_trainer_does(given: bool, tmp_path: Path) -> None:
    """As docs/peft.md says: upstream's Trainer multiplies, unless it gets such a loss."""
    base, norms = save_model("bert", tmp_path / "bert"), []
    torch.manual_seed(0)
    rows: Any = [
        {"input_ids": ids, "labels": label % 2}
        for label, ids in enumerate(torch.randint(4, 12, (4, 6)))
    ]
    for size, parts in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_steps=1, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows,
            compute_loss_func=mean_over_the_step if given else None,
        )  # fmt: skip
        trainer.train()
        norms.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert norms[1] / norms[0] == pytest.approx(1 if given else 4, rel=0.2)
