"""Faults and whole runs of Flower's programs, which take minutes: make test-deploy."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from plait.run.deploy.deployment import Deployment
from plait.run.deploy.join import join
from plait.run.deploy.serve import serve
from plait.run.deploy.submit import submit
from plait.run.federated.folder import read_rounds
from plait_cli import main
from tests.support.deployed import Background, cleaned, deployment, free_port, programs, toy

pytest.importorskip("flwr")
pytestmark = pytest.mark.skipif(
    not os.environ.get("PLAIT_DEPLOY"), reason="takes minutes; make test-deploy runs it"
)


def start(running: list[Background], folder: Path, name: str, act: Callable, *args: Any) -> Any:
    """Put a function to the background."""
    running.append(Background(folder / f"{name}.txt", act, *args))
    return running[-1]


def program(folder: Path, name: str) -> psutil.Process:
    """The one program of that name."""
    (found,) = [p for p in programs(folder) if any(w.endswith(name) for w in p.cmdline()[:3])]
    return found


def statuses(own: Deployment) -> list[str]:
    """Of all runs, newest first."""
    found = own.runs()
    assert found is not None
    return [row["status"] for row in found]


def test_a_lost_node_comes_back_and_ctrl_c_stops_a_run(tmp_path: Path) -> None:
    own = deployment(tmp_path, ["a"])
    with cleaned(tmp_path) as running:
        link = start(running, tmp_path, "serve", serve, own)
        link.wait_for("Next, ")
        assert "registered: a" in link.shown
        node = start(running, tmp_path, "join", join, own, "a", tmp_path / "socket")
        node.wait_for("accepted, node")
        run = start(running, tmp_path, "run", submit_forever, own, toy(tmp_path / "toy"))
        run.wait_for("mode forever")
        run.signal(signal.SIGINT)
        assert run.result() == "returned 130"
        assert statuses(own) == ["finished:stopped"]
        # Lost without a word, the node counts as online for up to 60 s.
        program(tmp_path, "flower-supernode").kill()
        node.wait_for("Starting it again.")
        node.wait_for("counts as online for up to 60 s.")
        end = time.monotonic() + 110
        while node.shown.count("accepted, node") < 2:
            assert time.monotonic() < end, node.shown
            assert node.process.is_alive(), node.shown
            time.sleep(0.5)
        said: list[str] = []
        assert submit(own, tmp_path / "toy", said.append) == 0
        assert any(f"reply: a at {tmp_path / 'socket'}" in text for text in said)
        node.stop()
        assert node.shown.splitlines()[-1] == "returned None"
        # It left in order, so it may come back at once.
        again = start(running, tmp_path, "again", join, own, "a", tmp_path / "socket")
        again.wait_for("accepted, node")
        assert "not accepted" not in again.shown


def submit_forever(own: Deployment, app: Path, say: Any) -> int:
    """A run without an end."""
    return submit(own, app, say, {"mode": "forever"})


def test_keys_outlive_a_killed_server(tmp_path: Path) -> None:
    own = deployment(tmp_path, ["a"])
    with cleaned(tmp_path) as running:
        link = start(running, tmp_path, "serve", serve, own)
        link.wait_for("Next, ")
        node = start(running, tmp_path, "join", join, own, "a", tmp_path / "socket")
        node.wait_for("accepted, node")
        run = start(running, tmp_path, "run", submit_forever, own, toy(tmp_path / "toy"))
        run.wait_for("mode forever")
        program(tmp_path, "flower-superlink").kill()
        assert "DeployError: the SuperLink ended with exit code -9" in link.result()
        left = [p for p in programs(tmp_path) if "flwr-serverapp" in " ".join(p.cmdline())]
        assert not left  # the run's program ended with its server
        (own.certs / "a.pub").unlink()
        again = start(running, tmp_path, "serve-again", serve, own)
        again.wait_for("No client has a key")
        again.wait_for("Next, ")
        assert run.result() == "returned 1"
        assert statuses(own) == ["finished:failed"]
        # The client has waited, and its key is known.
        said: list[str] = []
        assert submit(own, tmp_path / "toy", said.append) == 0
        assert any("reply: a at" in text for text in said)
        assert "not accepted" not in node.shown


def command(*words: str, say: Any) -> int:
    """`plait federate WORDS`, with what it prints."""
    import contextlib
    import io

    class Out(io.TextIOBase):
        def write(self, text: str) -> int:
            if text.strip():
                say(text.rstrip())
            return len(text)

    with contextlib.redirect_stdout(Out()), contextlib.redirect_stderr(Out()):
        return main(["federate", *words])


def test_a_deployed_run_has_the_bits_of_a_simulated_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certs = ["certs", str(tmp_path / "certs"), "--host", "127.0.0.1", "--clients", "a,b"]
    assert main(["federate", *certs]) == 0
    config = {
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "federated": {"method": "fedalora"},
        "data": {"train": "builtin:shift?n=24", "validation": "builtin:shift?n=8"},
        "partition": {"kind": "iid", "clients": ["a", "b"]},
        "local": {"rounds": 2, "steps": 1, "batch_size": 4},
        "evaluation": {"every": 0},
        "timeouts": {"wait": 100},
        "output": {"dir": str(tmp_path / "run")},
        "deploy": {
            "address": f"127.0.0.1:{free_port()}",
            "certs": str(tmp_path / "certs"),
            "home": str(tmp_path / "home"),
        },
    }
    file, alone = tmp_path / "fed.yaml", tmp_path / "alone"
    file.write_text(yaml.safe_dump(config))
    assert main(["federate", "simulate", str(file), f"output.dir={alone}", "local.rounds=3"]) == 0
    with cleaned(tmp_path) as running:
        link = start(running, tmp_path, "serve", command, "serve", str(file))
        link.wait_for("Next, ")
        for name in ("a", "b"):
            node = start(running, tmp_path, name, command, "join", str(file), "--client", name)
            node.wait_for("accepted, node")
        assert main(["federate", "run", str(file)]) == 0
        assert main(["federate", "resume", str(tmp_path / "run"), "local.rounds=3"]) == 0
        capsys.readouterr()
        assert main(["federate", "status", str(tmp_path / "run")]) == 0
        shown = capsys.readouterr().out
        assert shown.count("finished:completed") == 2
        assert "round 3 of 3, 2 of 2 updates" in shown
    states = [sorted((f / "server").glob("*.ckpt"))[-1] for f in (tmp_path / "run", alone)]
    assert states[0].name == states[1].name == "round-000003.ckpt"
    assert states[0].read_bytes() == states[1].read_bytes()
    rows = read_rounds(tmp_path / "run" / "metrics.jsonl")
    assert [row["round"] for row in rows] == [1, 2, 3]
