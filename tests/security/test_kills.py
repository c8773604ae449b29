"""Processes killed at any moment, two writers of one folder, and a full disk.

The short form runs with all tests. PLAIT_KILLS=1 gives the numbers of `LONG`; a full disk needs a
file system of its own, which root alone can mount.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.federated.faults import kill_runs
from plait.run.export import export_run, read_back
from plait.run.export.logits import logits_of
from plait.run.train import train
from plait_cli import main
from tests.support.federated_runs import write
from tests.support.runs import copy_rows, run_config, save_model, weights, write_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes to kill them")

LONG = bool(os.environ.get("PLAIT_KILLS"))
TRAIN, EXPORT, FEDERATE, WRITERS = (20, 10, 10, 20) if LONG else (2, 1, 0, 2)
STEPS = {"max_steps": 6, "save_steps": 2}
QUICK = {"generate": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked process cannot use the threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


def forked(act: Callable[[], Any], log: Path) -> int:
    """Start a process that calls a function and ends with 0, 2 for FileExistsError, 1 else."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log.write_text("")
        act()
        code = 0
    except FileExistsError:
        code = 2
    except BaseException as error:
        log.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(folder: Path) -> list[str]:
    """Files and folders that only a killed process leaves: temporary ones, and locks."""
    marks = (".tmp.", ".new.", ".old.", "tmp-checkpoint")
    return [
        str(p) for p in folder.rglob("*") if any(m in p.name for m in marks) or p.name == ".lock"
    ]


