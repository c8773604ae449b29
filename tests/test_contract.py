"""The contract over every registered method."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plait
from plait.core import registry
from plait.testing import CHECKS, Case, checks, fresh_process, processes

# B0 / 3 three times is not B0 to the last bit.
ROUNDED = {"start_error": 1e-6}
# A method that is not named here runs with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    # A mask for each token comes from the global generator: tested in tests/test_droplora.py.
    "droplora": [
        {"options": {"scope": "token", "inner_dropout": 0.0}},
        {"options": {"scope": "step", "inner_dropout": 0.25}},
        {"options": {"scope": "step", "inner_dropout": 0.25, "init": "pissa"}},
    ],
    "sora": [{"options": {"l1_weight": 0.1}}, {"options": {"init": "pissa", "l1_weight": 0.1}}],
    "alloc": [{"options": {"rounds": 0}}, {"options": {"rounds": 0, "init": "pissa"}}],
    "nola": [
        {"options": {"num_basis_A": 40, "num_basis_B": 48}, "lr": 5e-2},
        {"options": {"a0": False, "basis_dtype": "bfloat16"}, "lr": 5e-2},
    ],
    "tied": [{}, {"options": {"train": ["u", "v"]}, "lr": 5e-2}],
    "hydra": [
        {"options": {"num_B": 3}, "experts": ("B", "G")},
        {"options": {"num_B": 2, "independent_dropout": True}, "experts": ("B", "G")},
        {"options": {"num_B": 2, "init": "pissa"}, "experts": ("B", "G")},
    ],
    "molora": [
        {"options": {"r": 2, "num_experts": 3}, "experts": ("A", "B", "G")},
        {"options": {"r": 2, "num_experts": 3, "top_k": 2}, "experts": ("A", "B", "G")},
        {"options": {"r": 2, "num_experts": 2, "init": "pissa"}, "experts": ("A", "B", "G")},
    ],
    "dual_lora": [{"options": {"gate_steps": 8}, "additive": {"ste": "identity"}}],
    "dual_module": [{"options": {"tinit": 2, "tfinal": 2, "deltaT": 1}}],
    "shared_b": [
        {"options": {"r": 2, "num_A": 3}, "experts": ("A", "G")},
        {"options": {"r": 2, "routing": "task", "tasks": ["law", "care"]}, "experts": ("A",)},
        {"options": {"r": 2, "num_A": 2, "independent_dropout": True}, "experts": ("A", "G")},
    ],
    "fedalora_het": [
        {"options": {"common_rank": 3}},
        {"options": {"r": 2, "common_rank": 6}},
    ],
    "cola": [
        {"options": {"r": 2, "strategy": "full"}, "alike": ("A", "B"), **ROUNDED},
        {"options": {"r": 2, "strategy": "full", "init": "kaiming"}},
        {"options": {"r": 2, "strategy": "random"}, "experts": ("A", "B"), **ROUNDED},
        {"options": {"r": 2, "strategy": "random_b"}, "experts": ("A", "B"), **ROUNDED},
        {"options": {"r": 2, "strategy": "heuristic"}, "experts": ("A",), **ROUNDED},
        {
            "options": {"r": 2, "strategy": "heuristic", "init": "pissa_split"},
            "experts": ("A",),
        },
    ],
}
CASES = [
    Case(method.key, **variant)
    for method in plait.list_methods()
    for variant in VARIANTS.get(method.key, [{}])
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Any, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_shape(case: Case) -> None:
    @settings(max_examples=5)
    @given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), rows=st.integers(1, 3))
    def check(n_in: int, n_out: int, rows: int) -> None:
        checks.forward_is_weight(case, n_in, n_out)
        checks.fast_is_naive(case, n_in, n_out, rows, tiles=(2, 4))

    check()


FORGETFUL = '''
from dataclasses import dataclass

import torch
from torch import nn

import plait


@dataclass
class Config(plait.DeltaConfig):
    pass


@plait.register("hashes_its_name", Config, paper="none")
class HashesItsName(plait.LowRankDelta):
    """Its start is not saved and comes from hash(), which differs between processes."""

    def __init__(self, base, config, gen):
        super().__init__(base, config, gen)
        gen.manual_seed(hash(base.name) % 2**32)
        self.A = nn.Buffer(torch.randn(config.r, base.in_features, generator=gen), persistent=False)
        self.B = nn.Parameter(torch.zeros(base.out_features, config.r))

    def factors(self):
        return self.A, self.B
'''


def test_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a method that works in its own process only is found out."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    path = tmp_path / "forgetful.py"
    path.write_text(FORGETFUL, encoding="utf-8")
    processes.load(path)
    broken = Case("hashes_its_name")
    checks.save_and_load(broken)  # in this process all is well
    problems = fresh_process([*CASES, broken], tmp_path)
    assert problems == {"hashes_its_name": "differs in a new process"}
