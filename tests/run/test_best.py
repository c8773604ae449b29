"""The best checkpoint: which one that is by each metric, and what says that it was kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.run import trainer as trainer_module
from plait.run.check import check
from plait.run.folder import RunFolder
from plait.run.metrics import METRICS, METRICS_OF
from plait.run.train import train
from plait.run.trainer import RunTrainer
from plait_cli import main
from tests.support.runs import copy_rows, film_rows, run_config, save_model, weights, write_rows

BEST = {
    "max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
    "save_steps": 2, "load_best_model_at_end": True,
}  # fmt: skip

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Lets the evaluations during training measure given values."""

    def play(metric: str, *values: float | None) -> None:
        left = iter(values)

        def measure(model: Any, data: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"rows": 1, "loss": 1.0, metric: next(left)}

        monkeypatch.setattr(trainer_module, "evaluate_model", measure)

    return play


def config(task: str, folder: Path, **training: Any) -> Any:
    """A short run of a task that keeps its best checkpoint."""
    causal = task == "causal_lm"
    base = save_model("llama" if causal else "bert", folder / "base")
    rows = copy_rows(40) if causal else film_rows(32)
    if task == "regression":
        rows = [{"text": row["text"], "label": row["score"]} for row in rows]
    data = write_rows(folder / "rows.jsonl", rows)
    return run_config(
        base, data, folder / "run", model={"task": task}, training={**BEST, **training}
    )


def kept(folder: RunFolder) -> int | None:
    """The step whose weights a run kept, by what it noted; they are those of that checkpoint."""
    fact = folder.read_facts().get("kept")
    if fact is None:
        return None
    saved = folder.checkpoints / f"checkpoint-{fact['step']}"
    stored = json.loads((saved / "trainer_state.json").read_text())
    assert stored["global_step"] == fact["step"]
    from safetensors.torch import load_file

    for name, value in load_file(saved / "adapter_model.safetensors").items():
        assert (weights(folder)[name] == value).all(), name
    return fact["step"]


TASKS = ("causal_lm", "classification", "regression")  # other keys are objectives
CASES = [(task, metric) for task in TASKS for metric in METRICS_OF[task]]


@pytest.mark.parametrize(("task", "metric"), CASES)
def test_the_better_value_is_kept_for_every_metric(
    task: str, metric: str, tmp_path: Path, script: Script
) -> None:
    higher = METRICS[metric].higher_is_better
    script(metric, 3.0, 5.0, 1.0, 2.0)
    folder = train(config(task, tmp_path, metric_for_best_model=metric))
    assert kept(folder) == (4 if higher else 6)
    value = 5.0 if higher else 1.0
    assert folder.read_facts()["kept"] == {
        "step": 4 if higher else 6,
        "metric": metric,
        "value": value,
    }
    text = f"step {4 if higher else 6}, best validation {METRICS[metric].label} {value:.4g}"
    assert f"| weights kept | {text} |" in folder.card.read_text()


@pytest.mark.parametrize("task", TASKS)
def test_the_default_metric_is_the_loss(task: str, tmp_path: Path, script: Script) -> None:
    metric = "mse" if task == "regression" else "loss"
    script(metric, 3.0, 5.0, 1.0, 2.0)
    folder = train(config(task, tmp_path))
    assert kept(folder) == 6
    assert folder.read_facts()["kept"]["metric"] == "loss"


