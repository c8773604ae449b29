"""The config of a run: YAML and command-line overrides in, checked dataclasses out.

Every section is a plain dataclass checked by pydantic; an unknown key is an error with the
nearest known name. PyYAML reads `1e-4` as a string; checking against the declared type makes it
a number. The sections `method` and `training` take their keys from the method's own config class
and from `transformers.TrainingArguments`.
"""

import copy
import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from plait.core.config import DeltaConfig, did_you_mean
from plait.upstream.table import BASELINES

if typing.TYPE_CHECKING:
    from peft import PeftConfig

    from plait.chain import ChainPlan

_STRICT = ConfigDict(extra="forbid")
_Count = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(gt=0, lt=1)]

ModelTask = Literal["causal_lm", "classification", "regression"]


@dataclass(kw_only=True)
class ModelConfig:
    """The base model. name: hub id, local folder or `builtin:tiny`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: str = "builtin:tiny"
    revision: str | None = None
    task: ModelTask = "causal_lm"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class MethodConfig:
    """The fine-tuning method.

    name: a plait method or a baseline. options: checked keywords of that method's config class.
    lr_scale: parameter name -> factor on its learning rate (its weight decay is divided by it).
    """

    name: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    lr_scale: dict[str, float] | None = None


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer.

    name: `default` (training.optim decides) or one of plait.run.optimizers. options: its checked
    keywords. Learning rate and weight decay are those of `training`.
    """

    name: str = "default"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ColumnsConfig:
    """Where the data keeps what plait needs: a column name, or its index from 0."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    prompt: str | int | None = None
    completion: str | int | None = None
    messages: str | int | None = None
    text: str | int | None = None
    text_pair: str | int | None = None
    label: str | int | None = None
    task: str | int | None = None
    sample_type: str | int | None = None


@dataclass(kw_only=True)
class DataConfig:
    """The rows. Lengths are in tokens, limits in rows; paths are relative to the working folder.

    train, validation, test: file paths, a hub id, or `builtin:NAME?key=value`. `SOURCE#PART` names
    the split of a hub set or the key of a JSON object of lists; without it, `split` for train,
    "validation" and "test" for the others. header, quotes: None means csv has both, tsv has a
    header, txt neither.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    train: str | list[str] = "builtin:shift"
    validation: Annotated[_Fraction | str | list[str] | None, Field(union_mode="left_to_right")] = (
        None
    )
    test: str | list[str] | None = None
    split: str = "train"
    subset: str | None = None
    format: Literal["jsonl", "json", "csv", "tsv", "txt", "parquet"] | None = None
    delimiter: Annotated[str, Field(min_length=1)] | None = None
    header: bool | None = None
    quotes: bool | None = None
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    prompt_template: str | None = None
    completion_template: str | None = None
    max_length: _Count = 512
    truncate: bool = False
    train_on_prompt: bool = False
    add_eos: bool = True
    limit: _Count | None = None
    validation_limit: _Count | None = None
    test_limit: _Count | None = None
    seed: int = 0


@dataclass(kw_only=True)
class EvaluationConfig:
    """How a model is evaluated. max_new_tokens is in tokens."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    generate: bool = True
    max_new_tokens: _Count = 64
    batch_size: _Count = 32


@dataclass(kw_only=True)
class OutputConfig:
    """Where the run folder goes."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    dir: Annotated[str, Field(min_length=1)] = "runs/first"


@dataclass(kw_only=True)
class ChainConfig:
    """A chain of adapters. plan: a recipe; what is null is that recipe's own default."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    plan: str = "chain"
    links: _Count | None = None
    steps_per_link: _Count | None = None
    ranks: _Count | list[_Count] | None = None
    lr: Literal["restart", "global"] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    reset_optimizer: bool | None = None
    storage: Literal["stack", "merge"] | None = None
    freeze: Literal["A", "B"] | None = None
    sketch: Literal["orthonormal", "gaussian"] | None = None
    sketch_std: float | None = None
    blocks_per_link: int | float | None = None
    rank: _Count | None = None
    seed: int | None = None

    def build(self) -> "ChainPlan":
        """The plan; raises ValueError for an option of another plan, or one out of range."""
        from plait.chain import ChainPlan

        options = {k: v for k, v in vars(self).items() if v is not None and k != "plan"}
        return ChainPlan.of(self.plan, **options)


@dataclass(kw_only=True)
class RunConfig:
    """One checked run. training: keywords of TrainingArguments, plait's defaults filled in."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    chain: ChainConfig | None = None
    output: OutputConfig = field(default_factory=OutputConfig)