def killed_at(act: Callable[[], Any], log: Path, after: float) -> bool:
    """Kill a process that calls a function after some seconds; False if it had ended before."""
    child = forked(act, log)
    until = time.monotonic() + after
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def test_a_killed_training_resumes_to_the_same_bits(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    """At any moment, twice in one run of three."""

    def config(name: str) -> Any:
        return run_config(llama, rows, tmp_path / name / "run", training=STEPS, evaluation=QUICK)

    start = time.monotonic()
    assert ended(forked(lambda: train(config("whole")), tmp_path / "log")) == 0
    took, draw, kills = time.monotonic() - start, random.Random(0), 0
    from plait.run.folder import RunFolder

    whole = RunFolder(config("whole").output.dir)
    for number in range(100):
        if kills == TRAIN:
            break
        cfg, log = config(f"cut{number}"), tmp_path / f"log{number}"
        path = Path(cfg.output.dir)
        if not killed_at(lambda cfg=cfg: train(cfg), log, draw.uniform(0, took)):
            continue
        kills += 1
        resume = path.is_dir() and (path / "config.yaml").is_file()
        if resume and number % 3 == 0:
            killed_at(lambda cfg=cfg: train(cfg, resume=True), log, draw.uniform(0, took))
        again = lambda cfg=cfg, resume=resume: train(cfg, resume=resume)  # noqa: E731
        code = ended(forked(again, log))
        # It may have been killed between its last write and its end.
        finished = "this run is finished" in log.read_text()
        assert code == 0 or finished, f"kill {number}: {log.read_text()}"
        cut = RunFolder(path)
        assert all(torch.equal(x, weights(cut)[k]) for k, x in weights(whole).items())
        assert cut.read_evaluation() == whole.read_evaluation()
        assert [row["step"] for row in cut.read_metrics()] == [
            row["step"] for row in whole.read_metrics()
        ]
        assert leftovers(path.parent) == []
    assert kills == TRAIN


def no_stock_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check by stock peft is a process that loads torch: only in the long form."""
    if not LONG:
        monkeypatch.setattr(
            read_back,
            "read_without_plait",
            lambda run, folders, to, inputs: {k: logits_of(run.model, inputs[k]) for k in folders},
        )


def test_a_killed_export_leaves_the_old_one_or_the_new_one(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_stock_check(monkeypatch)
    cfg = run_config(
        llama,
        rows,
        tmp_path / "run",
        training={"max_steps": 2, "save_strategy": "no"},
        evaluation=QUICK,
    )
    train(cfg)
    out = tmp_path / "out" / "lora"

    def act() -> None:
        export_run(tmp_path / "run", "lora", out, force=True)

    start = time.monotonic()
    assert ended(forked(act, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    took, draw, kills = time.monotonic() - start, random.Random(1), 0
    content = {p.name: p.read_bytes() for p in out.iterdir()}
    for number in range(100):
        if kills == EXPORT:
            break
        if number % 2:
            shutil.rmtree(out, ignore_errors=True)  # nothing is there before
        if not killed_at(act, tmp_path / "log", draw.uniform(0, took)):
            continue
        kills += 1
        if out.exists():
            assert {p.name: p.read_bytes() for p in out.iterdir()} == content
        assert ended(forked(act, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        assert {p.name: p.read_bytes() for p in out.iterdir()} == content
        assert leftovers(out.parent) == []
    assert kills == EXPORT


@pytest.mark.skipif(not FEDERATE, reason="PLAIT_KILLS=1 runs more of what test_faults has")
def test_a_killed_federation_resumes_to_the_same_bits(tmp_path: Path) -> None:
    found = kill_runs(FEDERATE, tmp_path, seed=7)
    assert [row["resumed_exit_code"] for row in found] == [0] * FEDERATE
    assert all(row["equal"] for row in found)
    assert [str(p) for p in tmp_path.rglob(".round-*")] == []


@pytest.mark.parametrize("kind", ["train", "federate"])
def test_of_two_writers_one_is_refused(kind: str, llama: Path, rows: Path, tmp_path: Path) -> None:
    from plait.run.federated.config import load_federate_config
    from plait.run.federated.engines import simulate

    refused = 0
    for number in range(WRITERS):
        path = tmp_path / f"{number}" / "run"
        if kind == "train":
            options = {"max_steps": 2, "save_strategy": "no"}
            cfg = run_config(llama, rows, path, training=options, evaluation=QUICK)
            act: Callable[[], Any] = lambda cfg=cfg: train(cfg)  # noqa: E731
        else:
            file = write(path, evaluation={"every": 0}, local={"rounds": 1})
            config = load_federate_config(file)
            act = lambda config=config: simulate(config)  # noqa: E731
        children = [forked(act, tmp_path / f"log{number}.{i}") for i in range(2)]
        codes = sorted(ended(child) for child in children)
        logs = [(tmp_path / f"log{number}.{i}").read_text() for i in range(2)]
        assert codes == [0, 2], logs
        refused += codes.count(2)
        assert leftovers(path.parent) == []
    assert refused == WRITERS


# A full disk --------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes; the test is skipped where none can be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "plait", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Bytes in pages of a file system in memory."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", ["train", "export", "federate"])
def test_a_full_disk(
    kind: str,
    llama: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2 with one line, nothing half-written under a final name; then there is room."""
    no_stock_check(monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    steps = {"max_steps": 4, "save_steps": 2}
    plain = run_config(llama, rows, tmp_path / "plain", training=steps, evaluation=QUICK)
    train(plain)
    import yaml

    def words(disk: Path) -> list[str]:
        if kind == "export":
            return ["export", str(tmp_path / "plain"), "--to", "merged", "--out", str(disk / "out")]
        if kind == "federate":
            return ["federate", "simulate", write(disk / "run", evaluation={"every": 0})]
        raw = yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(raw | {"output": {"dir": str(disk / "run")}}))
        return ["train", str(file)]

    (tmp_path / "whole").mkdir()
    assert main(words(tmp_path / "whole")) == 0
    need = size_of(tmp_path / "whole")
    capsys.readouterr()
    shares = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9) if LONG else (0.4,)
    for share in shares:
        with small_disk(tmp_path / f"disk{share}", max(8192, int(share * need))) as disk:
            try:
                command = words(disk)
            except OSError:
                continue  # not even the config fits
            code = main(command)
            error = capsys.readouterr().err
            assert code == 2, error
            assert "Traceback" not in error
            assert "o space left" in error or "could not be written" in error, error
            assert str(disk) in error, error
            assert [p for p in leftovers(disk) if ".lock" in p or ".new." in p] == []
            if kind == "export":
                assert not (disk / "out").exists()
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            resume = ["--resume"] if (disk / "run" / "config.yaml").exists() else []
            if kind == "federate" and (disk / "run" / "server").is_dir():
                resume = ["--resume"]
            assert main([*command, *resume]) == 0, capsys.readouterr().err
            capsys.readouterr()
