"""Two processes under DDP on gloo: the same sketches, and xgb as in one process."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from plait import ChainPlan
from plait.chain import Ledger, start
from plait.testing import tiny
from tests.support import chains as toys

PLANS = {
    "chain": ChainPlan.chain(3),
    "rac": ChainPlan.rac(3, seed=5),
    "xgb": ChainPlan.xgb(steps_per_link=2, blocks_per_link=2, seed=1),
}
STEPS = 9
pytestmark = pytest.mark.slow  # three processes import transformers


def train(name: str, folder: Path, rank: int = 0, world: int = 1) -> None:
    """Train on this process' half of each batch, in fp64; save the adapter's numbers."""
    model: Any = toys.wrap(toys.Blocks(torch.float64), r=1)
    optimizer = toys.adamw(model, weight_decay=0.1)
    chain = start(model, PLANS[name], STEPS)
    wrapped: nn.Module = DistributedDataParallel(model) if world > 1 else model
    for step in range(STEPS):
        x, y = (part.chunk(world)[rank] for part in toys.data(model, key=step))
        (wrapped(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-2)
        optimizer.step()
        optimizer.zero_grad()
    chain.finish()
    folder = folder / f"{world}-{rank}"
    chain.save(folder)
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    torch.save(tensors, folder / "weights.pt")


def process(rank: int, port: int, folder: Path) -> None:
    """One of two."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for name in PLANS:
            train(name, folder / name, rank, 2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes and one have written."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    to = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(process, args=(port, to), nprocs=2)
    for name in PLANS:
        train(name, to / name)
    return to


@pytest.mark.parametrize("name", PLANS)
def test_two_processes_are_one(name: str, folder: Path) -> None:
    """Golden 16, and 9: ledgers with all sketches are equal in both processes."""
    one, first, second = (Ledger.load(folder / name / k) for k in ("1-0", "2-0", "2-1"))
    assert len(one.records) == len(first.records) == len(second.records) > 6
    for a, b, c in zip(one.records, first.records, second.records, strict=True):
        assert (a.link, a.module, a.steps) == (b.link, b.module, b.steps)
        assert torch.equal(b.A, c.A)
        assert torch.equal(b.B, c.B)
        torch.testing.assert_close(a.A, b.A, rtol=0, atol=1e-9)
        torch.testing.assert_close(a.B, b.B, rtol=0, atol=1e-9)
    assert first.frozen.keys() == one.frozen.keys()
    assert all(torch.equal(first.frozen[n], one.frozen[n]) for n in one.frozen)
    assert bool(one.frozen) == (name == "rac")
    weights = [torch.load(folder / name / k / "weights.pt") for k in ("1-0", "2-0")]
    for n, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][n], rtol=0, atol=1e-9)


def test_sketches_in_another_process(folder: Path) -> None:
    """Golden 9: equal bits, and equal to what the plan draws here."""
    plan = PLANS["rac"]
    ledger = Ledger.load(folder / "rac" / "2-1")
    for record in ledger.records:
        drawn = plan.draw(record.link, record.module, 1, record.A.shape[1])
        assert torch.equal(record.A, drawn.to(record.A))
    assert tiny.numbers(2).dtype == record.A.dtype == torch.float64
