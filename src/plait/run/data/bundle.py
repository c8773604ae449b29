"""The data of a run: from its config to splits of token ids, and from rows to batches.

rows     one file, hub set or generator -> rows, split and limited
reader   rows -> texts, labels, tasks, by the columns of the config
tokens   texts -> token ids and the loss mask
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from plait.run.config import RunConfig
from plait.run.data.reader import Kind, read_columns
from plait.run.data.rows import read_splits
from plait.run.data.tokens import TOKENIZER_COLUMNS, tokenize

Split = Literal["train", "validation", "test"]


@dataclass
class DataBundle:
    """The data of one run.

    Each split has `input_ids`, `attention_mask`, `labels` (token ids with -100 where no loss is
    taken; a class index; a number) and the raw strings: `prompt` and `completion` (causal; the
    first `prompt_length` ids are the prompt), or `text`, `text_pair`, `label`. With tasks, `task`
    is the name and `task_id` its index in `tasks`.

    labels: class names by index, classification only. tasks: task names by index, those of the
    training rows first. longest: longest row in tokens, of all splits.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    kind: Kind
    collator: "Collator"
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None
    tasks: list[str] | None
    longest: int

    def splits(self) -> dict[str, Dataset]:
        """Return the splits that are there, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}

    @property
    def held_out_split(self) -> Split | None:
        """The split that a run is judged on: test, else validation, else None."""
        if self.test is not None:
            return "test"
        return None if self.validation is None else "validation"


class Collator:
    """Pads the rows of a batch to its longest one and keeps what the model takes.

    task_ids, sample_types: also emit these, LongTensors (batch,), for a method that routes by task
    or whose balance loss has a target for each type.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        causal: bool,
        task_ids: bool = False,
        sample_types: bool = False,
    ):
        inner = DataCollatorForSeq2Seq if causal else DataCollatorWithPadding
        self.pad: Callable[[list[dict[str, Any]]], Any] = inner(tokenizer)
        self.task_ids, self.sample_types = task_ids, sample_types

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask (batch, longest) and labels."""
        names = (*TOKENIZER_COLUMNS, "labels")
        batch = dict(self.pad([{k: row[k] for k in names if k in row} for row in rows]))
        if self.task_ids:
            batch["task_ids"] = torch.tensor([row["task_id"] for row in rows])
        if self.sample_types:
            batch["sample_types"] = torch.tensor([row["sample_type"] for row in rows])
        return batch


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None = None
) -> DataBundle:
    """Read, split, tokenize and check all data of a run.

    labels: class names by index, if the training rows need not have all of them.

    Raises FileNotFoundError for missing sources and ValueError for rows that cannot be used:
    missing columns, labels that the training rows do not have, rows longer than data.max_length.
    """
    data, causal = config.data, config.model.task == "causal_lm"
    source, rows = read_splits(data)
    columns = read_columns(data, config.model.task, config.method, source, rows, labels)
    splits = tokenize(columns, data, causal, tokenizer)
    return DataBundle(
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        kind=columns.kind,
        collator=Collator(tokenizer, causal, columns.routed, columns.typed),
        tokenizer=tokenizer,
        labels=columns.labels,
        tasks=columns.tasks,
        longest=max(len(ids) for split in splits.values() for ids in split["input_ids"]),
    )
