"""Every method on every engine: worker processes and Flower give the bits of one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.federated.client import Roster, Site
from plait.federated.engines.workers import Workers
from plait.federated.protocol import Answer, Exchange, Order
from plait.federated.server import RoundRecord, Server, ServerOptions
from tests.support.federation import METHODS, NAMES, federation, loss_of, parts

ROUNDS = 2


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Any, list[RoundRecord]]]:
    """Each method in one process: its federation after the run, and the records."""
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for index, (key, changes) in enumerate(METHODS):
        folder = tmp_path_factory.mktemp(f"alone{index}")
        made = federation(
            folder, key, rounds=ROUNDS, run=f"run{index}", evaluate=loss_of, **changes
        )
        found.append((made, [made.step(measure=True) for _ in range(ROUNDS)]))
    torch.set_num_threads(threads)
    return found


def site(folder: Path, index: int) -> tuple[Roster, Site]:
    """The clients of a method, with their private states below a folder."""
    key, changes = METHODS[index]
    base, configs, method, train, _ = parts(key, dict(changes))
    roster = Roster(base, configs, method)
    private = folder / "private"
    return roster, Site(roster, train, private, run=f"run{index}", evaluate=loss_of)


def answer_all(folder: Path) -> Answer:
    """The clients of all methods; the run's name says which."""
    sites: dict[str, Site] = {}

    def answer(data: bytes) -> bytes:
        name = Order.unpack(data)[0].run
        if name not in sites:
            sites[name] = site(folder, int(name.removeprefix("run")))[1]
        return sites[name].answer(data)

    return answer


def servers(folder: Path, exchange: Exchange) -> list[tuple[Server, list[RoundRecord]]]:
    """Each method's server after its run."""
    found = []
    for index in range(len(METHODS)):
        roster, clients = site(folder, index)
        options = ServerOptions(run=f"run{index}", rounds=ROUNDS)
        server = Server(roster, folder / f"server{index}", options, stored=clients.stored)
        found.append((server, [server.step(exchange, measure=True) for _ in range(ROUNDS)]))
    return found


def same(alone: list[tuple[Any, Any]], found: list[tuple[Server, Any]]) -> None:
    assert len(alone) == len(found) == len(METHODS)
    for (whole, records), (server, own), (key, _) in zip(alone, found, METHODS, strict=True):
        assert own == records, key
        assert all(list(record.held_out) == [*NAMES] for record in own), key
        assert whole.state.tensors.keys() == server.state.tensors.keys()
        assert all(torch.equal(x, server.state.tensors[k]) for k, x in whole.state.tensors.items())


def test_worker_processes_give_the_bits_of_one_process(alone: Any, tmp_path: Path) -> None:
    with Workers(partial(answer_all, tmp_path), 2, threads=1) as workers:
        same(alone, servers(tmp_path, workers))


@pytest.mark.slow
def test_flower_gives_the_bits_of_one_process(alone: Any, tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower needs plait[federated]")
    from plait.federated.engines.flower import simulation

    same(
        alone,
        simulation.simulate(
            partial(servers, tmp_path),
            partial(answer_all, tmp_path),
            NAMES,
            home=tmp_path / "home",
            workers=2,
            threads=1,
        ),
    )
