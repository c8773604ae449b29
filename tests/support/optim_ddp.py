"""One of the processes of test_two_processes_are_one; run by torchrun with a folder."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import plait
from benchmarks.optim.toys import Invariance, OneLayer, adapted, delta

CASES: dict[str, dict[str, Any]] = {
    "one sweep": {},
    "two sweeps, in": {"sweeps": 2, "start": "in"},
    "no momentum": {"momentum": 0.0},
    "metric": {"metric": "kfac"},
    "no sweep": {"sweeps": 0},
    "rite": {"rite": True},
}


def environment() -> dict[str, str]:
    """One thread for each process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(options: dict[str, Any], rank: int, world: int) -> Tensor:
    """Train 8 steps on a share of each batch; returns dW in fp32 of the last."""
    toy = Invariance(zero_B=True)
    model = adapted(OneLayer(toy.W, toy.H), toy.A, toy.B)
    if options.get("rite"):
        optimizer: Any = plait.create_lora_rite_optimizer(model, lr=1e-2)
    else:
        optimizer = plait.create_lorsum_optimizer(model, lr=0.1, **options)
    trained: Any = DistributedDataParallel(model) if world > 1 else model
    for step in range(8):
        rows = torch.arange(8 * step, 8 * step + 8)[rank::world]
        optimizer.zero_grad()
        (trained(toy.X[rows]) - toy.Y[rows]).square().mean().backward()
        optimizer.step()
    return delta(model).contiguous()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {name: run(options, rank, world) for name, options in CASES.items()}
    save_file(found, Path(sys.argv[1]) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()
