"""The wheel in a fresh environment: the demo runs from outside the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_demo_runs_from_the_installed_wheel(tmp_path: Path) -> None:
    """Built, installed beside nothing of the checkout, and run: runs, pictures, a model card.

    The dependencies come from this environment by a .pth line, which does not carry an editable
    install along: plait can only come from the wheel.
    """
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

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [fresh / "bin/plait", "demo", "out", "--steps", "3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where = "import plait; print(plait.__file__)"
    found = subprocess.run(
        [fresh / "bin/python", "-c", where], cwd=tmp_path, env=environment, capture_output=True
    )
    assert str(fresh) in found.stdout.decode()
    assert (tmp_path / "out/exact_match.png").read_bytes().startswith(b"\x89PNG")
    for method in ("lora", "dual_lora"):
        run = tmp_path / "out" / method
        assert (run / "adapter/adapter_model.safetensors").is_file()
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((run / "eval.json").read_text())["before"]["exact_match"] < 0.05
    assert "import plait" in (tmp_path / "out/dual_lora/README.md").read_text()
