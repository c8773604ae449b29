"""What a run trains for: the `objective` section, one dataclass of options for each.

`sft` is the loss on completions. All others are trainers of TRL (`pip install "plait[trl]"`), and
the options have the names that they have there.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.options import did_you_mean, option, shown
from plait.run.config.plugins import import_plugin
from plait.run.config.yaml import Source, check_section


@dataclass(kw_only=True)
class SftConfig:
    """The loss on completions: no options."""


@dataclass(kw_only=True)
class DpoConfig:
    """Direct preference optimization (arXiv:2305.18290) on rows of prompt, chosen and rejected."""

    beta: float = option(0.1, "Weight of the distance from the reference.", above=0)
    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
    ] = option("sigmoid", "The loss of a pair; sigmoid is that of the paper.")
    label_smoothing: float = option(
        0.0, "Assumed share of pairs whose preference is wrong.", least=0, below=1
    )


@dataclass(kw_only=True)
class KtoConfig:
    """Kahneman-Tversky optimization (arXiv:2402.01306) on rows of prompt, completion and label."""

    beta: float = option(0.1, "Weight of the distance from the reference.", above=0)
    loss_type: Literal["kto", "apo_zero_unpaired"] = option("kto", "The loss of a row.")
    desirable_weight: float = option(1.0, "Weight of desired rows.", above=0)
    undesirable_weight: float = option(1.0, "Weight of undesired rows.", above=0)


@dataclass(kw_only=True)
class RewardConfig:
    """A reward model: a head with one output, which is higher for chosen than for rejected."""

    center_rewards_coefficient: float | None = option(
        None, "Weight of a penalty that keeps rewards near zero; null: none.", above=0
    )


@dataclass(kw_only=True)
class GrpoConfig:
    """Group relative policy optimization (arXiv:2402.03300) on rows of prompts."""

    reward: str | list[str] = option(
        "",
        "`module:function`, or a list: called as TRL does, with prompts, completions and the "
        "columns of the rows; returns one number per completion.",
    )
    reward_weights: list[float] | None = option(
        None, "One weight per reward function; null: 1 each."
    )
    num_generations: int = option(8, "Completions sampled per prompt.", least=2, most=65_536)
    max_completion_length: int = option(256, "Largest number of tokens in a completion.", least=1)
    temperature: float = option(1.0, "Sampling temperature.", above=0)
    top_p: float = option(
        1.0, "Nucleus sampling: probability mass of the tokens to sample from.", above=0, most=1
    )
    beta: float = option(0.0, "Weight of the distance from the reference; 0: none.", least=0)
    epsilon: float = option(0.2, "Clipping range of the probability ratio of a token.", above=0)
    num_iterations: int = option(1, "Passes over the same completions.", least=1)
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = option(
        "dapo", "How the loss is averaged over tokens."
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Which standard deviation divides the advantages; none: no scaling."
    )
    vllm: bool = option(
        False, "True samples in vLLM, which gets the adapter as a plain LoRA at each step."
    )


OBJECTIVES: dict[str, type] = {
    "sft": SftConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "reward": RewardConfig,
    "grpo": GrpoConfig,
}


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What a run trains for; options: those of its dataclass in OBJECTIVES, defaults filled in."""

    name: str = "sft"
    options: dict[str, Any] = field(default_factory=dict)


def named(raw: Any) -> Any:
    """Return the section where a file has its name alone: `objective: dpo`."""
    return {"name": raw} if isinstance(raw, str) else raw


def check_objective_section(raw: dict[str, Any], source: Source, trusted: bool) -> ObjectiveConfig:
    """Check the `objective` section against the options of the objective that it names.

    trusted: whether the file is the user's own, so that the modules of its rewards are imported.

    Raises:
        ValueError: an unknown objective or option, a wrong type, or a reward that is none.
        ImportError: the module of a reward cannot be imported.
    """
    raw = dict(raw)
    name = raw.pop("name", "sft")
    if name not in OBJECTIVES:
        raise ValueError(
            f"{source.at('objective')} is {shown(name)}, which is not an objective. "
            f"{did_you_mean(str(name), OBJECTIVES)}"
        )
    options = dataclasses.asdict(check_section(OBJECTIVES[name], raw, "objective", source))
    config = ObjectiveConfig(name=name, options=options)
    for reward in rewards_of(config) if name == "grpo" else ():
        module, sign, function = reward.partition(":")
        parts = [*module.split("."), function]
        if not sign or not all(part.isidentifier() for part in parts):
            raise ValueError(
                f"{source.at('objective.reward')} is {shown(reward)}. Name an importable function: "
                "module:function."
            )
        if trusted:
            try:
                import_plugin(module)
            except ImportError as error:
                raise ImportError(f"{source.at('objective.reward')}: {error}") from error
    weights, count = options.get("reward_weights"), len(rewards_of(config))
    if weights is not None and len(weights) != count:
        raise ValueError(
            f"{source.at('objective.reward_weights')} has {len(weights)} numbers, and "
            f"objective.reward names {count} functions. Give one for each."
        )
    return config


def rewards_of(config: ObjectiveConfig) -> list[str]:
    """Return the names of an objective's rewards."""
    rewards = config.options.get("reward", [])
    return [rewards] if isinstance(rewards, str) else list(rewards)
