"""A reward for grpo.yaml: how much of the right answer a completion has."""

from difflib import SequenceMatcher
from typing import Any


def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return for each completion its likeness to the column `answer`, from 0 to 1."""
    pairs = zip(completions, answer, strict=True)
    return [SequenceMatcher(None, made, right).ratio() for made, right in pairs]
