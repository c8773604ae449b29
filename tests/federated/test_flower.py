"""Flower as transport: a grid that misbehaves, the app that is shipped, and a simulation on Ray."""

import importlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="needs plait[federated]")

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from plait.federated.engines.flower import exchange as flower
from plait.federated.engines.flower import simulation
from plait.federated.engines.flower.exchange import TooFewNodes
from plait.federated.engines.flower.simulation import simulate
from plait.federated.engines.workers import Deadlines
from plait.federated.guard import TooFewUpdates
from plait.federated.protocol import Answer, Exchange, Order, Reply
from tests.support.flower import FakeGrid, Late, _task, exchange, exchanged, node, orders  # noqa: F401


def unready(kind: str, order: bytes) -> Any:
    """A node whose trainer still loads."""
    return {"failed": "FileNotFoundError: no socket"}


# Names ------------------------------------------------------------------------------------------


def test_orders_go_to_the_node_that_said_the_name_and_bytes_stay_bytes() -> None:
    grid = FakeGrid({5: node("b"), 3: node("a")})
    talk = exchange(grid, clients=["a", "b"])
    found = exchanged(talk, "a", "b")
    assert {name: reply.upload for name, reply in found.items()} == orders("a", "b")
    assert grid.sent == [(3, "query"), (5, "query"), (3, "train"), (5, "train")]
    exchanged(talk, "b")
    assert grid.sent[4:] == [(5, "train")], "names are asked once"


def test_missing_clients_are_named_after_a_bounded_wait() -> None:
    def mute(kind: str, order: bytes) -> None:
        return None

    grid = FakeGrid({1: node("a"), 2: mute, 3: unready})
    started = time.monotonic()
    with pytest.raises(TooFewNodes) as caught:
        exchanged(exchange(grid, wait=0.4), "a", "b", "c")
    assert time.monotonic() - started < 10  # bounded; a busy machine may stall for seconds
    assert isinstance(caught.value, TooFewUpdates), "the command line's exit code 3"
    assert str(caught.value) == (
        "federated: 2 of 3 clients are not online after 0.4 s: b, c. Online: a (node 1); node 3 "
        "cannot say its names: FileNotFoundError: no socket; node 2 does not answer. Start "
        "the missing ones with plait federate join, or wait longer."
    )


def test_enough_clients_are_enough() -> None:
    found = exchanged(exchange(FakeGrid({1: node("a")}), wait=0.2, least=1), "a", "b")
    assert not found["a"].failed
    assert found["b"].failed == "ConnectionError: no node of it is online"
    with pytest.raises(TooFewNodes, match=r"1 of 2 clients are not online after 0\.2 s: b"):
        exchanged(exchange(FakeGrid({1: node("a")}), wait=0.2, least=2), "a", "b")


def test_a_name_belongs_to_the_first_node_until_that_leaves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = FakeGrid({1: node("a"), 2: node("a"), 3: node("b"), 4: node("x")})
    talk = exchange(grid, clients=["a", "b"])
    exchanged(talk, "a", "b")
    assert talk.refused == {
        2: "it says it is 'a', which node 1 is already",
        4: "it says it is 'x', which is not a client of this run",
    }
    assert "node 2 is refused: it says it is 'a', which node 1 is already" in caplog.text
    assert (1, "train") in grid.sent
    assert (2, "train") not in grid.sent
    del grid.nodes[1]
    exchanged(talk, "a", "b")
    assert (2, "train") in grid.sent


def test_nodes_that_leave_and_come_back_are_asked_again() -> None:
    grid = FakeGrid({1: node("a"), 2: node("b")})
    talk = exchange(grid)
    exchanged(talk, "a", "b")
    del grid.nodes[1]
    assert exchanged(talk, "a", "b")["a"].failed == "ConnectionError: no node of it is online"
    grid.nodes[9] = node("a")
    assert not exchanged(talk, "a", "b")["a"].failed
    assert grid.sent[-2:] == [(9, "train"), (2, "train")]


