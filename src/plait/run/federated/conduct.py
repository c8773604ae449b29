"""A federated run from one config file: its server, its clients, or both on this machine.

    setting(config)  ->  conduct(config, exchange, setting)      the server: rounds, report
                     ->  site(config, folder, setting)           clients: adapters, rows, training
    simulate(config)     both: a loop in this process, worker processes, or Flower on Ray

The run folder holds config.yaml, partition.json (client -> numbers of its training rows), rows.json
(how many, by label or task), metrics.jsonl (a line for each round and one for each evaluation),
server/ (checkpoints), clients/ (private states), report.md and pictures.

Limits: `central` is one client with all rows that makes as many steps in a round as the selected
clients would together.
"""

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.pytorch_utils import Conv1D

from plait.federated.client import LocalTraining, Roster, Site, keyed_randomness, stored
from plait.federated.engines.workers import Workers
from plait.federated.partition import Partition, files, histogram, split
from plait.federated.privacy import Privacy
from plait.federated.protocol import Answer, Exchange
from plait.federated.server import Progress, RoundRecord, Server
from plait.run.config import RunConfig, did_you_mean, method_options, peft_config
from plait.run.data import DataBundle, load_data
from plait.run.data.rows import read_rows
from plait.run.evaluate import evaluate_model
from plait.run.federated.config import FederateConfig, load_federate_config
from plait.run.federated.report import read_rounds, write_report
from plait.run.folder import RunFolder, write_atomic
from plait.run.model import (
    adaptable_layers,
    load_base_with_missing,
    load_tokenizer,
    to_device,
)

__all__ = ["FederateConfig", "conduct", "load_federate_config", "setting", "simulate", "site"]

POOLED = "pooled"  # the one client of `central`


