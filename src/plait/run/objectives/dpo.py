"""Direct preference optimization: TRL's DPOTrainer."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from plait.run.objectives.base import ObjectiveTrainer, split_row


class DpoTrainer(ObjectiveTrainer, DPOTrainer):
    """Trains on pairs; a batch holds the chosen answers of all rows, then the rejected ones."""

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and completion_mask (2 rows, longest)."""
        pairs = []
        for row in rows:
            prompt, chosen = split_row(row)
            pair = {"chosen_ids": chosen, "rejected_ids": row["rejected_ids"]}
            pairs.append({"prompt_ids": prompt, **pair})
        batch: Any = DataCollatorForPreference(self.pad_id)(pairs)
        return self.with_tasks(batch, rows, times=2)
