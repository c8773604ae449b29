"""The server's part of a federated run: all rounds and evaluations, and the run folder.

conduct(setup, exchange)     opens the folder -> rounds of the Server -> report
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from plait.core.files import lock
from plait.federated.client import stored
from plait.federated.partition import histogram
from plait.federated.privacy import Privacy
from plait.federated.protocol import Exchange
from plait.federated.server import Progress, RoundRecord, Server
from plait.run.federated.config import FederateConfig, load_federate_config
from plait.run.federated.folder import FederatedFolder
from plait.run.federated.report import write_report
from plait.run.federated.rows import POOLED
from plait.run.federated.setup import Setup
from plait.run.folder import diff_configs, with_absolute_paths, write_atomic


def open_folder(config: FederateConfig, resume: bool) -> FederatedFolder:
    """The run folder of a config; nothing is made yet, so a config that is refused leaves none.

    Raises:
        FileExistsError: it holds something already and resume is False, or another process writes
            there.
        FileNotFoundError: there is nothing to resume.
        ValueError: what is there is no federated run, or its config is damaged.
    """
    with lock(config.output.dir):
        return _checked_folder(config, resume)


def _checked_folder(config: FederateConfig, resume: bool) -> FederatedFolder:
    if not resume:
        return FederatedFolder.free(config.output.dir)
    folder = FederatedFolder(config.output.dir)
    if not folder.config.is_file():
        if folder.server.is_dir() and not any(p.is_file() for p in folder.server.rglob("*")):
            return folder  # killed before it wrote anything
        raise FileNotFoundError(
            f"{folder.path}: there is no run to resume (config.yaml is missing). Start it without "
            "--resume."
        )
    try:
        load_federate_config(folder.config)
    except ValueError as error:
        raise ValueError(
            f"{folder.path}: is no federated run that can be resumed. Give another output.dir.\n"
            f"{error}"
        ) from error
    return folder


def keep_schedule(config: FederateConfig, folder: FederatedFolder) -> FederateConfig:
    """Return the config of a run to be resumed, whose schedule spans the rounds it began with."""
    if not folder.config.is_file() or config.local.schedule_rounds is not None:
        return config
    began = load_federate_config(folder.config).local
    rounds = began.schedule_rounds or began.rounds
    if rounds == config.local.rounds:
        return config
    return replace(config, local=replace(config.local, schedule_rounds=rounds))


def conduct(
    setup: Setup,
    exchange: Exchange,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    done: Callable[[RoundRecord], None] | None = None,
    private: Path | None = None,
) -> FederatedFolder:
    """Run all rounds and evaluations as the server; return the run folder.

    Args:
        setup: of the run. exchange: carries the orders.
        resume: continue in output.dir after its last checkpoint. The folder is locked meanwhile.
        progress: called after each reply. done: called with the record of each round.
        private: folder of all clients' private states if it is on this machine, for the report
            alone.

    Raises:
        FileExistsError: output.dir holds something and resume is False, or another process writes
            there.
        ValueError: what is to be resumed is no federated run, the method cannot serve the clients,
            or a resumed config differs in what decides the result.
        TooFewUpdates, FloatingPointError: see `Server.step`.
    """
    with lock(setup.config.output.dir):
        return _conduct(setup, exchange, resume, progress, done, private)


def _conduct(
    setup: Setup,
    exchange: Exchange,
    resume: bool,
    progress: Progress | None,
    done: Callable[[RoundRecord], None] | None,
    private: Path | None,
) -> FederatedFolder:
    folder = _checked_folder(setup.config, resume)
    config = _with_paths_of(setup.config, folder)
    names, rounds, every = list(setup.roster.clients), config.local.rounds, config.evaluation.every
    key_file = Path(config.privacy.key_file or folder.privacy_key)
    privacy = _privacy(config, key_file, names)
    try:
        server = Server(
            setup.roster,
            folder.server,
            config.server_options(),
            facts=_facts(config, setup),
            resume=resume,
            privacy=privacy,
            stored=None if private is None else partial(stored, private, config.federated.run),
            progress=progress,
        )
    except ValueError as error:
        changes = _changes(config, folder)
        if not changes:
            raise
        raise ValueError(f"{error} {changes}") from None
    _check_rows(setup, folder)
    write_atomic(folder.config, config.dump())  # nothing is refused from here on
    if privacy is not None:
        _keep_secret(privacy, key_file)
    folder.write_partition(setup.partition)
    folder.write_row_counts(_row_counts(setup))
    lines = [line for line in folder.read_rounds() if line["round"] <= server.round]
    folder.write_rounds(lines)

    def note(record: RoundRecord) -> None:
        held_out = _by_rows(record.held_out)
        folder.append_round({"kind": "round", **record.to_dict(), "held_out": held_out})
        if done is not None:
            done(record)

    measured = [name for name in names if setup.held_out.get(name) is not None]
    if setup.data is None and (config.data.validation is not None or config.data.test is not None):
        measured = names  # on their own held-out rows

    def due(number: int) -> bool:
        return bool(every) and (number % every == 0 or number >= rounds)

    while True:
        number = server.round
        written = {line["kind"] for line in lines if line["round"] == number}
        if due(number) and measured and "evaluation" not in written:
            metrics = _by_rows(server.evaluate(exchange, measured))
            folder.append_round({"kind": "evaluation", "round": number, "clients": metrics})
        last = number >= rounds
        spent = server.privacy_report() if due(number) or last else None
        if spent is not None and "privacy" not in written:
            folder.append_round({"kind": "privacy", **asdict(spent), "round": number})
        if last:
            break
        after_training = config.evaluation.after_training and bool(measured) and due(number + 1)
        server.step(exchange, note, measure=after_training)
    write_report(folder, server.method, config.federated.method)
    return folder


def _with_paths_of(config: FederateConfig, folder: FederatedFolder) -> FederateConfig:
    """The config with absolute paths of model and data, so that it holds in any working folder.

    A resumed run keeps the paths as its folder has them: its checkpoints contain a hash of the
    config, and plait 0.1 kept relative paths.
    """
    config = with_absolute_paths(config)
    if folder.config.is_file():
        before = load_federate_config(folder.config)
        absolute = with_absolute_paths(before)
        for name in ("model", "data"):
            if getattr(absolute, name) == getattr(config, name):
                setattr(config, name, getattr(before, name))
    return config


# Keys that plait 0.1 did not have: unset, they must not change the digest of its checkpoints.
_LATER = {
    *("adapter", "chat_template", "chosen", "form", "label_noise", "mix", "packing", "rejected"),
    "split_by",
}


def _as_before(values: dict[str, Any]) -> dict[str, Any]:
    """Return a section without later keys that are unset or off."""
    return {
        name: _as_before(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value not in (None, False) or name not in _LATER
    }


def _facts(config: FederateConfig, setup: Setup) -> dict[str, Any]:
    """What decides the result besides the method and the server's options."""
    return {
        "sections": {
            name: _as_before(asdict(section))
            for name, section in config.sections().items()
            if name in ("model", "data", "partition")
        },
        "local": {k: v for k, v in vars(config.local).items() if not k.endswith("rounds")},
        "rows": {name: len(own) for name, own in setup.training.rows.items()},
    }


