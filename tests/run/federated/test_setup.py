"""A federated run is checked as a single one: the same refusals, before a folder exists."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from plait_cli import main
from tests.support.federated_runs import write

LORA = {"name": "lora", "r": 2, "target_modules": ["q_proj"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "long rows": (
        {"data": {"train": "LONG", "validation": None, "max_length": 4000}},
        "data: the longest row has",
    ),
    "8-bit": (
        {"method": LORA | {"name": "dora"}, "model": {"quantization": "8bit"}},
        "method.name: dora does not work on a 8bit base",
    ),
    "4-bit": (
        {"method": LORA | {"name": "pissa"}, "model": {"quantization": "4bit"}},
        "method.name: pissa does not work on a 4bit base",
    ),
    "no target": (
        {"method": LORA | {"target_modules": ["q_proj", "gate"]}},
        "method.target_modules: 'gate' matches no linear layer of this model.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_single_run_refuses_a_federated_one_refuses_with_the_same_text(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, text = REFUSED[case]
    rows = tmp_path / "long.jsonl"
    line = json.dumps({"prompt": "a" * 2000, "completion": "b"})
    rows.write_text("\n".join([line] * 12))
    changes = json.loads(json.dumps(changes).replace("LONG", str(rows)))
    federated = tmp_path / "federated"
    file = write(federated, federated={"method": "local"}, **changes)
    sections = yaml.safe_load(Path(file).read_text())
    single = {k: v for k, v in sections.items() if k in ("model", "method", "data")}
    single |= {"output": {"dir": str(tmp_path / "single")}, "training": {"max_steps": 1}}
    (tmp_path / "single.yaml").write_text(yaml.safe_dump(single))
    errors = []
    for words in (["federate", "simulate", file], ["train", str(tmp_path / "single.yaml")]):
        assert main(words) == 2
        errors.append(capsys.readouterr().err.splitlines()[-1].removeprefix(f"plait {words[0]}: "))
    assert errors[0] == errors[1]
    assert text in errors[0]
    assert not federated.exists()
    assert not (tmp_path / "single").exists()


def test_every_client_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks differ between clients; targets that match nothing are found with any of them."""
    method = LORA | {"target_modules": ["gate"]}
    ranks = {"method": "zeropad", "ranks": [1, 2, 4]}
    file = write(tmp_path / "run", method=method, federated=ranks)
    assert main(["federate", "simulate", file, "engine.workers=2"]) == 2
    assert "'gate' matches no linear layer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
