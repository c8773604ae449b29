"""Two processes under DDP: schedules, penalties and draws are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.contract import ROOT, relative
from tests.ddp import CASES


def run(folder: Path, *launcher: str) -> None:
    """Run tests/ddp.py in a new process, or several."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "ddp.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The adapters of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("ddp")
    run(folder)
    run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    names = ("rank0of1", "rank0of2", "rank1of2")
    return [load_file(folder / f"{name}.safetensors") for name in names]


@pytest.mark.parametrize("case", [*map(str, range(len(CASES))), "adalora"])
def test_two_processes_are_one(case: str, ends: list[dict[str, Tensor]]) -> None:
    one, first, second = (
        {n: t for n, t in end.items() if n.startswith(f"{case}/")} for end in ends
    )
    assert one
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), f"the processes drifted apart: {name}"
        if value.is_floating_point() and "Ubar" not in name and "Ibar" not in name:
            assert relative(first[name], value) < 1e-4, name
        else:
            assert relative(first[name].double(), value.double()) < 1e-3, name


def test_schedules_ran(ends: list[dict[str, Tensor]]) -> None:
    """Else equality would say nothing."""
    end = ends[1]
    keys = [case.key for case in CASES]

    def of(key: str, name: str) -> list[Tensor]:
        return [t for n, t in end.items() if n.startswith(f"{keys.index(key)}/") and name in n]

    assert any(not bool(t.all()) for t in of("dual_module", "keep"))
    assert any(not bool(t.all()) for t in of("sora", ".g"))
    live = [int(t.sum()) for t in of("alloc", "live_ranks")]
    assert len(set(live)) > 1
    pruned = [t for n, t in end.items() if n.startswith("adalora/") and "lora_E" in n]
    assert sum(int((t == 0).sum()) for t in pruned) == 2 * len(pruned)
