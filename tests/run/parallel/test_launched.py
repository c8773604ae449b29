"""`plait train FILE --processes 2`: two processes of the command line, and what ends them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from plait.run.folder import RunFolder
from plait.run.trainer import latest_checkpoint
from tests.support.runs import assert_same, copy_rows, save_model, write_rows

pytestmark = pytest.mark.slow  # three processes import torch
LONG = bool(os.environ.get("PLAIT_PARALLEL"))
WAIT = 120  # seconds; what takes longer hangs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launched")
    base = save_model("llama", root / "llama")
    rows = write_rows(root / "rows.jsonl", copy_rows())
    config: dict[str, Any] = {
        "model": {"name": str(base)},
        "method": {"name": "cola", "r": 2, "strategy": "random", "lora_dropout": 0.1},
        "data": {"train": str(rows)},
        "training": {
            "max_steps": 60,
            "per_device_train_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_cpu": True,
        },
        "parallel": {"processes": 2},
        "output": {"dir": str(root / "run")},
    }
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(config: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "plait", "train", str(config), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait for a checkpoint."""
    until = time.monotonic() + WAIT
    while True:
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if checkpoint is not None and int(checkpoint.name.rpartition("-")[2]) >= step:
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def processes_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher started, by their rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for pair in environment:
            if pair.startswith(b"RANK="):
                found[int(pair[5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


def end(launcher: "subprocess.Popen[str]", within: float = WAIT) -> tuple[int, str, str]:
    """Exit code and output of a launcher that has to end soon."""
    try:
        out, err = launcher.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        launcher.kill()
        raise
    return launcher.returncode, out, err


def test_a_killed_process_ends_all_and_ctrl_c_stops_all(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(config, f"output.dir={run}", "training.max_steps=100000")
    wait_for(run, 2, launcher)
    first, second = processes_of(launcher)
    os.kill(second, signal.SIGKILL)
    code, _, err = end(launcher, within=30)
    assert code == 1
    assert "process 1 was killed by SIGKILL, so all were stopped" in err
    assert "another process of this run is gone" in err
    assert "Traceback" not in err
    assert not Path(f"/proc/{first}").exists()
    assert not (run / ".lock").exists()

    launcher = start(config, f"output.dir={run}", "training.max_steps=100000", "--resume")
    last = latest_checkpoint(run / "checkpoints")
    assert last is not None
    wait_for(run, int(last.name.rpartition("-")[2]) + 2, launcher)
    launcher.send_signal(signal.SIGINT)
    code, _, err = end(launcher)
    assert code == 130
    assert err.count("training: stopped after step") == 1
    assert "--resume" in err


@pytest.mark.skipif(not LONG, reason="minutes; set PLAIT_PARALLEL=1, or: make test-parallel")
def test_a_run_that_was_killed_ten_times_ends_as_one_that_was_not(
    config: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    longer = ("training.max_steps=400", "training.save_steps=5")
    code, _, err = end(start(config, f"output.dir={whole}", *longer))
    assert code == 0, err
    draw, seconds = random.Random(0), []
    for _ in range(10):
        last = latest_checkpoint(killed / "checkpoints")
        resume = ["--resume"] if (killed / "config.yaml").exists() else []
        launcher = start(config, f"output.dir={killed}", *longer, *resume)
        step = 0 if last is None else int(last.name.rpartition("-")[2])
        wait_for(killed, step + draw.randint(1, 20), launcher)
        time.sleep(draw.random() / 4)
        began = time.monotonic()
        os.kill(draw.choice(processes_of(launcher)), signal.SIGKILL)
        code, _, err = end(launcher, within=30)
        seconds.append(time.monotonic() - began)
        assert code == 1, err
    code, _, err = end(start(config, f"output.dir={killed}", *longer, "--resume"))
    assert code == 0, err
    assert_same(RunFolder.open(whole), RunFolder.open(killed))
    print(f"killed ten times; all ended within {max(seconds):.1f} s")
