"""Objective -> its trainer."""

from plait.run.trainer import RunTrainer


def trainer_class(objective: str) -> type[RunTrainer]:
    """Return the trainer of an objective; TRL is imported for all but sft."""
    if objective == "dpo":
        from plait.run.objectives.dpo import DpoTrainer

        return DpoTrainer
    if objective == "kto":
        from plait.run.objectives.kto import KtoTrainer

        return KtoTrainer
    if objective == "reward":
        from plait.run.objectives.reward import RewardModelTrainer

        return RewardModelTrainer
    if objective == "grpo":
        from plait.run.objectives.grpo import GrpoTrainer

        return GrpoTrainer
    return RunTrainer