# What server and clients have in common ---------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a config says of the clients, with the model and the data loaded.

    roster: the clients. partition: client -> numbers of its training rows. data: the rows; None on
    a server whose clients have their own. training: a client's local training. held: client -> its
    held-out rows. run: the config of loading and evaluating. folder: of the run.
    """

    roster: Roster
    partition: Partition
    data: DataBundle | None
    training: LocalTraining
    held: Mapping[str, Dataset | None]
    run: RunConfig


def setting(config: FederateConfig, only: str | None = None) -> Setting:
    """Load the model and the data of a run.

    only: one client's name, whose machine this is; None: all clients, or the server.

    Raises ValueError for what cannot be federated.
    """
    run, part = config.run_config(), config.partition
    tokenizer = load_tokenizer(config.model)
    method, pooled = config.algorithm(), config.federated.method == "central"
    data = None
    if part.kind != "own":
        data = load_data(run, tokenizer)
        partition = _partition(config, data)
    else:
        names = [str(name) for name in part.clients or ()]  # type: ignore[union-attr]
        partition: Partition = {name: [] for name in names}
        if only in partition:
            data = load_data(run, tokenizer, part.labels)
            partition[only] = list(range(len(data.train)))
    clients = [POOLED] if pooled else list(partition)
    if only is not None and only not in clients:
        raise ValueError(
            f"client {only!r} is none of the run's. {did_you_mean(only, clients)} The clients are "
            f"{', '.join(clients)}."
        )
    labels = part.labels if data is None else data.labels
    with keyed_randomness("base", config.sampling.seed):  # a new head is drawn
        outputs = {"classification": len(labels or ()), "regression": 1}
        classes = None if labels is None else dict(enumerate(labels))
        base, new = load_base_with_missing(config.model, outputs.get(config.model.task), classes)
    base = to_device(base, run)
    rows: Mapping[str, Any] = {}
    held: Mapping[str, Dataset | None] = {}
    if data is not None:
        rows = {name: data.train.select(own) for name, own in partition.items()}
        held = _held_out(config, data, list(partition))
        if pooled:
            rows = {POOLED: data.train}
            apart = held if part.kind == "by_column" else {}  # one model, each client's rows
            held = {**apart, POOLED: held_out(data)}
    training = config.training(rows, None if data is None else data.collator)
    if pooled and training.steps is not None:
        taking = max(int(config.sampling.fraction * len(partition)), 1)
        training = replace(training, steps=training.steps * taking)
    planned: dict[str, int] = {}
    known = training.steps is not None or part.kind != "own"
    if known and (config.sampling.fraction == 1 or pooled):  # else nobody knows them
        planned = {name: config.local.rounds * training.steps_of(name) for name in clients}
    configs = _configs(config, base, new, planned, clients, None if data is None else data.tasks)
    if only is not None:
        configs = {only: configs[only]}
    return Setting(Roster(base, configs, method), partition, data, training, held, run)


# The clients ------------------------------------------------------------------------------------


def site(
    config: FederateConfig,
    folder: str | Path,
    only: str | None = None,
    loaded: Setting | None = None,
) -> Site:
    """The clients' part of a run.

    folder: of their private states. only: one client's name; None: all of them. loaded: what
    `setting` returned; None: load it now. Raises what `setting` raises.
    """
    found = loaded or setting(config, only)

    def measured(model: nn.Module, client: str) -> dict[str, Any]:
        rows = found.held.get(client)
        if rows is None or found.data is None:
            return {}
        bundle = replace(found.data, validation=rows, test=None)
        metrics = evaluate_model(model, bundle, "validation", found.run)
        return {k: v for k, v in metrics.items() if k not in ("tasks", "task_mean")}

    def evaluate(model: nn.Module, client: str) -> dict[str, Any]:
        apart = [name for name in found.held if name != POOLED and found.held[name] is not None]
        if client == POOLED and apart:
            return {"clients": {name: measured(model, name) for name in apart}}
        return measured(model, client)

    return Site(
        found.roster,
        found.training,
        folder,
        run=config.federated.run,
        seed=config.sampling.seed,
        evaluate=evaluate,
    )


def answerer(config: FederateConfig, folder: Path, only: str | None = None) -> Answer:
    """`site(..).answer`; a worker process builds its own with it."""
    return site(config, folder, only).answer


@contextmanager
def trainer(config: FederateConfig, folder: Path, client: str) -> Iterator[Answer]:
    """One client in a process of its own, warm between orders; it is killed where it hangs."""
    make = partial(answerer, config, folder, client)
    with Workers(make, 1, config.timeouts.deadlines(), config.engine.threads) as workers:
        workers.ready()

        def answer(order: bytes) -> bytes:
            return next(data for _, data in workers({client: order}))

        yield answer


# The server -------------------------------------------------------------------------------------


def conduct(
    config: FederateConfig,
    exchange: Exchange,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    done: Callable[[RoundRecord], None] | None = None,
    loaded: Setting | None = None,
    private: Path | None = None,
) -> RunFolder:
    """The server's part of a run: all rounds and evaluations; returns the run folder.

    exchange: carries the orders. resume: go on in output.dir after its last checkpoint. progress:
    called after each reply. done: called with the record of each round. loaded: what `setting`
    returned; None: load it now. private: folder of all clients' private states, where they are on
    this machine, for the report alone.

    Raises FileExistsError where output.dir holds something and resume is False; ValueError for
    what cannot be federated, or a resumed config that differs in what decides the result;
    TooFewUpdates and FloatingPointError as `Server.step` does.
    """
    folder = _open(config, resume)
    found = loaded or setting(config)
    key_file = Path(config.privacy.key_file or folder.path / "privacy.key")
    privacy = _privacy(config, key_file, list(found.roster.clients))
    server = Server(
        found.roster,
        folder.path / "server",
        config.server_options(),
        facts=_facts(config, found),
        resume=resume,
        privacy=privacy,
        stored=None if private is None else partial(stored, private, config.federated.run),
        progress=progress,
    )
    if privacy is not None:  # nothing is refused from here on
        _keep_secret(privacy, key_file)
    write_atomic(folder.config, config.dump())
    write_atomic(folder.path / "partition.json", json.dumps(found.partition) + "\n")
    write_atomic(folder.path / "rows.json", json.dumps(_rows(found)) + "\n")
    lines = [row for row in read_rounds(folder.metrics) if row["round"] <= server.round]
    write_atomic(folder.metrics, "".join(json.dumps(row) + "\n" for row in lines))

    def note(record: RoundRecord) -> None:
        held_out = _by_rows(record.held_out)
        _append(folder.metrics, {"kind": "round", **record.to_dict(), "held_out": held_out})
        if done is not None:
            done(record)

    held = [name for name in found.roster.clients if found.held.get(name) is not None]
    if found.data is None and (config.data.validation is not None or config.data.test is not None):
        held = list(found.roster.clients)
    every = config.evaluation.every

    def due(number: int) -> bool:
        return bool(every) and (number % every == 0 or number >= config.local.rounds)

    while True:
        number = server.round
        there = {row["kind"] for row in lines if row["round"] == number}
        if due(number) and held and "evaluation" not in there:
            measured = _by_rows(server.evaluate(exchange, held))
            _append(folder.metrics, {"kind": "evaluation", "round": number, "clients": measured})
        last = number >= config.local.rounds
        spent = server.privacy_report() if due(number) or last else None
        if spent is not None and "privacy" not in there:
            _append(folder.metrics, {"kind": "privacy", **asdict(spent), "round": number})
        if last:
            break
        trained = config.evaluation.after_training and bool(held) and due(number + 1)
        server.step(exchange, note, measure=trained)
    write_report(folder, server.method, config.federated.method)
    return folder


def _open(config: FederateConfig, resume: bool) -> RunFolder:
    if not resume:
        return RunFolder.create(config.output.dir)
    path = Path(config.output.dir)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no run to resume. Start it without --resume.")
    return RunFolder(path)


def _facts(config: FederateConfig, found: Setting) -> dict[str, Any]:
    """What decides the result beside the method and the server's options."""
    return {
        "sections": {
            name: asdict(section)
            for name, section in config.sections().items()
            if name in ("model", "data", "partition")
        },
        "local": {k: v for k, v in vars(config.local).items() if k != "rounds"},
        "rows": {name: len(own) for name, own in found.training.rows.items()},
    }


