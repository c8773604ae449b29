"""The config of a run: YAML and command-line overrides in, checked dataclasses out.

yaml      reading, overrides, error texts           sections   a dataclass each, help on a field
method    method and optimizer, the peft config     training   fields of TrainingArguments
objectives  what a run trains for
run       RunConfig: load, dump, check_method       plugins    methods of other people
schema    options of all classes, without torch     starter    what `plait init` writes
"""

from plait.options import did_you_mean
from plait.run.config.method import (
    allocates,
    method_names,
    method_options,
    optimizer_options,
    peft_config,
)
from plait.run.config.objectives import OBJECTIVES, ObjectiveConfig, rewards_of
from plait.run.config.plugins import IMPORTED, REMOTE_CODE, check_remote_code, import_plugin
from plait.run.config.run import (
    RunConfig,
    check_method,
    config_from_dict,
    config_to_dict,
    dump_config,
    dump_sections,
    load_config,
    load_sections,
)
from plait.run.config.schema import PEFT_INTERNAL, Option
from plait.run.config.sections import (
    ChainConfig,
    ColumnsConfig,
    DataConfig,
    EvaluationConfig,
    Form,
    MethodConfig,
    ModelConfig,
    ModelTask,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
)
from plait.run.config.starter import starter_config
from plait.run.config.training import PATIENCE, TRAINING_DEFAULTS

__all__ = [
    "IMPORTED",
    "OBJECTIVES",
    "PATIENCE",
    "PEFT_INTERNAL",
    "REMOTE_CODE",
    "TRAINING_DEFAULTS",
    "ChainConfig",
    "ColumnsConfig",
    "DataConfig",
    "EvaluationConfig",
    "Form",
    "MethodConfig",
    "ModelConfig",
    "ModelTask",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Option",
    "OutputConfig",
    "ParallelConfig",
    "RunConfig",
    "allocates",
    "check_method",
    "check_remote_code",
    "config_from_dict",
    "config_to_dict",
    "did_you_mean",
    "dump_config",
    "dump_sections",
    "import_plugin",
    "load_config",
    "load_sections",
    "method_names",
    "method_options",
    "optimizer_options",
    "peft_config",
    "rewards_of",
    "starter_config",
]
