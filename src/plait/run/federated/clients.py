"""The clients of a federated run: what answers the server's orders, in which process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from plait.federated.client import Site
from plait.federated.engines.workers import Workers
from plait.federated.protocol import Answer
from plait.run.config import IMPORTED, import_plugin
from plait.run.evaluate import evaluate_model
from plait.run.federated.config import FederateConfig
from plait.run.federated.rows import POOLED
from plait.run.federated.setup import Setup, prepare_federation


def make_clients(setup: Setup, folder: str | Path) -> Site:
    """The clients' part of a run: all clients of the setup. folder: of their private states."""

    def measure(model: nn.Module, client: str) -> dict[str, Any]:
        rows = setup.held_out.get(client)
        if rows is None or setup.data is None:
            return {}
        bundle = replace(setup.data, validation=rows, test=None)
        metrics = evaluate_model(model, bundle, "validation", setup.run)
        return {k: v for k, v in metrics.items() if k not in ("tasks", "task_mean")}

    def evaluate(model: nn.Module, client: str) -> dict[str, Any]:
        apart = [
            name for name, rows in setup.held_out.items() if name != POOLED and rows is not None
        ]
        if client == POOLED and apart:
            return {"clients": {name: measure(model, name) for name in apart}}
        return measure(model, client)

    return Site(
        setup.roster,
        setup.training,
        folder,
        run=setup.config.federated.run,
        seed=setup.config.sampling.seed,
        evaluate=evaluate,
    )


def client_handler(
    config: FederateConfig, folder: Path, client: str | None = None
) -> Callable[[], Answer]:
    """Return what builds, in a worker process, that which answers its orders.

    client: the only one of the process; None: all.
    """
    return partial(_answer, config, folder, client, tuple(IMPORTED.values()))


def _answer(
    config: FederateConfig, folder: Path, client: str | None, plugins: Sequence[str]
) -> Answer:
    """Build the clients in a new process, which has not imported the user's plugins yet."""
    for name in plugins:
        import_plugin(name)
    return make_clients(prepare_federation(config, client), folder).answer


@contextmanager
def client_process(config: FederateConfig, folder: Path, client: str) -> Iterator[Answer]:
    """Run one client in a process that stays loaded between orders; one that hangs is killed."""
    make = client_handler(config, folder, client)
    with Workers(make, 1, config.timeouts.deadlines(), config.engine.threads) as workers:
        workers.ready()

        def answer(order: bytes) -> bytes:
            return next(data for _, data in workers({client: order}))

        yield answer
