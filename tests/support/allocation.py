"""A case of alloc, its live ranks and their scores."""

from typing import Any

from torch import Tensor

import plait
from plait.gates.alloc import importance
from plait.testing.case import Case
from plait.testing.helpers import batch, deltas

CASE = Case("alloc", {"first": 2, "every": 2, "rounds": 3, "n_A": 4})


def live_of(delta: Any) -> Tensor:
    """The 0/1 buffer."""
    return delta.live_ranks


def live(model: Any) -> list[int]:
    """Live ranks of each layer."""
    return [int(delta.live_ranks.sum()) for delta in deltas(model)]


def give(model: Any, key: int = 99) -> Any:
    """Give a development batch to a model; returns the model."""
    plait.set_development_batch(model, batch(model, key=key))
    return model


def scores(model: Any) -> list[Tensor]:
    """Importance of all slots."""
    return importance(deltas(model), live_of)
