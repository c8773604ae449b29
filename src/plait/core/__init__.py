"""The host of every method: what a Delta is, and everything derived from it."""

from plait.core.config import DeltaConfig, option
from plait.core.delta import (
    Delta,
    DenseDelta,
    FrozenLinear,
    LowRankDelta,
    NotMergeable,
    Pair,
    less_start,
)
from plait.core.events import EventNeverFired, PlaitWarning
from plait.core.free import FreeConfig, FreeDelta
from plait.core.gate import Gate, gates, register_gate
from plait.core.init import gaussian, kaiming, seeded, svd_start
from plait.core.mix import TaskTable, TokenRouter
from plait.core.registry import Method, find, list_methods, register
from plait.core.sharding import put, whole

__all__ = [
    "Delta",
    "DeltaConfig",
    "DenseDelta",
    "EventNeverFired",
    "FreeConfig",
    "FreeDelta",
    "FrozenLinear",
    "Gate",
    "LowRankDelta",
    "Method",
    "NotMergeable",
    "Pair",
    "PlaitWarning",
    "TaskTable",
    "TokenRouter",
    "find",
    "gates",
    "gaussian",
    "kaiming",
    "less_start",
    "list_methods",
    "option",
    "put",
    "register",
    "register_gate",
    "seeded",
    "svd_start",
    "whole",
]
