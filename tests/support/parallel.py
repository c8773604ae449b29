"""Run by test_parallel.py under torchrun: every method on two processes, under DDP and FSDP2.

    torchrun --nproc_per_node 2 tests/support/parallel.py FOLDER

FOLDER gets what each process ends with, `ddp0.safetensors` and so on, the adapters that were saved,
and what FSDP2 refuses, `refused.json`.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import plait
from plait.core import whole
from plait.testing import tiny
from plait.testing.case import TARGETS, Case
from plait.testing.helpers import trained
from plait.testing.processes import load
from tests.support import ROOT

fsdp = load(ROOT / "examples" / "fsdp.py")  # what the documentation shows

STEPS = 8
STOP = 5  # under FSDP2 a run stops after so many steps and goes on from what it saved
# Schedules and draws that end within STEPS. A method that is not named here runs with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dual_lora": [{"gate_steps": 6, "ste": "identity"}],
    "dual_module": [{"tinit": 2, "tfinal": 2, "deltaT": 1, "target_r": 1}],
    "cola": [{"strategy": "random"}],
    "shared_b": [{"routing": "task", "tasks": ["law", "care"]}],
    "droplora": [{"scope": "step", "inner_dropout": 0.3}],
    "sora": [{"xi": 0.05, "l1_weight": 1.0, "gate_lr": 0.05}],
    # From B = 0 the ranks' scores are differences of losses within fp32's noise, and any order of
    # summation may choose other ranks; from a random start they are far apart.
    "alloc": [
        {"first": 2, "every": 4, "rounds": 2, "n_A": 2, "init_weights": False},
        {"first": 2, "every": 4, "rounds": 2, "n_A": 2, "init": "pissa"},
    ],
    "hydra": [{"num_B": 2}],
    "molora": [{"num_experts": 2, "balance": "switch", "balance_weight": 0.1}],
}
CASES = {
    str(case): case
    for method in plait.list_methods()
    for case in (Case(method.key, options) for options in VARIANTS.get(method.key, [{}]))
}
CONTROLS = ["lora", "adalora"]  # upstream's
ONE_UNIT = ["tied", "alloc-pissa"]  # under FSDP2; the others have a unit for each block
UPSTREAM_FAILS = ["adalora"]  # under FSDP2


def make(name: str) -> Any:
    """A fresh model of a case, the same in every process."""
    if name in CASES:
        return get_peft_model(tiny.llama(), CASES[name].config())
    shared: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if name == "lora":
        config: Any = LoraConfig(r=4, **shared)
    else:
        config = AdaLoraConfig(
            lora_alpha=32,
            init_r=4,
            target_r=2,
            tinit=1,
            tfinal=2,
            deltaT=1,
            total_step=STEPS,
            **shared,
        )
    with tiny.seed():
        model: Any = get_peft_model(tiny.llama(), config)
    if name == "adalora":
        plait.drive_adalora(model)
    return model


def shard(model: Any, one_unit: bool = False) -> Any:
    """FSDP2 over all processes: a unit for each block and one for the rest, or one for all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh) if one_unit else fsdp.shard(model, mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """With a state, and with decay, which some gates are kept from."""
    return torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9, weight_decay=0.01)


