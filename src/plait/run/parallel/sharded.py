"""FSDP2 through accelerate: a process holds a part of every parameter.

accelerate turns FSDP on for GPUs alone and trains with DDP on a CPU, without a word. So both what
it says of itself and the parameters are looked at.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerCallback

from plait.core.sharding import is_shard
from plait.run.config import RunConfig
from plait.run.parallel import ranks
from plait.upstream.adalora import METHOD

WEIGHTS = "pytorch_model_fsdp.bin"  # of a checkpoint: what adapter_model.safetensors holds, too
OPTIMIZER = "optimizer.bin"
# What FSDP2 cannot train -> why.
_METHODS = {
    "tied": "its blocks share factors, which torch refuses to shard",
    METHOD: "upstream's penalty reads a shard as if it were whole",
}


def fsdp_options(cfg: RunConfig) -> dict[str, Any]:
    """Return the keywords of TrainingArguments that share the model out among the processes.

    Raises ValueError for a method, an optimizer or a chain that FSDP2 cannot train.
    """
    reason, key = _METHODS.get(cfg.method.name), f"method.name is {cfg.method.name}"
    if cfg.optimizer.name != "default":
        key = f"optimizer.name is {cfg.optimizer.name}"
        reason = "it computes with whole factors, and each process holds a part"
    if cfg.chain is not None:
        key, reason = "there is a chain", "its links replace parameters"
    if cfg.model.quantization != "none":
        key = f"model.quantization is {cfg.model.quantization}"
        reason = "shards of quantised weights are not tested"
    if cfg.training.get("load_best_model_at_end"):
        key = "training.load_best_model_at_end is true"
        reason = "weights cannot be loaded into a sharded model"
    if reason is not None:
        raise ValueError(
            f"{cfg.source.at('parallel.kind')} is fsdp2, and {key}: {reason}. Set parallel.kind: "
            "ddp, or change the other key."
        )
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


def forget_earlier() -> None:
    """Make accelerate look at FSDP's options again: only the first Accelerator of a process does.

    It notes in the environment that it did.
    """
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state()


def check_kind(accelerator: Accelerator, cfg: RunConfig) -> None:
    """Raise ValueError if accelerate would train in another way than parallel.kind says."""
    sharded = accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2
    if sharded != (cfg.parallel.kind == "fsdp2"):
        raise ValueError(
            f"{cfg.source.at('parallel.kind')} is {cfg.parallel.kind}, and accelerate would train "
            f"with {accelerator.distributed_type.value}. It shards a model on GPUs only; set "
            "parallel.kind: ddp."
        )


class CheckSharded(TrainerCallback):
    """Raises RuntimeError if the parameters are whole although they were to be shared out."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the parameters."""
        parameters = list(kwargs["model"].parameters())
        held = sum(local(p).numel() for p in parameters)
        every = sum(p.numel() for p in parameters)
        if (
            not all(map(is_shard, parameters))
            or held > every // ranks.size() + len(parameters) * 64
        ):
            raise RuntimeError(
                f"parallel.kind: fsdp2: this process holds {held:,} of {every:,} numbers, so the "
                "model is not sharded. Set parallel.kind: ddp."
            )


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds a part of this model."""
    return any(map(is_shard, model.parameters()))


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Gather what trains, and the buffers, for the first process; all call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers that this process holds of a tensor are finite."""
    return bool(torch.isfinite(local(tensor)).all())