def test_a_trainer_that_is_not_ready_is_asked_again() -> None:
    asked = []

    def loading(kind: str, order: bytes) -> Any:
        asked.append(kind)
        if len(asked) < 3:
            return unready(kind, order)
        return node("a")(kind, order)

    assert not exchanged(exchange(FakeGrid({1: loading})), "a")["a"].failed
    assert asked == ["query", "query", "query", "train"]
    with pytest.raises(RuntimeError, match="node 1 does not start: FileNotFoundError: no socket"):
        exchanged(exchange(FakeGrid({1: unready}), ready=True), "a")


# Orders -----------------------------------------------------------------------------------------


def test_every_fault_of_a_node_is_a_failed_reply() -> None:
    acts: dict[str, Any] = {
        "raised": Error(
            ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'ValueError'>\nat ^^^\n more\n"
        ),
        "gone": Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"),
        "told": {"failed": "ConnectionRefusedError: no trainer"},
        "odd": {"something": 1},
        "silent": None,
        "good": Reply("good").pack(),
        "junk": b"\xff",
    }
    nodes = {
        i: node(name, act=lambda kind, order, does=does: does)
        for i, (name, does) in enumerate(acts.items())
    }
    found = dict(exchange(FakeGrid(nodes))(orders(*acts)))
    assert found.pop("junk") == b"\xff", "what it means is for the server to say"
    assert {name: Reply.unpack(data).failed for name, data in found.items()} == {
        "raised": "CLIENT_APP_RAISED_EXCEPTION: <class 'ValueError'> .. more",
        "gone": "NODE_UNAVAILABLE: Node Unavailable",
        "told": "ConnectionRefusedError: no trainer",
        "odd": "the reply holds no bytes",
        "silent": "TimeoutError: no reply within 1 s",
        "good": "",
    }


def test_an_order_that_flower_does_not_take_fails() -> None:
    grid = FakeGrid({1: node("a")})
    talk = exchange(grid)
    talk.meet(["a"])
    grid.takes = False
    found = exchanged(talk, "a")
    assert found["a"].failed == "ConnectionError: Flower took no order of 5 bytes"


def test_late_and_doubled_replies_are_dropped() -> None:
    rounds = count(1)

    def slow(kind: str, order: bytes) -> Any:
        if next(rounds) == 1:
            return [Late(1.4), Reply("a", upload=b"old").pack()]
        return [Reply("a", upload=b"new").pack(), Reply("a", upload=b"again").pack()]

    grid = FakeGrid({1: node("a", act=slow)})
    talk = exchange(grid)
    assert exchanged(talk, "a")["a"].failed == "TimeoutError: no reply within 1 s"
    time.sleep(0.6)  # the old reply is there now
    assert [exchanged(talk, "a")["a"].upload for _ in range(2)] == [b"new", b"new"]


def test_the_first_deadline_is_for_a_cold_start() -> None:
    delays = iter([1.0, 0.0, 1.0])

    def slow(kind: str, order: bytes) -> Any:
        return [Late(next(delays)), Reply("a").pack()]

    talk = exchange(FakeGrid({1: node("a", act=slow)}), deadlines=Deadlines(5.0, 0.1))
    assert not exchanged(talk, "a")["a"].failed
    limit = talk.deadlines.limit()
    assert 3.0 < limit < 5.0, "3 x the only time so far"
    assert not exchanged(talk, "a")["a"].failed
    assert not exchanged(talk, "a")["a"].failed


def test_orders_are_built_one_at_a_time() -> None:
    built = []

    class Lazy(Mapping[str, bytes]):
        def __getitem__(self, name: str) -> bytes:
            built.append(name)
            return name.encode()

        def __iter__(self) -> Iterator[str]:
            return iter("abc")

        def __len__(self) -> int:
            return 3

    talk = exchange(FakeGrid({i: node(name) for i, name in enumerate("abc")}), at_once=1)
    seen = [(name, list(built)) for name, _ in talk(Lazy())]
    assert seen == [("a", ["a"]), ("b", ["a", "b"]), ("c", ["a", "b", "c"])]


