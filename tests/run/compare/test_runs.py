"""The runs of a comparison: once each, as separate runs would be, whatever is killed."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels")

from plait.core.files import lock
from plait.run.compare import match, outcome, runner, warm
from plait.run.compare.runner import Pool, Stopped
from plait.run.compare.study import Study, Trial, read_study
from plait.run.config import config_from_dict
from plait.run.folder import RunFolder
from plait.run.train import train
from plait_cli import main
from tests.support.runs import film_rows, save_model, write_rows
from tests.support.studies import study_of, write_study

LONG = bool(os.environ.get("PLAIT_KILLS"))
KILLS = 5 if LONG else 2


def bert(folder: Path, **training: Any) -> dict[str, Any]:
    """A classifier on eight words, whose head is drawn anew with every seed."""
    save_model("bert", folder / "bert")
    write_rows(folder / "rows.jsonl", film_rows(24))
    write_rows(folder / "test.jsonl", film_rows(16))
    return {
        "model": {"name": str(folder / "bert"), "task": "classification"},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "test": str(folder / "test.jsonl"),
            "validation": 0.25,
        },
        "training": {
            "max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "logging_steps": 1,
            "save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0.0, **training,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, two rates of which one diverges, two seeds."""
    folder = tmp_path_factory.mktemp("study")
    arms = {
        "lora": {"name": "lora", "r": 2, "lora_dropout": 0.1},
        "dual": {"name": "dual_lora", "r": 2},
        "full": {"name": "full"},
    }
    return write_study(
        folder, arms, bert(folder), tune={"learning_rate": [1e-2, 1e30], "grow": 0}, seeds=2,
        metrics=["accuracy", "loss"],
    )  # fmt: skip


def finished(study: Study) -> tuple[Study, dict[str, Any]]:
    study, sizes = match.match_arms(study)
    with Pool(study.folder) as pool:
        return study, outcome.conduct(study, sizes, pool.run)


