"""The output layer on target positions only: the same loss and gradients from fewer logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.run import trainer
from plait.run.train import train
from plait.run.trainer import only_targets
from plait.testing import tiny
from tests.support.runs import copy_rows, run_config, save_model, weights, write_rows


def inputs(rows: int = 3, tokens: int = 8) -> dict[str, Tensor]:
    """Rows with prompts of 4, 5, .. tokens, which are no targets."""
    ids = tiny.tokens(rows, tokens)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 4 + row] = -100
    return {"input_ids": ids, "labels": labels}


def test_the_loss_and_its_gradients_are_the_same() -> None:
    model: Any = tiny.llama().double()
    narrow = only_targets(inputs(), least=0)
    assert narrow is not None
    found = []
    for one in (inputs(), narrow):
        model.zero_grad()
        out = model(**one)
        out.loss.backward()
        found.append((out, [p.grad.clone() for p in model.parameters()]))
    (whole, expected), (few, grads) = found
    assert whole.logits.shape[1] == 8
    assert few.logits.shape[1] == 4  # before the targets 4 .. 7
    assert float(few.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    for one, other in zip(grads, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_nothing_is_changed_where_nothing_would_be_saved() -> None:
    ids = tiny.tokens(2, 8)
    assert only_targets({"input_ids": ids, "labels": ids}, least=0) is None  # all are targets
    none = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert only_targets(none, least=0) is None
    assert only_targets(inputs(), vocabulary=50) is None  # few logits
    assert only_targets({"input_ids": ids}, least=0) is None
    assert only_targets({"input_ids": ids, "labels": ids[:, 0]}, least=0) is None  # a classifier


def test_a_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Trainer: the output layer gets fewer rows, and the adapter is the same."""
    base = save_model("llama", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows())
    seen: list[int] = []
    real = trainer.only_targets

    def watched(*args: Any, **kwargs: Any) -> Any:
        narrow = real(*args, **kwargs)
        seen.append(0 if narrow is None else len(narrow["logits_to_keep"]))
        return narrow

    monkeypatch.setattr(trainer, "only_targets", watched)
    found = []
    for least in (0, trainer.MANY_LOGITS):
        monkeypatch.setattr(trainer, "MANY_LOGITS", least)
        seen.clear()
        folder = train(run_config(base, rows, tmp_path / f"run{least}", training={"max_steps": 2}))
        assert any(seen) == (least == 0)
        found.append(weights(folder))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-5), name


def test_a_model_with_a_loss_of_its_own_keeps_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The losses with and without it are compared before it is used."""
    monkeypatch.setattr(
        trainer.Trainer, "compute_loss", lambda self, model, inputs: model(**inputs).loss
    )
    run: Any = object.__new__(trainer.RunTrainer)
    assert run._measure_narrowing(tiny.llama(), inputs()) is True
    model: Any = tiny.llama()
    model.loss_function = lambda logits, labels, **_: logits.float().square().sum()
    assert run._measure_narrowing(model, inputs()) is False
