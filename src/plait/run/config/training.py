"""The `training` section: any field of transformers.TrainingArguments, with plait's defaults."""

from typing import Any

from plait.run.config import schema
from plait.run.config.yaml import Source, bounded, check_value

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

# Bounds of fields, as in `plait.options.option`: transformers accepts what lies outside.
_BOUNDS: dict[str, dict[str, float]] = {
    "per_device_train_batch_size": {"least": 1, "most": 2**20},
    "per_device_eval_batch_size": {"least": 1, "most": 2**20},
    "gradient_accumulation_steps": {"least": 1, "most": 2**20},
    "eval_accumulation_steps": {"least": 1},
    "num_train_epochs": {"above": 0, "most": 2**20},
    "max_steps": {"least": -1, "most": 2**40},
    "learning_rate": {"least": 0},
    "weight_decay": {"least": 0},
    "warmup_steps": {"least": 0},
    "warmup_ratio": {"least": 0, "most": 1},
    "adam_beta1": {"least": 0, "below": 1},
    "adam_beta2": {"least": 0, "below": 1},
    "adam_epsilon": {"least": 0},
    "max_grad_norm": {"least": 0},
    "label_smoothing_factor": {"least": 0, "below": 1},
    "neftune_noise_alpha": {"least": 0},
    "logging_steps": {"above": 0},
    "eval_steps": {"above": 0},
    "save_steps": {"above": 0},
    "eval_delay": {"least": 0},
    "save_total_limit": {"least": 1},
    "dataloader_num_workers": {"least": 0, "most": 256},
    "dataloader_prefetch_factor": {"least": 1},
    "torch_empty_cache_steps": {"least": 1},
    "early_stopping_patience": {"least": 1, "most": 2**40},
    "seed": {"least": 0, "below": 2**32},
    "data_seed": {"least": 0, "below": 2**32},
}

# Keys of plait's own, which no field of TrainingArguments has.
PATIENCE = "early_stopping_patience"
_OWN: dict[str, Any] = {PATIENCE: int | None}

_REFUSED = {
    "output_dir": "Set output.dir, the run folder.",
    "resume_from_checkpoint": "Resume with: plait train FILE --resume.",
    "remove_unused_columns": "plait chooses the columns the model gets.",
    "hub_token": "Set the environment variable HF_TOKEN; a config is stored with the run.",
}


def check_training_section(raw: dict[str, Any], evaluates: bool, source: Source) -> dict[str, Any]:
    """Check the `training` section against TrainingArguments and fill in plait's defaults.

    evaluates: whether there are validation rows.

    Raises:
        ValueError: an unknown key, one that plait sets itself, or a value of a wrong type or range.
    """
    types = schema.training_types()
    known = [*(name for name in types if name not in _REFUSED), *_OWN]
    values = {}
    for key, value in raw.items():
        at = f"training.{key}"
        if key in _REFUSED:
            raise ValueError(f"{source.at(at)} cannot be set. {_REFUSED[key]}")
        if key not in known:
            where = f"The keys are {PATIENCE} and the fields of transformers.TrainingArguments."
            raise ValueError(source.unknown(at, known, where))
        hint = _OWN[key] if key in _OWN else schema.read_type(types[key])
        kind = bounded(hint, _BOUNDS.get(key, {}))
        values[key] = check_value(kind, value, at, source)
        if key == "report_to" and str(values[key]).lower() in ("no", "off", "false"):
            values[key] = "none"
    each_epoch = {"eval_strategy": "epoch"} if evaluates else {}
    return TRAINING_DEFAULTS | each_epoch | values
