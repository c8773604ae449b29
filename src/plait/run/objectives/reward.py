"""Reward models: TRL's RewardTrainer."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from plait.run.objectives.base import ObjectiveTrainer, split_row


class RewardModelTrainer(ObjectiveTrainer, RewardTrainer):
    """Trains a head with one output to be higher for the chosen answers than for the rejected."""

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return input_ids and attention_mask (2 rows, longest)."""
        pairs = [
            {
                "chosen_ids": row["input_ids"],
                "rejected_ids": split_row(row)[0] + row["rejected_ids"],
            }
            for row in rows
        ]
        batch: Any = DataCollatorForPreference(self.pad_id)(pairs)
        return self.with_tasks(batch, rows, times=2)