# plait's defaults where they differ from transformers'. 2e-4 with a cosine and a short warm-up is
# common for LoRA on billion-parameter models; small models want ten times as much.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a fraction of all steps
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a NaN loss must be seen, not averaged away
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "seed": 42,
    "report_to": "none",
}

_TRAINING_OURS = {
    "output_dir": "Set output.dir, the run folder.",
    "resume_from_checkpoint": "Resume with: plait train FILE --resume.",
    "remove_unused_columns": "plait chooses the columns the model gets.",
    "hub_token": "Set the environment variable HF_TOKEN; a config is stored with the run.",
}

# Fields of a PeftConfig that say where an adapter comes from, not what it is.
_PEFT_INTERNAL = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "plait_version",
    "checksums",
}

_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS", "regression": "SEQ_CLS"}


class _Source:
    """Says in an error where a key came from: the file or the command line."""

    def __init__(self, file: str, overridden: Iterable[str] = ()):
        self.file = file
        self.overridden = set(overridden)

    def at(self, key: str) -> str:
        given = any(key == o or key.startswith(f"{o}.") for o in self.overridden)
        return f"{'command line' if given else self.file}: {key}"

    def unknown(self, key: str, known: Iterable[str]) -> str:
        return f"{self.at(key)} is not known. {did_you_mean(key.rpartition('.')[2], known)}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply overrides of the form `section.key=value` (value in YAML).

    Raises FileNotFoundError for a missing file and ValueError for everything that is wrong in it,
    each with the file, the dotted key, the value and the remedy.
    """
    raw = _read(Path(path), f"Write one with: plait init {path}")
    return config_from_dict(raw, overrides, str(path))


def load_sections(
    path: str | Path, sections: dict[str, type], overrides: Sequence[str] = (), remedy: str = ""
) -> dict[str, Any]:
    """Read a config file of other sections than a run's, as strictly; a section -> its object.

    sections: name -> dataclass; MethodConfig is checked against the method that it names.
    remedy: for a missing file. Raises as `load_config` does.
    """
    file, raw = str(path), _read(Path(path), remedy)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: is a {type(raw).__name__}. Give: {', '.join(sections)}.")
    source = _Source(file, [_override(raw, text) for text in overrides])
    for name, value in raw.items():
        if name not in sections:
            raise ValueError(source.unknown(str(name), sections))
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{source.at(name)} is {value!r}. It should be keys and values.")
    return {
        name: _method(raw.get(name) or {}, source)
        if section is MethodConfig
        else _checked(section, raw.get(name) or {}, name, source)
        for name, section in sections.items()
    }


def dump_sections(sections: dict[str, Any]) -> str:
    """Return sections as YAML; `load_sections` reads them back to equal ones."""
    plain = {name: dataclasses.asdict(section) for name, section in sections.items()}
    for name, section in sections.items():
        if isinstance(section, MethodConfig):
            plain[name] = {"name": section.name, **section.options}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def _read(path: Path, remedy: str) -> Any:
    """Parse a config file; {} for an empty one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such config file. {remedy}".rstrip())
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_yaml_problem(error)}. Correct the YAML there.") from None
    return {} if raw is None else raw


