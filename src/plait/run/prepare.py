"""Turn the config of a run into tokenizer, data, base model and method, checked against each other.

    prepare(cfg)                               a run that is to be trained
    load_run(path)                             a run that was trained
    check_config, prepare_base, method_config  the parts, for a run of many clients

Nothing is written here: a config that is refused leaves no run folder behind.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D

from plait import chain
from plait.core.delta import Delta
from plait.gates.alloc import set_development_batch
from plait.run.adapter import load_adapter
from plait.run.config import (
    ModelConfig,
    RunConfig,
    allocates,
    load_config,
    method_options,
    peft_config,
)
from plait.run.data.bundle import DataBundle, load_data
from plait.run.folder import RunFolder
from plait.run.model import (
    adaptable_layers,
    load_base_with_missing,
    load_tokenizer,
    parameter_counts,
    quantised_reason,
    to_device,
)
from plait.upstream.layers import targeted
from plait.upstream.table import BASELINES

_SCORED_ROWS = 32  # validation rows that an allocation scores ranks on


@dataclass(frozen=True)
class Base:
    """A base model that fits the method's and the data's demands.

    layers: the linear layers that can be adapted, by name. missing: modules, no heads, that the
    checkpoint has no weights for; they are trained and saved with the adapter.
    """

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    missing: list[str]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be trained.

    model: with the method on it (a plain model for `full`), in training mode, on the CPU unless
    it is quantised. steps: planned optimizer steps.
    """

    cfg: RunConfig
    tokenizer: PreTrainedTokenizerBase
    data: DataBundle
    model: PeftModel | PreTrainedModel
    steps: int

    @property
    def seeds(self) -> dict[str, int]:
        """What is seeded -> its seed."""
        return {"training": self.cfg.training["seed"], "data": self.cfg.data.seed}

    @property
    def facts(self) -> dict[str, Any]:
        """What environment.json notes of the data and the model."""
        trainable, total = parameter_counts(self.model)
        return {
            "kind": self.data.kind,
            "labels": self.data.labels,
            "tasks": self.data.tasks,
            "train_rows": len(self.data.train),
            "train_tokens": sum(len(ids) for ids in self.data.train["input_ids"]),
            "trainable": trainable,
            "parameters": total,
        }

    def place(self) -> PeftModel | PreTrainedModel:
        """Move the model to its device and give a method that scores its ranks the rows for it."""
        model = to_device(self.model, self.cfg)
        if isinstance(model, PeftModel) and allocates(model.peft_config["default"]):
            rows = self.data.splits()["validation"]
            batch = self.data.collator([rows[i] for i in range(min(_SCORED_ROWS, len(rows)))])
            set_development_batch(model, {k: v.to(model.device) for k, v in batch.items()})
        return model


@dataclass(frozen=True)
class TrainedRun:
    """A trained run. model: in evaluation mode. facts: what training noted in environment.json."""

    folder: RunFolder
    cfg: RunConfig
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel | PreTrainedModel
    facts: dict[str, Any]

    def load_data(self) -> DataBundle:
        """Load the rows of the config; ValueError also for rows longer than the model reads."""
        data = load_data(self.cfg, self.tokenizer)
        check_lengths(self.model, data)
        return data


