"""The wheel in a fresh environment: the demo and the contract tests, outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel of this checkout.

    The dependencies come from this environment by a .pth line, which does not carry an editable
    install along: plait can only come from the wheel.
    """
    tmp_path = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("build", reason="the package `build` makes the wheel: install plait[test]")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("plait-*.whl")
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [fresh / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run(install, check=True, capture_output=True)
    where = "from importlib.util import find_spec; print(find_spec('plait').origin)"
    assert str(fresh) in run_in(tmp_path, fresh / "bin/python", "-c", where)
    return fresh


def run_in(folder: Path, *command: Any) -> str:
    """Standard output of a command that sees nothing of the checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_demo_runs_from_the_installed_wheel(fresh: Path, tmp_path: Path) -> None:
    """Runs, pictures, a model card."""
    run_in(tmp_path, fresh / "bin/plait", "demo", "out", "--steps", "3")
    assert (tmp_path / "out/exact_match.png").read_bytes().startswith(b"\x89PNG")
    for method in ("lora", "dual_lora"):
        run = tmp_path / "out" / method
        assert (run / "adapter/adapter_model.safetensors").is_file()
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((run / "eval.json").read_text())["before"]["exact_match"] < 0.05
    assert "import plait" in (tmp_path / "out/dual_lora/README.md").read_text()


@pytest.mark.slow
def test_contract_tests_run_from_the_installed_wheel(fresh: Path, tmp_path: Path) -> None:
    """A method and its tests in files of someone else's: the documented example."""
    for name in ("custom_method.py", "test_custom_method.py"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    shown = run_in(tmp_path, fresh / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "57 passed" in shown