def _by_rows(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Client -> metrics; of `central`, one model, those on the rows of each client."""
    return measured.get(POOLED, {}).get("clients", measured)


def _rows(found: Setting) -> dict[str, dict[str, int]]:
    """Client -> label or task -> its training rows; the number alone where rows have neither."""
    if found.data is None:
        return {}
    there = [c for c in ("label", "task") if c in found.data.train.column_names]
    values = list(found.data.train[there[0]]) if there else ["rows"] * len(found.data.train)
    counted = histogram(found.partition, values)
    return {name: {str(v): n for v, n in own.items()} for name, own in counted.items()}


def _privacy(config: FederateConfig, key_file: Path, clients: Sequence[str]) -> Privacy | None:
    """The options of privacy with their secret, and the accountant asked once, before training."""
    if not config.privacy.on:
        return None
    if key_file.is_file():
        key = key_file.read_text(encoding="utf-8").strip()
    elif config.privacy.key_file is None:
        key = secrets.token_hex(32)
    else:
        raise FileNotFoundError(f"privacy.key_file: {key_file} is no file. Give one with a secret.")
    privacy = config.privacy.options(key)
    privacy.report(config.sampling.fraction, len(clients), config.local.rounds)
    return privacy


def _keep_secret(privacy: Privacy, key_file: Path) -> None:
    """Write a new secret, for its owner alone."""
    if not key_file.exists():
        handle = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(privacy.key + "\n")


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# Both on this machine ---------------------------------------------------------------------------


def simulate(
    config: FederateConfig,
    resume: bool = False,
    progress: Progress | None = None,
    done: Callable[[RoundRecord], None] | None = None,
) -> RunFolder:
    """Run all rounds with all clients on this machine; arguments and errors as in `conduct`."""
    times, engine, path = config.timeouts, config.engine, Path(config.output.dir)
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
    if not resume:
        RunFolder.create(path)  # refuse before anything is loaded
    private = path / "clients"
    conducted = partial(
        conduct, config, resume=resume, progress=progress, done=done, private=private
    )
    make = partial(answerer, config, private)
    with _threads(engine.threads) as threads:
        if engine.kind == "flower":
            from plait.federated.engines import flower

            loaded = setting(config)
            clients = list(loaded.roster.clients)
            with tempfile.TemporaryDirectory(prefix="plait-flower-") as home:
                return flower.simulate(
                    partial(conducted, loaded=loaded),
                    make,
                    clients,
                    home=home,
                    workers=engine.workers or min(len(clients), os.cpu_count() or 1),
                    threads=threads,
                    deadlines=times.deadlines(),
                )
        if engine.workers:
            with Workers(make, engine.workers, times.deadlines(), threads) as workers:
                return conducted(workers)
        loaded = setting(config)
        own = site(config, private, loaded=loaded)

        def exchange(orders: Mapping[str, bytes]) -> Iterable[tuple[str, bytes]]:
            return ((name, own.answer(orders[name])) for name in orders)

        return conducted(exchange, loaded=loaded)


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """Torch's threads: the number decides the last bits of a sum, so all processes take one."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield wanted or before
    finally:
        torch.set_num_threads(before)


# Rows and adapters of the clients ---------------------------------------------------------------


def _partition(config: FederateConfig, data: DataBundle) -> Partition:
    part = config.partition
    if part.kind == "files":
        found, start = {}, 0
        for name, path in files(config.data.train).items():
            count = len(read_rows(str(path), config.data, "train"))
            found[name] = list(range(start, start + count))
            start += count
        return found
    given = {
        name: getattr(part, name)
        for name in ("clients", "alpha", "per_client", "min_rows")
        if getattr(part, name) is not None
    }
    if part.kind != "by_column":
        given["seed"] = part.seed
    column = None if part.by is None else _column(data.train, part.by)
    return split(part.kind, len(data.train), column, **given)


def _column(rows: Dataset, name: str) -> list[Hashable]:
    known = [c for c in ("task", "label", "sample_type") if c in rows.column_names]
    if name not in known:
        raise ValueError(
            f"partition.by is {name!r}, and the rows have {', '.join(known) or 'no such column'}. "
            f"{did_you_mean(name, known) if known else ''} Map a column with data.columns.task."
        )
    return list(rows[name])


def _configs(
    config: FederateConfig,
    base: nn.Module,
    new: list[str],
    planned: Mapping[str, int],
    clients: Sequence[str],
    tasks: list[str] | None,
) -> dict[str, Any]:
    """Client -> peft config, of its rank.

    new: modules that the checkpoint has no weights for. planned: client -> optimizer steps in the
    whole run, for methods with a schedule.
    """
    layers = adaptable_layers(base)
    options = dict(config.method.options)
    if new:
        options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *new]
    if options.get("target_modules", "all-linear") == "all-linear":
        options["target_modules"] = list(layers)
    if "fan_in_fan_out" in method_options(config.method.name):  # how GPT-2 stores its weights
        options.setdefault("fan_in_fan_out", any(isinstance(m, Conv1D) for m in layers.values()))
    found = {}
    for name, r in _ranks(config, clients).items():
        own = options if r is None else {**options, "r": r}
        if config.federated.scaling is not None:
            own = {**own, "lora_alpha": config.federated.scaling * own["r"]}
        method = replace(config.method, options=own)
        found[name] = peft_config(method, config.model.task, planned.get(name), tasks)
    return found


