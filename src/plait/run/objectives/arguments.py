"""The training arguments of an objective, and what it cannot be combined with."""

import importlib.util
from typing import Any

from transformers import TrainingArguments

from plait.run.config import RunConfig, rewards_of
from plait.upstream.table import BASELINES

_CLASSES = {"dpo": "DPOConfig", "kto": "KTOConfig", "reward": "RewardConfig", "grpo": "GRPOConfig"}


def arguments_of(cfg: RunConfig) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """Return the class of a run's training arguments and the objective's own part of them.

    Raises:
        ImportError: an objective of TRL, which is not installed.
    """
    name, options = cfg.objective.name, dict(cfg.objective.options)
    if name == "sft":
        return TrainingArguments, {}
    if importlib.util.find_spec("trl") is None:
        raise ImportError(f'objective: {name} needs TRL: pip install "plait[trl]"')
    import trl

    # What TRL would decide otherwise than the Trainer, where the file does not say it.
    options |= {"gradient_checkpointing": False, "bf16": False}
    if name in ("dpo", "kto", "reward"):
        options["max_length"] = None  # the rows are checked, and cut, by data.max_length
    if name == "grpo":
        for ours in ("reward", "vllm"):
            del options[ours]
    return getattr(trl, _CLASSES[name]), options  # loaded when it is asked for


def grpo_rows(arguments: Any, rows: int) -> int:
    """Return how many completions an epoch over some prompts trains on.

    Raises:
        ValueError: fewer prompts than one step takes.
    """
    prompts = arguments.generation_batch_size // arguments.num_generations
    if rows < prompts:
        raise ValueError(
            f"training.per_device_train_batch_size counts completions: {prompts} prompts of "
            f"objective.num_generations = {arguments.num_generations} each make a step, and there "
            f"are {rows}. Lower the batch, or give more rows."
        )
    return rows // prompts * arguments.generation_batch_size * arguments.num_iterations


def check_objective(cfg: RunConfig) -> None:
    """Raise ValueError for what an objective cannot do with the rest of a config."""
    name, options, task = cfg.objective.name, cfg.objective.options, cfg.model.task
    if name == "sft":
        return
    needs = "regression" if name == "reward" else "causal_lm"
    if task != needs:
        why = "trains a head with one output" if name == "reward" else "trains a causal model"
        raise ValueError(
            f"{cfg.source.at('objective')}: {name} {why}, and model.task is {task}. Set "
            f"model.task: {needs}."
        )
    if cfg.chain is not None:
        raise ValueError(
            f"{cfg.source.at('objective')}: {name} does not work with a chain, whose links start "
            "anew while the reference stays. Remove the section chain."
        )
    if cfg.training.get("label_smoothing_factor"):
        raise ValueError(
            f"training.label_smoothing_factor does not reach the loss of {name}. Leave it out."
        )
    if name == "grpo" and not all(rewards_of(cfg.objective)):
        raise ValueError(
            f"{cfg.source.at('objective.reward')} is not set. Name the function that judges "
            "completions: module:function."
        )
    compares = name in ("dpo", "kto") or (name == "grpo" and options["beta"])
    row = BASELINES.get(cfg.method.name)
    if compares and row is not None and row.no_reference:
        raise ValueError(
            f"{cfg.source.at('objective')}: {name} does not work with {row.key}: "
            f"{row.no_reference}. Use another method."
        )
    if cfg.method.name == "full" and compares:
        raise ValueError(
            f"{cfg.source.at('objective')}: {name} compares with the model at its start, which is "
            "the base with the adapter off; full fine-tuning has no adapter. Use another method."
        )
