"""The `training` section: any field of transformers.TrainingArguments, with plait's defaults."""

from typing import Any

from plait.run.config import schema
from plait.run.config.yaml import Source, check_value

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
        ValueError: an unknown key, one that plait sets itself, or a value of a wrong type.
    """
    types = schema.training_types()
    known = [name for name in types if name not in _REFUSED]
    values = {}
    for key, value in raw.items():
        at = f"training.{key}"
        if key in _REFUSED:
            raise ValueError(f"{source.at(at)} cannot be set. {_REFUSED[key]}")
        if key not in known:
            where = "The keys are the fields of transformers.TrainingArguments."
            raise ValueError(source.unknown(at, known, where))
        values[key] = check_value(schema.read_type(types[key]), value, at, source)
    each_epoch = {"eval_strategy": "epoch"} if evaluates else {}
    return TRAINING_DEFAULTS | each_epoch | values
