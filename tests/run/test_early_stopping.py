"""training.early_stopping_patience: a run ends when validation has not improved for a while."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from plait.run import trainer as trainer_module
from plait.run.config import dump_config
from plait.run.folder import RunFolder
from plait.run.train import train
from plait.run.trainer import RunTrainer
from plait_cli import main
from tests.support.runs import (
    assert_same,
    copy_rows,
    interrupt,
    run_config,
    save_model,
    write_rows,
)

# Validation loss after each step: the best is that of step 3.
LOSSES = [9.0, 5.0, 4.0, 4.5, 4.2, 4.1, 1.0, 1.0, 1.0, 1.0]
STEPS = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 10,
    "early_stopping_patience": 3,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


class Watch(TrainerCallback):
    """Knows the step that was just made."""

    step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Validation during training gives LOSSES; None among them is a metric that is undefined."""
    watch = Watch()

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"rows": 8, "loss": LOSSES[watch.step - 1], "perplexity": None}

    monkeypatch.setattr(trainer_module, "evaluate_model", evaluate)
    return watch


def config(llama: Path, rows: Path, to: Path, **training: Any) -> Any:
    return run_config(llama, rows, to, training=STEPS | training, evaluation={"generate": False})


def test_stops_when_validation_does_not_improve(
    llama: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    folder = train(config(llama, rows, tmp_path / "run"), callbacks=[watch])
    facts = folder.read_facts()
    assert (facts["steps"], facts["planned_steps"]) == (6, 10)
    assert max(row["step"] for row in folder.read_metrics()) == 6
    line = "| stopped early | step 6 of 10, no better validation since step 3 |"
    assert line in folder.card.read_text()


def test_the_best_weights_can_be_kept(
    llama: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    cfg = config(llama, rows, tmp_path / "run", load_best_model_at_end=True)
    folder = train(cfg, callbacks=[watch])
    assert folder.read_facts()["kept"]["step"] == 3
    short = train(
        config(llama, rows, tmp_path / "short", early_stopping_patience=1), callbacks=[watch]
    )
    assert short.read_facts()["steps"] == 4


def test_a_patient_run_makes_all_steps(
    llama: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    folder = train(
        config(llama, rows, tmp_path / "run", early_stopping_patience=4), callbacks=[watch]
    )
    facts = folder.read_facts()
    assert facts["steps"] == 10
    assert "planned_steps" not in facts
    assert "stopped early" not in folder.card.read_text()


def test_an_undefined_metric_is_no_improvement(
    llama: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    cfg = config(
        llama, rows, tmp_path / "run", metric_for_best_model="perplexity",
        early_stopping_patience=2,
    )  # fmt: skip
    assert train(cfg, callbacks=[watch]).read_facts()["steps"] == 3


@pytest.mark.parametrize("best", [False, True])
def test_resume_goes_on_counting(
    best: bool, llama: Path, rows: Path, tmp_path: Path, watch: Watch
) -> None:
    def cfg(to: str) -> Any:
        return config(llama, rows, tmp_path / to, load_best_model_at_end=best)

    whole = train(cfg("a"), callbacks=[watch])
    with pytest.raises(KeyboardInterrupt):
        train(cfg("b"), callbacks=[watch, interrupt(5)])
    state = json.loads(
        (tmp_path / "b" / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text()
    )
    counter = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
    assert counter == {"early_stopping_patience_counter": 2}
    resumed = train(cfg("b"), resume=True, callbacks=[watch])
    assert resumed.read_facts()["steps"] == 6
    assert_same(whole, resumed)
    assert whole.read_facts().get("kept") == resumed.read_facts().get("kept")


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_was_killed_after_it_stopped_trains_no_further(
    best: bool, llama: Path, rows: Path, tmp_path: Path, watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def cfg(to: str) -> Any:
        return config(llama, rows, tmp_path / to, load_best_model_at_end=best)

    whole = train(cfg("a"), callbacks=[watch])

    def killed(self: RunTrainer) -> None:
        raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "save", killed)
        with pytest.raises(MemoryError):
            train(cfg("b"), callbacks=[watch])
    resumed = train(cfg("b"), resume=True, callbacks=[watch])
    assert_same(whole, resumed)
    facts = RunFolder(resumed.path).read_facts()
    assert (facts["steps"], facts["planned_steps"]) == (6, 10)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no validation": (
        {"data": {"validation": None}},
        "training.early_stopping_patience is 3, and data.validation is not set. Give "
        "data.validation a source or a fraction of train, or remove "
        "training.early_stopping_patience.",
    ),
    "no evaluation": (
        {"training": {"eval_strategy": "no"}},
        "training.early_stopping_patience is 3, and training.eval_strategy is no, so nothing is "
        "measured. Set it to epoch or steps.",
    ),
    "chain": (
        {"chain": {"links": 2}},
        "training.early_stopping_patience does not work with a chain, whose later links would not "
        "be trained. Leave it out, or lower chain.links.",
    ),
    "schedule": (
        {"method": {"name": "adalora"}},
        "training.early_stopping_patience does not work with adalora: its ranks reach target_r "
        "only near the planned last step. Leave it out.",
    ),
    "metric": (
        {"training": {"metric_for_best_model": "accuracy"}},
        "training.metric_for_best_model: accuracy is not measured by a causal_lm run.",
    ),
}


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_check_and_train_alike(
    name: str, verb: str, llama: Path, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sections, text = REFUSED[name]
    training = STEPS | sections.get("training", {})
    cfg = run_config(llama, rows, tmp_path / "run", **{**sections, "training": training})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(cfg), encoding="utf-8")
    assert main([verb, str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"plait {verb}: {text}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [0, -1, "soon", 1.5])
def test_values_out_of_range(value: Any, llama: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.early_stopping_patience is"):
        config(llama, rows, tmp_path / "run", early_stopping_patience=value)


def test_the_verb_says_so(
    llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    steps = iter(LOSSES)
    monkeypatch.setattr(
        trainer_module, "evaluate_model", lambda *a, **k: {"rows": 8, "loss": next(steps)}
    )
    cfg = config(llama, rows, tmp_path / "run", load_best_model_at_end=True)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(cfg), encoding="utf-8")
    assert main(["train", str(file)]) == 0
    out = capsys.readouterr().out
    assert "stopped early: step 6 of 10, no better validation since step 3\n" in out
    assert "weights kept: step 3, best validation loss 4\n" in out