def _check_rows(setup: Setup, folder: FederatedFolder) -> None:
    """Note the rows of a run; raise ValueError if those of a resumed one changed.

    A folder of plait 0.1 has no note of them.
    """
    if setup.data is None:
        return
    noted = folder.read_facts().get("train_digest")
    digest = setup.data.digest("train")
    if noted not in (None, digest):
        raise ValueError(
            f"{folder.path}: the data changed since this run began (train_digest: {noted} -> "
            f"{digest}). Put the data back, or use another folder."
        )
    folder.note(train_digest=digest)


def _changes(config: FederateConfig, folder: FederatedFolder) -> str:
    """Name what changed since a run began, for the error that refuses to resume it."""
    if not folder.config.is_file():
        return ""
    sections = ("model", "method", "federated", "data", "partition", "sampling", "local", "guard")
    old, new = (
        {name: asdict(section) for name, section in every.sections().items() if name in sections}
        for every in (load_federate_config(folder.config), config)
    )
    lines = diff_configs(old, new)
    if any(line.startswith("local.rounds") for line in lines):
        began = old["local"]["schedule_rounds"] or old["local"]["rounds"]
        lines.append(f"set local.schedule_rounds: {began} to resume with other rounds")
    return f"Changed: {'; '.join(lines)}." if lines else ""


def _by_rows(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Client -> metrics; for `central`, whose model is one, the metrics on each client's rows."""
    return measured.get(POOLED, {}).get("clients", measured)


def _row_counts(setup: Setup) -> dict[str, dict[str, int]]:
    """Client -> label or task -> its training rows; under `rows` if the rows have neither."""
    if setup.data is None:
        return {}
    train = setup.data.train
    column = next((c for c in ("label", "task") if c in train.column_names), None)
    values = ["rows"] * len(train) if column is None else list(train[column])
    counts = histogram(setup.partition, values)
    return {name: {str(v): n for v, n in own.items()} for name, own in counts.items()}


def _privacy(config: FederateConfig, key_file: Path, clients: Sequence[str]) -> Privacy | None:
    """The options of privacy with their secret; the accountant runs once, before training."""
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
    """Write a new secret, readable by its owner alone."""
    if not key_file.exists():
        write_atomic(key_file, privacy.key + "\n", private=True)
