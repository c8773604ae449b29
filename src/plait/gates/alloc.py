"""The gate of Allocating LoRA: ranks are scored on a development batch and move between layers.

Importance of a live rank k, with S = -cross-entropy in evaluation mode and all other ranks of all
layers off in "only k":

    IS(k) = S(M) - S(M without k) + S(M with only k)

There are `rounds` rounds, at step `first` and then every `every` steps. A round switches off the
n_A ranks of lowest IS (ties by layer and slot) and gives as many new ones to the layers that lost
none, evenly, the remainder to those of highest mean IS. If every layer lost one, nothing is added
and the budget shrinks. A new rank takes the lowest dead slot, starts with an update of zero and
fresh optimizer state (ours); without a free slot it goes to the next layer, or is dropped with a
warning. A round costs 2 forwards for each live rank.

arXiv 2403.16187, Algorithm 1. The paper counts K1 and K2 in epochs, 1 and 0.25 of up to 10; steps
by default are ours. n_A is by default the number of adapted layers: the paper's "1 x N_mod" is 7
or 224.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.config import option
from plait.core.events import PlaitWarning, adapters_of
from plait.core.gate import Gate, register_gate
from plait.core.init import seeded
from plait.core.sharding import reshard


@dataclass
class AllocOptions:
    """Options of the allocation."""

    first: int | float = option(200, "K1: steps, or share of all, before the first round.", above=0)
    every: int | float = option(50, "K2: steps, or share of all, between rounds.", above=0)
    rounds: int = option(8, "N_A, the number of rounds.", least=0)
    n_A: int | None = option(None, "Ranks moved in a round; None: one a layer.", least=1)
    spare: int = option(2, "Slots of a layer, in multiples of r.", least=1)


@register_gate("alloc")
@dataclass
class AllocGate(AllocOptions, Gate):
    """The 0/1 buffer `live_ranks`, moved between layers."""

    allocates = True
    reads = ("live_ranks",)

    @property
    def total_steps_needed(self) -> bool:
        """Whether `first` or `every` is a share of all steps."""
        return isinstance(self.first, float) or isinstance(self.every, float)

    def check(self, delta_cls: Any) -> None:
        """Raise ValueError if ranks cannot restart one by one."""
        if not delta_cls.rank_axes:
            raise ValueError(
                "gates: alloc restarts single ranks, but the factors of this method are not free "
                "matrices with one row for each rank. Use it on a method whose factors are."
            )

    def slots(self, ranks: int) -> int:
        """`spare` times the ranks of the start."""
        return self.spare * ranks

    def prepare(self, delta: Any, ranks: int, gen: torch.Generator) -> None:
        """Declare live."""
        live = torch.zeros(ranks)
        live[: ranks // self.spare] = 1
        delta.live_ranks = nn.Buffer(live)
        delta.count_steps()

    def value(self, delta: Any) -> Tensor:
        """The 0/1 buffer."""
        return delta.live_ranks

    def times(self, delta: Any) -> range:
        """The steps that end with a round."""
        total = delta.total_steps if self.total_steps_needed else 0
        first, every = (
            max(1, int(n * total)) if isinstance(n, float) else n for n in (self.first, self.every)
        )
        return range(first, first + every * self.rounds, every)

    def check_schedule(self, delta: Any) -> None:
        """Raise ValueError if a round is due after the last step."""
        times, total = self.times(delta), delta.adapter.total_steps
        if times and total is not None and times[-1] > total:
            raise ValueError(
                f"{delta.adapter.key}: round {self.rounds} is due in step {times[-1]}, training "
                f"has {total}. Lower first = {self.first}, every = {self.every} or rounds, or give "
                "first and every as shares of all steps, such as 0.1 and 0.025."
            )

    def check_first(self, deltas: Sequence[Any], moved: int) -> None:
        """Report in the first step what a later round would lack."""
        one, live = deltas[0], sum(int(d.live_ranks.sum()) for d in deltas)
        if moved >= live:
            raise ValueError(
                f"n_A = {moved}: a round would take all of {live} ranks. Give a smaller n_A."
            )
        if development(one) is None:
            text = f"{one.adapter.key}: there is no development batch; step {self.times(one)[0]} "
            text += "needs it. Call plait.set_development_batch(model, batch)."
            warnings.warn(text, PlaitWarning, stacklevel=2)

    def after_all(self, deltas: Sequence[Any]) -> None:
        """Run a round if one is due."""
        t, moved = deltas[0].steps, self.n_A or len(deltas)
        if t == 1 and self.rounds:
            self.check_first(deltas, moved)
        if t in self.times(deltas[0]):
            scores = importance(deltas, lambda d: d.live_ranks)
            allocate(deltas, lambda d: d.live_ranks, scores, moved)


# The development batch ---------------------------------------------------------------------------


@dataclass
class Development:
    """A batch to score ranks on.

    Attributes:
        model: weak; the model whose loss is taken. batch: keyword arguments of its forward.
    """

    model: "weakref.ref[nn.Module]"
    batch: Mapping[str, Any]


# By Delta; not stored on the Delta, so that a model with a batch can still be pickled.
_batches: "weakref.WeakKeyDictionary[Any, Development]" = weakref.WeakKeyDictionary()


def set_development_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Give the batch that allocation scores ranks on, for example 32 validation rows.

    Args:
        model: with plait's adapters; `model(**batch).loss` is the cross-entropy.
        batch: keyword arguments, labels included.

    Raises:
        ValueError: no adapter of the model allocates.
    """
    allocating = [
        d for deltas in adapters_of(model) for d in deltas if any(g.allocates for g in d.gates)
    ]
    if not allocating:
        raise ValueError("set_development_batch: no adapter of this model allocates ranks.")
    for delta in allocating:
        _batches[delta] = Development(weakref.ref(model), batch)


