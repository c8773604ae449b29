"""The method and the optimizer of a run: names, checked options, and the peft config they make."""

import sys
from typing import TYPE_CHECKING, Any

from plait.options import did_you_mean, shown
from plait.run.config import schema
from plait.run.config.schema import Option
from plait.run.config.sections import MethodConfig, ModelTask, OptimizerConfig
from plait.run.config.yaml import Source, bounded, check_value
from plait.upstream.table import BASELINES
from plait.upstream.types import PREFIX, peft_types

if TYPE_CHECKING:
    from peft import PeftConfig

_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS", "regression": "SEQ_CLS"}
_RANKS = ("r", "init_r", "target_r")
# Bounds of options by their names: peft's fields have none, plait's no largest value.
_MOST = 65_536  # the widest layers of today's models have 53,248
_RANK: dict[str, float] = {"least": 1, "most": _MOST}
_COUNT = _RANK
_FEW: dict[str, float] = {"most": 4096}
_BOUNDS: dict[str, dict[str, float]] = {
    "r": _RANK,
    "init_r": _RANK,
    "target_r": _RANK,
    "r1": _RANK,
    "r2": _RANK,
    "shared_r": _RANK,
    "common_rank": _RANK,
    "rank_pattern": _RANK,
    "lora_alpha": {"above": 0},
    "alpha_pattern": {"above": 0},
    "dropout": {"least": 0, "below": 1},  # whatever stands in front: the method's name
    "num_A": _FEW,
    "num_B": _FEW,
    "num_experts": _FEW,
    "rounds": _FEW,
    "num_basis_A": _COUNT,
    "num_basis_B": _COUNT,
    "spare": {"most": _MOST},
    "num_vectors": _COUNT,
    "vector_length": _COUNT,
    "topk": _COUNT,
    "qalora_group_size": _COUNT,
    "theta_d_length": {"least": 1, "most": 2**26},
    "orth_reg_weight": {"least": 0},
    "beta1": {"least": 0, "below": 1},
    "beta2": {"least": 0, "below": 1},
}
# Options that make peft import a module by its name.
_IMPORTS = ("megatron_config", "megatron_core")
DEFAULT_OPTIMIZER = OptimizerConfig.name


def method_names() -> list[str]:
    """Return every name that `method.name` can be: plait's, those of plugins, upstream's."""
    registry = sys.modules.get("plait.core.registry")  # a plugin has loaded it
    registered = [m.key for m in registry.list_methods()] if registry else []
    return list(dict.fromkeys([*schema.methods(), *registered, *BASELINES]))


def method_options(name: str) -> dict[str, Option]:
    """Return the options that `method:` takes for this method; {} for full fine-tuning.

    Raises:
        ValueError: there is no such method; the message has the nearest name.
    """
    if name not in method_names() and name not in BASELINES:
        raise ValueError(f"{name!r} is not a method. {_nearest_method(name)}")
    baseline = BASELINES.get(name)
    if baseline is None:
        options = schema.method_class_options(name)
    else:
        options = schema.peft_class_options(baseline.config) if baseline.config else {}
    if options is None:
        options = schema.class_options(_config_class(name))
    defaults = {"target_modules": "all-linear"}
    if baseline is not None:
        options = {key: o for key, o in options.items() if key not in baseline.fixed}
        defaults |= baseline.defaults
    options = {
        key: Option(key, o.hint, defaults.get(key, o.default), o.help, o.required, o.bounds)
        for key, o in options.items()
    }
    for ours, theirs in baseline.renamed.items() if baseline else ():
        o = options[theirs]
        options.pop(ours, None)
        options[ours] = Option(ours, o.hint, o.default, f"The same as {theirs}.", bounds=o.bounds)
    return options


def check_method_section(raw: dict[str, Any], source: Source) -> MethodConfig:
    """Check the `method` section against the options of the method that it names.

    Raises:
        ValueError: an unknown method or option, or a value of a wrong type or range.
    """
    raw = dict(raw)
    name = raw.pop("name", MethodConfig.name)
    if name == "peft" or str(name).startswith(PREFIX):
        name = _typed(name, raw.pop("type", None), source)
    elif name not in method_names():
        raise ValueError(
            f"{source.at('method.name')} is {shown(name)}, which is not a method. "
            f"{_nearest_method(name)}"
        )
    lr_scale = raw.pop("lr_scale", None)
    if lr_scale is not None:
        positive = bounded(dict[str, float], {"above": 0})
        lr_scale = check_value(positive, lr_scale, "method.lr_scale", source)
    known, baseline = method_options(name), BASELINES.get(name)
    fixed, renamed = (baseline.fixed, baseline.renamed) if baseline else ({}, {})
    options = {}
    for key, value in raw.items():
        at = f"method.{key}"
        if key in fixed:
            raise ValueError(
                f"{source.at(at)} cannot be set: {name} means {key} = {fixed[key]}. Remove it."
            )
        if key not in known:
            remedy = did_you_mean(
                key, [*known, "lr_scale"], f"`plait methods {name}` lists its options."
            )
            raise ValueError(f"{source.at(at)} is not an option of {name}. {remedy}")
        if key in renamed and renamed[key] in raw:
            raise ValueError(
                f"{source.at(at)} and method.{renamed[key]} are the same option of {name}. "
                "Give one of them."
            )
        if key in _IMPORTS and value is not None:
            raise ValueError(f"{source.at(at)} cannot be set: it imports a module. Remove it.")
        of_name = "dropout" if key.endswith("_dropout") else key
        limits = {**_BOUNDS.get(of_name, {}), **known[key].bounds}
        least = limits.pop("least", None) if key in _RANKS else None
        options[key] = check_value(bounded(known[key].type, limits), value, at, source)
        if least is not None and options[key] is not None and options[key] < least:
            raise ValueError(f"{source.at(at)} is {options[key]}. Give a rank of at least 1.")
    return MethodConfig(name=name, options=options, lr_scale=lr_scale)


