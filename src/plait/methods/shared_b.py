"""ALoRA (asymmetric): several down-projections and one shared up-projection.

    token   y = W x + s B sum_i w_i(x) A_i x     w = softmax(G x), per token, dense
    task    y = W x + s B A_task(x) x            one A per task, no router (ours)

    A: (n, r, in)   B: (out, r)   G: (n, in), no bias   s = lora_alpha / r      arXiv 2509.25414

Start: A_i and G independently Kaiming-uniform, B = 0. The independence is the point: the paper
finds the likeness of A's elsewhere to come from equal starts, and B to carry the knowledge.

The mix happens in rank space: one (n r, in) product, a weighted sum to r, one (out, r) product.
The released code applies B once per expert, indexes 3-D inputs only, and draws a dropout mask per
expert; here one mask serves all, `independent_dropout` restores theirs. The router reads x itself.

Limits: with a live router no single matrix fits, so merge and export raise; for a task both are
exact. An A without samples in the batch has gradient 0, not None: AdamW's momentum and weight decay
still move it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core import DeltaConfig, FrozenLinear, LowRankDelta, Pair, option, register
from plait.core.delta import TaskTable, TokenRouter
from plait.core.init import kaiming


@dataclass
class SharedBLoraConfig(DeltaConfig):
    """Options of asymmetric ALoRA."""

    lora_dropout: float = option(0.05, "Dropout on A's input, a fraction.", least=0)
    num_A: int = option(3, "Number of A; with routing='task' that of tasks.", least=1)
    routing: Literal["token", "task"] = option("token", "A router per token, or a task id per row.")
    tasks: list[str] | None = option(None, "Names of the tasks, with routing='task'.")
    independent_dropout: bool = option(False, "A mask for each A, as in the released code.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.routing == "task") != bool(self.tasks):
            raise ValueError(
                f"routing = {self.routing!r} with tasks = {self.tasks}. "
                'Give the names of the tasks with routing="task", and only there.'
            )
        if self.tasks:
            if len(set(self.tasks)) != len(self.tasks):
                raise ValueError(f"tasks = {self.tasks} names a task twice. Give each name once.")
            self.num_A = len(self.tasks)


@register(
    "shared_b",
    SharedBLoraConfig,
    paper="2509.25414",
    formula="dW x = s B sum_i softmax(G x)_i A_i x",
    rank="r per token or task",
    names=("ALoRA", "Fed-ALoRA"),
)
class SharedB(LowRankDelta):
    """See the module."""

    mergeable: ClassVar[bool] = False  # per task only
    exact_export: ClassVar[bool] = False
    config: SharedBLoraConfig

    def __init__(self, base: FrozenLinear, config: SharedBLoraConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        n, r = config.num_A, config.r
        self.A = nn.Parameter(kaiming(gen, n, r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        if config.routing == "token":
            self.G = nn.Parameter(kaiming(gen, n, base.in_features))

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (n in + out), and n in for the router."""
        n = config.num_A
        router = n * in_features if config.routing == "token" else 0
        return config.r * (n * in_features + out_features) + router

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_cat (n r, in), B_cat (out, r)."""
        return self.A.flatten(0, 1), self.B

    def pairs(self) -> list[Pair]:
        """One: all A side by side with B. Router and tasks only weight the A's."""
        slices = tuple(range(self.config.num_A))
        return [Pair(self.base.name, self.A, self.B, self.scaling, A_slices=slices)]

    def mix(self) -> TokenRouter | TaskTable:
        """(.., n r) to (.., r)."""
        if self.config.tasks:
            return TaskTable(self.config.tasks)
        return TokenRouter(self.G)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """One dropout mask, or one for each A: (.., n, in) with (n, r, in) to (.., n r)."""
        if not (self.config.independent_dropout and self.training and self.dropout):
            return super().down(x, A)
        n = self.config.num_A
        dropped = F.dropout(x.unsqueeze(-2).expand(*x.shape[:-1], n, -1), self.dropout)
        return torch.einsum("...ni,nri->...nr", dropped, A.unflatten(0, (n, -1))).flatten(-2)
