"""The contract over every registered method."""

from pathlib import Path
from typing import Any

import pytest
from tests import contract
from tests.contract import CHECKS, Case

import plait

# B0 / 3 three times is not B0 to the last bit.
ROUNDED = {"start_error": 1e-6}
# A method that is not named here runs with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dual_lora": [{"options": {"gate_steps": 8}, "additive": {"ste": "identity"}}],
    "dual_module": [{"options": {"tinit": 2, "tfinal": 2, "deltaT": 1}}],
    "shared_b": [
        {"options": {"r": 2, "num_A": 3}, "experts": ("A", "G")},
        {"options": {"r": 2, "routing": "task", "tasks": ["law", "care"]}, "experts": ("A",)},
        {"options": {"r": 2, "num_A": 2, "independent_dropout": True}, "experts": ("A", "G")},
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
    for method in plait.methods()
    for variant in VARIANTS.get(method.key, [{}])
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Any, case: Case) -> None:
    check(case)


def test_fresh_process(tmp_path: Path) -> None:
    contract.fresh_process(CASES, tmp_path)
