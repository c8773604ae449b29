"""Merging into an 8-bit and a 4-bit base, written with 16 bits or packed again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plait.run.prepare import load_run, load_trained
from plait.run.train import train
from plait.testing import tiny
from plait_cli import main
from tests.support.runs import character_tokenizer, copy_rows, run_config, save_model, write_rows

pytest.importorskip("bitsandbytes", reason="the extra plait[quant] is not installed")
CASES = [("cola", "4bit"), ("lora", "8bit")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Short runs on packed bases, of a method of plait's and of peft's LoRA."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(folder / "base")
    character_tokenizer().save_pretrained(folder / "base")
    rows = write_rows(folder / "rows.jsonl", copy_rows())
    runs = {}
    for method, bits in CASES:
        cfg = run_config(
            folder / "base", rows, folder / f"{method}-{bits}",
            method={"name": method, "r": 4}, model={"quantization": bits},
            evaluation={"generate": False},
        )  # fmt: skip
        runs[method, bits] = train(cfg).path
    return runs


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny.tokens().clamp(max=17)).logits.float()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_dequantised_layers_hold_the_weights_that_are_computed_with(
    runs: dict[tuple[str, str], Path], case: tuple[str, str]
) -> None:
    """The same logits at 4 bits; 8-bit layers round their inputs, too."""
    run = load_run(runs[case])
    packed = run.model
    plain: Any = load_trained(run.folder, run.cfg, run.tokenizer, run.facts, dequantised=True)
    assert not [m for m in plain.modules() if type(m).__name__.startswith(("Linear4", "Linear8"))]
    bound = 1e-4 if case[1] == "4bit" else 0.1
    assert float((logits(packed) - logits(plain)).abs().max()) < bound


@pytest.mark.parametrize(
    ("case", "requantise"), [(CASES[0], False), (CASES[0], True), (CASES[1], True)], ids=str
)
def test_merged_export(
    runs: dict[tuple[str, str], Path],
    case: tuple[str, str],
    requantise: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The errors of both forms are printed; the folder loads as plain transformers."""
    run, out = runs[case], tmp_path / "merged"
    flags = ["--requantise"] if requantise else []
    assert main(["export", str(run), "--to", "merged", "--out", str(out), "--lossy", *flags]) == 0
    printed = capsys.readouterr().out
    error = {}
    for form, what in (("bfloat16", "as a plain checkpoint"), (case[1], "packed again")):
        (said,) = re.findall(rf"{form} +{what}: logits off by up to (\S+)", printed)
        error[form] = float(said)
    shift = float(re.findall(r"moves logits by up to (\S+)", printed)[0])
    assert max(error.values()) < 0.5 * shift
    if case[1] == "4bit":  # coarser than 16 bits; 8 bits are about as fine
        assert error["bfloat16"] < 0.5 * error["4bit"]
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == requantise
    weights = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {"4bit": torch.uint8, "8bit": torch.int8}[case[1]]
    assert weights[name].dtype == (packed if requantise else torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(out)
    off = float((logits(model) - logits(load_run(run).model)).abs().max())
    assert off < 3 * error[case[1] if requantise else "bfloat16"]


def test_packing_again_is_for_packed_bases(
    runs: dict[tuple[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs["lora", "8bit"])
    assert main(["export", run, "--to", "lora", "--requantise"]) == 2
    assert "--requantise belongs to --to merged" in capsys.readouterr().err


def test_packing_again_needs_a_packed_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model("llama", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(20))
    cfg = run_config(base, rows, tmp_path / "run", training={"max_steps": 1})
    run = str(train(cfg).path)
    assert main(["export", run, "--to", "merged", "--requantise"]) == 2
    assert "the base of this run is not quantised" in capsys.readouterr().err
    assert not Path(run, "merged").exists()
