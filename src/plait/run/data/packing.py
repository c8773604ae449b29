"""Packing: several rows laid end to end in one, so that no computation is spent on padding.

The rows of a pack do not see each other: the positions start anew with each, which transformers
takes for the border of a block where it gets no attention mask and no cache. So the loss of each
row, and its gradient, is what it is alone; `packs_apart` checks that of a model.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from plait.run.data.tokens import IGNORED

_PROBE = (5, 7)  # tokens of two rows


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return the rows of each pack: at most `limit` tokens, by best fit, the longest row first.

    lengths: of the rows, none above the limit.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[row], -1))
        if at == len(rooms):
            packs.append([row])
            left, number = limit - lengths[row], len(packs) - 1
        else:
            left, number = rooms.pop(at)
            packs[number].append(row)
            left -= lengths[row]
        bisect.insort(rooms, (left, number))
    return packs


class PackedRows(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """The packs of a data set: an item is the list of a pack's rows."""

    def __init__(self, rows: Dataset, limit: int) -> None:
        self.rows = rows
        self.packs = pack([len(ids) for ids in rows["input_ids"]], limit)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        return [self.rows[i] for i in self.packs[number]]


class PackCollator:
    """Makes a batch of packs, each a row of it.

    task_ids: also emit these, LongTensor (batch, tokens), for a method that routes by task.
    """

    def __init__(self, pad: int, task_ids: bool = False) -> None:
        self.pad, self.task_ids = pad, task_ids

    def __call__(self, packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """Return input_ids, labels and position_ids (batch, longest), and use_cache: False.

        What fills up a pack is a block of its own. There is no attention mask.
        """
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        if self.task_ids:
            columns["task_ids"] = []
        longest = max(sum(len(row["input_ids"]) for row in rows) for rows in packs)
        for rows in packs:
            ids, labels, positions, tasks = [], [], [], []
            for row in rows:
                ids += row["input_ids"]
                labels += [IGNORED, *row["labels"][1:]]  # else the row before would predict it
                positions += range(len(row["input_ids"]))
                tasks += [row.get("task_id", 0)] * len(row["input_ids"])
            rest = longest - len(ids)
            columns["input_ids"].append(ids + [self.pad] * rest)
            columns["labels"].append(labels + [IGNORED] * rest)
            columns["position_ids"].append(positions + list(range(rest)))
            if self.task_ids:
                columns["task_ids"].append(tasks + [0] * rest)
        return {**{n: torch.tensor(values) for n, values in columns.items()}, "use_cache": False}


def padding(lengths: Sequence[int], size: int) -> float:
    """Return the share of padding in batches of `size` rows in their order."""
    wide = sum(
        max(lengths[i : i + size]) * len(lengths[i : i + size])
        for i in range(0, len(lengths), size)
    )
    return 1 - sum(lengths) / wide


@torch.no_grad()
def packs_apart(model: nn.Module) -> bool:
    """Whether a causal model keeps the rows of a pack apart: its logits are those of each alone.

    Measured with the adapter off and without changing the model.
    """
    adapter = model if isinstance(model, PeftModel) else None
    base: Any = model if adapter is None else adapter.get_base_model()
    device, vocabulary = next(model.parameters()).device, base.config.get_text_config().vocab_size
    ids = torch.arange(sum(_PROBE), device=device) * 7 % vocabulary
    rows = [part[None] for part in ids.split(_PROBE)]
    positions = torch.cat([torch.arange(n, device=device) for n in _PROBE])[None]
    was_training = model.training
    model.eval()
    if adapter is not None:
        adapter.base_model.disable_adapter_layers()  # type: ignore[operator]
    try:
        packed = base(input_ids=ids[None], position_ids=positions, use_cache=False).logits
        alone = torch.cat([_alone(base, row) for row in rows], 1)
    except (TypeError, ValueError):  # a model that is not told its positions
        return False
    finally:
        if adapter is not None:
            adapter.base_model.enable_adapter_layers()  # type: ignore[operator]
        model.train(was_training)
    slack = 1e-4 if packed.dtype == torch.float32 else 0.05
    return bool((packed - alone).abs().max() <= slack * alone.abs().max())


def _alone(base: Any, row: Tensor) -> Tensor:
    return base(input_ids=row, use_cache=False).logits
