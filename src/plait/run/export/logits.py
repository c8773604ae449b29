"""Logits of a model, the rows that they are measured on, and how far apart they may be."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from plait.core.events import PlaitWarning
from plait.run.data.bundle import DataBundle
from plait.run.model import context_of
from plait.run.prepare import TrainedRun

PROBE_ROWS = 8
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a stock model takes
TOLERANCE = 1e-3  # of the largest logit: what an exact fp32 export may differ by


def probe(run: TrainedRun, task: str | None = None) -> tuple[dict[str, Tensor], DataBundle | None]:
    """Return inputs to measure logits on, and the run's held-out data if they can be read.

    The inputs are the first rows of the held-out split, else of the training rows, else random
    tokens. task: take the rows of that task alone, where there are any.
    """
    split = run.held_out_split or "train"
    try:
        data = run.load_data(split)
    except FileNotFoundError as error:
        warnings.warn(
            f"{error} The export is measured on random tokens instead.", PlaitWarning, stacklevel=4
        )
        return _random_tokens(run), None
    rows = getattr(data, split)
    chosen = range(len(rows))
    if task is not None and data.tasks is not None:
        chosen = [i for i, of_row in enumerate(rows["task"]) if of_row == task] or chosen
    batch = data.collator([rows[i] for i in chosen[:PROBE_ROWS]])
    inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
    return inputs, data if run.held_out_split is not None else None


def _random_tokens(run: TrainedRun) -> dict[str, Tensor]:
    special = {*run.tokenizer.all_special_ids}
    embedding: Any = run.model.get_input_embeddings()
    rows = min(len(run.tokenizer), embedding.num_embeddings)
    ids = torch.tensor([i for i in range(rows) if i not in special])
    length = min(16, context_of(run.model) or 16)
    drawn = torch.randint(
        len(ids), (PROBE_ROWS, length), generator=torch.Generator().manual_seed(0)
    )
    return {"input_ids": ids[drawn], "attention_mask": torch.ones_like(drawn)}


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a model in evaluation mode, fp32, on the CPU."""
    return model.eval()(**{k: v.to(model.device) for k, v in inputs.items()}).logits.float().cpu()


def base_shift(model: Any, inputs: Mapping[str, Tensor], trained: Tensor) -> float:
    """How far the adapter moves the logits; 0 for a model without one."""
    if not isinstance(model, PeftModel):
        return 0.0
    with model.disable_adapter():
        return difference(logits_of(model, inputs), trained)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return float((a - b).abs().max())


def tolerance(trained: Tensor) -> float:
    """What the logits of an exact fp32 export may differ by."""
    return TOLERANCE * max(float(trained.abs().max()), 1.0)
