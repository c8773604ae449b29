"""Rows and arguments of a quick run under Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from plait.testing import tiny


def rows(count: int = 8) -> list[dict[str, Any]]:
    """A data set for Trainer."""
    return [{"input_ids": t, "labels": t} for t in tiny.tokens(count)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Six micro-batches of 2 rows, no logging, no files."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
        "logging_strategy": "no", "max_steps": 3,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})
