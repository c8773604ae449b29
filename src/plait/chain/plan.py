"""The plan of a chain: how long each link trains, at what rank, how it starts, at what rate.

    for k = 1..K:  start link k  ->  fresh optimizer state  ->  T_k steps on the link only
                   if k < K:  tie: record (A_k, B_k, s_k);  W += s_k B_k A_k

One engine serves all recipes, see chain/recipes.py. T_k is counted in completed optimizer steps.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from plait.chain.recipes import RECIPES, recipe_of
from plait.core.config import did_you_mean
from plait.core.init import seeded
from plait.core.trunk import Storage

Rate = Literal["restart", "global"]
Shape = Literal["constant", "linear", "cosine"]
SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class ChainPlan:
    """A plan, made by `ChainPlan.of` or one of its short forms `.chain`, `.rac` and `.xgb`.

    Attributes:
        recipe: a key of plait.chain.recipes.RECIPES.
        links: number of links K; None: as many as steps_per_link gives.
        steps_per_link: optimizer steps of a link; None: total // K, the first total % K links get
            one more.
        ranks: rank of each link, or one for all; None: the adapter's r. A link below the adapter's
            r leaves the surplus ranks at zero: it costs the memory of r.
        lr: "restart", with a warm-up in each link, or "global", one schedule over all links.
        warmup_steps: of a link (of the run with lr="global"), at most a tenth of it.
        reset_optimizer: forget the optimizer's state of the link's parameters at a tie.
        storage: of finished links, "stack" or "merge", see core/trunk.py.
        freeze: the side that is a frozen sketch, "A" or "B"; None: both are trained.
        sketch: "orthonormal" (Haar), or "gaussian", a control that the theory does not cover.
        sketch_std: scale of the sketch.
        blocks_per_link: number of transformer blocks that a link trains, or their share.
        seed: of starts, sketches and choices.
    """

    recipe: str
    links: int | None = None
    steps_per_link: int | None = None
    ranks: int | tuple[int, ...] | None = None
    lr: Rate = "restart"
    warmup_steps: int = 100
    reset_optimizer: bool = True
    storage: Storage = "stack"
    freeze: Literal["A", "B"] | None = None
    sketch: Literal["orthonormal", "gaussian"] = "orthonormal"
    sketch_std: float = 1.0
    blocks_per_link: int | float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, recipe: str, **options: Any) -> "ChainPlan":
        """The plan of a recipe: its defaults, then the options.

        Example:
            >>> import plait
            >>> plait.ChainPlan.of("xgb", steps_per_link=5).ranks
            1

        Args:
            recipe: a key of plait.chain.recipes.RECIPES.
            options: attributes of the plan that the recipe takes; `rank` is one rank for all links.
                Links and steps_per_link that are None count as not given.

        Raises:
            ValueError: an unknown recipe, an option of another recipe or out of range.
        """
        row = recipe_of(recipe)
        for name in options:
            if name not in row.known():
                raise ValueError(
                    f"chain: {name} is no option of the plan {recipe}. "
                    f"{did_you_mean(name, row.known())}"
                )
        chosen = {**row.options, **options}
        if chosen.get("links") is None and chosen.get("steps_per_link") is None:
            chosen |= row.length
        if "rank" in chosen:
            chosen["ranks"] = chosen.pop("rank")
        if isinstance(chosen.get("ranks"), list):
            chosen["ranks"] = tuple(chosen["ranks"])
        return cls(recipe=recipe, **chosen)

    @classmethod
    def chain(cls, links: int | None = None, **options: Any) -> "ChainPlan":
        """Chain-of-LoRA: A and B are trained in every link; 3 links unless given. See `of`."""
        return cls.of("chain", links=links, **options)

    @classmethod
    def rac(cls, links: int | None = None, **options: Any) -> "ChainPlan":
        """RAC-LoRA: one side is a random sketch and frozen; 12 links unless given. See `of`."""
        return cls.of("rac", links=links, **options)

    @classmethod
    def xgb(cls, links: int | None = None, **options: Any) -> "ChainPlan":
        """XGBLoRA: rank-1 links on some blocks; 10 steps a link unless given. See `of`."""
        return cls.of("xgb", links=links, **options)

    @property
    def by_block(self) -> bool:
        """Whether a link trains a random subset of the transformer blocks."""
        return RECIPES[self.recipe].by_block

    def __post_init__(self) -> None:
        sides = ("A", "B") if recipe_of(self.recipe).freezes else (None,)
        if (self.links is None) == (self.steps_per_link is None):
            raise ValueError(
                f"chain: links = {self.links} and steps_per_link = {self.steps_per_link}. "
                "Give one of them; the other follows from the number of steps."
            )
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,)
        for name, value, least in (
            ("links", self.links, 1),
            ("steps_per_link", self.steps_per_link, 1),
            ("warmup_steps", self.warmup_steps, 0),
            *(("ranks", rank, 1) for rank in ranks),
        ):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"chain: {name} = {value!r}. Give a whole number from {least} on.")
        if isinstance(self.ranks, tuple) and self.links is not None:
            self._check_ranks(self.links)
        for name, value, known in (
            ("lr", self.lr, ("restart", "global")),
            ("storage", self.storage, ("stack", "merge")),
            ("sketch", self.sketch, ("orthonormal", "gaussian")),
            ("freeze", self.freeze, sides),
        ):
            if value not in known:
                options = ", ".join(map(repr, known))
                raise ValueError(f"chain: {name} = {value!r} is not known. Use one of {options}.")
        if not self.sketch_std > 0 or not math.isfinite(self.sketch_std):
            raise ValueError(f"chain: sketch_std = {self.sketch_std}. Give a number above 0.")
        share = self.blocks_per_link
        if isinstance(share, bool) or share <= 0 or (isinstance(share, float) and share > 1):
            raise ValueError(
                f"chain: blocks_per_link = {share!r}. Give a number of blocks, or their share "
                "above 0 and up to 1.0."
            )

    def _check_ranks(self, links: int) -> None:
        if isinstance(self.ranks, tuple) and len(self.ranks) != links:
            raise ValueError(
                f"chain: ranks has {len(self.ranks)} entries for {links} links. Give one for each "
                "link, or one number for all."
            )

    # What follows from the plan -----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON stores it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def lengths(self, total_steps: int) -> list[int]:
        """Optimizer steps of each link.

        Raises:
            ValueError: fewer steps than links.
        """
        if self.steps_per_link is not None:
            whole, rest = divmod(total_steps, self.steps_per_link)
            lengths = [self.steps_per_link] * whole + ([rest] if rest else [])
        else:
            links = self.links or 1
            lengths = [total_steps // links + (k < total_steps % links) for k in range(links)]
        if not lengths or min(lengths) < 1:
            raise ValueError(
                f"chain: {total_steps} optimizer steps for {self.links} links. Give at least one "
                "step for each link."
            )
        self._check_ranks(len(lengths))
        return lengths

    def rank(self, link: int, most: int) -> int:
        """Rank of a link (0, 1, ..) on a layer whose adapter has rank `most`.

        Raises:
            ValueError: the plan's rank is above the adapter's.
        """
        rank = self.ranks[link] if isinstance(self.ranks, tuple) else self.ranks
        if rank is None:
            return most
        if rank > most:
            raise ValueError(
                f"chain: link {link} has rank {rank}, the adapter r = {most}. Give the adapter the "
                "largest rank of a link."
            )
        return rank

    def draw(self, link: int, name: str, rank: int, size: int) -> Tensor:
        """The sketch of a link and layer, rows (rank, size) in fp64; the same in every process.

        Orthonormal: Haar-distributed rows times sketch_std. Gaussian: N(0, sketch_std^2).

        Raises:
            ValueError: more orthonormal rows than the space has dimensions.
        """
        if self.sketch == "orthonormal" and rank > size:
            raise ValueError(
                f"chain: {name} has {size} features on its frozen side, r = {rank} orthonormal "
                "directions do not fit. Give a smaller r."
            )
        gen = seeded(self.seed, link, name)
        columns = torch.randn(size, rank, generator=gen, dtype=torch.float64)
        if self.sketch == "orthonormal":
            Q, R = torch.linalg.qr(columns)
            signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)  # without them Q is not Haar
            columns = Q * signs
        return self.sketch_std * columns.T.contiguous()

    def chosen(self, link: int, blocks: list[str]) -> set[str]:
        """The blocks that a link trains, drawn by seed and link.

        Raises:
            ValueError: the plan asks for more blocks than there are.
        """
        share = self.blocks_per_link
        count = max(1, round(share * len(blocks))) if isinstance(share, float) else share
        if count > len(blocks):
            raise ValueError(
                f"chain: blocks_per_link = {count}, the adapter has {len(blocks)} blocks. Give at "
                "most that."
            )
        order = torch.randperm(len(blocks), generator=seeded(self.seed, link, "blocks"))
        return {blocks[i] for i in order[:count].tolist()}

    def factors(self, total_steps: int, shape: Shape) -> list[float]:
        """Factor on the learning rate in each step; never 0, which would waste the step.

        In a link of T steps with w = min(warmup_steps, T // 10) for warm-up: (j + 1) / w in its
        step j < w, then the shape over (j - w) / (T - w).
        """
        if shape not in SHAPES:
            raise ValueError(
                f"chain: the learning rate cannot restart as {shape!r}. Use one of "
                f'{", ".join(map(repr, SHAPES))}, or a plan with lr="global".'
            )
        lengths = self.lengths(total_steps)
        values = []
        for length in lengths if self.lr == "restart" else [total_steps]:
            warm = min(self.warmup_steps, length // 10)
            for j in range(length):
                part = (j - warm) / (length - warm)
                after = {
                    "constant": 1.0,
                    "linear": 1 - part,
                    "cosine": (1 + math.cos(math.pi * part)) / 2,
                }[shape]
                values.append((j + 1) / warm if j < warm else after)
        return values


class ChainSchedule(LambdaLR):
    """The pre-computed learning rates of a plan; made by `plait.chain_schedule`."""

    def __init__(self, optimizer: Optimizer, plan: ChainPlan, total_steps: int, shape: Shape):
        values = plan.factors(total_steps, shape)
        # Text, so that it is saved with the schedule and compared on resume.
        self.signature = signature(plan, total_steps)
        super().__init__(optimizer, lambda step: values[min(step, len(values) - 1)])


def signature(plan: ChainPlan, total_steps: int) -> str:
    """Text of all that a schedule and a chain must agree on."""
    return f"{plan.lengths(total_steps)} {plan.lr} {plan.warmup_steps}"


def chain_schedule(
    plan: ChainPlan, optimizer: Optimizer, total_steps: int, shape: Shape = "linear"
) -> ChainSchedule:
    """The learning-rate schedule of a chain, as `optimizers=(optimizer, schedule)` takes it.

    Example:
        >>> import plait, torch
        >>> plan = plait.ChainPlan.chain(links=2, warmup_steps=0)
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> plan.factors(4, "linear")
        [1.0, 0.5, 1.0, 0.5]
        >>> schedule = plait.chain_schedule(plan, opt, total_steps=4)

    Args:
        plan: with lr="restart" the warm-up and the shape restart in each link.
        optimizer: with the base learning rates.
        total_steps: planned optimizer steps, those of the Trainer's max_steps.
        shape: "constant", "linear" or "cosine", from the end of the warm-up towards 0.

    Raises:
        ValueError: an unknown shape, or fewer steps than links.
    """
    return ChainSchedule(optimizer, plan, total_steps, shape)