def run(name: str, mode: str, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Train a case, each process on its rows of every batch; save the adapter.

    Args:
        name: of the case. mode: "one", "ddp" or "fsdp". folder: for the adapter.

    Returns:
        The losses (STEPS,) of the own rows, logits of a batch that all share, the adapter's state,
        and how many numbers of all parameters this process holds.
    """

    def rows(batch: Tensor) -> Tensor:
        return batch.chunk(world)[rank]

    def prepared() -> tuple[Any, torch.optim.Optimizer]:
        model = make(name)
        if mode == "fsdp":
            shard(model, name in ONE_UNIT)
        if name.startswith("alloc"):
            ids = rows(tiny.tokens(4, 8, 99))
            plait.set_development_batch(model, {"input_ids": ids, "labels": ids})
        return model, optimizer_of(model)

    tasks = name in CASES and "tasks" in CASES[name].options
    task_ids = {"task_ids": torch.arange(8) % 2} if tasks else {}
    own_ids = {k: rows(v) for k, v in task_ids.items()}
    (model, optimizer), losses = prepared(), []
    wrapped = DistributedDataParallel(model) if mode == "ddp" else model
    for step in range(STEPS):
        if mode == "fsdp" and step == STOP:
            before, (model, optimizer) = (model, optimizer), prepared()
            resume(before, (model, optimizer))
            wrapped = model
        wrapped.train()
        ids = rows(tiny.tokens(8, 8, step))
        loss = wrapped(input_ids=ids, labels=ids, **own_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tiny.tokens(8), **task_ids).logits
    if mode == "fsdp":
        fsdp.save(model, folder)
    elif rank == 0:
        model.save_pretrained(folder)
    state = model.state_dict()  # FSDP2 puts shards in place of what the forward left whole
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    key = f"plait_{CASES[name].key}" if name in CASES else "lora_"
    return {
        "losses": torch.stack(losses),
        "logits": logits,
        "held": torch.tensor(sum(p.numel() for p in held)),
        "all": torch.tensor(sum(p.numel() for p in model.parameters())),
        **{f"state/{n}": whole(t).contiguous() for n, t in state.items() if key in n},
    }


def resume(before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    """Load the state of a sharded model and its optimizer into others, from the first process."""
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    model = checkpoint.get_model_state_dict(before[0], options=gather)
    optimizer = checkpoint.get_optimizer_state_dict(*before, options=gather)
    checkpoint.set_model_state_dict(after[0], model, options=spread)
    checkpoint.set_optimizer_state_dict(*after, optimizer, options=spread)


# What FSDP2 cannot have -----------------------------------------------------------------------


def step(model: Any, optimizer: Any) -> None:
    """One step on a batch."""
    ids = tiny.tokens()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


REFUSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "merge": ("sora", lambda model: model.merge_adapter()),
    "merge dense": ("dual_lora-identity", lambda model: model.merge_adapter()),
    "export": ("sora", plait.to_lora),
    "export lora": ("lora", plait.to_lora),
    "prune": ("sora", plait.prune),
    "add": ("sora", lambda model: model.add_adapter("b", plait.SoraConfig(target_modules=TARGETS))),
    "sum": ("sora", lambda model: model.base_model.add_weighted_adapter(["default"], [2.0], "b")),
    "chain": ("sora", lambda model: plait.chain.start(model, plait.ChainPlan.chain(2), 4)),
    "chain lora": ("lora", lambda model: plait.chain.start(model, plait.ChainPlan.chain(2), 4)),
}
REFUSED_STEPS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora_rite": ("lora", lambda m: step(m, plait.create_lora_rite_optimizer(m, lr=1e-3))),
    "lorsum": ("lora", lambda m: step(m, plait.create_lorsum_optimizer(m, lr=1e-3))),
    "adalora": ("adalora", lambda m: step(m, optimizer_of(m))),
}


def refusals() -> dict[str, str]:
    """The error of each attempt; of REFUSED also where a forward left all parameters whole."""
    found = {}
    for name, (key, attempt) in {**REFUSED, **REFUSED_STEPS}.items():
        found[name] = error_of(attempt, shard(make(key)))
    for name, (key, attempt) in REFUSED.items():
        model = shard(make(key), one_unit=True)
        with torch.no_grad():
            model(input_ids=tiny.tokens())
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        found[f"{name}, whole"] = error_of(attempt, model)
    found["tied"] = error_of(lambda m: step(shard(m), optimizer_of(m)), make("tied"))
    return found


def error_of(attempt: Callable[[Any], Any], model: Any) -> str:
    """The error of an attempt, "" where there is none."""
    try:
        attempt(model)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    """Train all cases in both ways; write what each process ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))  # a hang is an error
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2, f"{world} processes; start two: torchrun --nproc_per_node 2"
    for mode in ("ddp", "fsdp"):
        names = [n for n in (*CASES, *CONTROLS) if mode == "ddp" or n not in UPSTREAM_FAILS]
        ends = {n: run(n, mode, folder / mode / n, rank, world) for n in names}
        flat = {f"{n}/{k}": v.clone() for n, end in ends.items() for k, v in end.items()}
        save_file(flat, folder / f"{mode}{rank}.safetensors")
    found = refusals()
    if rank == 0:
        (folder / "refused.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
