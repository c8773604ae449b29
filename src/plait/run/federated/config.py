"""The config file of a federated run: one YAML for the server and all clients."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from plait.federated import algorithm
from plait.federated.client import LocalOptions
from plait.federated.engines.workers import Deadlines
from plait.federated.guard import GuardOptions
from plait.federated.methods import Algorithm, refusal
from plait.federated.partition import names_of
from plait.federated.privacy import Privacy
from plait.federated.server import ServerOptions
from plait.options import option
from plait.run.config import (
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    dump_sections,
    load_sections,
    method_options,
    peft_config,
)
from plait.run.deploy.deployment import DeployConfig, Deployment


@dataclass(kw_only=True)
class FederatedConfig:
    """The federated method."""

    run: str = option("run", "Name of the run, which the states carry.")
    method: str = option("fedit", "The federated method; the page on federation lists them.")
    ranks: int | list[int] | dict[str, int] | None = option(
        None,
        "Rank of all clients, of each in the order of their names, or client: rank; null: "
        "method.r.",
    )
    scaling: float | None = option(
        None,
        "s of all clients, so that lora_alpha = s r; null: method.lora_alpha, whatever the rank.",
        above=0,
    )
    options: dict[str, Any] = option(dict, "Options of the federated method.")


@dataclass(kw_only=True)
class PartitionConfig:
    """Which client gets which training rows."""

    kind: Literal["iid", "dirichlet", "by_column", "shards", "files", "own"] = option(
        "iid",
        "How the rows are divided. files: each of data.train is a client. own: each client's "
        "machine has its own data.train.",
    )
    clients: int | list[str] | None = option(
        None, "Number of clients, or their names.", most=100_000
    )
    by: str | None = option(None, "dirichlet, by_column, shards: a column, task or label.")
    alpha: float | None = option(
        None, "dirichlet: concentration; the smaller, the more unequal.", above=0
    )
    per_client: int | None = option(None, "shards: number of shards of a client.", least=1)
    min_rows: int | None = option(None, "dirichlet: rows that each client has at least.")
    labels: list[str] | None = option(
        None, "own: class names of all clients together, for rows to classify."
    )
    seed: int = option(0, "Seed of the partition.")


@dataclass(kw_only=True)
class SamplingConfig:
    """Which clients take part in a round."""

    fraction: float = option(
        1.0,
        "Share of the clients, without replacement; with privacy, the probability of each.",
        above=0,
        most=1,
    )
    seed: int = option(0, "Seed of the selection and of randomness in training.")
    retries: int = option(0, "Retries of a round with too few updates.", least=0)


@dataclass(frozen=True, kw_only=True)
class LocalConfig(LocalOptions):
    """Rounds, and a client's training with AdamW in each of them."""

    rounds: int = option(10, "Rounds of the whole run.", least=1, most=1_000_000)
    schedule_rounds: int | None = option(
        None,
        "Rounds that the schedule of the method spans; null: rounds. A run that is resumed with "
        "more rounds keeps those that it began with.",
        least=1,
        most=1_000_000,
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "Number format of the uploads.")


@dataclass(kw_only=True)
class HeldOutConfig:
    """When the clients' models are measured, and how."""

    every: int = option(
        1, "Rounds between two measurements, with one after the last round; 0: none.", least=0
    )
    after_training: bool = option(
        False,
        "In these rounds each client that takes part also measures its model right after its "
        "training, before the server averages.",
    )
    generate: bool = option(
        False, "Measure the exact match of greedy generation on rows with a completion."
    )
    max_new_tokens: int = option(64, "Largest number of tokens to generate.", least=1)
    batch_size: int = option(32, "Rows per batch.", least=1)


@dataclass(kw_only=True)
class CheckpointsConfig:
    """Server checkpoints."""

    keep: int = option(2, "Number of checkpoints that are kept.", least=1)


@dataclass(kw_only=True)
class PrivacyConfig:
    """Differential privacy of clients; see plait.federated.privacy."""

    clip: float | None = option(
        None, "Largest norm of an update; give clip and noise, or neither.", above=0
    )
    noise: float | None = option(
        None,
        "Standard deviation of the noise in units of clip; without noise nothing is private.",
        above=0,
    )
    delta: float = option(1e-5, "Of (epsilon, delta); below 1 / n clients.", above=0, below=1)
    key_file: str | None = option(
        None,
        "File of the secret behind the noise and the sampling, on the server alone; null: "
        "output.dir/privacy.key, made at the start.",
    )

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return self.clip is not None or self.noise is not None

    def options(self, key: str) -> Privacy:
        """Return the options with the secret.

        Raises:
            ValueError: one of clip and noise is missing, or what Privacy refuses.
        """
        if self.clip is None or self.noise is None:
            missing = "clip" if self.clip is None else "noise"
            raise ValueError(f"privacy.{missing} is not set. Give it, or remove privacy.")
        return Privacy(clip=self.clip, noise=self.noise, key=key, delta=self.delta)


@dataclass(kw_only=True)
class EngineConfig:
    """Where clients run when all are on this machine."""

    kind: Literal["local", "flower"] = option(
        "local", "local: processes of plait. flower: Flower's simulation on Ray."
    )
    workers: int = option(0, "Processes; 0: in this one.", least=0, most=1024)
    threads: int | None = option(
        None, "torch's threads in each process; null: torch's choice.", least=1
    )


