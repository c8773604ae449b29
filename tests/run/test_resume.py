"""Resuming a run: the same weights, bit for bit, from the last whole checkpoint."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plait.run import train as train_module
from plait.run.folder import RunFolder
from plait.run.train import train
from plait.run.trainer import latest_checkpoint
from tests.support.runs import (
    At,
    assert_same,
    copy_rows,
    crash,
    interrupt,
    run_config,
    save_model,
    write_rows,
)

# 10 steps of 4 rows; 32 training rows, so step 8 ends an epoch.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "lora_dropout": 0.1},
    "pissa": {"r": 2, "lora_dropout": 0.1},
    "adalora": {"r": 2, "init_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1, "lora_dropout": 0.1},
    "full": {},
    "dual_lora": {"r": 4, "gate_steps": 8, "lora_dropout": 0.1},
    "dual_module": {
        "r": 4, "shared_r": 2, "target_r": 1, "tinit": 2, "tfinal": 2, "deltaT": 1,
        "lora_dropout": 0.1,
    },
    "shared_b": {"r": 2, "num_A": 2, "routing": "task", "lora_dropout": 0.1},
    "cola": {"r": 2, "num_A": 2, "num_B": 2, "strategy": "random", "lora_dropout": 0.1},
    "nola": {"r": 2, "num_basis_A": 8, "num_basis_B": 8, "lora_dropout": 0.1},
    "tied": {"r": 2, "lora_dropout": 0.1},
    "hydra": {"r": 2, "num_B": 2, "independent_dropout": True, "lora_dropout": 0.1},
    "molora": {
        "r": 2, "num_experts": 4, "top_k": 2, "balance": "switch", "balance_weight": 0.1,
        "lora_dropout": 0.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows(tasks=True))


@pytest.fixture(scope="module")
def whole(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A lora run that was never stopped."""
    return train(run_config(llama, rows, tmp_path_factory.mktemp("whole") / "run"))


# --------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", METHODS)
def test_resume_gives_the_same_weights(
    method: str, llama: Path, rows: Path, tmp_path: Path
) -> None:
    options = {"name": method, **METHODS[method]}
    quick = {"generate": False}
    whole = train(run_config(llama, rows, tmp_path / "a", method=options, evaluation=quick))
    cfg = run_config(llama, rows, tmp_path / "b", method=options, evaluation=quick)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 5 of 10; .*checkpoint-5 is"):
        train(cfg, callbacks=[interrupt(5)])
    stopped = RunFolder.open(tmp_path / "b")
    checkpoint = stopped.checkpoints / "checkpoint-5"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert names & {"adapter_model.safetensors", "model.safetensors"}
    assert "training_args.bin" not in names
    assert not stopped.adapter.exists()
    assert_same(whole, train(cfg, resume=True))
    lines = [row["step"] for row in whole.read_metrics()]
    assert [row["step"] for row in stopped.read_metrics()] == lines


@pytest.mark.parametrize("stop", [3, 4])  # in the middle and at the end of an epoch
def test_resume_with_gradient_accumulation(
    stop: int, llama: Path, rows: Path, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 7}
    whole = train(run_config(llama, rows, tmp_path / "a", training=options))
    cfg = run_config(llama, rows, tmp_path / "b", training=options)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(stop)])
    assert_same(whole, train(cfg, resume=True))


