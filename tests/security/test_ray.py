"""Another user of the machine against a running simulation, and the hosts that it asks for."""

import json
import os
import subprocess
import sys
import tempfile
import time
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

# What another user tries: prints what it could do.
INTRUDER = """
import json, os, sys
folder, address, pids = json.loads(sys.argv[1])
done = []
def attempt(name, act):
    try:
        act()
    except (PermissionError, ProcessLookupError):
        return
    except Exception as error:
        if "nauthenticated" not in f"{type(error).__name__} {error}":
            done.append(f"{name}: {type(error).__name__} {error}")
        return
    done.append(name)
attempt("list", lambda: os.listdir(folder))
attempt("write", lambda: open(f"{folder}/x", "w"))
attempt("token", lambda: open(f"{folder}/token"))
attempt("remove", lambda: os.rename(folder, folder + ".x"))
attempt("socket", lambda: os.stat(f"{folder}/ray/session_latest/sockets/raylet"))
for pid in pids:
    attempt(f"environ {pid}", lambda: open(f"/proc/{pid}/environ").read())
    attempt(f"memory {pid}", lambda: open(f"/proc/{pid}/mem", "rb+"))
for top in ("/tmp", "/dev/shm"):
    for where, _, names in os.walk(top):
        for name in names:
            path = os.path.join(where, name)
            if "ray" in path and os.access(path, os.R_OK) and os.stat(path).st_uid == 0:
                done.append(path)
if address:
    from ray._raylet import GcsClient
    client = GcsClient(address=address)
    attempt("read keys", lambda: client.internal_kv_keys(b"", None, 5))
    attempt("write keys", lambda: client.internal_kv_put(b"x", b"y", True, None, 5))
print(json.dumps(done))
"""


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
        (folder,) = Path(tempfile.gettempdir()).glob("plait-ray-*")
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
            address = ray.get_runtime_context().gcs_address
            words = json.dumps([str(folder), address, sorted(running)])
            done = subprocess.run(
                [sys.executable, "-c", INTRUDER, words],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                env={
                    "PATH": os.environ["PATH"],
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": "0" * 64,
                },
                capture_output=True,
                text=True,
                cwd="/",
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            seen["done"] = json.loads(done.stdout.splitlines()[-1])

    simulate(conduct, answerer, ["a"], home=tmp_path / "home", workers=1)
    asked = set(hosts.read_text().split())
    assert asked, "the recorder worked"
    assert {host for host in asked if host.startswith("169.254.") or "metadata" in host} == set()
    assert seen.get("done", []) == []
    assert not list(Path(tempfile.gettempdir()).glob("plait-ray-*"))
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
