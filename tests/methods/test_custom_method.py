"""The worked example: a method outside the package, through the whole contract."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.core import registry
from plait.testing import CHECKS, Case, fresh_process, processes
from tests.support import ROOT, warm

FILE = ROOT / "examples" / "custom_method.py"
CASE = Case("gated")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[Any]:
    """The example's method, for this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_methods", dict(registry._methods))
        yield processes.load(FILE)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Any) -> None:
    check(CASE)


def test_fresh_process(tmp_path: Path) -> None:
    assert fresh_process([CASE], tmp_path) == {}


def test_is_listed() -> None:
    method = plait.find("gated")
    assert method in plait.list_methods()
    assert method.summary.startswith("Gated LoRA: ")
    assert (method.title, method.parameters) == ("Gated LoRA", "r (in + out + 1)")
    assert method.mergeable
    assert method.exact_export


def test_the_methods_are_a_package() -> None:
    code = "import plait; import plait.methods.cola; print(plait.methods.cola.ColaConfig.key)"
    done = warm.python(code=code)
    assert done.stdout.strip() == "cola"
    assert "cola" in [method.key for method in plait.list_methods()]


def test_length() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 60


def test_runs_as_a_script() -> None:
    done = warm.python(FILE, peft=True)
    assert done.returncode == 0, done.stderr
    assert "trainable params: 124" in done.stdout


def test_names_are_taken_once(registered: Any) -> None:
    with pytest.raises(ValueError, match="the key 'gated' is taken"):
        plait.register("gated", registered.GatedLoraConfig, paper="none")(registered.GatedLora)
    with pytest.raises(ValueError, match="GatedLoraConfig belongs to 'gated'"):
        plait.register("gated_too", registered.GatedLoraConfig, paper="none")(registered.GatedLora)
    with pytest.raises(ValueError, match="key 'Gated-LoRA' is not a lower-case identifier"):
        plait.register("Gated-LoRA", registered.GatedLoraConfig, paper="none")(registered.GatedLora)
    with pytest.raises(ValueError, match=r"Method 'gatd' is not known. Did you mean gated\?"):
        plait.find("gatd")
