"""The config that `plait init` writes: every key with its default, and its help as the comment."""

import dataclasses
import json
import textwrap
import typing
from collections.abc import Mapping
from typing import Any, Literal

from plait.run.config.sections import (
    ChainConfig,
    ColumnsConfig,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
)

_WIDTH, _COLUMN = 100, 30  # of a line, and where its comment starts

_HEAD = """\
# A run of plait. Look at it with `plait check FILE`, train it with `plait train FILE`.
# Every key can be set on the command line, too: plait train FILE method.r=16 output.dir=runs/r16
# An unknown key is an error. A key that is left out takes the value shown here, unless a comment
# says otherwise.
"""

_TRAINING = """\
# Any field of transformers.TrainingArguments. plait's defaults:
# learning_rate 2e-4, cosine with 3 % warm-up, batch 8, 3 epochs, evaluation (if there are
# validation rows) and a checkpoint each epoch, the last two kept, seed 42, no tracker.
training:
  learning_rate: 5e-3         # a small model needs more than the default
  per_device_train_batch_size: 16
  max_steps: 300              # left out: num_train_epochs decides
"""

_METHOD_KEYS = """\
  r: 8                        # all other keys: `plait methods dual_module`
  target_modules: all-linear  # or name endings: [q_proj, v_proj]; or a regular expression
"""

# Values of the first run where they are not the default.
_DATA = {"validation": "builtin:shift", "test": "builtin:shift"}


def starter_config() -> str:
    """Return a commented config of a first run, for `plait init`."""
    method = _lines(MethodConfig, {"name": "dual_module"}, ("options", "lr_scale"))
    factors = _lines(MethodConfig, {"lr_scale": {"A": 2, "B": 3}}, ("name", "options"), "# ")
    parts = [
        _HEAD,
        "model:\n" + _lines(ModelConfig),
        "method:\n" + method + _METHOD_KEYS + factors,
        "optimizer:\n" + _lines(OptimizerConfig, leave_out=("options",)),
        "# objective: sft             # sft | dpo | kto | reward | grpo. The objective; see\n"
        "                              # docs/objectives.md.\n",
        "data:\n" + _lines(DataConfig, _DATA),
        _TRAINING,
        "parallel:\n" + _lines(ParallelConfig),
        "evaluation:\n" + _lines(EvaluationConfig),
        "# Train the method as a chain of links, see docs/chains.md.\n# chain:\n"
        + _lines(ChainConfig, commented="# "),
        "output:\n" + _lines(OutputConfig, {"also": ["lora"]}),
    ]
    return "\n".join(parts)


def _lines(
    cls: Any,
    values: Mapping[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    commented: str = "",
) -> str:
    """Return a section's keys, one after the other, the help of each wrapped beside it."""
    hints, values, lines = typing.get_type_hints(cls), values or {}, []
    for f in dataclasses.fields(cls):
        if f.name in leave_out:
            continue
        default = [] if f.default_factory is list else f.default
        key = f"{commented}  {f.name}: {_shown(values.get(f.name, default))}"
        first, *more = textwrap.wrap(
            _help(f, hints[f.name]), _WIDTH - _COLUMN - 2, break_on_hyphens=False
        )
        lines += [f"{key:<{_COLUMN}}# {first}\n"]
        lines += [f"{commented:<{_COLUMN}}# {line}\n" for line in more]
    return "".join(lines)


def _help(f: Any, hint: Any) -> str:
    """Return a field's help, with the values of a Literal and the names of columns."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    text = f.metadata["help"]
    if f.default_factory is ColumnsConfig:
        choices = tuple(column.name for column in dataclasses.fields(ColumnsConfig))
        return f"{text} Ours: {', '.join(choices)}."
    return f"{' | '.join(choices)}. {text}" if choices else text


def _shown(value: Any) -> str:
    """Return a default as YAML."""
    if value is dataclasses.MISSING:
        return "{}"
    if isinstance(value, str):
        return value
    return json.dumps(value).replace('"', "")
