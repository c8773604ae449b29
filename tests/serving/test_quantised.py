"""Merging into an 8-bit and a 4-bit base: 16 bits are close to the run, packing again costs more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plait.run.export import export_run
from plait.run.prepare import load_run
from plait.run.train import train
from plait.testing import tiny
from plait_cli import main
from tests.support.runs import character_tokenizer, copy_rows, run_config, write_rows

pytest.importorskip("bitsandbytes", reason="the extra plait[quant] is not installed")
CASES = [("cola", "4bit"), ("cola", "8bit"), ("lora", "4bit"), ("lora", "8bit")]


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
    packed, plain = (load_run(runs[case], dequantised=d).model for d in (False, True))
    assert not [m for m in plain.modules() if type(m).__name__.startswith(("Linear4", "Linear8"))]
    bound = 1e-4 if case[1] == "4bit" else 0.1
    assert float((logits(packed) - logits(plain)).abs().max()) < bound


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_merged_export(
    runs: dict[tuple[str, str], Path],
    case: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both errors are printed; 16 bits are closer; each folder loads as plain transformers."""
    run, out = runs[case], tmp_path / "merged"
    assert main(["export", str(run), "--to", "merged", "--out", str(out), "--lossy"]) == 0
    printed = capsys.readouterr().out
    assert "merged, bfloat16" in printed
    assert f"packed again to {case[1]}" in printed
    _, report = export_run(run, "merged", tmp_path / "again", requantise=True, lossy=True)
    narrow, packed = report.logit_errors["bfloat16"], report.logit_errors[case[1]]
    assert narrow < packed
    assert narrow < 0.1 * report.logit_shift
    live = logits(load_run(run).model)
    for folder, error in ((out, narrow), (tmp_path / "again", packed)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert not isinstance(model, PeftModel)
        assert float((logits(model) - live).abs().max()) < 3 * error
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "quantization_config" in json.loads((tmp_path / "again/config.json").read_text())


def test_packing_again_is_for_packed_bases(
    runs: dict[tuple[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs["lora", "4bit"])
    assert main(["export", run, "--to", "lora", "--requantise"]) == 2
    assert "--requantise belongs to --to merged" in capsys.readouterr().err