@pytest.mark.parametrize("metric", ["perplexity", "eval_perplexity"])
def test_perplexity_end_to_end(metric: str, tmp_path: Path) -> None:
    """Measured, not scripted: a learning rate that first helps and then harms."""
    cfg = config(
        "causal_lm", tmp_path, metric_for_best_model=metric, learning_rate=0.2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    folder = train(cfg)
    seen = {r["step"]: r["eval_perplexity"] for r in folder.read_metrics() if "eval_loss" in r}
    assert min(seen, key=lambda step: seen[step]) == kept(folder)
    assert folder.read_evaluation()["after"]["perplexity"] == pytest.approx(min(seen.values()))


def test_mse_end_to_end(tmp_path: Path) -> None:
    cfg = config(
        "regression", tmp_path, metric_for_best_model="mse", learning_rate=0.1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    folder = train(cfg)
    seen = {r["step"]: r["eval_mse"] for r in folder.read_metrics() if "eval_mse" in r}
    assert min(seen, key=lambda step: seen[step]) == kept(folder)
    assert folder.read_evaluation()["after"]["mse"] == pytest.approx(min(seen.values()))


def test_a_best_step_between_two_saves_is_saved(tmp_path: Path, script: Script) -> None:
    """Upstream notes it as best, saves nothing, and keeps the last step without a word."""
    script("perplexity", 3.0, 1.0, 2.0, 4.0)
    cfg = config("causal_lm", tmp_path, metric_for_best_model="perplexity", save_steps=8)
    assert kept(train(cfg)) == 4


def test_a_value_that_is_not_defined_is_never_the_best(tmp_path: Path, script: Script) -> None:
    """Pearson of a constant prediction, perplexity beyond the largest float."""
    script("pearson", None, 0.2, None, 0.1)
    folder = train(config("regression", tmp_path, metric_for_best_model="pearson"))
    assert kept(folder) == 4


def test_without_a_best_checkpoint_nothing_is_said(tmp_path: Path) -> None:
    cfg = config("causal_lm", tmp_path, load_best_model_at_end=False, eval_strategy="no")
    folder = train(cfg)
    assert "kept" not in folder.read_facts()
    assert "weights kept" not in folder.card.read_text()


def test_the_verb_says_what_was_kept(
    tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    from plait.run.config import dump_config

    script("perplexity", 3.0, 1.0, 2.0, 4.0)
    cfg = config("causal_lm", tmp_path, metric_for_best_model="perplexity")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(cfg))
    assert main(["train", str(file)]) == 0
    assert "weights kept: step 4, best validation perplexity 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_stopped_before_saving_keeps_the_best(
    moved: bool, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done and the last checkpoint is written; only the adapter is missing."""
    script("perplexity", 3.0, 1.0, 2.0, 4.0)
    cfg = config("causal_lm", tmp_path, metric_for_best_model="perplexity")
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(cfg)
    if moved:
        (tmp_path / "run").rename(tmp_path / "moved")
        cfg.output.dir = str(tmp_path / "moved")
    folder = train(cfg, resume=True)
    assert kept(folder) == 4
    assert folder.read_facts()["kept"]["value"] == 1.0


@pytest.mark.parametrize(
    ("task", "metric", "text"),
    [
        (
            "causal_lm",
            "accuracy",
            "training.metric_for_best_model: accuracy is not measured by a causal_lm run. ",
        ),
        (
            "regression",
            "eval_pearsom",
            "training.metric_for_best_model: pearsom is not measured by a regression run. Did you "
            "mean pearson?",
        ),
    ],
)
def test_a_metric_that_is_not_measured_is_refused(
    task: str, metric: str, text: str, tmp_path: Path
) -> None:
    cfg = config(task, tmp_path, metric_for_best_model=metric)
    for refuse in (check, train):
        with pytest.raises(ValueError) as caught:
            refuse(cfg)
        assert str(caught.value).startswith(text)
    assert not (tmp_path / "run").exists()


def test_exact_match_needs_prompts(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "abcd"[: 1 + i % 4]} for i in range(20)])
    cfg = run_config(
        base, data, tmp_path / "run", training={**BEST, "metric_for_best_model": "exact_match"}
    )
    for refuse in (check, train):
        with pytest.raises(ValueError, match="exact_match needs rows with a prompt and a compl"):
            refuse(cfg)
    assert not (tmp_path / "run").exists()