def config_from_dict(raw: Any, overrides: Sequence[str] = (), file: str = "config") -> RunConfig:
    """Check a nested dict as `load_config` does; `file` names it in errors."""
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: is a {type(raw).__name__}. Give sections: {_sections()}.")
    raw = copy.deepcopy(raw)
    source = _Source(file, [_override(raw, text) for text in overrides])
    for name, value in raw.items():
        if name not in RunConfig.__dataclass_fields__:
            raise ValueError(source.unknown(str(name), RunConfig.__dataclass_fields__))
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{source.at(name)} is {value!r}. It should be keys and values.")
    section = {name: raw.get(name) or {} for name in RunConfig.__dataclass_fields__}
    data = _checked(DataConfig, section["data"], "data", source)
    method = _method(section["method"], source)
    config = RunConfig(
        model=_checked(ModelConfig, section["model"], "model", source),
        method=method,
        optimizer=_optimizer(section["optimizer"], method, section["training"], source),
        data=data,
        training=_training(section["training"], data, source),
        evaluation=_checked(EvaluationConfig, section["evaluation"], "evaluation", source),
        chain=_chain(raw.get("chain"), section["method"], source),
        output=_checked(OutputConfig, section["output"], "output", source),
    )
    try:
        # The data names the tasks later; one name stands for them while the rest is checked.
        peft_config(config.method, config.model.task, tasks=["unknown"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source.at('method')}: {error}") from error
    return config


def allocates(config: Any) -> bool:
    """Whether a peft config is of a method that scores ranks on a development batch."""
    return isinstance(config, DeltaConfig) and config.delta_cls.allocates(config)


def _chain(raw: dict[str, Any] | None, method: dict[str, Any], source: _Source) -> Any:
    """Check the `chain` section, where there is one, and that its plan works with the method."""
    if raw is None:
        return None
    from plait.chain import chain_support
    from plait.chain.recipes import RECIPES

    chain: ChainConfig = _checked(ChainConfig, raw, "chain", source)
    if chain.plan not in RECIPES:
        raise ValueError(
            f"{source.at('chain.plan')} is {chain.plan!r}, which is no plan. "
            f"{did_you_mean(chain.plan, RECIPES)}"
        )
    try:
        chain.build()
        reason = chain_support(chain.plan, method.get("name", MethodConfig.name))
    except ValueError as error:
        raise ValueError(f"{source.at('chain')}: {error}") from None
    if reason is not None:
        raise ValueError(f"{source.at('chain.plan')}: {reason}")
    return chain


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the nested dict that `config_from_dict` reads back to an equal config."""
    result = dataclasses.asdict(config)
    method = result["method"]
    lr_scale = {} if method["lr_scale"] is None else {"lr_scale": method["lr_scale"]}
    result["method"] = {"name": method["name"], **method["options"], **lr_scale}
    result["optimizer"] = {"name": config.optimizer.name, **result["optimizer"]["options"]}
    columns = result["data"]["columns"]
    result["data"]["columns"] = {k: v for k, v in columns.items() if v is not None}
    if config.chain is None:
        del result["chain"]
    else:
        result["chain"] = {k: v for k, v in result["chain"].items() if v is not None}
    return result


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def starter_config() -> str:
    """Return a commented config of a first run, for `plait init`."""
    return resources.files("plait.run").joinpath("starter.yaml").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Option:
    """One option of a method: its name, type, default (None for a required one) and help."""

    name: str
    type: Any
    default: Any
    help: str


def method_options(name: str) -> dict[str, Option]:
    """Return the options that `method:` takes for this method; {} for full fine-tuning.

    Raises ValueError with the nearest name when there is no such method.
    """
    baseline = BASELINES.get(name)
    cls = _config_class(name)
    if cls is None:
        return {}
    fixed = baseline.fixed if baseline else {}
    defaults = {"target_modules": "all-linear", **(baseline.defaults if baseline else {})}
    renamed = baseline.renamed if baseline else {}
    hints = typing.get_type_hints(cls)
    options = {}
    for f in dataclasses.fields(cls):
        if f.name in _PEFT_INTERNAL or f.name in fixed or f.name in renamed:
            continue
        default = f.default_factory() if callable(f.default_factory) else f.default
        default = defaults.get(f.name, None if default is dataclasses.MISSING else default)
        help_text = " ".join(str(f.metadata.get("help", "")).split())
        options[f.name] = Option(f.name, hints[f.name], default, help_text)
    for ours, theirs in renamed.items():
        o = options[theirs]
        options[ours] = Option(ours, o.type, o.default, f"The same as {theirs}.")
    return options


def method_names() -> list[str]:
    """Return every name that `method.name` can be: plait's methods, then the baselines."""
    import plait

    return [m.key for m in plait.list_methods()] + list(BASELINES)


def peft_config(
    method: MethodConfig,
    task: ModelTask,
    total_steps: int | None = None,
    tasks: list[str] | None = None,
) -> "PeftConfig | None":
    """Build the peft config of a method; None for full fine-tuning.

    total_steps: planned optimizer steps, for methods with a schedule; a baseline may complete its
    options with it, see plait.upstream.options. tasks: names of the data's tasks, for a method that
    routes by task. Raises what the config class raises for its own checks.
    """
    cls = _config_class(method.name)
    if cls is None:
        return None
    options: dict[str, Any] = {"target_modules": "all-linear"}
    baseline = BASELINES.get(method.name)
    if baseline:
        options |= baseline.defaults | baseline.fixed
    for key, value in method.options.items():
        options[baseline.renamed.get(key, key) if baseline else key] = value
    if baseline and baseline.complete:
        baseline.complete(options, total_steps)
    elif "total_steps" in cls.__dataclass_fields__ and options.get("total_steps") is None:
        options["total_steps"] = total_steps
    if options.get("routing") == "task" and not options.get("tasks"):
        options["tasks"] = tasks
    return cls(task_type=_TASK_TYPES[task], **options)


def _config_class(name: str) -> Any:
    """Return the config class of a method, None for `full`."""
    if name in BASELINES:
        import peft

        cls = BASELINES[name].config
        return None if cls is None else vars(peft)[cls]
    from plait.core.registry import find

    return find(name).config


def _method(raw: dict[str, Any], source: _Source) -> MethodConfig:
    """Check the `method` section against the options of the method it names."""
    raw = dict(raw)
    name = raw.pop("name", MethodConfig.name)
    if name not in BASELINES and name not in method_names():
        raise ValueError(
            f"{source.at('method.name')} is {name!r}, which is no method. "
            f"{did_you_mean(name, method_names())}"
        )
    lr_scale = raw.pop("lr_scale", None)
    if lr_scale is not None:
        positive = dict[str, Annotated[float, Field(gt=0)]]
        lr_scale = _value(positive, lr_scale, "method.lr_scale", source)
    known = method_options(name)
    renamed = BASELINES[name].renamed if name in BASELINES else {}
    options = {}
    for key, value in raw.items():
        at = f"method.{key}"
        if key not in known:
            fixed = BASELINES[name].fixed if name in BASELINES else {}
            if key in fixed:
                raise ValueError(
                    f"{source.at(at)} cannot be set: {name} means {key} = {fixed[key]}. Remove it."
                )
            remedy = did_you_mean(key, [*known, "lr_scale"])
            raise ValueError(f"{source.at(at)} is not an option of {name}. {remedy}")
        if key in renamed and renamed[key] in raw:
            raise ValueError(
                f"{source.at(at)} and method.{renamed[key]} are the same option of {name}. "
                "Give one of them."
            )
        value = _value(known[key].type, value, at, source)
        if key in ("r", "init_r", "target_r") and value is not None and value < 1:
            raise ValueError(f"{source.at(at)} is {value}. Give a rank of at least 1.")
        options[key] = value
    return MethodConfig(name=name, options=options, lr_scale=lr_scale)


def optimizer_options(name: str) -> dict[str, Option]:
    """Return the options that `optimizer:` takes for this optimizer; {} for the default."""
    from plait.run.optimizers import option_facts

    return {
        key: Option(key, kind, None if default is inspect.Parameter.empty else default, text)
        for key, (kind, default, text) in option_facts(name).items()
    }


def _optimizer(
    raw: dict[str, Any], method: MethodConfig, training: dict[str, Any], source: _Source
) -> OptimizerConfig:
    """Check the `optimizer` section against the options of the one it names, and the method."""
    from plait.run.optimizers import DEFAULT, OPTIMIZERS, check_optimizer, option_facts

    raw = dict(raw)
    name = raw.pop("name", OptimizerConfig.name)
    if name != DEFAULT and name not in OPTIMIZERS:
        raise ValueError(
            f"{source.at('optimizer.name')} is {name!r}, which is no optimizer. "
            f"{did_you_mean(name, [DEFAULT, *OPTIMIZERS])}"
        )
    known, options = option_facts(name), {}
    for key, value in raw.items():
        at = f"optimizer.{key}"
        if key in ("lr", "learning_rate", "weight_decay"):
            there = "weight_decay" if key == "weight_decay" else "learning_rate"
            raise ValueError(f"{source.at(at)} cannot be set. Set training.{there}.")
        if key not in known:
            remedy = did_you_mean(key, known) if known else "Name the optimizer, optimizer.name."
            raise ValueError(f"{source.at(at)} is not an option of {name}. {remedy}")
        options[key] = _value(known[key][0], value, at, source)
    for key, (_, default, _) in known.items():
        if default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"{source.at('optimizer')}: {name} needs {key}. Give it.")
    try:
        check_optimizer(name, method.name, method.lr_scale, training)
    except ValueError as error:
        raise ValueError(f"{source.at('optimizer.name')}: {error}") from error
    return OptimizerConfig(name=name, options=options)


