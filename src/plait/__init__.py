"""plait: dual, collaborative and multi-LoRA fine-tuning methods on upstream peft.

Importing it makes every method known to peft:

    >>> import plait
    >>> from peft import get_peft_model
    >>> config = plait.DualLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    >>> model = get_peft_model(base, config)  # doctest: +SKIP

Torch and peft are loaded at the first use of a name; see `plait._lazy`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from plait._lazy import load_with_peft
from plait._version import __version__

if TYPE_CHECKING:
    from plait import chain
    from plait.callback import PlaitCallback, set_micro_batches
    from plait.chain import ChainCallback, ChainPlan, chain_schedule, chain_support
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
        list_methods,
        register,
    )
    from plait.core.events import after_step, penalty
    from plait.gates.alloc import set_development_batch
    from plait.gates.prune import prune
    from plait.methods.alloc import AllocLoraConfig
    from plait.methods.cola import ColaConfig
    from plait.methods.droplora import DropLoraConfig
    from plait.methods.dual_lora import DualLoraConfig
    from plait.methods.dual_module import DualModuleLoraConfig
    from plait.methods.fedalora_het import FedAloraHetConfig
    from plait.methods.hydra import HydraLoraConfig
    from plait.methods.molora import MoLoraConfig
    from plait.methods.nola import NolaConfig
    from plait.methods.shared_b import SharedBLoraConfig
    from plait.methods.sora import SoraConfig
    from plait.methods.tied import TiedLoraConfig
    from plait.optim import create_lora_rite_optimizer, create_lorsum_optimizer
    from plait.upstream.adalora import drive_adalora
    from plait.upstream.export import LoraExport, to_lora

__all__ = [
    "AllocLoraConfig",
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
]

# Where the public names are defined, the same as above; a test compares the two.
_NAMES = {
    "plait.callback": ("PlaitCallback", "set_micro_batches"),
    "plait.chain": ("ChainCallback", "ChainPlan", "chain_schedule", "chain_support"),
    "plait.core": (
        "Delta",
        "DeltaConfig",
        "DenseDelta",
        "EventNeverFired",
        "LowRankDelta",
        "Method",
        "NotMergeable",
        "PlaitWarning",
        "find",
        "list_methods",
        "register",
    ),
    "plait.core.events": ("after_step", "penalty"),
    "plait.gates.alloc": ("set_development_batch",),
    "plait.gates.prune": ("prune",),
    "plait.methods.alloc": ("AllocLoraConfig",),
    "plait.methods.cola": ("ColaConfig",),
    "plait.methods.droplora": ("DropLoraConfig",),
    "plait.methods.dual_lora": ("DualLoraConfig",),
    "plait.methods.dual_module": ("DualModuleLoraConfig",),
    "plait.methods.fedalora_het": ("FedAloraHetConfig",),
    "plait.methods.hydra": ("HydraLoraConfig",),
    "plait.methods.molora": ("MoLoraConfig",),
    "plait.methods.nola": ("NolaConfig",),
    "plait.methods.shared_b": ("SharedBLoraConfig",),
    "plait.methods.sora": ("SoraConfig",),
    "plait.methods.tied": ("TiedLoraConfig",),
    "plait.optim": ("create_lora_rite_optimizer", "create_lorsum_optimizer"),
    "plait.upstream.adalora": ("drive_adalora",),
    "plait.upstream.export": ("LoraExport", "to_lora"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}
_PARTS = {"chain", "core", "gates", "kernels", "methods", "optim", "upstream"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
        globals()[name] = value
        return value
    if name in _PARTS:
        return importlib.import_module(f"plait.{name}")
    raise AttributeError(f"module 'plait' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})


def _load() -> None:
    for module in _NAMES:
        importlib.import_module(module)


load_with_peft(_load)
