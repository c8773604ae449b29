"""plait.testing: what contract_test makes of a config class, and what it says of mistakes."""

import importlib
import sys
from typing import Any

import pytest
import torch

import plait
from plait.testing import CHECKS, contract_test


def parameters(test: Any) -> dict[str, Any]:
    """Id -> check of a parametrised test function."""
    (mark,) = test.pytestmark
    return {parameter.id: parameter.values[0] for parameter in mark.args[1]}


def test_every_check_runs_over_every_variant() -> None:
    test = contract_test(plait.ColaConfig, {"strategy": "full"}, {"strategy": "random"}, lr=0.1)
    checks = parameters(test)
    expected = {f"{check.__name__}-cola-{s}" for check in CHECKS for s in ("full", "random")}
    assert set(checks) == {*expected, "works_in_a_new_process"}
    (case,) = checks["loss_falls-cola-random"].args
    assert (case.key, case.options, case.lr) == ("cola", {"strategy": "random"}, 0.1)


def test_without_variants_the_defaults_are_tested() -> None:
    checks = parameters(contract_test(plait.NolaConfig))
    assert set(checks) == {*(f"{c.__name__}-nola" for c in CHECKS), "works_in_a_new_process"}


def test_a_check_runs_on_one_thread_and_the_settings_are_restored() -> None:
    test = contract_test(plait.NolaConfig)
    before = torch.get_num_threads(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    seen = []
    try:
        test(
            lambda: seen.append(
                (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
            )
        )
        after = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(True, warn_only=before[1])
    assert seen == [(1, True)]
    assert after == (2, False)


def test_a_config_without_a_method_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"DeltaConfig belongs to no method\. Register"):
        contract_test(plait.DeltaConfig)


def test_an_unknown_fact_is_an_error() -> None:
    with pytest.raises(TypeError, match="rate"):
        contract_test(plait.NolaConfig, rate=1e-2)


def test_a_missing_pytest_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "plait.testing")
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match=r'needs pytest. Run: pip install "plait\[testing\]"'):
        importlib.import_module("plait.testing")
