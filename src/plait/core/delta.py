"""Delta: the trainable update dW (out, in) of one frozen linear layer.

A method subclasses LowRankDelta (stacked factors, gate, mix) or DenseDelta (rows of dW) and states
its mathematics. Forward, weight, merge, export, counting, saving and scheduling are derived here
and in the rest of core, once.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.core import events
from plait.core.config import DeltaConfig
from plait.core.init import svd_start
from plait.kernels.dense_tiles import DenseTiles, tile_rows
from plait.kernels.low_rank import up

_order = itertools.count()


class NotMergeable(ValueError):
    """The update depends on the input, so no single weight holds it."""


@dataclass
class FrozenLinear:
    """What a Delta may know of its layer.

    name: full module name. in_features, out_features: of the layer, whatever its storage layout.
    dtype: of the factors, float32, or float64 on an fp64 base. read: gives the weight.
    """

    name: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    blank: bool = False  # start values are zeros: saved or random ones replace them

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), dequantised, in the factors' dtype."""
        return self.read().detach().to(self.dtype)

    def principal(
        self, rank: int, scaling: float, svd: Literal["randomized", "exact"], gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A0 (rank, in), B0 (out, rank): scaling B0 A0 is the weight's best rank-`rank` part.

        Zeros where saved or random values are about to replace them: no SVD at load.
        """
        if self.blank:
            return torch.zeros(rank, self.in_features), torch.zeros(self.out_features, rank)
        return svd_start(self.weight, rank, scaling, svd, gen)


class Delta(nn.Module):
    """The update of one layer. Subclasses declare; the constructor receives the layer's facts.

    Attributes:
        config: this layer's options (`r`, `lora_alpha` resolved from the patterns).
        adapter: the adapter's config, one object for all its layers; holds `total_steps`.
        base: facts of the frozen layer.
        scaling: s.
        t: completed optimizer steps (int64 buffer), where the method counts them, else None.
    """

    mergeable: ClassVar[bool] = True
    exact_export: ClassVar[bool] = True
    # Groups of parameters of which one must be non-zero, or no gradient could ever leave zero.
    alive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # Buffers that a file may lack or that a method drops on its way, see _load_from_state_dict.
    optional_buffers: ClassVar[tuple[str, ...]] = ()
    no_restart: ClassVar[str | None] = None  # why `restart` cannot be, for a chain; None: it can

    t: Tensor | None

    def __init__(self, base: FrozenLinear, config: DeltaConfig, gen: torch.Generator) -> None:
        """Set what all methods share; a subclass adds parameters drawn from `gen`."""
        super().__init__()
        self.base, self.config, self.adapter = base, config, config
        self.scaling = config.lora_alpha / config.r
        self.dropout = config.lora_dropout
        self.order = next(_order)  # layers in the order of the model
        self.forwards = 0  # training forwards since the start or the last event
        self.stepped = False  # an event came
        self.fresh = True  # at its start, before the first step: the update may be zero
        self.awaits_weights = False  # made from a saved config, weights not loaded yet
        self.register_buffer("t", None)
        self.register_state_dict_pre_hook(_check_fired)

    # What a method may declare -------------------------------------------------------------

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """Trainable parameters of one layer, by the method's formula."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """A scalar whose gradient enters once per optimizer step, or None.

        The adapter's penalty is the mean over its layers.
        """
        return None

    def after_step(self) -> None:
        """What happens after each completed optimizer step, gradients still present, t advanced."""

    @classmethod
    def after_all(cls, deltas: Sequence[Any]) -> None:
        """What happens once a step over all layers of an adapter, after every after_step."""

    def check_schedule(self) -> Any:
        """Raise ValueError where total_steps leaves no room for the schedule."""

    def loaded(self) -> None:
        """Recompute what is derived from saved state."""

    # What the core provides ---------------------------------------------------------------------

    def count_steps(self) -> None:
        """Count completed optimizer steps in the buffer `t`; makes the event required."""
        self.t = torch.zeros((), dtype=torch.int64)

    @property
    def steps(self) -> int:
        """Completed optimizer steps."""
        return 0 if self.t is None else int(self.t)

    @property
    def total_steps(self) -> int:
        """Planned optimizer steps.

        Raises:
            ValueError: unknown; the message names the ways to give it.
        """
        if self.adapter.total_steps is None:
            raise ValueError(
                f"{self.adapter.key}: total_steps is not known and this method has a schedule. "
                f"Give {type(self.adapter).__name__}(total_steps=...), add plait.PlaitCallback() "
                "to the Trainer, or use plait train."
            )
        return self.adapter.total_steps

    @property
    def needs_events(self) -> bool:
        """Whether training without optimizer-step events would be wrong."""
        cls = type(self)
        return self.t is not None or any(
            vars_of(cls, name) is not vars_of(Delta, name)
            for name in ("penalty", "after_step", "after_all")
        )

    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast region that the call is in, or None."""
        device = next(self.parameters()).device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def randomize(self, gen: torch.Generator) -> None:
        """A random start with dW != 0 (`init_weights=False`, for tests)."""
        self.fresh = False
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=gen) * 0.1)

    @torch.no_grad()
    def restart(self, gen: torch.Generator) -> None:
        """Start anew, as on a fresh layer of the weight that `base` now reads; for chains.

        Parameters keep their objects and get new values, their gradients go; all buffers (t,
        averages, masks) are those of a fresh Delta.
        """
        blank = replace(self.base, blank=False)  # a loaded adapter restarts from the weight, too
        fresh = type(self)(blank, self.config, gen)
        for name, p in self.named_parameters():
            p.copy_(fresh.get_parameter(name))
            p.grad = None
        first = next(self.parameters())
        for name, module in fresh.to(first.device, first.dtype).named_modules():
            for buffer, value in module._buffers.items():
                setattr(self.get_submodule(name), buffer, value)
        self.forwards, self.fresh = 0, True
        self.loaded()

    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in), scaled, in the factors' dtype.

        Raises:
            NotMergeable: the update depends on the input.
        """
        raise NotImplementedError

    def rank(self) -> int:
        """Attainable rank of dW."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; the copy is watched like the original."""
        super().__setstate__(state)
        events.watch(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load, with optional buffers taken or dropped as the file has them."""
        ours = [k for k in state_dict if k.startswith(prefix)]
        if ours:
            device = next(self.parameters()).device
            for name in self.optional_buffers:
                saved = state_dict.get(prefix + name)
                setattr(
                    self, name, None if saved is None else torch.empty_like(saved, device=device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if ours:
            self.awaits_weights = False
            self.fresh = self.t is not None and not self.t.is_meta and not self.steps
            self._check_alive()
            self.loaded()

    def _check_alive(self) -> None:
        for group in self.alive:
            tensors = [p for p in map(self.get_parameter, group) if p.numel() and not p.is_meta]
            if tensors and not any(bool(p.any()) for p in tensors):
                raise ValueError(
                    f"{self.adapter.key}: {' and '.join(group)} of {self.base.name} are all zero, "
                    "so no gradient can ever reach them. The file is not a trained adapter of this "
                    "method; train it again."
                )

    def extra_repr(self) -> str:
        """Shape and scale, for print(model)."""
        return (
            f"in={self.base.in_features}, out={self.base.out_features}, "
            f"r={self.config.r}, s={self.scaling:g}"
        )


@dataclass
class TokenRouter:
    """Softmax weights per token over n groups of the rank axis: h = sum_i w_i z_i.

    G: (n, in), no bias; w = softmax(G x) in fp32. The token alone decides: no look at other tokens.
    """

    G: Tensor

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Mix z (.., n r) to (.., r) by the un-dropped x (.., in)."""
        w = F.linear(x, self.G.to(x.dtype)).softmax(
            -1, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        z = z.unflatten(-1, (self.G.shape[0], -1))  # (.., n, r)
        return (w.to(z.dtype).unsqueeze(-2) @ z).squeeze(-2)


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


class LowRankDelta(Delta):
    """dW = s B_cat mix(gate A_cat): a sum of products, mixed in rank space."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_cat (R_in, in) and B_cat (out, R_out)."""
        raise NotImplementedError

    def gate(self) -> Tensor | None:
        """Factor on the rank axis (R_in,), or None."""
        return None

    def mix(self) -> Tensor | TokenRouter | TaskTable | None:
        """None (R_in == R_out), a constant matrix (R_out, R_in), a token router or a task table."""
        return None

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Rank activations (.., R_in) of x (.., in); input dropout acts here, one mask a call."""
        return F.linear(F.dropout(x, self.dropout, self.training), A)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """s mix(gate x A^T) B^T: (.., in) to (.., out), computed in the dtype of x.

        Args:
            x: (.., in).
            task_ids: (batch,), for a task table only.
        """
        A, B = self.factors()
        mix = self.mix()
        if isinstance(mix, TokenRouter):
            apply = lambda z: mix(x, z)  # noqa: E731
        elif isinstance(mix, TaskTable):
            if task_ids is None:
                raise ValueError(
                    f"{self.adapter.key}: no task_ids in this batch. Pass model(..., task_ids=...) "
                    f'or call set_task("{mix.tasks[0]}") for evaluation.'
                )
            apply = lambda z: mix(task_ids, z)  # noqa: E731
        elif mix is not None:
            apply = lambda z: F.linear(z, mix.to(z.dtype))  # noqa: E731
        else:
            apply = None
        return up(self.down(x, A.to(x.dtype)), B, self.scaling, self.gate(), apply)

    @torch.no_grad()
    def folded(
        self, task: str | None = None, approx: Literal["mean"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate and mix folded in: dW = s B A with A (k, in), B (out, k), zero ranks left out.

        Args:
            task: which task of a task table.
            approx: "mean" takes a uniform router; exact only where the router is uniform.

        Raises:
            NotMergeable: a token router without approx, a task table without a task.
        """
        with mode(self, training=False):
            A, B = self.factors()
            gate, mix = self.gate(), self.mix()
        if gate is not None:
            A = gate[:, None] * A
        key = self.adapter.key
        if isinstance(mix, TokenRouter):
            if approx != "mean":
                raise NotMergeable(
                    f"{key} cannot be merged: its update depends on the token. "
                    'Use merge(approx="mean") or keep the adapter.'
                )
            A = A.unflatten(0, (mix.G.shape[0], -1)).mean(0)
        elif isinstance(mix, TaskTable):
            if task is None:
                raise NotMergeable(
                    f"{key} cannot be merged: its update depends on the task. "
                    f"Name one of {', '.join(mix.tasks)}: merge(task=...)."
                )
            A = A.unflatten(0, (len(mix.tasks), -1))[task_index(mix.tasks, task)]
        elif mix is not None:  # mix = L R of rank rho; never wider than its rank
            U, S, Vh = torch.linalg.svd(mix.to(A), full_matrices=False)
            rho = int((S[:1] * max(mix.shape) * torch.finfo(S.dtype).eps < S).sum())
            A, B = Vh[:rho] @ A, B @ (U[:, :rho] * S[:rho])
        alive = (A != 0).any(1) & (B != 0).any(0)
        return A[alive], B[:, alive]

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in); `choice` as in folded."""
        A, B = self.folded(**choice)
        return self.scaling * (B @ A)

    def rank(self) -> int:
        """Attainable rank of dW: rows of A after the mix, for routers those of one token."""
        with mode(self, training=False):
            mix = self.mix()
            A, B = self.factors()
        inner = min(A.shape[0], B.shape[1])
        if isinstance(mix, Tensor):
            inner = int(torch.linalg.matrix_rank(mix.float()))
        return min(inner, self.base.in_features, self.base.out_features)


class DenseDelta(Delta):
    """dW by an element-wise form, of full rank; computed in tiles of rows."""

    exact_export: ClassVar[bool] = False
    tile: int | None = None  # rows of a tile; None: by device

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of dW / s, (stop - start, in), in the factors' dtype."""
        raise NotImplementedError

    def check_step(self) -> None:
        """Refuse a training forward that the method cannot serve."""

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.scaling * self.weight_rows(start, stop)

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x dW^T (split form), or x (W + dW)^T + b with the base weight given (joint form).

        Args:
            x: (.., in).
            weight: frozen base weight (out, in), or None.
            bias: (out,), with weight.
        """
        self.check_step()
        x = F.dropout(x, self.dropout, self.training)
        height = self.tile or tile_rows(self.base.in_features, x.device)
        x = x.to(self.autocast() or x.dtype)
        training = self.training  # the backward may run after eval(); the gate is the forward's

        def rows(start: int, stop: int) -> Tensor:
            with mode(self, training):
                return self._rows(start, stop)

        with torch.autocast(x.device.type, enabled=False):
            return DenseTiles.apply(
                rows, self.base.out_features, height, x, weight, bias, *self.parameters()
            )

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in), by the same code and tiles as the forward."""
        if choice.get("task") is not None:
            raise ValueError(
                f"{self.adapter.key} has no tasks; task = {choice['task']!r} was given."
            )
        first = next(self.parameters())
        height = self.tile or tile_rows(self.base.in_features, first.device)
        out = self.base.out_features
        with mode(self, training=False):
            tiles = [self._rows(a, min(a + height, out)) for a in range(0, out, height)]
        return torch.cat(tiles)

    def rank(self) -> int:
        """Attainable rank of dW: full."""
        return min(self.base.in_features, self.base.out_features)


def _check_fired(delta: Delta, *_: Any) -> None:
    events.check_fired(delta)


def vars_of(cls: type, name: str) -> Any:
    """The function behind a method of a class, classmethods included."""
    found = getattr(cls, name)
    return getattr(found, "__func__", found)


def less_start(
    a: Tensor,
    b: Tensor,
    A0: Tensor,
    B0: Tensor,
    share_a: Tensor | float = 1.0,
    share_b: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Delta mode: sum_a b_a a_a less its start, as stacked factors.

    The start of term a is (share_b B0)(share_a A0), of one block for all terms or a block for each.
    b a - b0 a0 = b (a - a0) + (b - b0) a0: both parts are exactly zero at the start, so a bf16
    forward sees the small difference and not the rounding of two large products.

    Args:
        a: (k, r, in). b: (k, out, r).
        A0: (r, in) or (k r, in). B0: (out, r) or (out, k r).
        share_a, share_b: (k, 1, 1) or a number.

    Returns:
        A_cat (k r + r0, in) and B_cat (out, k r + r0), r0 = rows of A0.
    """
    r = a.shape[1]
    a0 = A0.unflatten(0, (-1, r))  # (blocks, r, in)
    b0 = B0.unflatten(1, (-1, r)).movedim(1, 0)  # (blocks, out, r)
    extra = share_a * (b - share_b * b0)
    if len(a0) == 1:
        extra = extra.sum(0, keepdim=True)
    columns = torch.cat([b, extra])  # (k + blocks, out, r)
    return (
        torch.cat([(a - share_a * a0).flatten(0, 1), A0]),
        columns.movedim(0, 1).flatten(1),
    )


@contextmanager
def mode(delta: Delta, training: bool) -> Iterator[None]:
    """The Delta in training or evaluation mode, inside."""
    before, delta.training = delta.training, training
    try:
        yield
    finally:
        delta.training = before


def task_index(tasks: Sequence[str], task: str) -> int:
    """The index of a task's name.

    Raises:
        ValueError: an unknown name; the message lists those that exist.
    """
    if task not in tasks:
        raise ValueError(f"Task {task!r} is not in this adapter. It has: {', '.join(tasks)}.")
    return tasks.index(task)
