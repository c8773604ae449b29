"""Allocation: how much a rank matters on a development batch; moving ranks between layers."""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.events import PlaitWarning, adapters_of
from plait.core.init import seeded
from plait.core.sharding import reshard


@dataclass
class Development:
    """A batch to score ranks on.

    Attributes:
        model: weak; the model whose loss is taken. batch: keyword arguments of its forward.
    """

    model: "weakref.ref[nn.Module]"
    batch: Mapping[str, Any]


# By Delta; beside them, so that a model with a batch can still be pickled.
_given: "weakref.WeakKeyDictionary[Any, Development]" = weakref.WeakKeyDictionary()


def set_development_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Give the batch that allocation scores ranks on, for example 32 validation rows.

    Args:
        model: with plait's adapters; `model(**batch).loss` is the cross-entropy.
        batch: keyword arguments, labels included.

    Raises:
        ValueError: no adapter of the model allocates.
    """
    found = [
        d for deltas in adapters_of(model) for d in deltas if any(g.allocates for g in d.gates)
    ]
    if not found:
        raise ValueError("set_development_batch: no adapter of this model allocates ranks.")
    for delta in found:
        _given[delta] = Development(weakref.ref(model), batch)


def development(delta: Any) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """The model and the batch to score on; None where none was given for the Delta's own model."""
    given = _given.get(delta)
    model = None if given is None else given.model()
    if given is None or model is None or not any(m is delta for m in model.modules()):
        return None
    return model, given.batch


@torch.no_grad()
def importance(deltas: Sequence[Any], live_of: Callable[[Any], Tensor]) -> list[Tensor]:
    """IS(k) of each rank up to the constant S(M), (slots,) a layer; -inf where a slot is dead.

    Gates, weights, mode and random state are as before; under torch.distributed it is the mean over
    processes, so that all choose alike.

    Args:
        deltas: the layers. live_of: gives a layer's 0/1 buffer.

    Raises:
        ValueError: no development batch was given, or it has no labels.
    """
    found = development(deltas[0])
    if found is None:
        raise ValueError(
            f"{deltas[0].adapter.key}: there is no development batch to score ranks on. Call "
            "plait.set_development_batch(model, batch) before training; for plait train set "
            "data.validation."
        )
    model, batch = found
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

    A round that would take every rank is left out with a warning.

    Args:
        deltas: the layers. live_of: gives a layer's 0/1 buffer. scores: (slots,) a layer, -inf
        where dead.
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
        own = scores[layer][live.bool()]
        means[layer] = float(own.mean()) if len(own) else -torch.inf
    for _, layer, k in lost:
        lives[layer][k] = 0
    spared = sorted(set(range(len(lives))) - {layer for _, layer, _ in lost})
    left = 0
    for layer, wanted in zip(spared, shares(len(lost), [means[i] for i in spared]), strict=True):
        left += _grow(deltas[layer], lives[layer], wanted)
    for layer in sorted(spared, key=lambda i: (-means[i], i)):  # where a layer had no slot left
        left = _grow(deltas[layer], lives[layer], left)
    if left and spared:
        _warn(deltas, f"{left} ranks found no free slot and are dropped. Raise spare")


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


def _grow(delta: Any, live: Tensor, wanted: int) -> int:
    """Start up to `wanted` ranks in the lowest dead slots; return how many found none."""
    free = (live == 0).nonzero()[:wanted, 0]
    if len(free):  # a layer may grow twice in a round: the first slot keys another draw
        first = int(free[0])
        delta.revive(free, seeded(delta.config.seed, delta.steps, delta.base.name, "new", first))
        live[free] = 1
    return wanted - len(free)
