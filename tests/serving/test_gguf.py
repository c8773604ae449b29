"""The GGUF file of an adapter, without llama.cpp: it holds the update, or it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import plait
from plait.run.serving.gguf import FAMILIES, read_gguf, write_gguf
from plait.run.train import train
from plait.testing import tiny
from plait.upstream.export import LoraExport, to_lora
from plait_cli import main
from tests.support import ROOT
from tests.support.runs import copy_rows, run_config, save_model, write_rows

gguf = pytest.importorskip("gguf", reason="the extra plait[gguf] is not installed")


def lora(base: Any = None, **options: Any) -> tuple[LoraExport, Any]:
    """A random stock LoRA as it is exported, and its base."""
    base = tiny.llama() if base is None else base
    options = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    with tiny.seed():
        model: Any = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, **options))
    return to_lora(model), base


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    export, base = lora()
    write_gguf(export, base, tmp_path / "a.gguf")
    back = read_gguf(tmp_path / "a.gguf", base).tensors
    assert back.keys() == export.tensors.keys()
    assert all(torch.equal(back[name], export.tensors[name]) for name in back)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["adapter.lora.alpha"].contents() == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_as_such(tmp_path: Path, dtype: torch.dtype) -> None:
    export, base = lora()
    half = LoraExport(export.config, {n: t.to(dtype) for n, t in export.tensors.items()}, [])
    write_gguf(half, base, tmp_path / "a.gguf")
    back = read_gguf(tmp_path / "a.gguf", base).tensors
    assert all(torch.equal(back[name], half.tensors[name].float()) for name in back)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {"F16" if dtype == torch.float16 else "BF16"}


def test_rows_of_q_and_k_are_interleaved_and_others_not(tmp_path: Path) -> None:
    """Two heads of 12 rows: row 1 of the file is the first row of the second half."""
    export, base = lora()
    write_gguf(export, base, tmp_path / "a.gguf")
    stored = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    path = "base_model.model.model.layers.1.self_attn"
    B = export.tensors[f"{path}.q_proj.lora_B.weight"]
    q = stored["blk.1.attn_q.weight.lora_b"]
    assert torch.equal(q[:4], B[[0, 6, 1, 7]])
    assert torch.equal(q[12:16], B[[12, 18, 13, 19]])
    assert torch.equal(stored["blk.1.attn_v.weight.lora_b"],
                       export.tensors[f"{path}.v_proj.lora_B.weight"])  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["norm"]}, "reads no .*input_layernorm.weight and 4 more"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 1}}, "drops rank_pattern, so scales would be wrong"),
        ({"use_rslora": True}, "drops use_rslora, so scales"),
        ({"target_modules": ["lm_head"]}, "refuses lm_head where the base ties"),
        ({"target_modules": ["embed_tokens"]}, "reads no .*lora_embedding_A"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_llamacpp_cannot_read_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base = tiny.llama(tie_word_embeddings=True)
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, **options}
    with tiny.seed():
        model: Any = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, **options))
    tensors = plait_tensors(model)
    export = LoraExport(model.peft_config["default"], tensors, [])
    with pytest.raises(ValueError, match=message):
        write_gguf(export, base, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def plait_tensors(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    export, base = lora(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"and not of GPT2LMHeadModel\. Export with --to lora"):
        write_gguf(export, base, tmp_path / "a.gguf")
    assert "GPT2LMHeadModel" not in FAMILIES


def test_every_rank_of_a_sparse_method_is_written(tmp_path: Path) -> None:
    """Layers of unlike rank: one rank in the file, scale inside B."""
    config = plait.SoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model: Any = get_peft_model(tiny.llama(), config)
    for i, layer in enumerate(model.base_model.plait_layers()):
        delta = layer.plait_delta["default"]
        with torch.no_grad():
            delta.B.add_(tiny.numbers(*delta.B.shape).to(delta.B))
            delta.g[: i % 3] = 0
    export = to_lora(model)
    write_gguf(export, model.get_base_model(), tmp_path / "a.gguf")
    back = read_gguf(tmp_path / "a.gguf", tiny.llama()).tensors
    for layer in model.base_model.plait_layers():
        A, B = (back[f"base_model.model.{layer.name}.lora_{x}.weight"] for x in "AB")
        dW = export.config.lora_alpha / len(A) * B @ A
        torch.testing.assert_close(dW, layer.get_delta_weight("default"))


def test_cli_writes_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file, measured by what is read back from it; a run that llama.cpp cannot read is 2."""
    base, rows = save_model("llama", tmp_path / "base"), tmp_path / "rows.jsonl"
    method = {"name": "cola", "r": 2}
    cfg = run_config(base, write_rows(rows, copy_rows()), tmp_path / "run", method=method)
    folder = train(cfg).path
    assert main(["export", str(folder), "--to", "gguf"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("logit error") < printed.index("read back") < printed.index("written")
    assert (folder / "gguf/adapter.gguf").is_file()
    assert "llama-server" in (folder / "gguf/README.md").read_text()
    assert main(["export", str(folder), "--to", "gguf"]) == 2
    assert "Give --force" in capsys.readouterr().err


def test_the_page_names_every_architecture() -> None:
    page = (ROOT / "docs/serving.md").read_text("utf-8")
    assert not [name for name in FAMILIES if f"`{name}`" not in page]
