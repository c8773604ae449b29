"""The config file of a federated run: one YAML for the server and all clients."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from plait.federated import algorithm
from plait.federated.client import LocalOptions
from plait.federated.engines.workers import Deadlines
from plait.federated.guard import GuardOptions
from plait.federated.methods import Algorithm, refusal
from plait.federated.partition import names_of
from plait.federated.privacy import Privacy
from plait.federated.server import ServerOptions
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

_FORBID = {"extra": "forbid"}  # pydantic's: an unknown key is an error


@dataclass(kw_only=True)
class FederatedConfig:
    """The federated method. run: a name that the states carry. ranks: of all clients, one for each
    in the order of their names, or client -> rank; None: method.r. scaling: s of all of them, that
    is lora_alpha = s r; None: method.lora_alpha, whatever the rank. options: of the federated
    method.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    run: str = "run"
    method: str = "fedit"
    ranks: int | list[int] | dict[str, int] | None = None
    scaling: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PartitionConfig:
    """Which client gets which training rows. by: a column, `task` or `label`, for dirichlet,
    by_column and shards. clients: how many, or their names. files: each of data.train is a client.
    own: each client's machine has its own data.train; clients: their names. labels: of all clients
    together, for own rows to classify.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    kind: Literal["iid", "dirichlet", "by_column", "shards", "files", "own"] = "iid"
    clients: int | list[str] | None = None
    by: str | None = None
    alpha: float | None = None
    per_client: int | None = None
    min_rows: int | None = None
    labels: list[str] | None = None
    seed: int = 0


@dataclass(kw_only=True)
class SamplingConfig:
    """Which clients take part in a round. fraction: share of them, without replacement; with
    privacy, the probability of each by itself. retries: of a round with too few updates.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    fraction: float = 1.0
    seed: int = 0
    retries: int = 0


@dataclass(frozen=True, kw_only=True)
class LocalConfig(LocalOptions):
    """Rounds, and a client's training in each of them: steps or epochs of AdamW.

    dtype: of the uploads.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    rounds: int = 10
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class GuardConfig(GuardOptions):
    """The guard."""

    __pydantic_config__: ClassVar[Any] = _FORBID


@dataclass(kw_only=True)
class HeldOutConfig:
    """When the clients' models are measured. every: rounds, and after the last one; 0: never.
    after_training: in these rounds each client that takes part measures its own model right after
    its training, too, before the server averages.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    every: int = 1
    after_training: bool = False
    generate: bool = False
    max_new_tokens: int = 64
    batch_size: int = 32


@dataclass(kw_only=True)
class CheckpointsConfig:
    """Server checkpoints. keep: how many."""

    __pydantic_config__: ClassVar[Any] = _FORBID
    keep: int = 2


@dataclass(kw_only=True)
class PrivacyConfig:
    """Differential privacy of clients; see plait.federated.privacy. clip and noise: give both or
    neither. key_file: of the secret behind the noise and the sampling, on the server alone; None:
    output.dir/privacy.key, made at the start.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    clip: float | None = None
    noise: float | None = None
    delta: float = 1e-5
    key_file: str | None = None

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return self.clip is not None or self.noise is not None

    def options(self, key: str) -> Privacy:
        """With the secret.

        Raises:
            ValueError: what Privacy refuses.
        """
        if self.clip is None or self.noise is None:
            missing = "clip" if self.clip is None else "noise"
            raise ValueError(f"privacy.{missing} is not set. Give it, or remove privacy.")
        return Privacy(clip=self.clip, noise=self.noise, key=key, delta=self.delta)


@dataclass(kw_only=True)
class EngineConfig:
    """Where clients run when all are on this machine. kind: local, or flower, which simulates on
    Ray. workers: processes; 0: in this one. threads: torch's, of each process; None: torch's own
    choice.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    kind: Literal["local", "flower"] = "local"
    workers: int = 0
    threads: int | None = None


@dataclass(kw_only=True)
class TimeoutsConfig:
    """Seconds. first: until a first reply has come, for a cold start. floor: least later, where
    3 x the median of the replies may be more. wait: for enough clients to be online.
    """

    __pydantic_config__: ClassVar[Any] = _FORBID
    first: float | None = None
    floor: float | None = None
    wait: float | None = None

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
    guard: GuardConfig
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
    config.timeouts.deadlines()
    _check_engine(config)
    Deployment(config.deploy)
    if config.privacy.on:
        config.privacy.options("a secret of the server")
    if config.method.lr_scale is not None:
        raise ValueError("method.lr_scale is not taken in federated runs. Remove it.")
    known = method_options(config.method.name)
    if "r" not in known:
        raise ValueError(
            f"method.name is {config.method.name!r}, which has no rank. Use lora, or a method of "
            "plait."
        )
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
    if config.evaluation.every < 0:
        raise ValueError(f"evaluation.every = {config.evaluation.every}. Give 0 or more.")
    if config.evaluation.after_training and not config.evaluation.every:
        raise ValueError(
            "evaluation.after_training is true and evaluation.every 0, so nothing is measured. "
            "Give evaluation.every = 1 or more."
        )
    if config.checkpoints.keep < 1:
        raise ValueError(f"checkpoints.keep = {config.checkpoints.keep}. Give 1 or more.")
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


def _check_scaling(federated: FederatedConfig, options: dict[str, Any]) -> None:
    scaling = federated.scaling
    if not (scaling or 0) > 0:
        raise ValueError(f"federated.scaling = {scaling}. Give a number above 0.")
    if "lora_alpha" in options:
        raise ValueError(
            f"federated.scaling is {scaling:g} and method.lora_alpha {options['lora_alpha']}. Give "
            "one of them."
        )
    if federated.ranks is None and "r" not in options:
        raise ValueError("federated.scaling needs the ranks. Give federated.ranks or method.r.")


def _check_engine(config: FederateConfig) -> None:
    engine, times = config.engine, config.timeouts
    if engine.workers < 0:
        raise ValueError(f"engine.workers = {engine.workers}. Give 0 or more.")
    if engine.threads is not None and engine.threads < 1:
        raise ValueError(f"engine.threads = {engine.threads}. Give 1 or more.")
    if not times.online() > 0:
        raise ValueError(f"timeouts.wait = {times.wait}. Give seconds above 0.")


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
