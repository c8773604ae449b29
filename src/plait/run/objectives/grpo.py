"""Group relative policy optimization: TRL's GRPOTrainer, with rewards of the user's own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from plait.run.data.tokens import encode_chat, encode_prompt
from plait.run.objectives.base import ObjectiveTrainer
from plait.run.objectives.reference import is_base
from plait.run.objectives.rewards import reward_functions
from plait.run.objectives.rollout import Rollout, open_vllm


class _Grpo(GRPOTrainer):
    """TRL's trainer with the arguments that the others take; `rewards` are set before."""

    rewards: list[Any]

    def __init__(self, *, data_collator: Any, **arguments: Any) -> None:
        super().__init__(reward_funcs=self.rewards, **arguments)
        self.data_collator = data_collator


class GrpoTrainer(ObjectiveTrainer, _Grpo):
    """Draws completions of prompts, and trains on how the rewards judge them.

    The model itself generates, or vLLM, which gets the adapter as a plain LoRA.
    """

    def __init__(self, run: Any, folder: Any, callbacks: Any = ()) -> None:
        self.rewards = reward_functions(run.cfg.objective)
        super().__init__(run, folder, callbacks)
        self.rollout: Rollout | None = None
        if run.cfg.objective.options["vllm"]:
            policy: Any = self.trained
            batch = run.data.batch("train", 2)
            self.rollout = Rollout(open_vllm(run), policy, lambda: is_base(policy, batch))

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows as they were given, for the rewards, with their prompts and tasks."""
        given = [json.loads(row["given"]) for row in rows]
        tasks = [{"task_id": row["task_id"]} if self.routed else {} for row in rows]
        return [
            {**values, **task, "prompt": values["prompt"] if kept else row["prompt"]}
            for values, task, row in zip(given, tasks, rows, strict=True)
            for kept in [isinstance(values.get("prompt"), list)]
        ]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return the ids that `plait generate` starts from, too."""
        tokenizer: Any = self.processing_class
        ids = [
            encode_chat(tokenizer, prompt)
            if isinstance(prompt, list)
            else encode_prompt(tokenizer, prompt)
            for prompt in prompts
        ]
        return ids, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.rollout is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.rollout.draw(prompt_ids, self.state.global_step), None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        ids = None
        if self.routed:
            ids = torch.tensor([row["task_id"] for row in inputs], device=self.accelerator.device)
        with self.tasks_of(ids):
            batch = super()._generate_and_score_completions(inputs)
        return batch if ids is None else {**batch, "task_ids": ids}

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self.routed:  # in one piece, as the tasks are
            kwargs["batch_size"] = None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        with self.tasks_of(inputs.get("task_ids")):
            return super()._compute_loss(model, inputs)
