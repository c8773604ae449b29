"""Rewards: functions of the user that judge completions, as TRL calls them.

    def reward(prompts, completions, completion_ids, **columns) -> list[float]

`columns` are the other columns of the rows. A function is called only if the user named its module
in this very process: in the run file that is trained, or by `plait --import MODULE`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.run.config import IMPORTED, ObjectiveConfig, rewards_of

OWN = ("prompt", "completion", "completion_ids")  # names of arguments that no column takes


def reward_functions(objective: ObjectiveConfig) -> list[Callable[..., Any]]:
    """Return the functions that a config names.

    Raises:
        ValueError: a module that the user did not import, or one without the function.
    """
    functions = []
    for name in rewards_of(objective):
        module, _, function = name.partition(":")
        if module not in IMPORTED or module not in sys.modules:
            raise ValueError(
                f"objective.reward names {name}, and {module} is not imported: the config of a run "
                f"folder runs no code. If you trust it, name it: plait --import {module} VERB ..."
            )
        found = getattr(sys.modules[module], function, None)
        if not callable(found):
            raise ValueError(
                f"objective.reward names {name}, and {module} has no such function. Correct it."
            )
        functions.append(found)
    return functions


def reward_rows(
    objective: ObjectiveConfig,
    given: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> NDArray[np.float64]:
    """Return the weighted sum of the rewards of each completion, (rows,).

    Args:
        objective: of the run. given: the rows. texts, ids: their completions.

    Raises:
        ValueError: a reward that is missing, or does not return one number for each completion.
    """
    columns = {name: [row.get(name) for row in given] for row in given for name in row}
    columns = {name: values for name, values in columns.items() if name not in OWN}
    prompts = [row["prompt"] for row in given]
    completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    functions = reward_functions(objective)
    weights, total = objective.options["reward_weights"] or [1.0] * len(functions), 0.0
    quiet: dict[str, Any] = {"trainer_state": None}
    quiet |= dict.fromkeys(("log_extra", "log_metric"), lambda *_: None)
    for name, function, weight in zip(rewards_of(objective), functions, weights, strict=True):
        values = function(
            prompts=prompts, completions=completions, completion_ids=list(ids), **columns, **quiet
        )
        if len(values) != len(given):
            raise ValueError(
                f"objective.reward: {name} returned {len(values)} rewards for {len(given)} "
                "completions. Return one number for each."
            )
        numbers = [np.nan if value is None else value for value in values]
        total = total + weight * np.nan_to_num(np.array(numbers, dtype=float))
    return np.asarray(total)


def as_completion(prompt: Any, text: str) -> Any:
    """Return a completion as a reward gets it: a text, or after messages a list of one message."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