@dataclass(kw_only=True)
class TimeoutsConfig:
    """Waiting times in seconds."""

    first: float | None = option(
        None, "Until a first reply has come, for a cold start; null: 600.", above=0
    )
    floor: float | None = option(
        None,
        "Shortest time to wait later, where 3 x the median of the replies may be more; null: 60.",
        above=0,
    )
    wait: float | None = option(None, "Until enough clients are online; null: 300.", above=0)

    def deadlines(self) -> Deadlines:
        """With 600 and 60 where nothing is given."""
        return Deadlines(
            600.0 if self.first is None else self.first, 60.0 if self.floor is None else self.floor
        )

    def online(self) -> float:
        """Seconds to wait for clients; 300 where nothing is given."""
        return 300.0 if self.wait is None else self.wait


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
    guard: GuardOptions
    privacy: PrivacyConfig
    engine: EngineConfig
    timeouts: TimeoutsConfig
    evaluation: HeldOutConfig
    checkpoints: CheckpointsConfig
    output: OutputConfig
    deploy: DeployConfig

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

    def server_options(self) -> ServerOptions:
        """Of the server; `central` samples nobody."""
        return ServerOptions(
            run=self.federated.run,
            rounds=self.local.rounds,
            fraction=1.0 if self.federated.method == "central" else self.sampling.fraction,
            seed=self.sampling.seed,
            dtype=self.local.dtype,
            guard=self.guard,
            keep=self.checkpoints.keep,
            retries=self.sampling.retries,
        )

    def run_config(self) -> RunConfig:
        """What loading the data and evaluating takes."""
        when = ("every", "after_training")
        evaluation = {k: v for k, v in vars(self.evaluation).items() if k not in when}
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
    config.server_options().guard.mean(method)
    Deployment(config.deploy)
    if config.privacy.on:
        config.privacy.options("a secret of the server")
    if config.output.also:
        raise ValueError(
            "output.also is not taken in federated runs. Remove it; plait federate export writes "
            "the clients' adapters as plain LoRAs."
        )
    if config.method.lr_scale is not None:
        raise ValueError("method.lr_scale is not taken in federated runs. Remove it.")
    known = method_options(config.method.name)
    if "r" not in known:
        raise ValueError(
            f"method.name is {config.method.name!r}, which has no rank. Use lora, or a method of "
            "plait."
        )
    if config.model.adapter is not None:
        raise ValueError(
            f"model.adapter is {config.model.adapter!r}, and a federated run starts all clients "
            "from new adapters. Remove it."
        )
    if config.data.packing:
        raise ValueError("data.packing is true, and clients train row by row. Set it to false.")
    if config.federated.scaling is not None:
        _check_scaling(config.federated, config.method.options)
    reason = refusal(method, peft_config(config.method, config.model.task, tasks=["unknown"]))
    if reason is not None:
        raise ValueError(f"method.name is {config.method.name!r}: {reason}")
    if method.key == "central" and local.epochs and config.sampling.fraction != 1:
        raise ValueError(
            "federated.method is 'central' with local.epochs and sampling.fraction = "
            f"{config.sampling.fraction}: its examples cannot match. Give local.steps."
        )
    if config.evaluation.after_training and not config.evaluation.every:
        raise ValueError(
            "evaluation.after_training is true and evaluation.every 0, so nothing is measured. "
            "Give evaluation.every = 1 or more."
        )
    part = config.partition
    taken = {
        "iid": {"clients"},
        "dirichlet": {"clients", "by", "alpha", "min_rows"},
        "by_column": {"by"},
        "shards": {"clients", "by", "per_client"},
        "files": set(),
        "own": {"clients", "labels"},
    }[part.kind]
    for name in ("clients", "by", "alpha", "per_client", "min_rows", "labels"):
        if getattr(part, name) is not None and name not in taken:
            raise ValueError(f"partition.{name} is no option of {part.kind}. Remove it.")
    for name in sorted(taken & {"clients", "by", "alpha"}):
        if getattr(part, name) is None:
            raise ValueError(f"partition.{name} is not set, and {part.kind} needs it. Give it.")
    data = config.data
    if part.kind == "own":
        _check_own(config)
    if part.kind == "files":
        if isinstance(data.train, str) or data.limit is not None or data.mix is not None:
            raise ValueError(
                "partition.kind is 'files', which takes a list of files in data.train and no "
                "data.limit or data.mix. Correct data."
            )
        if isinstance(data.validation, float):
            raise ValueError(
                f"data.validation is {data.validation}, a share, and partition.kind is 'files'. "
                "Give a file of held-out rows."
            )


def _check_scaling(federated: FederatedConfig, options: dict[str, Any]) -> None:
    if "lora_alpha" in options:
        raise ValueError(
            f"federated.scaling is {federated.scaling:g} and method.lora_alpha "
            f"{options['lora_alpha']}. Give one of them."
        )
    if federated.ranks is None and "r" not in options:
        raise ValueError("federated.scaling needs the ranks. Give federated.ranks or method.r.")


def _check_own(config: FederateConfig) -> None:
    names, labels = config.partition.clients, config.partition.labels
    if not isinstance(names, list):
        raise ValueError(
            f"partition.clients is {names!r}, and own takes the names of the clients, a list."
        )
    names_of(names)
    if (config.model.task == "classification") != (labels is not None):
        raise ValueError(
            f"partition.labels is {labels!r} and model.task {config.model.task!r}. Own rows to "
            "classify need the labels of all clients together, a list; others need none."
        )
    if config.federated.method == "central":
        raise ValueError(
            "federated.method is 'central', which pools all rows, and partition.kind 'own', where "
            "they stay apart. Use another method."
        )
