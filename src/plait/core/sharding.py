"""Sharding: with FSDP2 parameters are whole in forward and backward, and shards between steps.

So forwards need nothing special, while penalties and events meet shards: `whole` reads one and
`put` writes into one, with equal results on all processes. Functions that would read or replace the
weights of a sharded model as if they were whole raise, because FSDP2 trains parameters of its own.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

AVAILABLE = torch.distributed.is_available()
if TYPE_CHECKING or AVAILABLE:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate

SAVE = (
    "Save the adapter by torch's get_model_state_dict with full_state_dict=True and "
    "model.save_pretrained(folder, state_dict=...), load it in one process and do it there."
)


def is_shard(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is this process' shard of a larger one."""
    return AVAILABLE and isinstance(t, DTensor)


def whole(t: Tensor) -> Tensor:
    """Gather the whole tensor of a shard, on all processes together; other tensors as they are.

    Differentiable: if all processes compute the same from it, the gradient is that of a shard.
    """
    return t.full_tensor() if is_shard(t) else t


@torch.no_grad()
def put(t: Tensor, index: Any, value: Tensor | float) -> None:
    """t[index] = value, also for a shard; all processes pass the same index and value."""
    if not is_shard(t):
        t[index] = value
        return
    full, mesh = t.full_tensor(), t.device_mesh
    full[index] = value
    alike = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    t.copy_(alike.redistribute(placements=t.placements))


def reshard(model: nn.Module) -> None:
    """Shard again what a forward left whole, because writes to the whole tensors would be lost."""
    for module in model.modules():
        if AVAILABLE and isinstance(module, FSDPModule):
            module.reshard()


def refuse_sharded(module: nn.Module, what: str, remedy: str = SAVE) -> None:
    """Raise ValueError if FSDP2 holds a module's parameters, even while they are whole.

    Args:
        module: to look at.
        what: the operation or object, as the error names it.
        remedy: the end of the error message.
    """
    marked = "_is_fsdp_managed_module" in vars(module)  # the only sign of it while they are whole
    if marked or any(map(is_shard, module.parameters())):
        raise ValueError(f"{what}: the parameters are sharded (FSDP2). {remedy}")
