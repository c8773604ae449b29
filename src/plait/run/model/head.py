"""The head of a classifier or a regression: how many outputs, and their names."""

from typing import Any

from plait.run.config import ModelConfig
from plait.run.model.source import config_of

HEADS = ("classifier", "score")  # peft trains and saves these for classification by itself


def head_of(task: str, labels: list[str] | None) -> tuple[int | None, dict[int, str] | None]:
    """Return the outputs of the head that a task needs and their names, as load_base takes them."""
    outputs = {"classification": len(labels or ()), "regression": 1}.get(task)
    return outputs, None if labels is None else dict(enumerate(labels))


def head_labels(model: ModelConfig) -> list[str] | None:
    """Return the class names of the head that a checkpoint holds, by index.

    None without a head for classification, and [] for a head whose classes have no names.
    """
    if model.task != "classification":
        return None
    config: Any = config_of(model)
    if not any(
        str(name).endswith("ForSequenceClassification") for name in config.architectures or ()
    ):
        return None
    names = [str(config.id2label[i]).strip() for i in sorted(config.id2label)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names