def prepare(cfg: RunConfig) -> Prepared:
    """Load and check everything that training takes.

    Sets the global seed to `training.seed`, from which new modules and the adapter are drawn.

    Raises:
        FileNotFoundError: a model, weights or rows that are not there.
        ValueError: what the config, the data, the model and the method refuse of each other: rows
            longer than the model reads, target modules that match nothing, a rank or a schedule
            that does not fit.
        ImportError: a quantised base without bitsandbytes.
    """
    check_config(cfg)
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer)
    set_seed(cfg.training["seed"])
    base = prepare_base(cfg, data)
    steps = planned_steps(cfg.training, len(data.train))
    config = method_config(cfg, base, steps, data.tasks)
    if allocates(config) and data.validation is None:
        raise ValueError(
            f"data.validation is not set, and {cfg.method.name} scores its ranks on validation "
            "rows. Give a source or a fraction of train."
        )
    model = base.model if config is None else get_peft_model(base.model, config)
    delta = next((m for m in model.modules() if isinstance(m, Delta)), None)
    if delta is not None and cfg.chain is None:  # a chain checks the steps of a link
        delta.check_schedule()
    return Prepared(cfg, tokenizer, data, model.train(), steps)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Load the base model and the trained adapter (or the trained model) of a run folder.

    overrides: `data.x=..`, `evaluation.x=..`: other data than that of training.

    Raises FileNotFoundError if training has not finished, and ValueError for an adapter that is
    damaged, a pickle, of another method, of another model's shapes or of a newer plait.
    """
    folder = RunFolder.open(path)
    for text in overrides:
        if not text.startswith(("data.", "evaluation.")):
            raise ValueError(
                f"command line: {text} cannot be changed after training. Override data.* or "
                "evaluation.*."
            )
    cfg = load_config(folder.config, overrides)
    full = cfg.method.name == "full"
    trained = folder.model if full else folder.adapter
    if not trained.is_dir():
        raise FileNotFoundError(
            f"{path}: {trained.name}/ is missing, so training did not finish. Continue it: plait "
            "train FILE --resume"
        )
    facts = folder.read_facts()
    tokenizer = load_tokenizer(cfg.model)
    if full:
        source = replace(cfg.model, name=str(trained.resolve()), revision=None)
        model, _ = _load_labelled(source, facts.get("labels"))
    else:
        expected = peft_config(cfg.method, cfg.model.task, tasks=facts.get("tasks"))
        assert expected is not None  # only `full` has none
        base, _ = _load_labelled(cfg.model, facts.get("labels"))
        model = load_adapter(base, trained, expected)
        if cfg.chain is not None:
            chain.load(model, trained)
    return TrainedRun(folder, cfg, tokenizer, to_device(model.eval(), cfg), facts)


# -------------------------------------------------------------------------------------- the parts


def check_config(cfg: RunConfig) -> None:
    """Raise ValueError for what a config says wrong by itself, before anything is loaded."""
    _checked_peft_config(cfg, None, ["unknown"])  # one name stands for the data's tasks
    name, quantization = cfg.method.name, cfg.model.quantization
    reason = quantised_reason(name, quantization)
    if reason is not None:
        raise ValueError(
            f"method.name: {name} does not work on a {quantization} base: {reason}. Set "
            "model.quantization: none, or use another method."
        )


def prepare_base(cfg: RunConfig, data: DataBundle | None, labels: list[str] | None = None) -> Base:
    """Load the base model of a run and check that it reads the rows.

    The caller seeds: modules that the checkpoint lacks are drawn. data: None on a server without
    rows, which then gives the class names, labels.
    """
    if data is not None:
        labels = data.labels
    model, missing = _load_labelled(cfg.model, labels)
    if data is not None:
        check_lengths(model, data)
    layers = adaptable_layers(model)
    if cfg.model.quantization != "none":
        checkpointing = bool(cfg.training.get("gradient_checkpointing"))
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return Base(model, layers, missing)


def method_config(
    cfg: RunConfig, base: Base, total_steps: int | None, tasks: list[str] | None
) -> PeftConfig | None:
    """Return the peft config of the method on this base model; None for `full`.

    total_steps: planned optimizer steps, None if unknown. tasks: names of the data's tasks.

    Raises ValueError for options that do not fit the base model's layers.
    """
    options = dict(cfg.method.options)
    if base.missing:
        options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *base.missing]
    if "fan_in_fan_out" in method_options(cfg.method.name):  # how GPT-2 stores its weights
        stored = any(isinstance(layer, Conv1D) for layer in base.layers.values())
        options.setdefault("fan_in_fan_out", stored)
    completed = replace(cfg, method=replace(cfg.method, options=options))
    config = _checked_peft_config(completed, total_steps, tasks)
    if config is not None:
        planned = getattr(config, "total_step", None)  # adalora's; 2**31 - 1 is "not known yet"
        if total_steps is not None and planned not in (None, total_steps):
            raise ValueError(
                f"method.total_step is {planned}, but training has {total_steps} optimizer steps, "
                f"so {cfg.method.name}'s schedule would not end where training does. Set it to "
                f"{total_steps}, or leave it out."
            )
        _check_targets(base.layers, config, cfg.method.name)
    return config


def planned_steps(training: dict[str, Any], rows: int) -> int:
    """Return the optimizer steps that the Trainer will make on one device."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    batches = rows / training["per_device_train_batch_size"]
    batches = math.floor(batches) if training.get("dataloader_drop_last") else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / training.get("gradient_accumulation_steps", 1)))
    return math.ceil(per_epoch * training["num_train_epochs"])


def check_lengths(model: PeftModel | PreTrainedModel, data: DataBundle) -> None:
    """Raise ValueError if a row has more tokens than the model has positions."""
    limit = model.config.to_dict().get("max_position_embeddings")
    if limit is None:  # models without positions, such as Bloom
        return
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's first positions are taken by padding.
            limit -= 0 if module.padding_idx is None else module.padding_idx + 1
    if data.longest > limit:
        raise ValueError(
            f"data: the longest row has {data.longest} tokens, the model reads {limit}. "
            f"Set data.max_length: {limit} and data.truncate: true."
        )


def _load_labelled(
    model: ModelConfig, labels: list[str] | None
) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model with the head that its task and the class names ask for."""
    outputs = {"classification": len(labels or ()), "regression": 1}.get(model.task)
    return load_base_with_missing(
        model, outputs, None if labels is None else dict(enumerate(labels))
    )


def _checked_peft_config(
    cfg: RunConfig, total_steps: int | None, tasks: list[str] | None
) -> PeftConfig | None:
    try:
        return peft_config(cfg.method, cfg.model.task, total_steps, tasks)
    except (ValueError, TypeError) as error:
        raise ValueError(f"method: {error}") from error


def _check_targets(layers: dict[str, nn.Module], config: PeftConfig, method: str) -> None:
    """Raise when a target matches no layer, or a layer has sizes the method cannot take."""
    options = config.to_dict()
    targets = options["target_modules"]
    if targets == "all-linear":
        config = replace(config, target_modules=list(layers))
    else:
        names = [targets] if isinstance(targets, str) else sorted(targets or ())
        unmatched = [n for n in names if not _matches(n, layers, isinstance(targets, str))]
        if unmatched:
            candidates = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"method.target_modules: {', '.join(map(repr, unmatched))} matches no linear "
                f"layer of this model. It has {', '.join(candidates)}; or use all-linear."
            )
    baseline = BASELINES.get(method)
    if baseline is not None and baseline.check_layers is not None:
        sizes = {name: _sizes(layers[name]) for name in targeted(config, layers)}
        baseline.check_layers(options, sizes)


def _matches(target: str, layers: Iterable[str], pattern: bool) -> bool:
    """Whether a target (a name ending, or a regular expression) fits one of the layers."""
    if pattern:
        return any(re.fullmatch(target, name) for name in layers)
    return any(name == target or name.endswith(f".{target}") for name in layers)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features), of a bitsandbytes layer too."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features