def test_resume_after_a_kill_starts_from_the_last_whole_checkpoint(
    whole: RunFolder, llama: Path, rows: Path, tmp_path: Path
) -> None:
    cfg = run_config(llama, rows, tmp_path / "b", training={"save_steps": 2})
    with pytest.raises(MemoryError):
        train(cfg, callbacks=[crash(8)])
    folder = RunFolder.open(tmp_path / "b")
    assert latest_checkpoint(folder.checkpoints) == folder.checkpoints / "checkpoint-6"
    # A process killed while it saved step 8, and one that another program cut off.
    shutil.copytree(folder.checkpoints / "checkpoint-6", folder.checkpoints / ".checkpoint-8.new.x")
    (folder.checkpoints / "checkpoint-9").mkdir()
    (folder.checkpoints / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(folder.checkpoints) == folder.checkpoints / "checkpoint-6"
    assert_same(whole, train(cfg, resume=True))
    assert not (folder.checkpoints / ".checkpoint-8.new.x").exists()


def test_resume_without_a_checkpoint_starts_anew(
    whole: RunFolder, llama: Path, rows: Path, tmp_path: Path
) -> None:
    cfg = run_config(llama, rows, tmp_path / "b")
    with pytest.raises(MemoryError):
        train(cfg, callbacks=[crash(4)])
    assert_same(whole, train(cfg, resume=True))
    assert len(RunFolder(tmp_path / "b").read_metrics()) == 11  # 10 steps and the summary


def test_resume_after_the_last_step_makes_no_further_one(
    whole: RunFolder, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_config(llama, rows, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "check_events", lambda model: crash(0).act(model))
        with pytest.raises(MemoryError):
            train(cfg)
    assert_same(whole, train(cfg, resume=True))


def test_resume_after_a_stop_before_the_seconds_were_noted(
    whole: RunFolder, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_config(llama, rows, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "note", lambda self, **facts: crash(0).act(None))
        with pytest.raises(MemoryError):
            train(cfg)
    folder = train(cfg, resume=True)
    assert_same(whole, folder)
    assert "| seconds of training | not known" in folder.card.read_text()


def test_resume_of_a_changed_config_lists_the_differences(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(run_config(llama, rows, path), callbacks=[interrupt(2)])
    changed = run_config(llama, rows, path, training={"learning_rate": 0.5, "logging_steps": 2})
    with pytest.raises(ValueError) as caught:
        train(changed, resume=True)
    assert str(caught.value) == (
        f"{path}: the config changed since this run began, so the result would be of neither:\n"
        "  training.learning_rate: 0.01 -> 0.5\n"
        "Put the values back, or train to another output.dir."
    )
    logging = {"logging_steps": 2, "save_steps": 4}
    free = run_config(llama, rows, path, training=logging, evaluation={"batch_size": 3})
    folder = train(free, resume=True)
    assert "logging_steps: 2" in folder.config.read_text()


def test_resume_with_changed_rows_is_refused(llama: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", copy_rows(40))
    cfg = run_config(llama, data, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(2)])
    write_rows(data, copy_rows(41))
    with pytest.raises(ValueError) as caught:
        train(cfg, resume=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: the data changed since this run began (train_rows: 32 -> 33). "
        "Put the data back, or train to another output.dir."
    )


def test_resume_needs_an_unfinished_run(llama: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    cfg = run_config(llama, rows, path, training={"max_steps": 1})
    with pytest.raises(FileNotFoundError) as missing:
        train(cfg, resume=True)
    assert str(missing.value) == (
        f"{path}: there is no run to resume (config.yaml is missing). Train without --resume."
    )
    train(cfg)
    with pytest.raises(ValueError) as finished:
        train(cfg, resume=True)
    assert str(finished.value) == (
        f"{path}: this run is finished, nothing is left to resume. Train to another output.dir, or "
        f"evaluate it: plait evaluate {path}"
    )
    with pytest.raises(FileExistsError, match="this run folder exists and is not empty"):
        train(cfg)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_resume_from_a_cut_off_file(name: str, llama: Path, rows: Path, tmp_path: Path) -> None:
    cfg = run_config(llama, rows, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(2)])
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"checkpoint-2.*: damaged or cut off .* Remove that checkpoint"
    ):
        train(cfg, resume=True)


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_full_disk_leaves_the_old_checkpoint(
    writer: str,
    whole: RunFolder,
    llama: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = run_config(llama, rows, tmp_path / "b", training={"save_steps": 2})
    checkpoints = tmp_path / "b" / "checkpoints"

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_disk(model: Any) -> None:
        if writer == "torch":
            monkeypatch.setattr("transformers.trainer.torch.save", full)
        else:
            monkeypatch.setattr("peft.peft_model.safe_save_file", full)

    with pytest.raises(OSError) as caught:
        train(cfg, callbacks=[At(3, fill_disk)])
    assert str(caught.value) == (
        f"{checkpoints / 'checkpoint-4'}: could not be written ([Errno 28] No space left on "
        f"device). {checkpoints / 'checkpoint-2'} is kept: make room and resume."
    )
    assert [p.name for p in checkpoints.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert_same(whole, train(cfg, resume=True))


def test_full_disk_at_the_end_loses_nothing(
    whole: RunFolder, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cfg = run_config(llama, rows, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr("plait.run.trainer.save_trained", full)
        with pytest.raises(OSError) as caught:
            train(cfg)
    folder = RunFolder.open(tmp_path / "b")
    assert str(caught.value) == (
        f"{folder.adapter}: could not be written ([Errno 28] No space left on device). "
        f"{folder.checkpoints / 'checkpoint-10'} is kept: make room and resume."
    )
    assert_same(whole, train(cfg, resume=True))


@pytest.mark.parametrize("change", ["order", "answers", "validation"])
def test_resume_with_rows_of_equal_counts_is_refused(
    change: str, llama: Path, tmp_path: Path
) -> None:
    rows, held_out = copy_rows(40), copy_rows(8)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    validation = write_rows(tmp_path / "validation.jsonl", held_out)
    cfg = run_config(llama, data, tmp_path / "run", data={"validation": str(validation)})
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(2)])
    if change == "order":
        write_rows(data, rows[::-1])
    elif change == "answers":
        write_rows(data, [{**row, "completion": row["completion"][::-1]} for row in rows])
    else:
        write_rows(validation, held_out[::-1])
    name = "validation_digest" if change == "validation" else "train_digest"
    with pytest.raises(ValueError, match=rf"the data changed since this run began \({name}: "):
        train(cfg, resume=True)
    write_rows(data, rows)
    write_rows(validation, held_out)
    train(cfg, resume=True)


def test_a_run_without_a_digest_is_resumed(llama: Path, rows: Path, tmp_path: Path) -> None:
    cfg = run_config(llama, rows, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(2)])
    folder = RunFolder(tmp_path / "run")
    content = json.loads(folder.environment.read_text())
    for name in ("train_digest", "validation_digest", "text_pair"):  # as plait 0.1 wrote it
        del content["run"][name]
    folder.environment.write_text(json.dumps(content))
    assert train(cfg, resume=True).read_facts()["train_digest"]
