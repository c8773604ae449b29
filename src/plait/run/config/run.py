"""RunConfig: one checked run, loaded from a file and written back to one."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.options import did_you_mean, shown
from plait.run.config.method import (
    DEFAULT_OPTIMIZER,
    check_method_section,
    check_optimizer_section,
    peft_config,
)
from plait.run.config.objectives import ObjectiveConfig, check_objective_section, named
from plait.run.config.plugins import check_plugins
from plait.run.config.sections import (
    ChainConfig,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
)
from plait.run.config.training import check_training_section
from plait.run.config.yaml import Source, check_section, check_sections, dump, override, read

SECTIONS = (
    "model",
    "method",
    "optimizer",
    "objective",
    "data",
    "training",
    "parallel",
    "evaluation",
    "chain",
    "output",
)


@dataclass(kw_only=True)
class RunConfig:
    """One checked run.

    training: keywords of TrainingArguments, plait's defaults filled in. plugins: modules that
    register methods of other people.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    chain: ChainConfig | None = None
    output: OutputConfig = field(default_factory=OutputConfig)
    plugins: list[str] = field(default_factory=list)

    source = Source("config")  # no field: where an error that is found later came from


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, import_plugins: bool = False
) -> RunConfig:
    """Read a config file and apply overrides of the form `section.key=value` (value in YAML).

    Neither torch nor peft is loaded; `check_method` checks what takes them. import_plugins: import
    the modules that the file names, which runs their code: for a file of the user's own alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: everything that is wrong in it, each with the file, the dotted key, the value
            and the remedy; a plugin that is neither imported yet nor to be imported.
        ImportError: a plugin that cannot be imported.
    """
    raw = read(Path(path), f"Write one with: plait init {path}")
    return config_from_dict(raw, overrides, str(path), import_plugins=import_plugins)


def config_from_dict(
    raw: Any, overrides: Sequence[str] = (), file: str = "config", *, import_plugins: bool = False
) -> RunConfig:
    """Check a nested dict as `load_config` does; `file` names it in errors."""
    raw = copy.deepcopy(raw)
    is_mapping = isinstance(raw, dict)
    if is_mapping and "objective" in raw:
        raw["objective"] = named(raw["objective"])
    source = Source(file, [override(raw, text) for text in overrides] if is_mapping else ())
    if is_mapping and "objective" in raw:
        raw["objective"] = named(raw["objective"])
    plugins = check_plugins(
        raw.pop("plugins", None) if is_mapping else None, source, import_plugins
    )
    section = check_sections(raw, SECTIONS, source)
    data = check_section(DataConfig, section["data"], "data", source)
    has_chain = raw.get("chain") is not None
    config = RunConfig(
        model=check_section(ModelConfig, section["model"], "model", source),
        method=check_method_section(section["method"], source),
        optimizer=check_optimizer_section(section["optimizer"], source),
        objective=check_objective_section(section["objective"], source, import_plugins),
        data=data,
        training=check_training_section(section["training"], data.validation is not None, source),
        parallel=check_section(ParallelConfig, section["parallel"], "parallel", source),
        evaluation=check_section(EvaluationConfig, section["evaluation"], "evaluation", source),
        chain=check_section(ChainConfig, section["chain"], "chain", source) if has_chain else None,
        output=check_section(OutputConfig, section["output"], "output", source),
        plugins=plugins,
    )
    config.source = source
    return config


def check_method(config: RunConfig, source: Source | None = None) -> None:
    """Check what takes the method's own classes: its options together, the optimizer, the chain.

    source: named in errors; the file that the config was loaded from unless given.

    Raises:
        ValueError: options that do not go together, an optimizer or a chain that cannot train the
            method, with the file, the key and the remedy.
    """
    source = source or config.source
    if config.optimizer.name != DEFAULT_OPTIMIZER:
        from plait.run.optimizers import check_optimizer

        try:
            method = config.method
            check_optimizer(config.optimizer.name, method.name, method.lr_scale, config.training)
        except ValueError as error:
            raise ValueError(f"{source.at('optimizer.name')}: {error}") from error
    if config.chain is not None:
        _check_chain(config.chain, config.method.name, source)
    try:
        # The data names the tasks later; one name stands for them while the rest is checked.
        peft_config(config.method, config.model.task, tasks=["unknown"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source.at('method')}: {error}") from error


def _check_chain(chain: ChainConfig, method: str, source: Source) -> None:
    from plait.chain import chain_support
    from plait.chain.recipes import RECIPES

    if chain.plan not in RECIPES:
        raise ValueError(
            f"{source.at('chain.plan')} is {shown(chain.plan)}, which is not a plan. "
            f"{did_you_mean(chain.plan, RECIPES)}"
        )
    try:
        chain.build()
        reason = chain_support(chain.plan, method)
    except ValueError as error:
        raise ValueError(f"{source.at('chain')}: {error}") from None
    if reason is not None:
        raise ValueError(f"{source.at('chain.plan')}: {reason}")


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the nested dict that `config_from_dict` reads back to an equal config."""
    result = dataclasses.asdict(config)
    method = result["method"]
    lr_scale = {} if method["lr_scale"] is None else {"lr_scale": method["lr_scale"]}
    result["method"] = {"name": method["name"], **method["options"], **lr_scale}
    result["optimizer"] = {"name": config.optimizer.name, **result["optimizer"]["options"]}
    result["objective"] = {"name": config.objective.name, **config.objective.options}
    if config.objective.name == "sft":
        del result["objective"]
    columns = result["data"]["columns"]
    result["data"]["columns"] = {k: v for k, v in columns.items() if v is not None}
    if config.chain is None:
        del result["chain"]
    else:
        result["chain"] = {k: v for k, v in result["chain"].items() if v is not None}
    if not config.plugins:
        del result["plugins"]
    return result


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML; `load_config` reads it back to an equal config."""
    return dump(config_to_dict(config))


# Files of other sections ------------------------------------------------------------------------


def load_sections(
    path: str | Path, sections: dict[str, type], overrides: Sequence[str] = (), remedy: str = ""
) -> dict[str, Any]:
    """Read a config file of other sections than a run's, as strictly; a section -> its object.

    sections: name -> dataclass; MethodConfig is checked against the method that it names.
    remedy: for a missing file. Raises as `load_config` does.
    """
    raw = read(Path(path), remedy)
    is_mapping = isinstance(raw, dict)
    source = Source(str(path), [override(raw, text) for text in overrides] if is_mapping else ())
    values = check_sections(raw, sections, source)
    return {
        name: check_method_section(values[name], source)
        if section is MethodConfig
        else check_section(section, values[name], name, source)
        for name, section in sections.items()
    }


def dump_sections(sections: dict[str, Any]) -> str:
    """Return sections as YAML; `load_sections` reads them back to equal ones."""
    plain = {name: dataclasses.asdict(section) for name, section in sections.items()}
    for name, section in sections.items():
        if isinstance(section, MethodConfig):
            plain[name] = {"name": section.name, **section.options}
    return dump(plain)
