"""Mixes: which A meets which B, decided in rank space.

A constant matrix folds into the factors. A token router weighs groups of the rank axis by a softmax
of the token itself. A task table picks one group by the row's task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.route import Rows


@dataclass
class TokenRouter:
    """Softmax weights per token over n groups of the rank axis; w = softmax(G x) in fp32.

    The token alone decides: no look at other tokens or rows.

    Attributes:
        G: (n, in), no bias.
        kind: "reduce" sums groups, (.., n r) to (.., r): sum_i w_i z_i. "expand" copies one group,
            (.., r) to (.., n r): [w_1 z, .., w_n z]. "pair" keeps them apart, (.., n r) to
            (.., n r): [w_1 z_1, .., w_n z_n].
        top_k: keep the k largest weights and make them sum to 1; None: all.
        tap: called with the softmax (.., n) and the rows, returns what stands for it; for balance
            losses.
        rows: what is known of the rows of this call.
    """

    G: Tensor
    kind: Literal["reduce", "expand", "pair"] = "reduce"
    top_k: int | None = None
    tap: Callable[[Tensor, Rows | None], Tensor] | None = None
    rows: Rows | None = None

    def weights(self, x: Tensor) -> Tensor:
        """The weights (.., n) of tokens x (.., in), fp32 or wider; each row sums to 1."""
        w = F.linear(x, self.G.to(x.dtype)).softmax(
            -1, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        if self.tap is not None:
            w = self.tap(w, self.rows)
        if self.top_k is not None:
            kept = torch.zeros_like(w).scatter(-1, w.topk(self.top_k, dim=-1).indices, 1.0)
            w = w * kept
            w = w / w.sum(-1, keepdim=True)
        return w

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Mix rank activations z (.., R_in) to (.., R_out) by the un-dropped x (.., in)."""
        w = self.weights(x).to(z.dtype)
        if self.kind == "expand":
            return (w.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        z = z.unflatten(-1, (len(self.G), -1))  # (.., n, r)
        if self.kind == "pair":
            return (w.unsqueeze(-1) * z).flatten(-2)
        return (w.unsqueeze(-2) @ z).squeeze(-2)

    def uniform(self, ranks: int) -> Tensor:
        """The constant mix (R_out, R_in) of equal weights 1/n, in fp64.

        Args:
            ranks: R_in.
        """
        n = len(self.G)
        if self.kind == "pair":
            return torch.eye(ranks, dtype=torch.float64) / n
        one = torch.eye(ranks if self.kind == "expand" else ranks // n, dtype=torch.float64) / n
        return torch.cat([one] * n, dim=0 if self.kind == "expand" else 1)


@dataclass
class TaskTable:
    """One group of the rank axis per task: h = z_task."""

    tasks: Sequence[str]

    def __call__(self, ids: Tensor, z: Tensor) -> Tensor:
        """Pick each row's group from z (.., n r); ids (batch,) or of the leading shape of z.

        Raises:
            ValueError: ids of another shape, or outside 0..n-1.
        """
        n, lead = len(self.tasks), z.shape[:-1]
        ids = ids.to(z.device)
        if ids.shape != lead[: ids.ndim]:
            raise ValueError(
                f"task_ids has shape {tuple(ids.shape)}, the layer's input leads {tuple(lead)}. "
                "Give one id for each row of the batch; leave layers without rows, such as those "
                "of relative positions, out of target_modules."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
            raise ValueError(
                f"task_ids holds {int(ids.min())}..{int(ids.max())}; the adapter has tasks "
                f"0..{n - 1} ({', '.join(self.tasks)}). Map each row's task to its index."
            )
        z = z.unflatten(-1, (n, -1))  # (.., n, r)
        index = ids.reshape(ids.shape + (1,) * (z.ndim - ids.ndim)).expand(*lead, 1, z.shape[-1])
        return z.gather(-2, index).squeeze(-2)

    def chosen(self, task: str, ranks: int) -> Tensor:
        """The constant mix (r, R_in) of one task, in fp64.

        Args:
            task: its name.
            ranks: R_in.
        """
        n = len(self.tasks)
        return torch.eye(ranks, dtype=torch.float64).unflatten(0, (n, -1))[
            task_index(self.tasks, task)
        ]


def task_index(tasks: Sequence[str], task: str) -> int:
    """The index of a task's name.

    Raises:
        ValueError: an unknown name; the message lists those that exist.
    """
    if task not in tasks:
        raise ValueError(f"Task {task!r} is not in this adapter. It has: {', '.join(tasks)}.")
    return tasks.index(task)
