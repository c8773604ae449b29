"""Starts that are not zero, so that a test of the update sees the start too."""

from typing import Any

import torch

from plait.testing import tiny


def with_random_start(model: Any, delta: Any) -> tuple[Any, Any]:
    """Fill a frozen start A0, B0, if there is one, with numbers that are not those of the base."""
    if delta.A0 is not None:
        with torch.no_grad():
            delta.A0.copy_(tiny.numbers(*delta.A0.shape, key=5))
            delta.B0.copy_(tiny.numbers(*delta.B0.shape, key=6))
    return model, delta