def _training(raw: dict[str, Any], data: DataConfig, source: _Source) -> dict[str, Any]:
    """Check the `training` section against TrainingArguments and fill in plait's defaults."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = [n for n in TrainingArguments.__dataclass_fields__ if n not in _TRAINING_OURS]
    given = {}
    for key, value in raw.items():
        at = f"training.{key}"
        if key in _TRAINING_OURS:
            raise ValueError(f"{source.at(at)} cannot be set. {_TRAINING_OURS[key]}")
        if key not in known:
            raise ValueError(source.unknown(at, known))
        value = _value(_enum_only(hints[key]), value, at, source)
        given[key] = value.value if isinstance(value, enum.Enum) else value
    evaluates = {} if data.validation is None else {"eval_strategy": "epoch"}
    return TRAINING_DEFAULTS | evaluates | given


def _enum_only(hint: Any) -> Any:
    """Drop `str` from `Enum | str`, which would let every misspelt value pass."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = typing.get_args(hint)
        if any(isinstance(m, type) and issubclass(m, enum.Enum) for m in members):
            kept = tuple(m for m in members if m is not str)
            return kept[0] if len(kept) == 1 else typing.Union[kept]  # noqa: UP007
    return hint


def _checked(section: type, raw: dict[str, Any], prefix: str, source: _Source) -> Any:
    """Validate one section into its dataclass."""
    return _value(section, raw, prefix, source)


