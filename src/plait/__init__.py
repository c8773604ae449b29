"""plait: dual, collaborative and multi-LoRA fine-tuning methods on upstream peft.

Importing it makes every method known to peft:

    >>> import plait
    >>> from peft import get_peft_model
    >>> config = plait.DualLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    >>> model = get_peft_model(base, config)  # doctest: +SKIP

Torch and peft are loaded at the first use of a name; see `plait._lazy`.
"""

# ruff: noqa: F405 - the names of `__all__` stand in plait._names

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from plait._lazy import load_with_peft
from plait._version import __version__

if TYPE_CHECKING:
    from plait._names import *  # noqa: F403

__all__ = [
    "AllocLoraConfig",
    "Arm",
    "ChainCallback",
    "ChainPlan",
    "ColaConfig",
    "Delta",
    "DeltaConfig",
    "DenseDelta",
    "DropLoraConfig",
    "DualLoraConfig",
    "DualModuleLoraConfig",
    "EventNeverFired",
    "FedAloraHetConfig",
    "HydraLoraConfig",
    "LoraExport",
    "LowRankDelta",
    "Method",
    "MoLoraConfig",
    "NolaConfig",
    "NotMergeable",
    "PlaitCallback",
    "PlaitWarning",
    "SharedBLoraConfig",
    "SoraConfig",
    "TiedLoraConfig",
    "__version__",
    "after_step",
    "chain",
    "chain_schedule",
    "chain_support",
    "create_lora_rite_optimizer",
    "create_lorsum_optimizer",
    "drive_adalora",
    "find",
    "list_methods",
    "penalty",
    "prune",
    "register",
    "set_development_batch",
    "set_micro_batches",
    "to_lora",
    "train_together",
]

_PARTS = {"chain", "core", "gates", "kernels", "methods", "optim", "upstream"}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"plait.{name}")
    if name in __all__:
        value = getattr(_load(), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'plait' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})


def _load() -> ModuleType:
    return importlib.import_module("plait._names")


load_with_peft(_load)