def test_a_node_with_two_clients_gets_one_order_at_a_time() -> None:
    def slow(kind: str, order: bytes) -> Any:
        return [Late(0.7), Reply("", upload=order).pack()]

    grid = FakeGrid({1: node("a", "b", act=slow)})
    found = exchanged(exchange(grid), "a", "b")  # 0.7 + 0.7 s, and each may take 1 s
    assert {name: reply.upload for name, reply in found.items()} == orders("a", "b")


def test_an_order_whose_worker_died_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "_PAUSE", 0.05)
    died, tries = Error(ErrorCode.UNKNOWN, "<class 'ray.exceptions.ActorDiedError'>"), count(1)

    def once(kind: str, order: bytes) -> Any:
        return died if next(tries) == 1 else Reply("a").pack()

    grid = FakeGrid({1: node("a", act=once), 2: node("b", act=lambda kind, order: died)})
    found = exchanged(exchange(grid), "a", "b")
    assert not found["a"].failed
    assert found["b"].failed == "ChildProcessError: its worker process ended"
    assert [kind for n, kind in grid.sent if n == 2] == ["query", *3 * ["train"]]


def test_an_order_that_reached_no_worker_is_sent_until_one_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a dead worker starts again, however long that takes, orders for it do not count."""
    monkeypatch.setattr(flower, "_PAUSE", 0.01)
    died, tries = Error(ErrorCode.UNKNOWN, "<class 'ray.exceptions.ActorUnavailableError'>"), 12
    sent: list[str] = []

    def starts(kind: str, order: bytes) -> Any:
        sent.append(kind)
        return died if len(sent) < tries else Reply("a").pack()

    talk = exchange(
        FakeGrid({1: node("a", act=starts)}),
        deadlines=Deadlines(60.0, 1.0),
        delivered=lambda key: False,
    )
    assert not exchanged(talk, "a")["a"].failed
    assert len(sent) == tries > flower._TRIES
    assert talk._limit() == 60.0, "the next worker may be cold"

    never = exchange(
        FakeGrid({1: node("a", act=lambda kind, order: died)}),
        deadlines=Deadlines(0.2, 1.0),
        delivered=lambda key: False,
    )
    text = "ChildProcessError: no worker process started in 0.2 s"
    assert exchanged(never, "a")["a"].failed == text


def test_only_an_order_that_was_delivered_counts_as_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "_PAUSE", 0.01)
    died = Error(ErrorCode.UNKNOWN, "<class 'ray.exceptions.ActorDiedError'>")
    grid = FakeGrid({1: node("a", act=lambda kind, order: died)})
    # m1 is the hello; of the orders m2, m3, .. every second one is delivered.
    talk = exchange(
        grid, deadlines=Deadlines(60.0, 60.0), delivered=lambda key: int(key[1:]) % 2 == 1
    )
    assert exchanged(talk, "a")["a"].failed == "ChildProcessError: its worker process ended"
    assert [kind for _, kind in grid.sent] == ["query", *2 * flower._TRIES * ["train"]]


def test_a_worker_marks_the_orders_that_it_receives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    content = RecordDict({"plait": ConfigRecord({"order": b"o", "limit": 60.0})})
    context: Any = SimpleNamespace(node_config={"partition-id": 0})
    for kind, key in (("query", "hello"), ("train", "order")):
        message = Message(content, 1, kind)
        message.metadata.__dict__["_message_id"] = key
        simulation._respond(lambda: bytes, ["a"], 1, str(tmp_path), message, context)
    assert [path.name for path in tmp_path.iterdir()] == ["order"]


def test_flwr_still_reads_its_telemetry_switch_from_this_constant() -> None:
    """A simulation sets it, since flwr may have been imported before its environment was set."""
    from flwr.supercore import telemetry

    assert telemetry.FLWR_TELEMETRY_ENABLED in ("0", "1")


def test_the_check_ends_an_exchange() -> None:
    def ended() -> None:
        raise RuntimeError("the simulation ended")

    with pytest.raises(RuntimeError, match="the simulation ended"):
        exchanged(exchange(FakeGrid({}), check=ended), "a")
    with pytest.raises(ValueError, match=r"wait = 0. Give seconds above 0."):
        exchange(FakeGrid({}), wait=0)


def test_without_flower_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "plait.federated.engines.flower.exchange")
    with pytest.raises(ImportError, match=r'Run pip install "plait\[federated\]"\.'):
        importlib.import_module("plait.federated.engines.flower.exchange")


# Ray --------------------------------------------------------------------------------------------


class Odd(Exception):
    """An error with a type of its own."""


def toy(pid_file: str) -> Answer:
    """Answers with facts of its process; client c1 kills it once, and hangs in round 3."""
    with open(pid_file, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")

    def answer(data: bytes) -> bytes:
        order, _ = Order.unpack(data)
        if (order.client, order.round) == ("c1", 2) and not os.path.exists(f"{pid_file}.died"):
            open(f"{pid_file}.died", "w").close()
            os._exit(7)
        if (order.client, order.round) == ("c1", 3):
            time.sleep(600)
            open(f"{pid_file}.woke", "w").close()
        if (order.client, order.round) == ("c0", 2):
            raise ValueError("too hot")
        facts = {"pid": os.getpid(), "threads": torch.get_num_threads()}
        return Reply(order.client, metrics=facts).pack()

    return answer


@pytest.mark.slow
def test_a_simulation_survives_its_clients_and_raises_what_its_server_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("FLWR_HOME", raising=False)
    names, pids, used = ["c2", "c0", "c1"], tmp_path / "pids", set[str]()

    def conduct(exchange: Exchange) -> None:
        nonlocal used
        for number in (1, 2, 3):
            asked = {n: Order("train", round=number, client=n).pack() for n in names}
            replies = exchange(asked)
            if number == 3:
                assert {next(iter(replies))[0] for _ in range(2)} == {"c0", "c2"}
                raise Odd("while c1 hangs")
            found = {name: Reply.unpack(data) for name, data in replies}
            assert sorted(found) == ["c0", "c1", "c2"]
            if number == 1:
                assert not any(reply.failed for reply in found.values())
                assert {reply.metrics["threads"] for reply in found.values()} == {1}
                used = {str(reply.metrics["pid"]) for reply in found.values()}
                assert used <= set(pids.read_text().split())
                assert len(pids.read_text().split()) <= 2, "built once in each worker"
            else:
                assert found["c0"].failed == "ValueError: too hot"
                assert not found["c1"].failed, "it was asked again"
                assert not found["c2"].failed
                assert len(pids.read_text().split()) > len(used), "in a new process"

    with pytest.raises(Odd, match="while c1 hangs"):
        simulate(
            conduct,
            partial(toy, str(pids)),
            names,
            home=tmp_path / "home",
            workers=2,
            deadlines=Deadlines(600.0, 300.0),  # a worker that died imports torch anew
        )
    assert not (tmp_path / "pids.woke").exists(), "a worker that hangs is not waited for"
    assert not ray.is_initialized()
    assert "FLWR_HOME" not in os.environ
    assert not (tmp_path / "user").exists(), "nothing is written to the user's home"
    with pytest.raises(ValueError, match=r"engine.workers = 0. Give 1 or more."):
        simulate(conduct, partial(toy, str(pids)), names, home=tmp_path / "home", workers=0)


def killer() -> Answer:
    """Answers that end their process for c1, always."""

    def answer(data: bytes) -> bytes:
        order, _ = Order.unpack(data)
        if order.client == "c1":
            os._exit(7)
        return Reply(order.client).pack()

    return answer


@pytest.mark.slow
def test_a_client_that_kills_its_worker_again_and_again_fails(tmp_path: Path) -> None:
    """Ray's workers mark what they receive, so each death counts, and only deaths do."""
    names = ["c0", "c1"]
    replies = simulate(
        lambda exchange: dict(exchange({n: Order("train", client=n).pack() for n in names})),
        killer,
        names,
        home=tmp_path / "home",
        workers=1,
        deadlines=Deadlines(600.0, 300.0),
    )
    failed = {name: Reply.unpack(data).failed for name, data in replies.items()}
    assert failed == {"c0": "", "c1": "ChildProcessError: its worker process ended"}
