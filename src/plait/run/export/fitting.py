"""Make a lossy export better on the rows of a run: inputs to weigh by, and a short distillation.

Only training rows are read: the held-out rows measure the export.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

from plait.run.data.bundle import DataBundle
from plait.run.export.logits import MODEL_INPUTS
from plait.run.prepare import TrainedRun
from plait.upstream.export import LoraExport

BATCH = 16  # rows
MOMENT_BATCHES = 8  # for second moments
RATE = 2e-3  # of AdamW at the start of a distillation; it falls to 0 linearly


def training_batches(run: TrainedRun, task: str | None, seed: int = 0) -> Iterator[Any]:
    """Endless batches of training rows, drawn without an end by a seeded generator.

    task: rows of this task alone.

    Raises:
        FileNotFoundError: the training rows are not there.
    """
    data: DataBundle = run.load_data("train")
    rows = data.train
    if task is not None and data.tasks is not None:
        rows = rows.select([i for i, name in enumerate(rows["task"]) if name == task])
    gen = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(rows), (BATCH,), generator=gen)
        batch = data.collator([rows[int(i)] for i in chosen])
        yield {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}


def distilled(
    run: TrainedRun, lora: LoraExport, student: PeftModel, steps: int, task: str | None
) -> LoraExport:
    """Train the factors of an export to give the logits of the run's model, and return it.

    The loss is the KL divergence from the run's distribution to the export's, a mean over the
    tokens of the batch (classes of the row; for regression the squared difference). Heads stay.

    Args:
        run: the teacher, with its task set. lora: the export; its errors by layer stay those of the
            truncation. student: a base model with it, which is trained in place. steps: of AdamW.
    """
    factors = [p for name, p in student.named_parameters() if ".lora_" in name]
    for p in student.parameters():
        p.requires_grad_(False)
    for p in factors:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, lr=RATE, weight_decay=0.0)
    batches = training_batches(run, task)
    teacher: Any = run.model.eval()
    for step in range(steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        with torch.no_grad():
            wanted = _logits(teacher, batch)
        loss = _difference(_logits(student.eval(), batch), wanted, batch["attention_mask"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = get_peft_model_state_dict(student, save_embedding_layers=False)
    tensors = {n: saved[n].detach().cpu().to(t.dtype).contiguous() for n, t in lora.tensors.items()}
    return replace(lora, tensors=tensors)


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**{k: v.to(model.device) for k, v in batch.items()}).logits.float().cpu()


def _difference(given: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """The loss of logits (rows, tokens, vocabulary) or (rows, classes)."""
    if given.shape[-1] == 1:
        return functional.mse_loss(given, wanted)
    if given.ndim == 3:
        given, wanted = given[mask.bool()], wanted[mask.bool()]
    return functional.kl_div(
        given.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
    )
