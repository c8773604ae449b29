"""The file of a comparison, its runs, and what they say."""

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels")

from plait.run.compare import outcome, runner
from plait.run.compare.study import Study, read_study
from plait.run.metrics import metrics_of_rows
from tests.support.runs import copy_rows, film_rows, save_model, write_rows


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def sections(**data: Any) -> dict[str, Any]:
    return {
        "model": {"name": "builtin:tiny"},
        "data": {"train": "rows.jsonl", "test": "test.jsonl", "validation": 0.2, **data},
        "training": {"seed": 7},
    }


ARMS = {"lora": {"name": "lora", "r": 4}, "dual": {"name": "dual_lora", "r": 4}}


def study_of(tmp_path: Path, arms: Any = None, base: Any = None, **compare: Any) -> Study:
    content = {
        "base": sections() if base is None else base,
        "arms": ARMS if arms is None else arms,
        "compare": compare,
    }
    return read_study(write(tmp_path / "study.yaml", content))


# ---------------------------------------------------------------------------------------- the file


def test_arms_differ_in_their_method_and_share_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path, learning_rates=[1e-3, 1e-2], seeds=3, tuning_seeds=2)
    assert (study.reference, study.metric) == ("lora", "exact_match")
    assert study.seeds == [7, 8, 9]
    tuning = study.tuning()
    assert len(tuning) == 2 * 2 * 2
    assert all(t.config.data.test is None for t in tuning)
    compared = study.compared({"lora": 1e-3, "dual": 1e-2})
    assert [(t.arm, t.rate, t.seed) for t in compared] == [
        (arm, rate, seed) for arm, rate in (("lora", 1e-3), ("dual", 1e-2)) for seed in (7, 8, 9)
    ]
    first, other = compared[0].config, compared[3].config
    assert first.data == other.data
    assert first.training | {"learning_rate": 1e-2} == other.training
    assert len({t.key for t in (*tuning, *compared)}) == 8 + 6
    assert study_of(tmp_path, seeds=2).tuning() == []


def test_a_base_is_a_file_or_stands_in_it(tmp_path: Path) -> None:
    write(tmp_path / "run.yaml", {**sections(), "method": {"name": "sora"}, "output": {"dir": "x"}})
    study = study_of(tmp_path, base="run.yaml")
    assert study.config("dual").method.name == "dual_lora"
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        study_of(tmp_path, base="no.yaml")


def test_lists_multiply_but_for_options_that_are_lists(tmp_path: Path) -> None:
    arms = {
        "lora": {"name": "lora", "target_modules": ["q_proj", "v_proj"]},
        "grid": {"name": "cola", "r": [4, 8], "strategy": ["full", "heuristic"]},
    }
    study = study_of(tmp_path, arms)
    assert list(study.arms) == [
        "lora",
        *[f"grid r={r} strategy={s}" for r in (4, 8) for s in ("full", "heuristic")],
    ]
    assert study.config("lora").method.options["target_modules"] == ["q_proj", "v_proj"]
    assert study.config("grid r=8 strategy=full").method.options["r"] == 8


