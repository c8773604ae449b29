"""A reward for grpo.yaml: completions that begin like the right answer and are brief."""

from typing import Any


def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return for each completion a number up to 1; `answer` is a column of the rows.

    Half of it is for the right first letter, half for two letters, less for each one more or less.
    """
    rewards = []
    for made, right in zip(completions, answer, strict=True):
        first = 0.5 * made.startswith(right[0])
        rewards.append(first + max(0.0, 0.5 - 0.1 * abs(len(made) - 2)))
    return rewards
