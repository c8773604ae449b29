"""Worker processes: the bits of one process, and clients that raise, die, hang or come back."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.federated import algorithm
from plait.federated.client import LocalTraining, Roster, Site, Trained
from plait.federated.engines.workers import Deadlines, Workers
from plait.federated.guard import GuardOptions, TooFewUpdates
from plait.federated.protocol import Answer, Order, Reply, failure
from plait.federated.server import Server, ServerOptions
from plait.testing import tiny
from tests.support.federation import NAMES, federation, lora, run, training

FAST = Deadlines(first=60.0, floor=6.0)


def answer_with(act: Callable[[str], Any]) -> Answer:
    """An answerer that says its process id, after `act`."""

    def answer(data: bytes) -> bytes:
        order, _ = Order.unpack(data)
        act(order.client)
        return Reply(order.client, metrics={"pid": os.getpid()}).pack()

    return answer


def misbehave(client: str) -> None:
    if client == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if client == "hangs":
        while True:
            time.sleep(0.01)
    if client == "slow":
        time.sleep(1.0)


def nothing(client: str) -> None:
    """Answer at once."""


def orders(*names: str) -> dict[str, bytes]:
    return {name: Order("train", client=name).pack() for name in names}


def exchanged(workers: Workers, *names: str) -> dict[str, Reply]:
    return {name: Reply.unpack(data) for name, data in workers(orders(*names))}


def test_a_dead_and_a_hung_worker_are_replaced_and_cost_only_their_own_order() -> None:
    deadlines = Deadlines(first=4.0, floor=4.0)
    with Workers(partial(answer_with, misbehave), 2, deadlines, threads=1) as workers:
        found = exchanged(workers, "a", "dies", "b", "hangs", "c")
        assert sorted(found) == ["a", "b", "c", "dies", "hangs"]
        assert "ChildProcessError: its process ended, exit code -9" in found["dies"].failed
        assert "TimeoutError: no reply within 4 s" in found["hangs"].failed
        assert not any(found[name].failed for name in "abc")
        again = exchanged(workers, "a", "b")
        assert not any(reply.failed for reply in again.values())
        ids = [w.process.pid for w in workers._pool]
    for pid in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_dies_while_it_is_idle_costs_no_order() -> None:
    with Workers(partial(answer_with, nothing), 1, FAST, threads=1) as workers:
        workers.ready()
        process = workers._pool[0].process
        process.kill()
        process.join()
        assert not any(reply.failed for reply in exchanged(workers, "a", "b").values())


def test_workers_are_forks_of_one_server_with_the_libraries() -> None:
    """One import for all of them, and none of this process's threads in them."""

    def parents() -> set[int]:
        pids = [worker.process.pid for worker in workers._pool]
        stats = [Path(f"/proc/{pid}/stat").read_text(encoding="ascii") for pid in pids]
        return {int(stat.rpartition(")")[2].split()[1]) for stat in stats}

    with Workers(partial(answer_with, nothing), 2, FAST, threads=1) as workers:
        workers.ready()
        (server,) = parents()
        assert server != os.getpid()
    with Workers(partial(answer_with, nothing), 1, FAST, threads=1) as workers:
        workers.ready()
        assert parents() == {server}


def test_workers_end_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    forkserver._forkserver._stop()  # workers print where a new server prints: to this capture
    with Workers(partial(answer_with, nothing), 1, FAST, threads=1) as workers:
        exchanged(workers, "a")
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err


def test_two_orders_run_at_the_same_time_in_two_processes() -> None:
    with Workers(partial(answer_with, misbehave), 2, FAST, threads=1) as workers:
        workers.ready()
        found = exchanged(workers, "slow", "a")
    assert found["slow"].metrics["pid"] != found["a"].metrics["pid"]


def fails() -> Answer:
    raise ValueError("no such model. Correct model.name.")


