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
from torch import Tensor, nn

from plait.core import FreeConfig, FreeDelta, FrozenLinear, option, register
from plait.core.init import kaiming
from plait.core.mix import TaskTable, TokenRouter


@dataclass
class SharedBLoraConfig(FreeConfig):
    """Options of asymmetric ALoRA."""

    lora_dropout: float = option(0.05, "Dropout on A's input, a fraction.", least=0, below=1)
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
class SharedB(FreeDelta):
    """See the module."""

    mergeable: ClassVar[bool] = False  # per task only
    exact_export: ClassVar[bool] = False
    reads = ("A", "B", "A0", "B0", "G")
    config: SharedBLoraConfig

    def __init__(self, base: FrozenLinear, config: SharedBLoraConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen, num_A=config.num_A)
        if config.routing == "token":
            self.G = nn.Parameter(kaiming(gen, config.num_A, base.in_features))

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (n in + out), and n in for the router."""
        n = config.num_A
        router = n * in_features if config.routing == "token" else 0
        return cls.slots_of(config) * (n * in_features + out_features) + router

    def mix(self) -> TokenRouter | TaskTable:
        """(.., n r) to (.., r)."""
        if self.config.tasks:
            return TaskTable(self.config.tasks)
        return TokenRouter(self.G)

    @property
    def one_mask(self) -> bool:
        """Unless each A has a mask of its own."""
        return not (self.config.independent_dropout and self.training and self.dropout)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """One dropout mask, or one for each A: (.., n, in) with (n, r, in) to (.., n r)."""
        if self.one_mask:
            return super().down(x, A)
        return self.masked_down(x, A.unflatten(0, (self.config.num_A, -1)))