def development(delta: Any) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """The model and the batch to score on; None if the Delta's own model has no batch."""
    entry = _batches.get(delta)
    model = None if entry is None else entry.model()
    if entry is None or model is None or not any(m is delta for m in model.modules()):
        return None
    return model, entry.batch


@torch.no_grad()
def importance(deltas: Sequence[Any], live_of: Callable[[Any], Tensor]) -> list[Tensor]:
    """IS(k) of each rank up to the constant S(M), (slots,) per layer; -inf where a slot is dead.

    Gates, weights, mode and random state are restored. Under torch.distributed it is the mean over
    processes, so that all choose alike.

    Args:
        deltas: the layers.
        live_of: returns a layer's 0/1 buffer.

    Raises:
        ValueError: no development batch was given, or it has no labels.
    """
    source = development(deltas[0])
    if source is None:
        raise ValueError(
            f"{deltas[0].adapter.key}: there is no development batch to score ranks on. Call "
            "plait.set_development_batch(model, batch) before training; for plait train set "
            "data.validation."
        )
    model, batch = source
    lives = [live_of(d) for d in deltas]
    to = lives[0].device  # the model may have moved since the batch was given
    batch = {k: v.to(to) if isinstance(v, Tensor) else v for k, v in batch.items()}
    kept = [live.clone() for live in lives]
    modes = [(m, m.training) for m in model.modules()]
    scores = [torch.full_like(live, -torch.inf) for live in lives]
    with ExitStack() as stack:
        devices = sorted({live.device.index or 0 for live in lives if live.is_cuda})
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(_restore, lives, kept, modes)
        stack.callback(reshard, model)
        model.eval()
        for live, score in zip(lives, scores, strict=True):
            for k in live.nonzero()[:, 0].tolist():
                live[k] = 0
                without = _loss(model, batch)
                for other in lives:
                    other.zero_()
                live[k] = 1
                score[k] = without - _loss(model, batch)
                for other, value in zip(lives, kept, strict=True):
                    other.copy_(value)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for score in scores:
            torch.distributed.all_reduce(score)
            score /= torch.distributed.get_world_size()
    return scores


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """The cross-entropy, -S."""
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(
            f"The development batch ({', '.join(batch)}) gives no loss. Put labels into it."
        )
    return float(loss)


def _restore(
    lives: Sequence[Tensor], kept: Sequence[Tensor], modes: Sequence[tuple[nn.Module, bool]]
) -> None:
    for live, value in zip(lives, kept, strict=True):
        live.copy_(value)
    for module, training in modes:
        module.training = training


@torch.no_grad()
def allocate(
    deltas: Sequence[Any], live_of: Callable[[Any], Tensor], scores: Sequence[Tensor], moved: int
) -> None:
    """Take the `moved` ranks of lowest score away and give as many to the layers that lost none.

    A round that would take every rank is skipped with a warning.

    Args:
        deltas: the layers.
        live_of: returns a layer's 0/1 buffer.
        scores: (slots,) per layer, -inf where a slot is dead.
        moved: ranks to move.
    """
    lives = [live_of(d) for d in deltas]
    ranked = [
        (float(score), layer, int(k))
        for layer, (live, score) in enumerate(zip(lives, [s.cpu() for s in scores], strict=True))
        for k, score in enumerate(score)
        if live[k]
    ]
    if moved >= len(ranked):
        _warn(deltas, f"{len(ranked)} ranks are left, a round moves {moved} and is left out")
        return
    ranked.sort()
    lost = ranked[:moved]
    means = {}
    for layer, live in enumerate(lives):
        left = scores[layer][live.bool()]
        means[layer] = float(left.mean()) if len(left) else -torch.inf
    for _, layer, k in lost:
        lives[layer][k] = 0
    spared = sorted(set(range(len(lives))) - {layer for _, layer, _ in lost})
    homeless = 0
    for layer, share in zip(spared, shares(len(lost), [means[i] for i in spared]), strict=True):
        homeless += _grow(deltas[layer], lives[layer], share)
    for layer in sorted(spared, key=lambda i: (-means[i], i)):  # if a layer had no slot left
        homeless = _grow(deltas[layer], lives[layer], homeless)
    if homeless and spared:
        _warn(deltas, f"{homeless} ranks found no free slot and are dropped. Raise spare")


def _warn(deltas: Sequence[Any], text: str) -> None:
    where = f"{deltas[0].adapter.key}, step {deltas[0].steps}"
    warnings.warn(f"{where}: {text}.", PlaitWarning, stacklevel=3)


def shares(total: int, means: Sequence[float]) -> list[int]:
    """`total` new ranks over layers: evenly, the remainder to the highest mean score first."""
    if not means:
        return []
    each, rest = divmod(total, len(means))
    order = sorted(range(len(means)), key=lambda i: (-means[i], i))
    return [each + (i in order[:rest]) for i in range(len(means))]


def _grow(delta: Any, live: Tensor, count: int) -> int:
    """Start up to `count` ranks in the lowest dead slots; return how many found none."""
    free = (live == 0).nonzero()[:count, 0]
    if len(free):  # a layer may grow twice in a round: the first slot keys another draw
        first = int(free[0])
        delta.revive(free, seeded(delta.config.seed, delta.steps, delta.base.name, "new", first))
        live[free] = 1
    return count - len(free)