def _ranks(config: FederateConfig, clients: Sequence[str]) -> dict[str, int | None]:
    ranks = config.federated.ranks
    if isinstance(ranks, list):
        if len(ranks) != len(clients):
            raise ValueError(
                f"federated.ranks has {len(ranks)} ranks for {len(clients)} clients. Give one for "
                "each, or one for all."
            )
        ranks = dict(zip(sorted(clients), ranks, strict=True))
    if isinstance(ranks, dict):
        for name in ranks:
            if name not in clients:
                raise ValueError(
                    f"federated.ranks names {name!r}, which is no client. "
                    f"{did_you_mean(name, clients)}"
                )
        missing = sorted(set(clients) - set(ranks))
        if missing:
            raise ValueError(f"federated.ranks does not name client {missing[0]!r}. Give its rank.")
        found: dict[str, int | None] = {name: ranks[name] for name in clients}
    else:
        found = dict.fromkeys(clients, ranks)
    for name, r in found.items():
        if r is not None and r < 1:
            raise ValueError(f"federated.ranks: client {name!r} has rank {r}. Give 1 or more.")
    return found


# Held-out rows ----------------------------------------------------------------------------------


def held_out(data: DataBundle) -> Dataset | None:
    """The rows that models are judged on: test, else validation."""
    name = data.held_out_split
    return None if name is None else data.splits()[name]


def _held_out(
    config: FederateConfig, data: DataBundle, clients: Sequence[str]
) -> dict[str, Dataset | None]:
    """Client -> held-out rows: those of its own value where clients are by column, else all."""
    rows, by = held_out(data), config.partition.by
    if rows is None or config.partition.kind != "by_column" or by not in rows.column_names:
        return dict.fromkeys(clients, rows)
    values = list(map(str, rows[by]))
    own = {name: [i for i, value in enumerate(values) if value == name] for name in clients}
    return {name: rows.select(found) if found else None for name, found in own.items()}
