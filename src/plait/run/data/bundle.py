"""The data of a run: from its config to splits of token ids.

rows     one file, hub set or generator -> rows, split and limited
reader   rows -> texts, labels, tasks, by the columns of the config
noise    some train rows get a wrong answer, if the config asks for it
tokens   texts -> token ids and the loss mask
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from plait.run.config import RunConfig
from plait.run.data.forms import AnyForm, described
from plait.run.data.noise import add_label_noise
from plait.run.data.packing import pack, padding
from plait.run.data.reader import Columns, Kind, read_columns
from plait.run.data.rows import read_splits
from plait.run.data.tokens import Collator, tokenize

Split = Literal["train", "validation", "test"]

# What a step reads.
_TRAINED = ("input_ids", "labels", "sample_type", "task_id", "token_type_ids")
_TRAINED += ("rejected_ids", "desired")


@dataclass
class DataBundle:
    """The data of one run.

    Each split has `input_ids`, `attention_mask`, `labels` (token ids with -100 where no loss is
    taken; a class index; a number) and the raw strings: `prompt` and `completion` (causal; the
    first `prompt_length` ids are the prompt), or `text`, `text_pair`, `label`. With tasks, `task`
    is the name and `task_id` its index in `tasks`. Pairs also have `rejected` and `rejected_ids`,
    the tokens after the prompt; labelled rows `desired`, whether the completion is; prompts
    without completion `given`, the whole row as JSON.

    form: how the rows of a causal model came, see plait.run.data.forms. labels: class names by
    index, classification only. tasks: task names by index, those of the training rows first.
    longest: longest row in tokens, of all splits that were read; largest_id:
    largest token id in them. train: without rows if it was not read.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    kind: Kind
    form: AnyForm | None
    collator: Collator
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None
    tasks: list[str] | None
    longest: int
    largest_id: int

    def splits(self) -> dict[str, Dataset]:
        """Return the splits that are there, by name."""
        train = self.train if len(self.train) else None
        every = {"train": train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}

    @property
    def summary(self) -> str:
        """How many rows of which form each split has, on one line."""
        counts = ", ".join(f"{name} {len(rows):,}" for name, rows in self.splits().items())
        form = self.form and described(self.form, self.kind == "messages")
        return f"rows: {counts}" + (f"; each has {form}" if form else "")

    def packed(self, limit: int, size: int) -> str:
        """What packing the training rows saves, on one line; size: rows of a batch."""
        lengths = [len(ids) for ids in self.train["input_ids"]]
        packs = pack(lengths, limit)
        sums = [sum(lengths[i] for i in rows) for rows in packs]
        return (
            f"packing: {len(lengths):,} rows in {len(packs):,} packs; "
            f"{100 * padding(sums, size):.1f} % of a batch is padding, "
            f"{100 * padding(lengths, size):.1f} % without"
        )

    def digest(self, split: Split) -> str | None:
        """Return a digest of a split as a model reads it, in order; None without that split."""
        rows = self.splits().get(split)
        if rows is None:
            return None
        table: Any = rows.with_format("arrow")[:]
        total = hashlib.sha256(json.dumps([self.labels, self.tasks]).encode())
        for name in sorted({*_TRAINED} & {*table.column_names}):
            values = table.column(name).combine_chunks()
            total.update(name.encode())
            if hasattr(values, "value_lengths"):
                total.update(values.value_lengths().to_numpy().astype(np.int64).tobytes())
                values = values.flatten()
            numbers = values.to_numpy(zero_copy_only=False)
            kind = np.float64 if numbers.dtype.kind == "f" else np.int64
            total.update(numbers.astype(kind).tobytes())
        if "given" in table.column_names:
            total.update("".join(table.column("given").to_pylist()).encode())
        return total.hexdigest()[:16]

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
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None = None,
    *,
    head: list[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    split: Split | None = None,
) -> DataBundle:
    """Read, split, tokenize and check all data of a run.

    Args:
        config: of the run.
        tokenizer: of its model.
        labels: class names by index, if the training rows need not have all of them.
        head: class names by index of the head that the model comes with; see `head_labels`.
        facts: of a run that was trained: its kind of rows, its labels and tasks hold, and the
            training rows are not asked for them.
        split: read this split alone; None: all.

    Raises FileNotFoundError for missing sources and ValueError for rows that cannot be used:
    missing columns, labels that the training rows do not have, rows longer than data.max_length,
    held-out rows with nothing to generate from.
    """
    data, objective = config.data, config.objective.name
    # A reward model reads what a causal model does, and answers with a number.
    task = "causal_lm" if objective == "reward" else config.model.task
    causal = task == "causal_lm"
    source, rows = read_splits(data, split)
    columns = read_columns(data, task, config.method, source, rows, labels, head, facts, objective)
    add_label_noise(columns, data)
    splits = tokenize(columns, data, causal, tokenizer)
    if objective == "reward":
        splits = {name: rows.remove_columns("labels") for name, rows in splits.items()}
    if config.evaluation.generate and columns.kind in ("completion", "messages"):
        _check_prompts(columns, splits)
    more = config.objective.options.get("max_completion_length", 0)  # of a drawn completion
    parts = [(part, name) for part in splits.values() for name in ("input_ids", "rejected_ids")]
    ids = [row for part, name in parts if name in part.column_names for row in part[name]]
    return DataBundle(
        train=splits["train"] if "train" in splits else Dataset.from_list([]),
        validation=splits.get("validation"),
        test=splits.get("test"),
        kind=columns.kind,
        form=columns.form,
        collator=Collator(
            tokenizer, config.model.task == "causal_lm", columns.routed, columns.typed
        ),
        tokenizer=tokenizer,
        labels=columns.labels,
        tasks=columns.tasks,
        longest=max(map(_longest, splits.values())) + more,
        largest_id=max(max(row, default=0) for row in ids),
    )


def _longest(rows: Dataset) -> int:
    """Return the tokens of the longest row, of a pair those of its longer answer."""
    lengths = list(map(len, rows["input_ids"]))
    if "rejected_ids" in rows.column_names:
        pairs = zip(rows["prompt_length"], rows["rejected_ids"], strict=True)
        lengths += [start + len(ids) for start, ids in pairs]
    return max(lengths)


def _check_prompts(columns: Columns, splits: Mapping[str, Dataset]) -> None:
    """Raise ValueError for a held-out row whose prompt has no tokens."""
    for name, rows in splits.items():
        lengths = rows["prompt_length"]
        if name != "train" and 0 in lengths:
            row = columns.rows[name][list(lengths).index(0)]
            raise ValueError(
                f"{row.where}: the prompt has no tokens, so no completion can be generated. Remove "
                "the row, or set evaluation.generate: false."
            )
