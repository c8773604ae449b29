"""RunTrainer over one of TRL's trainers: plait's run folder, checks and evaluation, TRL's loss."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback

from plait.core.delta import Delta
from plait.run.folder import RunFolder
from plait.run.objectives.reference import REF, drop_reference, rest_reference, settle_reference
from plait.run.prepare import Prepared
from plait.run.trainer import RunTrainer


class ObjectiveTrainer(RunTrainer):
    """What the trainers of all objectives share; a trainer of TRL stands behind it in the bases.

    A subclass says how rows become a batch of TRL's, `collate`.
    """

    def __init__(
        self, run: Prepared, folder: RunFolder, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        self.routed = run.data.collator.task_ids
        collator: Any = self.collate
        self.pad_id: Any = run.tokenizer.pad_token_id
        super().__init__(replace(run, data=replace(run.data, collator=collator)), folder, callbacks)
        self.data = run.data
        if getattr(self.args, "disable_dropout", False):  # TRL does so for modules of torch's
            for module in self.trained.modules():
                if isinstance(module, Delta):
                    module.dropout = 0.0
        if isinstance(self.trained, PeftModel):
            settle_reference(self.trained, run.data.batch("train", 2))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return a batch as TRL's trainer takes it."""
        raise NotImplementedError

    def with_tasks(
        self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]], times: int = 1
    ) -> dict[str, Any]:
        """Add the tasks of the rows; times: how often the batch has all rows, one after another."""
        if self.routed:
            batch["task_ids"] = torch.tensor([row["task_id"] for row in rows] * times)
        return batch

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Leave the rows as they are: they are tokens already."""
        return dataset

    def fit(self) -> None:
        """As RunTrainer does; the reference is removed at the end."""
        super().fit()
        drop_reference(self.trained)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream does."""
        return super(RunTrainer, self).get_batch_samples(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL does, with the reference at rest."""
        rest_reference(self.trained)
        return super(RunTrainer, self).compute_loss(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL does, which adds its metrics of training; those of an evaluation stay alone."""
        if any(name.startswith("eval_") for name in logs):
            Trainer.log(self, logs, start_time)
        else:
            super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder has plait's."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.checkpoints) / REF, ignore_errors=True)

    @contextmanager
    def tasks_of(self, ids: Tensor | None) -> Iterator[None]:
        """Route all forwards within the context by these tasks, (rows,)."""
        tuner: Any = getattr(self.trained, "base_model", None)
        route = None if ids is None else tuner.plait_route
        with nullcontext() if route is None else route.routing(None, ids):
            yield


def split_row(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids of a row's prompt and of its completion."""
    ids, start = row["input_ids"], row["prompt_length"]
    return ids[:start], ids[start:]
