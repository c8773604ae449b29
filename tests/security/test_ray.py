"""Another user of the machine against a running simulation, and the hosts that it asks for."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs plait[federated]")

from plait.federated.engines.flower.simulation import _environment, simulate
from plait.federated.protocol import Answer, Exchange, Order, Reply

NOBODY = 65534

# Notes the hosts that each Python process asks for or connects to.
RECORDER = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        what = args[1] if event == "socket.connect" else args[0]
        host = what[0] if isinstance(what, tuple) else what
        with open(os.environ["PLAIT_HOSTS"], "a") as file:
            file.write(f"{host}\\n")
sys.addaudithook(note)
"""

# Asks Ray without the token; prints what it could do.
STRANGER = """
import sys
from ray._raylet import GcsClient
client = lambda: GcsClient(address=sys.argv[1])
for act in (
    lambda: client().internal_kv_keys(b"", None, 5),
    lambda: client().internal_kv_put(b"x", b"y", True, None, 5),
):
    try:
        print("DONE", act())
    except Exception as error:
        print("REFUSED", type(error).__name__, error)
"""


def tried(folder: Path, pids: list[int]) -> list[str]:
    """What a user without rights could do to a simulation, its processes and its files."""
    done = list[str]()

    def attempt(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except (PermissionError, ProcessLookupError):
            return
        done.append(name)

    attempt("list", lambda: os.listdir(folder))
    attempt("write", lambda: (folder / "x").touch())
    attempt("token", lambda: (folder / "token").read_text())
    attempt("socket", lambda: os.stat(folder / "ray" / "session_latest" / "sockets" / "raylet"))
    for pid in pids:
        attempt(f"environ {pid}", lambda pid=pid: Path(f"/proc/{pid}/environ").read_bytes())
        attempt(f"memory {pid}", lambda pid=pid: os.open(f"/proc/{pid}/mem", os.O_RDWR))
    return done


def as_nobody(act: Callable[[], list[str]]) -> list[str]:
    """Call a function in a process of the user nobody."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write, json.dumps(act()).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return json.load(file)


def answerer() -> Answer:
    return lambda data: Reply(Order.unpack(data)[0].client).pack()


def processes(folder: Path) -> dict[int, str]:
    """Process -> command line, of those that were started for a simulation."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in words:
                found[int(entry.name)] = words
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_simulation_is_private_and_asks_no_cloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    hosts = tmp_path / "hosts"
    hosts.touch()
    before = dict(os.environ)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("PLAIT_HOSTS", str(hosts))
    seen: dict[str, Any] = {}

    def conduct(exchange: Exchange) -> None:
        replies = dict(exchange({"a": Order("train", round=1, client="a").pack()}))
        assert not Reply.unpack(replies["a"]).failed
        folder = seen["folder"] = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        running = processes(folder)
        assert any("gcs_server" in words for words in running.values())
        token = (folder / "token").read_text()
        assert len(token) == 64
        assert not any(token in words for words in running.values())
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
        logs, until = folder / "ray" / "session_latest" / "logs", time.monotonic() + 30
        while time.monotonic() < until:  # after it looked for a cloud
            text = "".join(p.read_text() for p in logs.glob("dashboard*.log"))
            if "Usage reporting is disabled" in text:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the dashboard process said nothing")
        if os.getuid() == 0:
            assert "token" in tried(folder, []), "its owner can do it"
            (folder / "x").unlink()
            seen["done"] = as_nobody(lambda: tried(folder, sorted(running)))
        address = ray.get_runtime_context().gcs_address
        stranger = {
            "PATH": os.environ["PATH"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
        }
        words = [sys.executable, "-c", STRANGER, address]
        asked = subprocess.run(
            words, env=stranger, capture_output=True, text=True, check=True, timeout=120
        )
        seen["answers"] = asked.stdout.splitlines()

    simulate(conduct, answerer, ["a"], home=tmp_path / "home", workers=1)
    asked = set(hosts.read_text().split())
    assert asked, "the recorder worked"
    assert {host for host in asked if host.startswith("169.254.") or "metadata" in host} == set()
    assert seen.get("done", []) == []
    assert len(seen["answers"]) == 2
    assert all("InvalidAuthToken" in line for line in seen["answers"]), seen["answers"]
    assert not seen["folder"].exists()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "HOME", "FLWR_HOME"):
        assert os.environ.get(name) == before.get(name)


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_A", "1")
    monkeypatch.delenv("PLAIT_B", raising=False)
    with _environment(PLAIT_A=None, PLAIT_B="2"):
        assert "PLAIT_A" not in os.environ
        assert os.environ["PLAIT_B"] == "2"
    assert os.environ["PLAIT_A"] == "1"
    assert "PLAIT_B" not in os.environ
