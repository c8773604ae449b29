"""Fully sharded training (FSDP2) in a loop of your own: every process holds a part of each number.

    torchrun --nproc_per_node 2 examples/fsdp.py

Alone it is one process with one shard, for a look; on GPUs the mesh is of "cuda", the backend nccl.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir


# --8<-- [start:shard]
def shard(model: PeftModel, mesh: DeviceMesh) -> None:
    """Each block is a unit of its own and the rest another. The optimizer comes after this."""
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


# --8<-- [end:shard]


# --8<-- [start:save]
def save(model: PeftModel, folder: str | Path) -> None:
    """All processes gather the adapter, the first one writes it. It is loaded like any other."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    whole = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=whole)


# --8<-- [end:save]


def main() -> None:
    """Train some steps, save, load in one process, compare."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
    config = plait.SoraConfig(r=4, target_modules="all-linear")
    model: Any = get_peft_model(base, config)
    shard(model, init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(
        3, base.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0)
    )
    rows = ids[rank::world]
    for _ in range(5):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits = model(input_ids=ids).logits
        save(model, folder)
        if rank == 0:
            again = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
            loaded = PeftModel.from_pretrained(again, folder).eval()(input_ids=ids).logits
            print(f"sharded and loaded differ by {float((logits - loaded).abs().max()):.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