def _typed(name: str, kind: Any, source: Source) -> str:
    """Return the key of a type of peft's: `method: {name: peft, type: MISS}`."""
    where = "method.name" if kind is None else "method.type"
    kind = name[len(PREFIX) :] if kind is None else kind
    if not kind:
        raise ValueError(
            f"{source.at('method')}: peft needs a type, such as MISS. Types: "
            f"{', '.join(sorted(peft_types()))}."
        )
    key = f"{PREFIX}{str(kind).upper()}"
    if key not in BASELINES:
        raise ValueError(
            f"{source.at(where)} is {shown(kind)}, which is not a type of the installed peft. "
            f"{did_you_mean(str(kind).upper(), peft_types())}"
        )
    return key


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
    if "target_modules" not in cls.__dataclass_fields__:
        options = {}
    baseline = BASELINES.get(method.name)
    if baseline:
        options |= {**baseline.defaults, **baseline.fixed}
    for key, value in method.options.items():
        options[baseline.renamed.get(key, key) if baseline else key] = value
    if baseline and baseline.complete:
        baseline.complete(options, total_steps)
    elif "total_steps" in cls.__dataclass_fields__ and options.get("total_steps") is None:
        options["total_steps"] = total_steps
    if options.get("routing") == "task" and not options.get("tasks"):
        options["tasks"] = tasks
    return cls(task_type=_TASK_TYPES[task], **options)


def allocates(config: Any) -> bool:
    """Whether a peft config is of a method that scores ranks on a development batch."""
    from plait.core.config import DeltaConfig

    return isinstance(config, DeltaConfig) and config.delta_cls.allocates(config)


def optimizer_options(name: str) -> dict[str, Option]:
    """Return the options that `optimizer:` takes for this optimizer; {} for the default."""
    return schema.optimizer_class_options(name) or {}


def check_optimizer_section(raw: dict[str, Any], source: Source) -> OptimizerConfig:
    """Check the `optimizer` section against the options of the optimizer that it names.

    Raises:
        ValueError: an unknown optimizer or option, a wrong type, or a required option left out.
    """
    raw = dict(raw)
    name, names = raw.pop("name", DEFAULT_OPTIMIZER), [DEFAULT_OPTIMIZER, *schema.optimizers()]
    if name not in names:
        raise ValueError(
            f"{source.at('optimizer.name')} is {shown(name)}, which is not an optimizer. "
            f"{did_you_mean(name, names, 'The page on optimizers lists them.')}"
        )
    known, options = optimizer_options(name), {}
    for key, value in raw.items():
        at = f"optimizer.{key}"
        if key in ("lr", "learning_rate", "weight_decay"):
            there = "weight_decay" if key == "weight_decay" else "learning_rate"
            raise ValueError(f"{source.at(at)} cannot be set. Set training.{there}.")
        if key not in known:
            remedy = did_you_mean(key, known) if known else "Name the optimizer, optimizer.name."
            raise ValueError(f"{source.at(at)} is not an option of {name}. {remedy}")
        options[key] = check_value(bounded(known[key].type, {}), value, at, source)
    for key, o in known.items():
        if o.required and key not in options:
            raise ValueError(f"{source.at('optimizer')}: {name} needs {key}. Give it.")
    return OptimizerConfig(name=name, options=options)


def _nearest_method(name: str) -> str:
    return did_you_mean(
        name,
        method_names(),
        "`plait methods` lists all; a method of your own becomes known by: plait --import MODULE",
    )


def _config_class(name: str) -> Any:
    """Return the config class of a method, None for `full`."""
    if name in BASELINES:
        import peft

        cls = BASELINES[name].config
        return None if cls is None else vars(peft)[cls]
    import plait.methods  # noqa: F401 - registers plait's own
    from plait.core.registry import find

    return find(name).config
