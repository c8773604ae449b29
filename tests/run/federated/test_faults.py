"""Faults of a whole run: the server killed at any moment, a poisoned fifth, two configs."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.federated.faults import kill_runs, saved
from benchmarks.federated.poison import measure, tables
from plait.federated.protocol import Order, Reply
from plait.run.federated.clients import make_clients
from plait.run.federated.conduct import conduct
from plait.run.federated.engines import simulate
from plait.run.federated.setup import prepare_federation
from tests.support.federated_runs import config, lines
from tests.support.federated_states import equal, states


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process to kill it")
def test_a_server_killed_at_random_moments_resumes_to_the_same_bits(tmp_path: Path) -> None:
    rows = kill_runs(4, tmp_path, seed=1)
    assert [row["exit_code"] for row in rows] == [-9] * 4
    assert [row["resumed_exit_code"] for row in rows] == [0] * 4
    assert all(row["equal"] for row in rows)


@pytest.mark.parametrize("moment", ["between", "write", "rename"])
def test_a_server_stopped_around_its_checkpoint_resumes_to_the_same_bits(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between aggregate and checkpoint, in the middle of the write, before the rename."""
    changes: dict[str, Any] = {
        "federated": {"method": "fedalora"}, "local": {"rounds": 3}, "evaluation": {"every": 0},
    }  # fmt: skip
    whole = simulate(config(tmp_path / "whole", changes))
    cut = config(tmp_path / "cut", changes)
    real_fsync, real_replace = os.fsync, os.replace

    def place(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def fsync(handle: int) -> None:
        if moment == "write" and ".round-000002.ckpt" in place(handle):
            os.ftruncate(handle, 40)
            os._exit(9)  # nothing is tidied up
        real_fsync(handle)

    def rename(source: Any, target: Any) -> None:
        if moment == "rename" and str(target).endswith("round-000002.ckpt"):
            os._exit(9)
        real_replace(source, target)

    def between(record: Any) -> None:
        if moment == "between" and record.round == 2:
            os._exit(9)

    pid = os.fork()
    if not pid:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", rename)
        try:
            simulate(cut, done=between)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    server = Path(cut.output.dir) / "server"
    assert [path.name for path in server.glob("round-*")] == ["round-000001.ckpt"]
    assert bool(list(server.glob(".round-*"))) == (moment != "between")
    simulate(cut, resume=True)
    assert saved(Path(cut.output.dir)) == saved(whole.path)
    assert not list(server.glob(".round-*"))


@pytest.mark.slow
def test_a_colluding_fifth_changes_the_loss_by_little(tmp_path: Path) -> None:
    """The default guard tolerates what ruins the plain mean; a clean run keeps its bits."""
    cases = {"off": [("scaled", 2)], "default": [("flip", 2), ("scaled", 2)]}
    rows = measure(1, 2, tmp_path, ("fedit",), cases, n=160)
    ratio = {(row["guard"], row["attack"]): row["to_clean"][0] for row in rows}
    assert ratio["default", "none"] == 1
    assert ratio["off", "scaled"] > 1.5
    for row in rows:
        if row["guard"] == "default" and row["poisoned"]:
            assert row["to_clean"][0] < 1.1
            assert row["rejected"] == [4]
        assert row["rejected_honest"] == row["less_weight_honest"] == [0]
    assert "| scaled | `fedit` | default | " in tables(rows)


def test_a_client_of_another_config_or_run_says_so(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federated": {"method": "fedit"}, "evaluation": {"every": 0}}
    server = config(tmp_path / "server", changes)
    setup = prepare_federation(server)
    good = make_clients(setup, tmp_path / "private")
    others = {
        "client-1": {"method": {"name": "lora", "r": 3, "target_modules": ["q_proj"]}},
        "client-2": {"federated": {"method": "fedit", "run": "second"}},
    }
    sites = {
        name: make_clients(
            prepare_federation(config(tmp_path / name, changes | change)), tmp_path / "other"
        )
        for name, change in others.items()
    }
    seen: dict[str, str] = {}

    def exchange(orders: Any) -> Any:
        for name in orders:
            data = sites.get(name, good).answer(orders[name])
            seen[name] = Reply.unpack(data).failed
            yield name, data

    conduct(setup, exchange)
    assert "has another method or adapter than the server" in seen["client-1"]
    assert "of run 'run'; here are client-0, client-1, client-2 of run 'second'" in seen["client-2"]
    assert seen["client-0"] == ""


def test_what_is_no_order_or_no_reply_is_a_failure_and_no_crash(tmp_path: Path) -> None:
    server = config(tmp_path / "server", {"evaluation": {"every": 0}, "local": {"rounds": 1}})
    loaded = prepare_federation(server)
    answer = make_clients(loaded, tmp_path / "private").answer
    assert "CorruptFrame" in Reply.unpack(answer(b"no order")).failed
    assert Reply.unpack(answer(Order("hello").pack())).client == "client-0"
    sent = iter((b"", b"\x00\x00\xff\xff{", b"\x00\x00\x00\x02{}"))

    def exchange(orders: Any) -> Any:
        for name in orders:
            data = answer(orders[name])
            yield name, data
            yield name, next(sent)  # a second, broken reply loses nothing

    folder = conduct(loaded, exchange)
    plain = simulate(
        config(tmp_path / "plain", {"evaluation": {"every": 0}, "local": {"rounds": 1}})
    )
    assert equal(states(folder), states(plain))


def test_metrics_of_a_client_are_numbers_or_left_out(tmp_path: Path) -> None:
    changes = {"evaluation": {"after_training": True}, "local": {"rounds": 1}}
    server = config(tmp_path / "server", changes)
    loaded, records = prepare_federation(server), []
    answer = make_clients(loaded, tmp_path / "private").answer

    def exchange(orders: Any) -> Any:
        for name in orders:
            reply = Reply.unpack(answer(orders[name]))
            told = {"loss": float("inf"), "note": "<b>", "rows": 10**400, "steps": 1}
            own = {"failed": ["<b>"]} if name == "client-1" else told
            yield name, replace(reply, metrics=told, held_out=own).pack()

    folder = conduct(loaded, exchange, done=records.append)
    assert records[0].metrics["client-0"] == {"steps": 1}
    assert records[0].held_out["client-0"] == {"steps": 1}
    assert records[0].held_out["client-1"] == {"failed": "['<b>']"}
    measured = [row["clients"] for row in lines(folder) if row["kind"] == "evaluation"]
    assert [row["client-0"] for row in measured] == [{"steps": 1}, {"steps": 1}]
