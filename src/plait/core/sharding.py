"""Sharding: with FSDP2 parameters are whole in forward and backward, and shards between steps.

What a forward needs nobody has to think of. Penalties and events meet shards: `whole` reads one,
`put` writes into one, on all processes alike. What would read or replace the weights of a sharded
model as if they were whole is refused, for FSDP2 keeps parameters of its own and trains those.
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
    """Whether a tensor is this process' part of a larger one."""
    return AVAILABLE and isinstance(t, DTensor)


def whole(t: Tensor) -> Tensor:
    """The whole of a shard, gathered by all processes together; other tensors as they are.

    Differentiable: where all processes compute the same from it, the gradient is that of a shard.
    """
    return t.full_tensor() if is_shard(t) else t


@torch.no_grad()
def put(t: Tensor, index: Any, value: Tensor | float) -> None:
    """t[index] = value, in a shard too; all processes give the same index and value."""
    if not is_shard(t):
        t[index] = value
        return
    full, mesh = t.full_tensor(), t.device_mesh
    full[index] = value
    alike = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    t.copy_(alike.redistribute(placements=t.placements))


def reshard(model: nn.Module) -> None:
    """Put shards in place of what a forward left whole: what is written there would be lost."""
    for module in model.modules():
        if AVAILABLE and isinstance(module, FSDPModule):
            module.reshard()


def refuse_sharded(module: nn.Module, what: str, remedy: str = SAVE) -> None:
    """Raise ValueError where FSDP2 holds a module's parameters, even while they are whole."""
    marked = "_is_fsdp_managed_module" in vars(module)  # the only sign of it while they are whole
    if marked or any(map(is_shard, module.parameters())):
        raise ValueError(f"{what}: the parameters are sharded (FSDP2). {remedy}")
