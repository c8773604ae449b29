"""Look at a run before it starts: everything validated, counted and shown, nothing trained."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plait.run.config import RunConfig
from plait.run.data.bundle import DataBundle
from plait.run.data.overlap import Overlap, overlap
from plait.run.data.tokens import IGNORED
from plait.run.model import parameter_counts
from plait.run.prepare import prepare
from plait.upstream.layers import fully_trained, is_tuner_layer


@dataclass(frozen=True)
class CheckReport:
    """What `plait check` shows of a run.

    trainable, total: parameters, the adapter's included. stored: numbers in the adapter's file;
    None for full fine-tuning. adapted: layers with an update. new: modules trained and saved
    beside them, such as a classification head. steps: planned optimizer steps.
    rows: per split. longest: tokens. memory: part -> bytes, see estimated_memory. example: pieces
    of the first training row, each with whether loss is taken on it. target: its label, for
    classification and regression.
    """

    config: RunConfig
    model: str
    trainable: int
    total: int
    stored: int | None
    adapted: int
    new: list[str]
    steps: int
    rows: dict[str, int]
    longest: int
    labels: list[str] | None
    tasks: list[str] | None
    memory: dict[str, int]
    example: list[tuple[str, bool]]
    target: str | None
    overlaps: list[Overlap]


def check(config: RunConfig) -> CheckReport:
    """Load data and model as training would and report on them.

    Raises what loading the data and building the model raises.
    """
    prepared = prepare(config, place=False)
    tokenizer, data, model = prepared.tokenizer, prepared.data, prepared.model
    trainable, total = parameter_counts(model)
    first = data.train[0]
    causal = config.model.task == "causal_lm"
    return CheckReport(
        config=config,
        model=type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__,
        trainable=trainable,
        total=total,
        stored=_stored(model),
        adapted=sum(map(is_tuner_layer, model.modules())),
        new=[name.removeprefix("base_model.model.") for name in fully_trained(model)],
        steps=prepared.steps,
        rows={name: len(split) for name, split in data.splits().items()},
        longest=data.longest,
        labels=data.labels,
        tasks=data.tasks,
        memory=estimated_memory(model, config, data),
        example=masked_pieces(first["input_ids"], first["labels"] if causal else None, tokenizer),
        target=None if causal else str(first["label"]),
        overlaps=overlap(data),
    )


def masked_pieces(
    ids: list[int], labels: list[int] | None, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Cut a row into runs of tokens with and without loss: (text, trained).

    labels: None for a row without a loss on tokens. Special tokens are shown by their names.
    """
    trained = [False] * len(ids) if labels is None else [label != IGNORED for label in labels]
    runs = itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [(str(tokenizer.decode([i for i, _ in run])), kind) for kind, run in runs]


def estimated_memory(
    model: PeftModel | PreTrainedModel, config: RunConfig, data: DataBundle
) -> dict[str, int]:
    """Estimate the peak memory of training in bytes, by part.

    weights: all parameters and buffers as they are held. gradients: of what is trained.
    optimizer: two fp32 numbers for each trained one, as AdamW keeps. activations: of one batch of
    the longest row, 17 numbers of the hidden size per token and block (Korthikanti et al. 2022,
    without attention scores, which fused attention does not keep), one where blocks are
    recomputed, and for causal models the logits with their fp32 copy and gradient. Not included:
    workspaces, fragmentation, and what a method computes besides.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    held = itertools.chain(model.parameters(), model.buffers())
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    shape = base.config
    half = config.training.get("bf16") or config.training.get("fp16")
    size = 2 if half else torch.finfo(base.dtype).bits // 8
    tokens = config.training["per_device_train_batch_size"] * data.longest
    recompute = config.training.get("gradient_checkpointing")
    blocks = shape.num_hidden_layers
    kept = blocks + 17 if recompute else 17 * blocks
    activations = tokens * shape.hidden_size * kept * size
    if config.model.task == "causal_lm":
        activations += tokens * shape.vocab_size * (size + 4 + 4)
    return {
        "weights": sum(t.numel() * t.element_size() for t in held),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": sum(2 * 4 * p.numel() for p in trained),
        "activations": activations,
    }


def _stored(model: PeftModel | PreTrainedModel) -> int | None:
    if not isinstance(model, PeftModel):
        return None
    # Without "auto", which would ask the hub whether the vocabulary was resized.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(tensor.numel() for tensor in state.values())
