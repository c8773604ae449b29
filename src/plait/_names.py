"""The public names of plait. Importing this loads torch, peft and every method."""

# ruff: noqa: F401 - `plait.__getattr__` hands them out

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
from plait.together import Arm, train_together
from plait.upstream.adalora import drive_adalora
from plait.upstream.export import LoraExport, to_lora
