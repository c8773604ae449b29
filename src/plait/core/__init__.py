"""The host of every method: what a Delta is, and everything derived from it."""

from plait.core import screening
from plait.core.config import DeltaConfig, option
from plait.core.delta import (
    Delta,
    DenseDelta,
    FrozenLinear,
    LowRankDelta,
    NotMergeable,
    Pair,
    TaskTable,
    TokenRouter,
    less_start,
)
from plait.core.events import EventNeverFired, PlaitWarning
from plait.core.init import gaussian, kaiming, seeded, svd_start
from plait.core.registry import Method, find, methods, register

__all__ = [
    "Delta",
    "DeltaConfig",
    "DenseDelta",
    "EventNeverFired",
    "FrozenLinear",
    "LowRankDelta",
    "Method",
    "NotMergeable",
    "Pair",
    "PlaitWarning",
    "TaskTable",
    "TokenRouter",
    "find",
    "gaussian",
    "kaiming",
    "less_start",
    "methods",
    "option",
    "register",
    "screening",
    "seeded",
    "svd_start",
]
