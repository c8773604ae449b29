"""The data of a run: from its config to splits of token ids.

rows     one file, hub set or generator -> rows, split and limited
reader   rows -> texts, labels, tasks, by the columns of the config
tokens   texts -> token ids and the loss mask
"""

from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from plait.run.config import RunConfig
from plait.run.data.reader import Kind, read_columns
from plait.run.data.rows import read_splits
from plait.run.data.tokens import Collator, tokenize

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
    collator: Collator
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None
    tasks: list[str] | None
    longest: int

    def splits(self) -> dict[str, Dataset]:
        """Return the splits that are there, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}

    def batch(self, split: Split, most: int) -> dict[str, torch.Tensor]:
        """Return the first rows of a split, at most so many, as the model takes them."""
        rows = getattr(self, split)
        return self.collator([rows[i] for i in range(min(most, len(rows)))])

    @property
    def held_out_split(self) -> Split | None:
        """The split that a run is judged on: test, else validation, else None."""
        if self.test is not None:
            return "test"
        return None if self.validation is None else "validation"


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
