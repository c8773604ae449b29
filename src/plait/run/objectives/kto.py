"""Kahneman-Tversky optimization: TRL's KTOTrainer."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from plait.run.objectives.base import ObjectiveTrainer, split_row


class KtoTrainer(ObjectiveTrainer, KTOTrainer):
    """Trains on single answers that are desired or not."""

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, completion_mask (rows, longest) and label (rows,).

        The KL term is estimated on the prompts with the answers of the rows before them.
        """
        parts = [split_row(row) for row in rows]
        examples = [
            {
                "prompt_ids": prompt,
                "completion_ids": answer,
                "KL_completion_ids": parts[i - 1][1],
                "label": row["desired"],
            }
            for i, (row, (prompt, answer)) in enumerate(zip(rows, parts, strict=True))
        ]
        if self.cfg.objective.options["loss_type"] != "kto":
            for example in examples:
                del example["KL_completion_ids"]
        batch: Any = DataCollatorForUnpairedPreference(self.pad_id)(examples)
        return self.with_tasks(batch, rows)
