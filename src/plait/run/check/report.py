"""Look at a run before it starts: everything validated, counted and shown, nothing trained."""

import itertools
from collections import Counter
from dataclasses import dataclass

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plait.core.files import check_place
from plait.run.check.memory import Memory, estimate_memory
from plait.run.config import RunConfig
from plait.run.data.bundle import DataBundle
from plait.run.data.forms import described
from plait.run.data.overlap import Overlap, Repeats, overlap, repeats
from plait.run.data.tokens import CUT, IGNORED
from plait.run.model import parameter_counts
from plait.run.trainer import rehearse
from plait.upstream.layers import fully_trained, is_tuner_layer


@dataclass(frozen=True)
class CheckReport:
    """What `plait check` shows of a run.

    trainable, total: parameters, the adapter's included. stored: numbers in the adapter's file;
    None for full fine-tuning. adapted: layers with an update. new: modules trained and saved
    beside them, such as a classification head. steps: planned optimizer steps.
    rows: per split. form: how they come, in words; None for a classifier. cut: of these, the rows
    that data.truncate shortens. longest: tokens.
    labels, tasks: name -> its training rows; None without. memory: see Memory. example: pieces
    of the first training row, each with whether loss is taken on it. target: its label, for
    classification and regression. repeats: rows that occur several times in train. overlaps: rows
    of the other splits that occur in train.
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
    form: str | None
    cut: dict[str, int]
    longest: int
    labels: dict[str, int] | None
    tasks: dict[str, int] | None
    memory: Memory
    example: list[tuple[str, bool]]
    target: str | None
    repeats: Repeats
    overlaps: list[Overlap]


def check(config: RunConfig) -> CheckReport:
    """Load data and model as training would and report on them.

    Raises what training raises before its first step, but for a run folder that exists.
    """
    check_place(config.output.dir)
    prepared, optimizer = rehearse(config, place=False)
    tokenizer, data, model = prepared.tokenizer, prepared.data, prepared.model
    trainable, total = parameter_counts(model)
    first = data.train[0]
    causal = "label" not in data.train.column_names  # else it is no loss on tokens
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
        form=data.form and described(data.form, data.kind == "messages"),
        cut={name: sum(split[CUT]) for name, split in data.splits().items()},
        longest=data.longest,
        labels=_counts(data, "label", data.labels),
        tasks=_counts(data, "task", data.tasks),
        memory=estimate_memory(prepared, optimizer),
        example=masked_pieces(
            first["input_ids"], first.get("labels") if causal else None, tokenizer
        ),
        target=None if causal else str(first["label"]),
        repeats=repeats(data),
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


def _counts(data: DataBundle, column: str, names: list[str] | None) -> dict[str, int] | None:
    """Count the training rows of each name; 0 for a name that none has."""
    if names is None:
        return None
    rows = Counter(data.train[column])
    return {name: rows[name] for name in names}


def _stored(model: PeftModel | PreTrainedModel) -> int | None:
    if not isinstance(model, PeftModel):
        return None
    # Without "auto", which would ask the hub whether the vocabulary was resized.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(tensor.numel() for tensor in state.values())
