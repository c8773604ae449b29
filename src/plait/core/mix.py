"""Mixes: which A meets which B, decided in rank space.

A pairing takes each A with its own B. A constant matrix folds into the factors. A token router
weights groups of the rank axis by a softmax of the token itself. A task table picks one group by
the task of the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core.delta import NotMergeable
from plait.core.route import NOWHERE, Rows

Approx = Literal["mean"]


class Mix:
    """Maps rank activations z (.., R_in) to h (.., R_out).

    Attributes:
        depends_on: the part of the input that decides, or None for a constant mix.
        tasks: names of the tasks that it can choose from.
    """

    depends_on: ClassVar[Literal["token", "task"] | None] = None
    tasks: Sequence[str] = ()

    def __call__(self, z: Tensor, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """Mix the rank activations of one call.

        Args:
            z: rank activations (.., R_in).
            x: the layer's input (.., in), before dropout.
            rows: what is known of the rows of the batch.
        """
        raise NotImplementedError

    def constant(
        self, ranks: int, task: str | None = None, approx: Approx | None = None
    ) -> Tensor | None:
        """The mix as a matrix (R_out, R_in), or None for the identity.

        Args:
            ranks: R_in.
            task: the task to choose.
            approx: "mean" takes a router as uniform.

        Raises:
            NotMergeable: the mix depends on the input and neither task nor approx settles it.
        """
        raise NotImplementedError


class Pairing(Mix):
    """Row k of A_cat meets column k of B_cat: h = z."""

    def __call__(self, z: Tensor, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """Return z."""
        return z

    def constant(
        self, ranks: int, task: str | None = None, approx: Approx | None = None
    ) -> Tensor | None:
        """The identity."""
        return None


@dataclass
class Matrix(Mix):
    """A constant matrix: h = M z, with M (R_out, R_in)."""

    M: Tensor

    def __call__(self, z: Tensor, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """Multiply by M, in the dtype of z."""
        return F.linear(z, self.M.to(z.dtype))

    def constant(
        self, ranks: int, task: str | None = None, approx: Approx | None = None
    ) -> Tensor | None:
        """M."""
        return self.M


@dataclass
class TokenRouter(Mix):
    """Softmax weights per token over n groups of the rank axis; w = softmax(G x) in fp32.

    The token alone decides: no look at other tokens or rows.

    Attributes:
        G: (n, in), no bias.
        kind: "reduce" sums groups, (.., n r) to (.., r): sum_i w_i z_i. "expand" copies one group,
            (.., r) to (.., n r): [w_1 z, .., w_n z]. "pair" keeps them apart, (.., n r) to
            (.., n r): [w_1 z_1, .., w_n z_n].
        top_k: keep the k largest weights and rescale them to sum 1; None: all.
        tap: called with the softmax (.., n) and the rows, returns the weights to use; for balance
            losses.
    """

    G: Tensor
    kind: Literal["reduce", "expand", "pair"] = "reduce"
    top_k: int | None = None
    tap: Callable[[Tensor, Rows], Tensor] | None = None

    depends_on: ClassVar[Literal["token", "task"] | None] = "token"

    def weights(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """The weights (.., n) of tokens x (.., in), fp32 or wider; each row sums to 1."""
        return self.of_logits(F.linear(x, self.G.to(x.dtype)), rows)

    def of_logits(self, logits: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """The weights (.., n) of logits G x (.., n)."""
        w = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self.tap is not None:
            w = self.tap(w, rows)
        if self.top_k is not None:
            kept = torch.zeros_like(w).scatter(-1, w.topk(self.top_k, dim=-1).indices, 1.0)
            w = w * kept
            w = w / w.sum(-1, keepdim=True)
        return w

    def __call__(self, z: Tensor, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """Weight the groups of z (.., R_in) by each token of x (.., in)."""
        w = self.weights(x, rows).to(z.dtype)
        if self.kind == "expand":
            return (w.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
        z = z.unflatten(-1, (len(self.G), -1))  # (.., n, r)
        if self.kind == "pair":
            return (w.unsqueeze(-1) * z).flatten(-2)
        return (w.unsqueeze(-2) @ z).squeeze(-2)

    def constant(
        self, ranks: int, task: str | None = None, approx: Approx | None = None
    ) -> Tensor | None:
        """With approx="mean" the mix of equal weights 1/n, in fp64."""
        if approx != "mean":
            raise NotMergeable(
                'its update depends on the token. Use merge(approx="mean") or keep the adapter.'
            )
        n = len(self.G)
        if self.kind == "pair":
            return torch.eye(ranks, dtype=torch.float64) / n
        one = torch.eye(ranks if self.kind == "expand" else ranks // n, dtype=torch.float64) / n
        return torch.cat([one] * n, dim=0 if self.kind == "expand" else 1)


@dataclass
class TaskTable(Mix):
    """One group of the rank axis per task: h = z_task."""

    tasks: Sequence[str]  # the indices of task_ids, in order

    depends_on: ClassVar[Literal["token", "task"] | None] = "task"

    def __call__(self, z: Tensor, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """Pick each row's group from z (.., n r).

        Raises:
            ValueError: rows.task_ids is missing, of another shape than the rows, or outside 0..n-1.
        """
        z = z.unflatten(-1, (len(self.tasks), -1))  # (.., n, r)
        index = self.groups(z.shape[:-2], rows).to(z.device)[..., None, None]
        return z.gather(-2, index.expand(*z.shape[:-2], 1, z.shape[-1])).squeeze(-2)

    def groups(self, lead: Sequence[int], rows: Rows) -> Tensor:
        """The index of the group of each token, in the shape `lead`.

        Raises:
            ValueError: as __call__.
        """
        n, ids, lead = len(self.tasks), rows.task_ids, tuple(lead)
        if ids is None:
            raise ValueError(
                "The adapter routes by task and there are no task_ids in this batch. Pass "
                f'model(..., task_ids=...) or call set_task("{self.tasks[0]}") for evaluation.'
            )
        if tuple(ids.shape) != lead[: ids.ndim]:
            raise ValueError(
                f"task_ids has shape {tuple(ids.shape)}, the layer's input leads {lead}. "
                "Give one id for each row of the batch; leave layers without rows, such as those "
                "of relative positions, out of target_modules."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
            raise ValueError(
                f"task_ids holds {int(ids.min())}..{int(ids.max())}; the adapter has tasks "
                f"0..{n - 1} ({', '.join(self.tasks)}). Map each row's task to its index."
            )
        return ids.reshape(ids.shape + (1,) * (len(lead) - ids.ndim)).expand(lead)

    def constant(
        self, ranks: int, task: str | None = None, approx: Approx | None = None
    ) -> Tensor | None:
        """The rows (r, R_in) of the identity that belong to one task, in fp64."""
        if task is None:
            raise NotMergeable(
                "its update depends on the task. "
                f"Name one of {', '.join(self.tasks)}: merge(task=...)."
            )
        identity = torch.eye(ranks, dtype=torch.float64).unflatten(0, (len(self.tasks), -1))
        return identity[task_index(self.tasks, task)]


def as_mix(declared: Mix | Tensor | None) -> Mix:
    """The mix that a method declares: None pairs A with B, a matrix (R_out, R_in) is constant."""
    if declared is None:
        return Pairing()
    return Matrix(declared) if isinstance(declared, Tensor) else declared


def task_index(tasks: Sequence[str], task: str) -> int:
    """The index of a task's name.

    Raises:
        ValueError: an unknown name; the message lists those that exist.
    """
    if task not in tasks:
        raise ValueError(f"Task {task!r} is not in this adapter. It has: {', '.join(tasks)}.")
    return tasks.index(task)
