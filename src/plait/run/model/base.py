"""The base model of a run that is about to train: loaded, with a head, and its layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel

from plait.run.config import RunConfig
from plait.run.data.bundle import DataBundle
from plait.run.model.head import head_of
from plait.run.model.layers import adaptable_layers
from plait.run.model.loading import load_base_with_missing, load_full
from plait.run.model.reading import check_ids, check_length


@dataclass(frozen=True)
class Base:
    """A base model that reads a run's rows.

    layers: the linear layers that can be adapted, by name. missing: modules, no heads, that the
    checkpoint has no weights for; they are trained and saved with the adapter.
    """

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    missing: list[str]


def prepare_base(cfg: RunConfig, data: DataBundle | None, labels: list[str] | None = None) -> Base:
    """Load the base model of a run and check that it reads the rows.

    The caller seeds: modules that the checkpoint lacks are drawn. data: None on a server without
    rows, which then gives the class names, labels.

    Raises as load_base_with_missing, check_length and check_ids do.
    """
    labels = labels if data is None else data.labels
    head = head_of(cfg.model.task, labels)
    if cfg.method.name == "full":
        model, missing = load_full(cfg.model, *head)
    else:
        model, missing = load_base_with_missing(cfg.model, *head)
    if data is not None:
        check_length(model, data.longest)
        check_ids(model, data.largest_id, data.tokenizer)
    layers = adaptable_layers(model)
    if cfg.model.quantization != "none":
        checkpointing = recomputes(cfg.training)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return Base(model, layers, missing)


def recomputes(training: Mapping[str, Any]) -> bool:
    """Whether a run computes the activations of its blocks again for the gradients.

    training: the section. transformers has two names for it, the later one being newer.
    """
    return any(training.get(f"{what}_checkpointing") for what in ("gradient", "activation"))