def test_a_study_runs_once_and_its_runs_are_ordinary(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm runs equal separate ones bit for bit: new heads, dropout, dense weights, rows."""
    study, results = finished(read_study(small))
    assert results["complete"]
    assert {row["arm"]: row["rate"] for row in results["results"]} == dict.fromkeys(
        ("lora", "dual", "full"), 1e-2
    )
    assert all(row["tuned"][1][1] is None for row in results["results"])  # a result
    compared = study.compared(dict.fromkeys([(arm, "") for arm in study.arms], 1e-2))
    for trial in compared:
        raw = runner._raw(trial)
        alone = train(config_from_dict({**raw, "output": {"dir": str(tmp_path / trial.key)}}))
        inside = RunFolder(study.folder / "runs" / trial.key)
        assert inside.read_evaluation() == alone.read_evaluation()
        for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
            if (alone.path / name).is_file():
                assert (inside.path / name).read_bytes() == (alone.path / name).read_bytes()
        rows = runner.read_trial(trial, study.folder)
        assert rows is not None
        measured = float(np.mean(rows["predicted"] == rows["label"]))
        assert measured == alone.read_evaluation()["after"]["accuracy"]
        result = runner.read_result(trial, study.folder)
        assert result["peak_memory"] > 10**7
        assert result["wall"] > result["trained"] > 0

    monkeypatch.setattr(runner, "run_trial", None)
    monkeypatch.setattr(match, "_look", None)
    assert finished(read_study(small))[1] == results


def test_models_that_start_alike_share_the_metric_before(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(small)
    measured: list[str] = []
    measure = warm.measure_rows

    def note(model: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append("")
        return measure(model, *args, **kwargs)

    monkeypatch.setattr(warm, "measure_rows", note)
    loads: list[int] = []
    base = warm.Loader.base
    monkeypatch.setattr(
        warm.Loader, "base", lambda self, cfg, data: loads.append(1) or base(self, cfg, data)
    )
    kept = warm.Warm()
    rates = dict.fromkeys([("lora", ""), ("dual", "")], 2e-2)
    trials = study.compared(rates)
    for trial in trials:
        runner.run_trial(runner._raw(trial), str(tmp_path / trial.key), kept)
    assert len(loads) == 2  # of four runs: once for each seed, whose head is its own
    assert len(measured) == 2 + 4  # before for each seed, after for each run


def test_the_last_file_of_a_run_is_made_again_without_training(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, results = finished(read_study(small))
    trial = study.compared({("lora", ""): 1e-2})[0]
    rows = study.folder / "runs" / trial.key / "rows.json"
    kept = rows.read_text()
    rows.unlink()
    monkeypatch.setattr("plait.run.train.train", None)
    again = finished(read_study(small))[1]
    assert json.loads(rows.read_text())["rows"] == json.loads(kept)["rows"]
    assert [r["comparison"] for r in again["results"]] == [
        r["comparison"] for r in results["results"]
    ]
    rows.write_text(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"rows\.json: damaged .* Remove it; the run is kept\."):
        finished(read_study(small))
    rows.write_text(kept)


# ------------------------------------------------------------------------------------------- kills


FORK = multiprocessing.get_context("fork")


def _go(path: str, log: str) -> None:
    """The command in a process of its own, as a user starts it."""
    handle = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os._exit(main(["compare", path]))


def _table(results: dict[str, Any]) -> Any:
    """What does not depend on the clock."""
    return [
        (row["arm"], row["rate"], row["tuned"], row["comparison"], row["others"],
         [(run["seed"], run["metrics"]) for run in row["runs"]])
        for row in results["results"]
    ]  # fmt: skip


def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """SIGKILL of the command, within the first runs and the last; then the same final table."""
    base = bert(tmp_path, max_steps=12, save_strategy="steps", save_steps=4)
    rates = [1e-2, 3e-2] if LONG else [1e-2]
    options: Any = {"tune": {"learning_rate": rates, "grow": 0}, "seeds": 2 if LONG else 4}
    whole = study_of(tmp_path, base=base, dir=str(tmp_path / "whole"), **options)
    expected = _table(finished(whole)[1])
    path = write_study(tmp_path, base=base, **options)
    draws, killed = random.Random(LONG), 0
    runs = tmp_path / "out" / "runs"
    for number in range(KILLS):
        process = FORK.Process(target=_go, args=(str(path), str(tmp_path / "log")))
        process.start()
        done = len(list(runs.glob("*/rows.json")))
        limit = time.monotonic() + 60
        while time.monotonic() < limit and process.is_alive():
            if len(list(runs.glob("*/rows.json"))) > done + (number == 0):
                break
            time.sleep(0.02)
        time.sleep(draws.uniform(0, 0.6))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
    assert killed == KILLS, (tmp_path / "log").read_text()
    assert main(["compare", str(path)]) == 0
    assert _table(outcome.read(tmp_path / "out")) == expected


def _fake(raw: dict[str, Any], path: str, kept: Any) -> None:
    """A worker that is killed at its first trial."""
    mark = Path(raw["data"]["train"]).parent / "killed"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "rows.json").write_text("{}")


def _always(raw: dict[str, Any], path: str, kept: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refused(raw: dict[str, Any], path: str, kept: Any) -> None:
    raise ValueError("data: no rows")


class _Forked:
    """Starts workers by fork: they need not import torch again."""

    Pipe, Process = FORK.Pipe, FORK.Process

    def set_forkserver_preload(self, names: list[str]) -> None:
        """Nothing is to be imported."""


def trials_of(tmp_path: Path) -> list[Trial]:
    base = {
        "model": {"name": "builtin:tiny"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "test": "test.jsonl"},
    }
    rates = dict.fromkeys([("lora", ""), ("dual", "")], 1e-3)
    return study_of(tmp_path, base=base, seeds=2).compared(rates)


def test_workers_that_are_killed_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = trials_of(tmp_path)
    monkeypatch.setattr(runner.mp, "get_context", lambda kind: _Forked())
    monkeypatch.setattr(runner, "run_trial", _fake)
    seen: list[int] = []
    with Pool(tmp_path, 2) as pool:
        pool.run(trials, lambda trial, done, of: seen.append(done))
    assert seen == [1, 2, 3, 4]
    monkeypatch.setattr(runner, "run_trial", _always)
    with (
        pytest.raises(RuntimeError, match=r"^3 worker processes were killed without a finished"),
        Pool(tmp_path / "other", 2) as pool,
    ):
        pool.run(trials)
    monkeypatch.setattr(runner, "run_trial", _refused)
    with (
        pytest.raises(ValueError, match=r"^data: no rows \(in a run of lora, rate 0.001, seed 42"),
        Pool(tmp_path / "third", 2) as pool,
    ):
        pool.run(trials)


def test_nothing_begins_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_trial", None)
    with pytest.raises(Stopped), Pool(tmp_path, 1, until=time.monotonic() - 1) as pool:
        pool.run(trials_of(tmp_path))


# ----------------------------------------------------------------------------------------- command


def test_the_command_compares_plans_and_reports(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(small)]) == 0
    said = capsys.readouterr().out
    assert "lora: r = 2, " in said
    assert "reference" in said
    assert "report: " in said
    folder = small.parent / "out"
    assert "<h2>Differences</h2>" in (folder / "report.html").read_text()
    assert main(["compare", str(small), "--plan"]) == 0
    assert "from: the finished runs" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == (folder / "report.md").read_text()
    assert main(["report", str(folder), "--out", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "report.html").read_text() == (folder / "report.html").read_text()
    with lock(folder):
        assert main(["compare", str(small)]) == 2
    assert "out" in capsys.readouterr().err
    assert main(["report"]) == 2
    said = capsys.readouterr().err
    assert "Give the folder of a comparison, or --peft-results and --reference." in said
    assert main(["report", str(tmp_path)]) == 2
    assert "no results of a comparison are here" in capsys.readouterr().err
    damaged = tmp_path / "results.json"
    damaged.write_text((folder / "results.json").read_text().replace('"mean": ', '"maen": '))
    assert main(["report", str(damaged)]) == 2
    assert "the results are damaged (KeyError: 'mean')" in capsys.readouterr().err
    small.write_text(small.read_text().replace('"seeds"', '"sedes"'))
    assert main(["compare", str(small)]) == 2
    assert "sedes is not known. Did you mean seeds?" in capsys.readouterr().err
