"""What a Delta is, and everything that all methods derive from it."""

from plait.core.config import DeltaConfig, option
from plait.core.delta import Delta, FrozenLinear, NotMergeable, Pair
from plait.core.dense import DenseDelta
from plait.core.events import EventNeverFired, PlaitWarning
from plait.core.free import FreeConfig, FreeDelta
from plait.core.gate import Gate, gates, register_gate
from plait.core.init import gaussian, kaiming, seeded, svd_start
from plait.core.low_rank import LowRankDelta, less_start
from plait.core.mix import Matrix, Mix, Pairing, TaskTable, TokenRouter
from plait.core.registry import Method, find, list_methods, register
from plait.core.sharding import put, whole
from plait.kernels.cache import traced

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
    "Matrix",
    "Method",
    "Mix",
    "NotMergeable",
    "Pair",
    "Pairing",
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
    "traced",
    "whole",
]