def _value(hint: Any, value: Any, key: str, source: _Source) -> Any:
    """Validate a value against a type; a ValueError names every wrong key below `key`."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        problems: dict[str, tuple[Any, list[str]]] = {}
        unknown, own = [], []
        for detail in error.errors(include_url=False):
            if detail["type"] == "value_error":  # of the dataclass itself, which names the key
                own.append(f"{source.file}: {detail['msg'].removeprefix('Value error, ')}")
                continue
            if detail["type"] == "unexpected_keyword_argument":
                owner = _field_type(hint, detail["loc"][:-1])
                dotted = ".".join([key, *(str(p) for p in detail["loc"])])
                unknown.append(source.unknown(dotted, owner.__dataclass_fields__))
                continue
            steps, inner = _real_path(value, detail["loc"])
            dotted = ".".join([key, *steps])
            message = detail["msg"].removeprefix("Input should be ")
            problems.setdefault(dotted, (inner, []))[1].append(message)
        wrong = [
            f"{source.at(dotted)} is {inner!r}. It should be {' or '.join(messages)}."
            for dotted, (inner, messages) in problems.items()
        ]
        raise ValueError("\n".join(unknown + wrong + own)) from None


def _field_type(hint: Any, path: Sequence[str | int]) -> Any:
    """Return the dataclass at `path` below a dataclass."""
    for part in path:
        hint = typing.get_type_hints(hint)[str(part)]
    return hint


def _real_path(value: Any, loc: Sequence[str | int]) -> tuple[list[str], Any]:
    """Follow pydantic's location while it names keys of the value (not branches of a union)."""
    steps = []
    for part in loc:
        if not (isinstance(value, dict) and part in value):
            break
        value = value[part]
        steps.append(str(part))
    return steps, value


def _override(raw: dict[str, Any], text: str) -> str:
    """Set `a.b=c` in a nested dict in place; return the dotted key."""
    key, sign, value = text.partition("=")
    parts = key.split(".")
    if not sign or len(parts) < 2 or not all(parts):
        raise ValueError(f"command line: {text!r} is not an override. Write section.key=value.")
    here = raw
    for depth, part in enumerate(parts[:-1], 1):
        below = here.get(part)
        here[part] = {} if below is None else below
        here = here[part]
        if not isinstance(here, dict):
            raise ValueError(
                f"command line: {key} is below {'.'.join(parts[:depth])}, which is {here!r} and "
                "has no keys. Set that key itself."
            )
    try:
        here[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"command line: {text!r}: {_yaml_problem(error)}. Quote it.") from None
    return key


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice; PyYAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Say on one line where YAML is broken."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _sections() -> str:
    return ", ".join(RunConfig.__dataclass_fields__)