def dies() -> Answer:
    os._exit(7)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (fails, ValueError, "^no such model. Correct model.name.$"),
        (dies, RuntimeError, "ended with exit code 7"),
    ],
)
def test_a_worker_that_cannot_be_built_ends_the_run(make: Any, kind: Any, text: str) -> None:
    with Workers(make, 1, FAST) as workers, pytest.raises(kind, match=text):
        exchanged(workers, "a")
    with Workers(make, 1, FAST) as workers, pytest.raises(kind, match=text):
        workers.ready()


def test_deadlines_follow_the_slowest_kind_of_exchange() -> None:
    deadlines = Deadlines(first=100.0, floor=2.0)
    assert deadlines.limit() == 100.0
    deadlines.note(0.1)
    assert deadlines.limit() == 2.0
    deadlines.begin()
    for seconds in (1.0, 2.0, 50.0):
        deadlines.note(seconds)
    assert deadlines.limit() == 6.0
    with pytest.raises(ValueError, match=r"timeouts.floor = 0. Give seconds above 0."):
        Deadlines(1.0, 0)


# Whole runs -------------------------------------------------------------------------------------


def misbehaving(folder: Path, client: str, round: int, fault: str) -> Answer:
    """All clients of the small federation; one of them is faulty in one round."""
    made = training()

    def train(model: Any, name: str, number: int) -> Trained:
        if (name, number) == (client, round):
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hangs":
                time.sleep(600)
            raise RuntimeError("out of memory")
        return made(model, name, number)

    configs = {name: lora(2) for name in NAMES}
    return Site(Roster(tiny.llama(), configs, algorithm("fedalora")), train, folder).answer


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("killed", "ChildProcessError: its process ended, exit code -9"),
        ("hangs", "TimeoutError: no reply within"),
        ("raises", "RuntimeError: out of memory"),
    ],
)
def test_a_faulty_client_costs_its_update_and_its_private_side_stays(
    fault: str, text: str, tmp_path: Path
) -> None:
    """The run equals one in which that client was never asked in that round."""
    server = Server(
        Roster(tiny.llama(), {name: lora(2) for name in NAMES}, algorithm("fedalora")),
        tmp_path / "server",
        ServerOptions(rounds=3),
    )
    make = partial(misbehaving, tmp_path / "clients", "b", 2, fault)
    records = []
    with Workers(make, 1, Deadlines(first=60.0, floor=6.0), threads=1) as workers:
        while server.round < 3:
            records.append(server.step(workers))
    assert records[1].accepted == ["a", "c"]
    assert text in records[1].failed["b"]
    assert records[2].accepted == [*NAMES]

    def absent(model: Any, name: str, number: int) -> Trained:
        if (name, number) == ("b", 2):
            raise RuntimeError
        return training()(model, name, number)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = federation(tmp_path / "other", "fedalora", train=absent, rounds=3)
        run(other)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, other.state.tensors[k]) for k, x in server.state.tensors.items())


def test_a_round_is_retried_and_then_an_error(tmp_path: Path) -> None:
    roster = Roster(tiny.llama(), {name: lora(2) for name in NAMES}, algorithm("fedit"))
    options = ServerOptions(rounds=1, retries=1, guard=GuardOptions(min_updates=3))
    server, calls = Server(roster, tmp_path / "server", options), list[int]()
    answer = Site(roster, training(), tmp_path / "clients").answer

    def flaky(orders: Any) -> Any:
        calls.append(len(orders))
        for name in orders:
            lost = name == "b" and len(calls) == 1
            yield name, failure(name, "lost") if lost else answer(orders[name])

    assert server.step(flaky).accepted == [*NAMES]
    assert calls == [3, 3]
    again = Server(roster, tmp_path / "other", options)

    def lost(orders: Any) -> Any:
        return ((name, failure(name, "lost")) for name in orders)

    with pytest.raises(TooFewUpdates, match="a failed: lost"):
        again.step(lost)
    assert again.round == 0


def test_the_steps_of_local_training_are_taken_from_the_rows() -> None:
    assert LocalTraining({"a": [0] * 5}, list, epochs=2, batch_size=2).steps_of("a") == 6
