"""The recipes of a chain as data: the options that each one takes, and their defaults.

To add a recipe, add a row here and nothing else: `ChainPlan.of`, the section `chain` of a run file,
`plait methods --matrix` and the docs read this table. It imports neither torch nor peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    key: the name in a run file and in `ChainPlan.of`. summary: one line. paper: arXiv id. length:
    the number of links, or of steps per link, unless one of the two is given. options: the options
    that it takes besides COMMON, with their defaults; an option of COMMON stands here if its
    default differs. no_delta: why methods of plait cannot be linked by it, said of `{key}`; None if
    every method whose finished link is a fixed product B A can.
    """

    key: str
    summary: str
    paper: str
    length: Mapping[str, int]
    options: Mapping[str, Any]
    no_delta: str | None = None

    @property
    def by_block(self) -> bool:
        """Whether a link trains a random subset of the transformer blocks."""
        return "blocks_per_link" in self.options

    @property
    def freezes(self) -> bool:
        """Whether one of A and B is a frozen random sketch."""
        return "freeze" in self.options

    def known(self) -> list[str]:
        """Names of all options that it takes."""
        return list(dict.fromkeys([*COMMON, *self.options]))


# Options of every recipe; their defaults are those of ChainPlan.
COMMON = (
    "links",
    "steps_per_link",
    "lr",
    "warmup_steps",
    "reset_optimizer",
    "storage",
    "seed",
)

RECIPES: dict[str, Recipe] = {
    recipe.key: recipe
    for recipe in (
        Recipe(
            "chain",
            "Chain-of-LoRA: A and B are trained in every link.",
            "2401.04151",
            length={"links": 3},
            options={"ranks": None},
        ),
        Recipe(
            "rac",
            "RAC-LoRA: one side of each link is a random sketch and frozen.",
            "2410.08305",
            length={"links": 12},
            options={"freeze": "A", "sketch": "orthonormal", "sketch_std": 1.0},
            no_delta="{key} has no single pair of which one side could be frozen. Use lora",
        ),
        Recipe(
            "xgb",
            "XGBLoRA: links of rank 1 on a random subset of the transformer blocks.",
            "2410.19694",
            length={"steps_per_link": 10},
            options={"blocks_per_link": 1 / 3, "rank": 1, "lr": "global"},
            no_delta="{key} has no rank-1 form that can be switched off by block. Use lora",
        ),
    )
}


def recipe_of(key: str) -> Recipe:
    """The row of a recipe; ValueError for an unknown one."""
    if key not in RECIPES:
        known = ", ".join(map(repr, RECIPES))
        raise ValueError(f"chain: plan = {key!r} is not known. Use one of {known}.")
    return RECIPES[key]
