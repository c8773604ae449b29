"""`plait federate simulate`: a federated run from one config file, in one process.

The run folder holds config.yaml, partition.json (client -> numbers of its training rows),
metrics.jsonl (a line for each round and one for each evaluation), server/ (checkpoints), clients/
(private states), report.md and loss.png.

Limits: one process on one machine; nothing is sent over a network. `central` is one client with all
rows that makes as many steps in a round as the selected clients would together.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from datasets import Dataset
from torch import nn
from transformers.pytorch_utils import Conv1D

from plait.federated import algorithm
from plait.federated.guard import GuardOptions
from plait.federated.local import (
    Federation,
    LocalOptions,
    LocalTraining,
    Progress,
    RoundRecord,
    keyed_randomness,
)
from plait.federated.methods import Algorithm, refusal
from plait.federated.partition import Partition, files, split
from plait.run.config import (
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    did_you_mean,
    dump_sections,
    load_sections,
    method_options,
    peft_config,
)
from plait.run.data import DataBundle, load_data
from plait.run.deploy import DeployConfig, Deployment
from plait.run.evaluate import evaluate_model, held_out_split, to_device
from plait.run.federate_report import read_rounds, write_report
from plait.run.folder import RunFolder, write_atomic
from plait.run.model import adaptable_layers, load_tokenizer, load_with_new
from plait.run.rows import read_rows

_FORBID = {"extra": "forbid"}  # pydantic's: an unknown key is an error
POOLED = "pooled"  # the one client of `central`


@dataclass(kw_only=True)
class FederatedConfig:
    """The federated method. ranks: of all clients, one for each in the order of their names, or
    client -> rank; None: method.r. options: of the federated method.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    method: str = "fedit"
    ranks: int | list[int] | dict[str, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PartitionConfig:
    """Which client gets which training rows. by: a column, `task` or `label`, for dirichlet,
    by_column and shards. clients: how many, or their names. files: each of data.train is a client.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    kind: Literal["iid", "dirichlet", "by_column", "shards", "files"] = "iid"
    clients: int | list[str] | None = None
    by: str | None = None
    alpha: float | None = None
    per_client: int | None = None
    min_rows: int | None = None
    seed: int = 0


@dataclass(kw_only=True)
class SamplingConfig:
    """Which clients take part in a round. fraction: share of them, without replacement."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    fraction: float = 1.0
    seed: int = 0


@dataclass(kw_only=True)
class LocalConfig:
    """Rounds, and a client's training in each of them: steps or epochs of AdamW.

    dtype: of the uploads.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    rounds: int = 10
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


@dataclass(kw_only=True)
class GuardConfig:
    """The guard; see plait.federated.guard.GuardOptions."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    max_norm_ratio: float = 10.0
    max_count_ratio: float = 10.0
    aggregator: str = "mean"
    trim: float = 0.2
    faulty: int = 1
    quarantine_after: int = 3
    min_updates: int = 1


@dataclass(kw_only=True)
class HeldOutConfig:
    """When the clients' models are measured. every: rounds, and after the last one; 0: never."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    every: int = 1
    generate: bool = False
    max_new_tokens: int = 64
    batch_size: int = 32


@dataclass(kw_only=True)
class CheckpointsConfig:
    """Server checkpoints. keep: how many."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    keep: int = 2


@dataclass(kw_only=True)
class FederateConfig:
    """One checked federated run."""

    model: ModelConfig
    method: MethodConfig
    federated: FederatedConfig
    data: DataConfig
    partition: PartitionConfig
    sampling: SamplingConfig
    local: LocalConfig
    guard: GuardConfig
    evaluation: HeldOutConfig
    checkpoints: CheckpointsConfig
    output: OutputConfig
    deploy: DeployConfig = field(default_factory=DeployConfig)

    def sections(self) -> dict[str, Any]:
        """Section name -> its object."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def dump(self) -> str:
        """As YAML."""
        return dump_sections(self.sections())

    def algorithm(self) -> Algorithm:
        """The federated method."""
        given = self.federated.options.items()
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
        return algorithm(self.federated.method, **options)

    def run_config(self) -> RunConfig:
        """What loading the data and evaluating takes."""
        evaluation = {k: v for k, v in vars(self.evaluation).items() if k != "every"}
        return RunConfig(
            model=self.model,
            method=self.method,
            data=self.data,
            evaluation=EvaluationConfig(**evaluation),
            output=self.output,
        )


def load_federate_config(path: str | Path, overrides: Sequence[str] = ()) -> FederateConfig:
    """Read the config file of a federated run.

    Raises FileNotFoundError for a missing file and ValueError for everything that is wrong in it,
    with the file, the key, the value and the remedy.
    """
    sections: dict[str, Any] = get_type_hints(FederateConfig)
    loaded = load_sections(path, sections, overrides, "See examples/federated/ for one.")
    config = FederateConfig(**loaded)
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _check(config: FederateConfig) -> None:
    """Refuse what can be refused before anything is loaded."""
    method, local = config.algorithm(), config.local
    guard = GuardOptions(**vars(config.guard))
    guard.mean(method)
    Deployment(config.deploy)
    LocalOptions(rounds=local.rounds, fraction=config.sampling.fraction, guard=guard)
    _training(config, {}, None)
    if config.method.lr_scale is not None:
        raise ValueError("method.lr_scale is not taken in federated runs. Remove it.")
    known = method_options(config.method.name)
    if "r" not in known:
        raise ValueError(
            f"method.name is {config.method.name!r}, which has no rank. Use lora, or a method of "
            "plait."
        )
    reason = refusal(method, peft_config(config.method, config.model.task, tasks=["unknown"]))
    if reason is not None:
        raise ValueError(f"method.name is {config.method.name!r}: {reason}")
    if method.key == "central" and local.epochs and config.sampling.fraction != 1:
        raise ValueError(
            "federated.method is 'central' with local.epochs and sampling.fraction = "
            f"{config.sampling.fraction}: its examples cannot match. Give local.steps."
        )
    if config.evaluation.every < 0:
        raise ValueError(f"evaluation.every = {config.evaluation.every}. Give 0 or more.")
    if config.checkpoints.keep < 1:
        raise ValueError(f"checkpoints.keep = {config.checkpoints.keep}. Give 1 or more.")
    part = config.partition
    taken = {
        "iid": {"clients"},
        "dirichlet": {"clients", "by", "alpha", "min_rows"},
        "by_column": {"by"},
        "shards": {"clients", "by", "per_client"},
        "files": set(),
    }[part.kind]
    for name in ("clients", "by", "alpha", "per_client", "min_rows"):
        if getattr(part, name) is not None and name not in taken:
            raise ValueError(f"partition.{name} is no option of {part.kind}. Remove it.")
    for name in sorted(taken & {"clients", "by", "alpha"}):
        if getattr(part, name) is None:
            raise ValueError(f"partition.{name} is not set, and {part.kind} needs it. Give it.")
    data = config.data
    if part.kind == "files":
        if isinstance(data.train, str) or data.limit is not None:
            raise ValueError(
                "partition.kind is 'files', which takes a list of files in data.train and no "
                "data.limit. Correct data."
            )
        if isinstance(data.validation, float):
            raise ValueError(
                f"data.validation is {data.validation}, a share, and partition.kind is 'files'. "
                "Give a file of held-out rows."
            )


# The run ----------------------------------------------------------------------------------------


def simulate(
    config: FederateConfig,
    resume: bool = False,
    progress: Progress | None = None,
    done: Callable[[RoundRecord], None] | None = None,
) -> RunFolder:
    """Run all rounds; return the run folder.

    resume: go on in output.dir after its last checkpoint. progress: called after each client.
    done: called with the record of each round.

    Raises FileExistsError where output.dir holds something and resume is False; ValueError for
    what cannot be federated, or a resumed config that differs in what decides the result;
    TooFewUpdates and FloatingPointError as `Federation.step` does.
    """
    folder = _open(config, resume)
    run = config.run_config()
    tokenizer = load_tokenizer(config.model)
    data = load_data(run, tokenizer)
    partition = _partition(config, data)
    with keyed_randomness("base", config.sampling.seed):  # a new head is drawn
        outputs = {"classification": len(data.labels or ()), "regression": 1}
        names = None if data.labels is None else dict(enumerate(data.labels))
        base, new = load_with_new(config.model, outputs.get(config.model.task), names)
    base = to_device(base, run)
    method = config.algorithm()
    clients = [POOLED] if method.key == "central" else list(partition)
    rows = {name: data.train.select(own) for name, own in partition.items()}
    held = _held_out(config, data, list(partition))
    steps = config.local.steps
    if method.key == "central":
        rows, held = {POOLED: data.train}, {POOLED: held_out(data)}
        taking = max(int(config.sampling.fraction * len(partition)), 1)
        steps = None if steps is None else steps * taking
    training = replace(_training(config, rows, data.collator), steps=steps)
    planned: dict[str, int] = {}
    if config.sampling.fraction == 1 or method.key == "central":  # else nobody knows them
        planned = {name: config.local.rounds * training.steps_of(name) for name in clients}
    federation = Federation(
        base,
        _configs(config, base, new, planned, clients, data.tasks),
        method,
        training,
        folder.path,
        LocalOptions(
            rounds=config.local.rounds,
            fraction=1.0 if method.key == "central" else config.sampling.fraction,
            seed=config.sampling.seed,
            dtype=config.local.dtype,
            guard=GuardOptions(**vars(config.guard)),
            keep=config.checkpoints.keep,
        ),
        facts={
            "sections": {
                name: asdict(section)
                for name, section in config.sections().items()
                if name in ("model", "data", "partition")
            },
            "local": {k: v for k, v in vars(config.local).items() if k != "rounds"},
            "rows": {name: len(own) for name, own in rows.items()},
        },
        resume=resume,
        progress=progress,
    )
    write_atomic(folder.config, config.dump())
    write_atomic(folder.path / "partition.json", json.dumps(partition) + "\n")
    lines = [row for row in read_rounds(folder.metrics) if row["round"] <= federation.round]
    write_atomic(folder.metrics, "".join(json.dumps(row) + "\n" for row in lines))

    def note(record: RoundRecord) -> None:
        _append(folder.metrics, {"kind": "round", **record.to_dict()})
        if done is not None:
            done(record)

    while True:
        number, every = federation.round, config.evaluation.every
        due = bool(every) and (number % every == 0 or number >= config.local.rounds)
        there = any(row["kind"] == "evaluation" and row["round"] == number for row in lines)
        if due and not there and any(part is not None for part in held.values()):
            measured = _measure(federation, data, run, held)
            _append(folder.metrics, {"kind": "evaluation", "round": number, "clients": measured})
        if number >= config.local.rounds:
            break
        federation.step(note)
    write_report(folder, method, config.federated.method)
    return folder


def _open(config: FederateConfig, resume: bool) -> RunFolder:
    if not resume:
        return RunFolder.create(config.output.dir)
    path = Path(config.output.dir)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no run to resume. Start it without --resume.")
    return RunFolder(path)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _training(config: FederateConfig, rows: Mapping[str, Any], collate: Any) -> LocalTraining:
    local = config.local
    return LocalTraining(
        rows,
        collate,
        steps=local.steps,
        epochs=local.epochs,
        batch_size=local.batch_size,
        learning_rate=local.learning_rate,
        weight_decay=local.weight_decay,
        max_grad_norm=local.max_grad_norm,
        seed=config.sampling.seed,
    )


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
    name = held_out_split(data)
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


def _measure(
    federation: Federation,
    data: DataBundle,
    run: RunConfig,
    held: Mapping[str, Dataset | None],
) -> dict[str, dict[str, Any]]:
    """Client -> metrics of its own model, as it would start the next round."""
    found = {}
    for name, rows in held.items():
        if rows is not None:
            bundle = replace(data, validation=rows, test=None)
            model = federation.model_of(name)
            metrics = evaluate_model(model, bundle, "validation", run)
            found[name] = {k: v for k, v in metrics.items() if k not in ("tasks", "task_mean")}
    return found
