"""Shared fixtures: tiny models, the real data's folder, one thread for all."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from plait.run import card, stock_check, train
from plait.run.export import read_back
from plait.testing import tiny
from tests.support import warm

torch.set_num_threads(1)
os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers wait for the other tests
torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
# The same examples on every machine, however slow it is just now.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _exports_are_checked_in_warm_processes() -> Iterator[None]:
    """The check of an export by stock peft runs in a new process that has peft loaded."""

    def run(command: list[str], *, cwd: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-P", stock_check.__file__]
        return warm.python(*command[2:], peft=True, cwd=cwd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_back, "subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_loss_curves() -> Iterator[None]:
    """Drawing takes a third of a short run; `loss_curves` is for tests that look at the picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_loss_curve", lambda folder, title: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """A run waits for the disk forty times. Tests kill processes; none cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def loss_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their loss curves."""
    monkeypatch.setattr(train, "write_loss_curve", card.write_loss_curve)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A causal language model with nn.Linear layers."""
    return tiny.llama()


@pytest.fixture
def gpt2() -> PreTrainedModel:
    """A causal language model with Conv1D layers."""
    return tiny.gpt2()


@pytest.fixture
def bert() -> PreTrainedModel:
    """An encoder with a classification head."""
    return tiny.bert()


@pytest.fixture
def deberta() -> PreTrainedModel:
    """An encoder with relative attention."""
    return tiny.deberta()


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data("sst2/train.tsv")`: a path inside PLAIT_DATA, or the test is skipped."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("PLAIT_DATA", "../shared/data"))
        if not (root / name).exists():
            pytest.skip(f"{name} is not in {root}. Set PLAIT_DATA to the folder of real data sets.")
        return root / name

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first: at the end, one process would wait for another one's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Keep what is imported out of later collections of garbage; every training makes one."""
    gc.collect()
    gc.freeze()