def test_a_run_is_named_by_what_decides_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(8))
    (first, *_) = study_of(tmp_path, seeds=1).compared({"lora": 1e-3, "dual": 1e-3})
    key = first.key
    other = study_of(tmp_path, seeds=4, dir="elsewhere").compared({"lora": 1e-3, "dual": 1e-3})[0]
    assert other.key == key
    assert dataclasses.replace(first, config=study_of(tmp_path).config("lora", 2e-3, 7)).key != key
    write_rows(rows, copy_rows(9))
    assert first.key != key


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"arms": ARMS, "bsae": {}}, "bsae is not known. Did you mean base?"),
        ({"base": sections(), "arms": {}}, "arms: give a method section"),
        ({"base": sections(), "arms": {"lora": {"name": "lora"}}}, "one arm, and nothing to comp"),
        ({"base": 3, "arms": ARMS}, "base is 3. Give a run file or its sections."),
        ({"base": sections(test=None), "arms": ARMS}, "base: data.test is not set"),
        (
            {
                "base": sections(validation=None),
                "arms": ARMS,
                "compare": {"learning_rates": [1e-3, 1e-2]},
            },
            "A rate is chosen on validation rows",
        ),
        (
            {"base": sections(), "arms": ARMS, "compare": {"reference": "loar"}},
            "compare.reference is 'loar', which is no arm. Did you mean lora?",
        ),
        (
            {"base": sections(), "arms": ARMS, "compare": {"metric": "accuracy"}},
            "compare.metric is 'accuracy', which a causal_lm run does not measure.",
        ),
        (
            {"base": sections(), "arms": ARMS, "compare": {"seeds": 0}},
            "compare.seeds",
        ),
        (
            {"base": sections(), "arms": {**ARMS, "x": {"name": "lora", "rnk": 3}}},
            "arms.x",
        ),
        (
            {"base": sections(), "arms": {f"a{i}": {"name": "lora"} for i in range(200)},
             "compare": {"seeds": 1000}},
            "200,000 runs. Give at most 100,000.",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: Any, text: str) -> None:
    path = write(tmp_path / "study.yaml", content)
    with pytest.raises(ValueError) as caught:
        read_study(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


# ----------------------------------------------------------------------------------------- parts


def test_the_mean_of_the_parts_is_the_metric() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 20).astype(float)
    causal = {
        "nll": rng.random(20) * tokens, "tokens": tokens, "correct": np.floor(tokens / 2),
        "exact_match": (rng.random(20) < 0.3).astype(float),
    }  # fmt: skip
    classes = {
        "label": rng.integers(0, 3, 20).astype(float),
        "predicted": rng.integers(0, 3, 20).astype(float),
        "nll": rng.random(20),
    }
    numbers = {"label": rng.random(20), "predicted": rng.random(20)}
    for task, rows in (
        ("causal_lm", causal), ("classification", classes), ("regression", numbers),
    ):  # fmt: skip
        for metric, value in metrics_of_rows(task, rows).items():
            parts = runner.parts_of(task, metric, rows)
            assert parts.mean() == pytest.approx(value), metric
            alone = metric in ("perplexity", "macro_f1", "matthews", "pearson", "spearman")
            assert len(parts) == (1 if alone else 20), metric


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A classifier on eight words: two arms, two rates of which one diverges, two seeds."""
    folder = tmp_path_factory.mktemp("study")
    save_model("bert", folder / "bert")
    write_rows(folder / "rows.jsonl", film_rows(24))
    write_rows(folder / "test.jsonl", film_rows(16))
    base = {
        "model": {"name": str(folder / "bert"), "task": "classification"},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "test": str(folder / "test.jsonl"),
            "validation": 0.25,
        },
        "training": {
            "max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True,
            "save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0.0,
        },
    }  # fmt: skip
    return study_of(
        folder, {"lora": {"name": "lora", "r": 2}, "full": {"name": "full"}}, base,
        learning_rates=[1e-2, 1e30], seeds=2, dir=str(folder / "out"),
    )  # fmt: skip


def test_a_study_runs_once(small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    def note(trial: Any, done: int, of: int) -> None:
        seen.append((trial.arm, trial.rate, done))

    made = outcome.run_study(small, note)
    assert [number for *_, number in seen] == [1, 2, 3, 4, 1, 2, 3, 4]
    reference, full = made.arms
    assert (reference.arm, reference.verdict, reference.rate) == ("lora", None, 1e-2)
    assert reference.tuned[1e30] is None  # diverged: a result
    assert full.difference is not None
    assert full.difference.rows == 16
    values = [value for value in full.values if value is not None]
    others = [value for value in reference.values if value is not None]
    assert full.difference.mean == pytest.approx(np.mean(values) - np.mean(others))
    text = outcome.markdown(made)
    assert "| lora | 0.01 |" in text
    assert "reference" in text
    assert "diverged" in text

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runner, "train", never)
    monkeypatch.setattr(runner, "load_run", never)
    assert outcome.markdown(outcome.run_study(small)) == text


def test_a_killed_run_is_finished_and_the_table_is_the_same(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file of a run is missing: it is measured, and not trained, again."""
    first = outcome.markdown(outcome.run_study(small))
    trial = small.compared({"lora": 1e-2, "full": 1e-2})[0]
    rows = Path(small.compare.dir) / "runs" / trial.key / "rows.json"
    kept = rows.read_text()
    rows.unlink()
    monkeypatch.setattr(runner, "train", None)
    assert outcome.markdown(outcome.run_study(small)) == first
    assert json.loads(rows.read_text()) == json.loads(kept)
    rows.write_text(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"rows\.json: damaged .* Remove it; the run is kept\."):
        outcome.run_study(small)
    rows.write_text(kept)


def _kill(raw: dict[str, Any], path: str) -> None:
    """A worker that is killed at its first trial."""
    mark = Path(raw["data"]["train"]).parent / "killed"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(path)).mkdir(parents=True, exist_ok=True)
    (Path(path) / "rows.json").write_text("{}")


def _always(raw: dict[str, Any], path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_killed_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sections(train=str(tmp_path / "rows.jsonl"))
    trials = study_of(tmp_path, base=base, seeds=2).compared({"lora": 1e-3, "dual": 1e-3})
    fork = multiprocessing.get_context("fork")  # spawned workers would import torch
    monkeypatch.setattr(runner, "get_context", lambda kind: fork)
    monkeypatch.setattr(runner, "run_trial", _kill)
    seen: list[int] = []
    runner.run_trials(trials, tmp_path, 2, lambda trial, done, of: seen.append(done))
    assert seen == [1, 2, 3, 4]
    monkeypatch.setattr(runner, "run_trial", _always)
    with pytest.raises(RuntimeError, match=r"^3 worker processes were killed without a finished"):
        runner.run_trials(trials, tmp_path / "other", 2)
