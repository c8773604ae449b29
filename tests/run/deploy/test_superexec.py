"""The programs between Flower and the client program: what they start, and how long they sleep."""

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs plait[federated]")

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supernode.runtime.run_clientapp import run_clientapp

from plait.run.deploy.app import superexec, supernode


def spec(task: TaskType, **changed: Any) -> ExecutionSpec:
    """An order to start a program."""
    given: dict[str, Any] = {
        "runtime_api_address": "127.0.0.1:1",
        "token": "secret",
        "insecure": True,
        "root_certificates_path": None,
        "runtime_dependency_install": False,
        "parent_pid": os.getpid(),
        "suppress_output": False,
        "task_id": 1,
    }
    return ExecutionSpec(task_type=task, **{**given, **changed})


def noted(**given: Any) -> None:
    """In place of flwr's client program: note what it is given, its process and its parent."""
    found = {"given": given, "pid": os.getpid(), "parent": os.getppid()}
    file = Path(given["token"])
    file.with_suffix(".new").write_text(json.dumps(found))
    file.with_suffix(".new").rename(file)


def read(file: Path) -> dict[str, Any]:
    """What `noted` wrote."""
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, "no program was started"
        time.sleep(0.02)
    return json.loads(file.read_text())


def test_client_programs_are_forks_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superexec, "run_clientapp", noted)
    executor = superexec.ForkExecutor()
    for name in ("a", "b"):
        executor.launch(spec(TaskType.CLIENT_APP, token=str(tmp_path / name)))
    a, b = (read(tmp_path / name) for name in ("a", "b"))
    assert a["pid"] != b["pid"]
    assert a["parent"] == b["parent"] != os.getpid()
    inspect.signature(run_clientapp).bind(**a["given"])  # flwr takes them
    assert a["given"]["parent_pid"] == os.getpid()
    assert a["given"]["certificates"] is None


def test_other_programs_are_started_as_by_flwr(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append(words))
    executor = superexec.ForkExecutor.__new__(superexec.ForkExecutor)  # no fork server
    executor.launch(spec(TaskType.SERVER_APP, token="t"))
    assert [words[0] for words in started] == ["flwr-serverapp"]


def test_the_supernode_starts_plaits_superexec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda words: words)
    words: Any = supernode.start(["flower-superexec", "--insecure"])
    assert words == [sys.executable, "-P", superexec.__file__, "--insecure"]
    with pytest.raises(RuntimeError, match=r"flwr starts 'other', .* Install flwr < 1\.42"):
        supernode.start(["other"])


def test_waits_grow_while_no_message_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    sleep = supernode.Sleep()
    for _ in range(60):
        sleep(3.0)
    sleep(0.5)  # a message, which waits for its program
    sleep(3.0)
    assert slept[:2] == [0.1, 0.1 * 1.05]
    assert slept[59] == 1.0
    assert slept[60:] == [0.1, 0.1]
