"""A federated run with its server and all its clients on this machine.

    engine.kind    engine.workers    where the clients run
    local          0                 in this process, one after another
    local          1, 2, ..          in worker processes, which have deadlines and may die
    flower         0, 1, ..          in worker processes of Flower's simulation on Ray

All give the same bits, if engine.threads is the same.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from plait.federated.engines.workers import Workers
from plait.federated.server import Progress, RoundRecord
from plait.run.federated.clients import client_handler, make_clients
from plait.run.federated.conduct import conduct, keep_schedule, open_folder
from plait.run.federated.config import FederateConfig
from plait.run.federated.folder import FederatedFolder
from plait.run.federated.setup import prepare_federation


def simulate(
    config: FederateConfig,
    resume: bool = False,
    progress: Progress | None = None,
    done: Callable[[RoundRecord], None] | None = None,
) -> FederatedFolder:
    """Run all rounds with all clients on this machine; arguments and errors as in `conduct`.

    Raises also what `prepare_federation` raises, before a folder exists.
    """
    _check(config)
    folder, engine = open_folder(config, resume), config.engine
    if resume:
        config = keep_schedule(config, folder)
    deadlines = config.timeouts.deadlines()
    with _threads(engine.threads) as threads:
        setup = prepare_federation(config)
        conducted = partial(
            conduct, setup, resume=resume, progress=progress, done=done, private=folder.clients
        )
        make = client_handler(config, folder.clients)
        if engine.kind == "flower":
            from plait.federated.engines.flower import simulation

            clients = list(setup.roster.clients)
            workers = engine.workers or min(len(clients), os.cpu_count() or 1)
            with tempfile.TemporaryDirectory(prefix="plait-flower-") as home:
                return simulation.simulate(
                    conducted,
                    make,
                    clients,
                    home=home,
                    workers=workers,
                    threads=threads,
                    deadlines=deadlines,
                )
        if engine.workers:
            with Workers(make, engine.workers, deadlines, threads) as pool:
                return conducted(pool)
        site = make_clients(setup, folder.clients)

        def exchange(orders: Mapping[str, bytes]) -> Iterable[tuple[str, bytes]]:
            return ((name, site.answer(orders[name])) for name in orders)

        return conducted(exchange)


def _check(config: FederateConfig) -> None:
    times, engine = config.timeouts, config.engine
    if config.partition.kind == "own":
        raise ValueError(
            "partition.kind is 'own', where each client's machine has its rows. Use 'files' to "
            "simulate them here."
        )
    if engine.kind == "local" and not engine.workers and {times.first, times.floor} != {None}:
        raise ValueError(
            "timeouts: one process cannot end itself. Give engine.workers, 1 or more, or remove "
            "timeouts.first and timeouts.floor."
        )


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Set torch's threads, which decide the last bits of a sum: all processes take one number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)
