"""plait: dual, collaborative and multi-LoRA fine-tuning methods on upstream peft.

Importing it registers every method with peft:

    >>> import plait
    >>> from peft import get_peft_model
    >>> config = plait.DualLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    >>> model = get_peft_model(base, config)  # doctest: +SKIP
"""

from plait._version import __version__
from plait.core import (
    Delta,
    DeltaConfig,
    DenseDelta,
    EventNeverFired,
    LowRankDelta,
    Method,
    NotMergeable,
    PlaitWarning,
    find,
    register,
)
from plait.core.events import PlaitCallback, after_step, penalty
from plait.core.export import LoraExport, to_lora
from plait.methods.cola import ColaConfig
from plait.methods.dual_lora import DualLoraConfig
from plait.methods.dual_module import DualModuleLoraConfig
from plait.methods.shared_b import SharedBLoraConfig
from plait.optim import create_lora_rite_optimizer, create_lorsum_optimizer

# The function, bound after the package of the same name was imported above.
from plait.core.registry import methods  # isort: skip

__all__ = [
    "ColaConfig",
    "Delta",
    "DeltaConfig",
    "DenseDelta",
    "DualLoraConfig",
    "DualModuleLoraConfig",
    "EventNeverFired",
    "LoraExport",
    "LowRankDelta",
    "Method",
    "NotMergeable",
    "PlaitCallback",
    "PlaitWarning",
    "SharedBLoraConfig",
    "__version__",
    "after_step",
    "create_lora_rite_optimizer",
    "create_lorsum_optimizer",
    "find",
    "methods",
    "penalty",
    "register",
    "to_lora",
]
