"""What the server and the clients of a federated run have in common: data, model, adapters.

Limits: `central` is one client with all rows, which makes as many steps in a round as the selected
clients would make together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from datasets import Dataset

from plait.federated.client import LocalOptions, LocalTraining, Roster, keyed_randomness
from plait.federated.partition import Partition
from plait.run.config import RunConfig, did_you_mean
from plait.run.data import DataBundle, load_data
from plait.run.data.reader import order_labels
from plait.run.federated.adapters import client_configs
from plait.run.federated.config import FederateConfig
from plait.run.federated.rows import POOLED, divide_rows
from plait.run.model import head_labels, load_tokenizer, prepare_base, to_device
from plait.run.prepare import check_config


@dataclass(frozen=True)
class Setup:
    """A federated run whose data and model are loaded and checked against each other.

    config: of the federated run. run: the part of it that loads and evaluates a single run.
    roster: the clients. partition: client -> indices of its training rows. data: the rows; None on
    a server whose clients have rows of their own. training: a client's local training.
    held_out: client -> its held-out rows.
    """

    config: FederateConfig
    run: RunConfig
    roster: Roster
    partition: Partition
    data: DataBundle | None
    training: LocalTraining
    held_out: Mapping[str, Dataset | None]


def prepare_federation(config: FederateConfig, client: str | None = None) -> Setup:
    """Load and check everything that the rounds take; nothing is written.

    Args:
        config: of the run. client: the one client of this machine; None: all, or the server.

    Raises:
        FileNotFoundError: a model, weights or rows that are not there.
        ValueError: what `plait.run.prepare` refuses of a single run, what the federated method
            cannot serve, or an unknown client.
        ImportError: a quantised base without bitsandbytes.
    """
    run, method = config.run_config(), config.algorithm()
    check_config(run)
    tokenizer, part = load_tokenizer(config.model, config.data.chat_template), config.partition
    here = part.kind != "own" or client in (part.clients or ())  # type: ignore[operator]
    head = head_labels(config.model)
    data = load_data(run, tokenizer, part.labels, head=head) if here else None
    rows, pooled = divide_rows(config, data, client), config.federated.method == "central"
    names = [POOLED] if pooled else list(rows.partition)
    if client is not None and client not in names:
        raise ValueError(
            f"client {client!r} is none of the run's. {did_you_mean(client, names)} The clients "
            f"are {', '.join(names)}."
        )
    with keyed_randomness("base", config.sampling.seed):  # a new head is drawn
        base = prepare_base(run, data, order_labels(part.labels, head, config.data))
    to_device(base.model, run)
    collate: Any = None if data is None else data.collator  # a server without rows trains nothing
    training = LocalTraining(
        rows.train,
        collate,
        seed=config.sampling.seed,
        **{f.name: getattr(config.local, f.name) for f in fields(LocalOptions)},
    )
    if pooled and training.steps is not None:
        selected = max(int(config.sampling.fraction * len(rows.partition)), 1)
        training = replace(training, steps=training.steps * selected)
    steps: dict[str, int | None] = dict.fromkeys(names)
    known = training.steps is not None or part.kind != "own"
    if known and (config.sampling.fraction == 1 or pooled):  # else sampling decides
        rounds = config.local.schedule_rounds or config.local.rounds
        steps = {name: rounds * training.steps_of(name) for name in names}
    configs = client_configs(config, run, base, steps, None if data is None else data.tasks)
    if client is not None:
        configs = {client: configs[client]}
    roster = Roster(base.model, configs, method)
    return Setup(config, run, roster, rows.partition, data, training, rows.held_out)
