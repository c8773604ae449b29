"""Run by test_ddp.py under torchrun, or alone: trains each case on its half of the batches.

FOLDER/rank0of1.safetensors and so on is what each process ends with: python tests/ddp.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import plait
from tests import tiny
from tests.contract import Case, trained

STEPS = 8
CASES = [
    Case("dual_lora", {"gate_steps": 4, "ste": "identity"}),
    Case("dual_module", {"tinit": 2, "tfinal": 2, "deltaT": 1, "target_r": 1}),
    Case("cola", {"strategy": "random"}),
    Case("shared_b", {"routing": "task", "tasks": ["law", "care"]}),
    Case("droplora", {"scope": "step", "inner_dropout": 0.3}),
    Case("sora", {"xi": 0.05, "l1_weight": 1.0}),
    Case("alloc", {"first": 2, "every": 2, "rounds": 2, "n_A": 2}),
    Case("tied"),
    Case("hydra", {"num_B": 2}),
    Case("molora", {"num_experts": 2, "balance": "switch", "balance_weight": 0.1}),
]


def adalora() -> Any:
    """Upstream's AdaLoRA, driven by plait."""
    with tiny.seed():
        config = AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=STEPS,
            target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(tiny.llama(), config)
    plait.drive_adalora(model)
    return model


def train(model: Any, rank: int, world: int, tasks: bool) -> None:
    """Eight steps of SGD, each process on its rows of every batch."""
    wrapped: Any = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.3)
    wrapped.train()
    for step in range(STEPS):
        ids = tiny.tokens(8, 8, step)
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        extra = {"task_ids": (torch.arange(8) % 2)[rows]} if tasks else {}
        wrapped(input_ids=ids[rows], labels=ids[rows], **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path) -> None:
    """Train all cases; write what each process ends with."""
    torch.set_num_threads(1)
    rank, world = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, torch.Tensor] = {}
    for name, model in [
        *((str(i), get_peft_model(tiny.llama(), c.config())) for i, c in enumerate(CASES)),
        ("adalora", adalora()),
    ]:
        case = CASES[int(name)] if name.isdigit() else None
        if case is not None and case.key == "alloc":
            ids = tiny.tokens(4, 8, 99)[rank * 4 // world : (rank + 1) * 4 // world]
            plait.set_development_batch(model, {"input_ids": ids, "labels": ids})
        train(model, rank, world, case is not None and "tasks" in case.options)
        key = "lora_" if case is None else f"plait_{case.key}"
        state = {n: t for n, t in model.state_dict().items() if key in n}
        found |= {f"{name}/{n}": t.contiguous().clone() for n, t in state.items()}
    save_file(found, folder / f"rank{rank}of{world}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
