"""What a user has is never lost: --force, two writers, damaged files, mistakes."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from plait.run.check import check
from plait.run.evaluate import evaluate_run
from plait.run.export import check_replaceable, mark_export
from plait.run.federated.folder import FederatedFolder
from plait.run.folder import RunFolder
from plait.run.train import train
from plait_cli import main
from tests.support.federated_runs import write
from tests.support.killed import holder
from tests.support.runs import copy_rows, interrupt, run_config, save_model, write_rows

ONE_STEP = {"max_steps": 1, "save_strategy": "no"}
QUICK = {"generate": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


@pytest.fixture(scope="module")
def finished(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; tests copy it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    train(run_config(llama, rows, path, training=ONE_STEP, evaluation=QUICK))
    return path


@pytest.fixture(scope="module")
def stopped(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps; tests copy it."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    cfg = run_config(llama, rows, path, training={"max_steps": 3}, evaluation=QUICK)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(2)])
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Path in the folder -> bytes of the file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds a folder."""
    process = holder(folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that a verb prints when it refuses something, with exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --force -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "adapter", "checkpoints", "..", "README.md"])
def test_force_never_replaces_a_run(
    where: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(finished, run)
    before = contents(tmp_path)
    error = refused(capsys, "export", run, "--to", "lora", "--out", run / where, "--force")
    own = where in ("adapter", "checkpoints")
    assert (
        "part of the run itself" if own else "--force replaces an earlier export alone"
    ) in error
    assert contents(tmp_path) == before


def test_force_replaces_an_export_of_ours_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def exported() -> None:
        shutil.rmtree(out, ignore_errors=True)
        (out / "deep").mkdir(parents=True)
        for name in ("adapter_config.json", "deep/README.md"):
            (out / name).write_text("{}")
        mark_export(out, to="lora")

    check_replaceable(out, force=False)  # nothing is there
    exported()
    check_replaceable(out, force=True)
    with pytest.raises(FileExistsError, match="Give --force to replace it, or another --out"):
        check_replaceable(out, force=False)
    (out / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out: holds deep/notes\.txt, which no"):
        check_replaceable(out, force=True)
    exported()
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="out: holds link, which no export wrote"):
        check_replaceable(out, force=True)
    (tmp_path / "precious").write_text("mine")
    check_replaceable(tmp_path / "none", force=True)
    (out / "plait_export.json").unlink()
    with pytest.raises(FileExistsError, match=r"is no export \(it has no plait_export\.json\)"):
        check_replaceable(out, force=True)
    with pytest.raises(FileExistsError, match="precious: is a file"):
        check_replaceable(tmp_path / "precious", force=True)
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty", force=True)


# Two writers -------------------------------------------------------------------------------------


def test_a_folder_that_is_written_to_is_refused(
    llama: Path, rows: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    shutil.copytree(stopped, run)
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    config["output"]["dir"] = str(run)
    file.write_text(yaml.safe_dump(config))
    for folder, words in (
        (run, ["train", file, "--resume"]),
        (tmp_path / "new", ["train", file, f"output.dir={tmp_path / 'new'}"]),
    ):
        with held(folder) as process:
            before = contents(folder)
            error = refused(capsys, *words)
            assert f"{folder}: is in use by process {process.pid} on " in error
            assert " since 2" in error
            assert contents(folder) == before
    # Its holder is dead: the lock is taken over, and it is gone at the end.
    assert (run / ".lock").is_file()
    cfg = run_config(llama, rows, run, training={"max_steps": 3}, evaluation=QUICK)
    assert train(cfg, resume=True).adapter.is_dir()
    assert not (run / ".lock").exists()


def test_an_export_into_a_run_that_is_written_to_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with held(run):
        assert "run: is in use by process" in refused(capsys, "export", run, "--to", "lora")
        assert not (run / "lora").exists()


def test_a_federated_run_that_is_written_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "run", local={"rounds": 1}, evaluation={"every": 0})
    with held(tmp_path / "run"):
        for words in ([], ["--resume"]):
            error = refused(capsys, "federate", "simulate", file, *words)
            assert "run: is in use by process" in error
        assert sorted(contents(tmp_path / "run")) == [".lock"]
    assert main(["federate", "simulate", file]) == 0
    assert not (tmp_path / "run" / ".lock").exists()


# What is no run of the kind ----------------------------------------------------------------------


def test_federate_resume_refuses_what_is_no_federated_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for folder, text in (
        (run, "run: is no federated run that can be resumed"),
        (other, "other: there is no run to resume (config.yaml is missing)"),
        (tmp_path / "empty", "empty: there is no run to resume"),
        (tmp_path / "none", "none: there is no run to resume"),
    ):
        file = write(tmp_path / "configs" / folder.name)
        words = ["federate", "simulate", file, f"output.dir={folder}", "--resume"]
        assert text in refused(capsys, *words)
    shutil.rmtree(tmp_path / "configs")
    assert contents(tmp_path) == before
    assert not (tmp_path / "none").exists()


# Damage ------------------------------------------------------------------------------------------

BAD_JSON: list[tuple[str, Callable[[str], str | bytes]]] = [
    ("cut off", lambda text: text[: len(text) // 2]),
    ("empty", lambda text: ""),
    ("a list", lambda text: "[1]"),
    ("no UTF-8", lambda text: text.encode() + b"\xff"),
    ("nested", lambda text: "[" * 100_000),
]


@pytest.mark.parametrize(("kind", "damage"), BAD_JSON, ids=[kind for kind, _ in BAD_JSON])
def test_damaged_json_of_a_finished_run(
    kind: str,
    damage: Callable[[str], str | bytes],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the work was done before the file was read")

    monkeypatch.setattr("plait.run.evaluate.evaluate_model", never)
    for name, remedy in (
        ("environment.json", "Train again."),
        ("eval.json", "Remove it and evaluate again."),
    ):
        run = tmp_path / name
        shutil.copytree(finished, run)
        file = run / name
        damaged = damage(file.read_text())
        file.write_bytes(damaged.encode() if isinstance(damaged, str) else damaged)
        error = refused(capsys, "evaluate", run)
        assert f"{file}: " in error
        assert error.endswith(f"{remedy}\n")


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("environment.json", {"run": []}, "run is [], not an object"),
        ("environment.json", {"run": {"kind": 3}}, "run.kind is 3, not str"),
        ("environment.json", {"run": {"labels": "no"}}, "run.labels is 'no', not list or None"),
        ("environment.json", {"run": {"steps": True}}, "run.steps is True, not int"),
        ("environment.json", {"run": {}}, "run.kind is missing"),
        ("eval.json", {"before": 3}, "before is 3"),
        ("eval.json", {"split": {}}, "split is {}"),
    ],
)
def test_json_with_values_of_another_kind(
    file: str,
    change: dict[str, Any],
    text: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
    error = refused(capsys, "evaluate", run)
    assert f"{run / file}: {text}" in error


def test_a_finished_evaluation_is_not_lost(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it cannot be written, the error holds it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plait.run.folder.write_json", full)
    with pytest.raises(OSError) as caught:
        evaluate_run(run)
    text = str(caught.value)
    assert text.startswith(f"{run / 'eval.json'}: could not be written ([Errno 28] No space left")
    measured = json.loads(text[text.index("{") :])
    assert measured["validation"]["rows"] == 8
    assert measured["validation"]["loss"] > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"{"),
        ("trainer_state.json", b"[1]"),
        ("trainer_state.json", b'{"global_step": 7}'),
        ("trainer_state.json", b'{"nonsense": 7}'),
        ("optimizer.pt", b""),
        ("optimizer.pt", b"\x80\x02nonsense"),
        ("scheduler.pt", b"nonsense"),
        ("rng_state.pth", b"\x00" * 100),
    ],
)
def test_a_damaged_checkpoint(
    name: str, content: bytes, llama: Path, rows: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    checkpoint = run / "checkpoints" / "checkpoint-2"
    (checkpoint / name).write_bytes(content)
    cfg = run_config(llama, rows, run, training={"max_steps": 3}, evaluation=QUICK)
    with pytest.raises(ValueError) as caught:
        train(cfg, resume=True)
    assert str(caught.value).startswith(str(checkpoint))
    assert str(caught.value).endswith("Remove that checkpoint to resume from the one before it.")
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"step": 1}\n\xff\n{"step": 2}\n', "metrics.jsonl: line 2 is not JSON"),
        (b"3\n", "metrics.jsonl: line 1 is 3, no object. Remove that line."),
        (b'{"loss": 1.0}\n', "metrics.jsonl: {'loss': 1.0} has no step. Remove that line."),
        (b'{"step": "x"}\n{"step": 2}\n', "has no step. Remove that line."),
    ],
)
def test_damaged_metrics(content: bytes, text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        folder.read_metrics()
    assert text in str(caught.value)


def test_a_damaged_federated_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    file = write(run, local={"rounds": 1}, evaluation={"every": 0})
    assert main(["federate", "simulate", file]) == 0
    more = ["federate", "simulate", file, "--resume", "local.rounds=2"]
    whole = contents(run)
    for name, content, text in (
        ("server/round-000001.ckpt", b"half", "round-000001.ckpt: "),
        ("metrics.jsonl", b'{"kind": "round"}\n{}\n', "metrics.jsonl: {'kind': 'round'} has no"),
        ("config.yaml", b"model: [", "run: is no federated run that can be resumed"),
    ):
        (run / name).write_bytes(content)
        assert text in refused(capsys, *more)
        (run / name).write_bytes(whole[name])
    (run / "rows.json").write_text('{"clients": {"a": 3}}')
    with pytest.raises(ValueError, match=r"rows\.json: a is 3\. Remove it and resume the run"):
        FederatedFolder(run).read_row_counts()


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "checked"),
    [
        ({"optimizer": {"name": "lorsum"}}, True),  # the method has dropout
        (
            {
                "optimizer": {"name": "lorsum", "sweeps": 0, "momentum": 0.9},
                "method": {"name": "lora", "r": 2},
            },
            True,
        ),
        ({"method": {"name": "lora", "r": 2, "lr_scale": {"nothing": 2.0}}}, False),
    ],
)
def test_a_mistake_leaves_no_folder(
    section: dict[str, Any], checked: bool, llama: Path, rows: Path, tmp_path: Path
) -> None:
    cfg = run_config(llama, rows, tmp_path / "runs" / "run", evaluation=QUICK, **section)
    for refuse in (check, train) if checked else (train,):
        with pytest.raises(ValueError):
            refuse(cfg)
        assert not (tmp_path / "runs").exists()


def test_a_mistake_leaves_a_folder_that_was_there(llama: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    method = {"name": "lora", "r": 2, "lr_scale": {"nothing": 2.0}}
    with pytest.raises(ValueError, match="no trained parameter is named nothing"):
        train(run_config(llama, rows, tmp_path / "run", method=method, evaluation=QUICK))
    assert contents(tmp_path / "run") == {}


def test_trying_an_optimizer_changes_nothing(llama: Path, rows: Path, tmp_path: Path) -> None:
    """LoRA-FA freezes A; only the optimizer that trains may."""
    from plait.run.prepare import prepare

    method = {"name": "lora", "r": 2}
    plain = prepare(run_config(llama, rows, tmp_path / "run", method=method))
    tried = prepare(
        run_config(llama, rows, tmp_path / "run", method=method, optimizer={"name": "lorafa"})
    )
    trained = [
        {name for name, p in run.model.named_parameters() if p.requires_grad}
        for run in (plain, tried)
    ]
    assert trained[0] == trained[1]
    assert tried.facts["trainable"] == plain.facts["trainable"]
