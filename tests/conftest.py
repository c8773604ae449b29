"""Shared fixtures: tiny models, the real data's folder, one thread for all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from plait.testing import tiny

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
# The same examples on every machine, however slow it is just now.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")


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
