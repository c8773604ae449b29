"""`plait export`: exact where it says so, measured otherwise, read back by stock peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import plait
from plait.run.export import export_run
from plait.run.train import train
from plait.testing import tiny
from plait.upstream.export import plain_factors
from plait.upstream.moments import second_moments, square_root
from plait_cli import main
from tests.support.runs import copy_rows, run_config, save_model, write_rows


def trained(config: Any, steps: int = 12, **inputs: torch.Tensor) -> Any:
    """A tiny Llama with a shortly trained adapter, in evaluation mode."""
    config.target_modules = ["q_proj", "down_proj"]
    model: Any = get_peft_model(tiny.llama(), config)
    ids = torch.arange(48).view(4, 12) % tiny.VOCABULARY
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), ids


@pytest.mark.parametrize(
    "config",
    [
        plait.DualModuleLoraConfig(r=8, total_steps=12),
        plait.ColaConfig(r=4),
        plait.ColaConfig(r=4, strategy="heuristic"),
        plait.ColaConfig(r=4, rank_pattern={"q_proj": 2}),
    ],
    ids=lambda c: f"{c.key}-{getattr(c, 'strategy', '')}{c.rank_pattern or ''}",
)
def test_low_rank_export_is_exact_through_stock_peft(config: Any, tmp_path: Path) -> None:
    """Equal logits, ranks of their own and a scale that stays right."""
    model, ids = trained(config)
    export = plait.to_lora(model)
    export.write(tmp_path / "lora")
    stock = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "lora")).eval()
    assert export.error == 0
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ["dual_lora", "cola"])
def test_truncation_error_is_the_measured_one(key: str) -> None:
    """The reported error equals ||dW - s B A|| / ||dW||, falls with the rank, and meets energy."""
    config: Any = {
        "dual_lora": plait.DualLoraConfig(r=4, gate_steps=4),
        "cola": plait.ColaConfig(r=4),
    }[key]
    model, _ = trained(config)
    delta = next(model.base_model.plait_layers()).plait_delta["default"]
    full, errors = delta.weight(), []
    for rank in (1, 2, 4):
        A, B, scale, error = plain_factors(delta, rank, None)
        left = torch.linalg.norm(full - scale * B @ A) / torch.linalg.norm(full)
        assert error == pytest.approx(float(left), rel=1e-3)
        assert len(A) == rank
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    A, _, _, error = plain_factors(delta, None, 0.9)
    assert error**2 <= 0.1 + 1e-6
    assert plain_factors(delta, len(A) - 1, None)[3] ** 2 > 0.1


def test_export_of_a_task_is_the_plain_lora_of_that_task() -> None:
    """Task k exports (A_k, B); without a task it is refused with the names."""
    ids = torch.tensor([0, 1, 0, 1])
    model, _ = trained(
        plait.SharedBLoraConfig(r=4, routing="task", tasks=["law", "art"]), task_ids=ids
    )
    export = plait.to_lora(model, task="art")
    delta = next(model.base_model.plait_layers()).plait_delta["default"]
    name = next(n for n in export.tensors if "q_proj.lora_A" in n)
    assert torch.equal(export.tensors[name], delta.A[1])
    with pytest.raises(plait.NotMergeable, match=r"Name one of law, art: merge\(task=\.\.\.\)"):
        plait.to_lora(model)


def test_router_refuses_and_zero_update_refuses() -> None:
    """Both say what to do."""
    model, _ = trained(plait.SharedBLoraConfig(r=4))
    with pytest.raises(plait.NotMergeable, match='Use merge\\(approx="mean"\\) or keep'):
        plait.to_lora(model)
    empty = plait.ColaConfig(r=2, init="kaiming", target_modules=["q_proj"])
    fresh = get_peft_model(tiny.llama(), empty)
    with pytest.raises(ValueError, match="the update is zero in every layer"):
        plait.to_lora(fresh)


def test_weighted_sum_of_adapters_is_exact_and_exports(tmp_path: Path) -> None:
    """0.25 dW_a + 0.75 dW_b in the forward, in weight() and in a plain LoRA of stacked rank."""
    model, ids = trained(plait.ColaConfig(r=2))
    model.add_adapter("b", plait.ColaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.add_weighted_adapter(["default", "b"], [0.25, 0.75], "sum")
    layers = [x for x in model.base_model.plait_layers() if "b" in x.plait_delta]
    for layer in layers:
        parts = [layer.get_delta_weight(a) for a in ("default", "b")]
        torch.testing.assert_close(layer.get_delta_weight("sum"), 0.25 * parts[0] + 0.75 * parts[1])
    model.set_adapter("sum")
    export = plait.to_lora(model, "sum")
    stock: nn.Module = get_peft_model(tiny.llama(), export.config)
    set_peft_model_state_dict(stock, export.tensors)
    torch.testing.assert_close(stock.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is a weighted sum"):
        model.save_pretrained(str(tmp_path), selected_adapters=["sum"])


def test_cli_exports_a_run_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors are printed before writing; existing output needs --force; nothing is half-written."""
    base, rows = save_model("llama", tmp_path / "base"), tmp_path / "rows.jsonl"
    method = {"name": "cola", "r": 2}
    cfg = run_config(base, write_rows(rows, copy_rows()), tmp_path / "run", method=method)
    folder = train(cfg).path
    assert main(["export", str(folder), "--to", "lora"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("logit error") < printed.index("stock check") < printed.index("written")
    assert (folder / "lora/adapter_model.safetensors").is_file()
    assert main(["export", str(folder), "--to", "lora"]) == 2
    assert "Give --force to replace it, or another --out." in capsys.readouterr().err
    out, report = export_run(folder, "merged", tmp_path / "merged")
    assert report.exact
    assert report.stock_error is not None
    assert report.stock_error < 1e-4
    assert any("weight" in name for name in load_file(out / "model.safetensors"))
    assert main(["export", str(folder), "--to", "merged", "--rank", "3"]) == 2
    assert not (folder / "merged").exists()


def test_weighted_truncation_is_the_best_for_the_inputs() -> None:
    """E |(dW - B A) x|^2 is the tail of the weighted spectrum, below that of the plain SVD."""
    model, _ = trained(plait.DualLoraConfig(r=8, gate_steps=4))
    delta = next(model.base_model.plait_layers()).plait_delta["default"]
    dW = delta.weight().double()
    x = torch.randn(200, dW.shape[1], generator=torch.Generator().manual_seed(0)).double()
    x *= torch.logspace(0, -2, dW.shape[1])
    C = x.T @ x / len(x)

    def cost(A: torch.Tensor, B: torch.Tensor) -> float:
        return float((x @ (dW - (B @ A).double()).T).square().sum() / len(x))

    A, B, scale, error = plain_factors(delta, 3, None, None, C)
    assert scale == 1
    spectrum = torch.linalg.svdvals(dW @ square_root(C))
    assert cost(A, B) == pytest.approx(float(spectrum[3:].square().sum()), rel=1e-4)
    plain = plain_factors(delta, 3, None)
    assert cost(A, B) < 0.9 * cost(plain[0], plain[1])
    left = torch.linalg.norm(dW - (B @ A).double()) / torch.linalg.norm(dW)
    assert error == pytest.approx(float(left), rel=1e-4)
    assert error > plain[3]
    kept = plain_factors(delta, None, 0.99, None, C)
    assert cost(kept[0], kept[1]) <= 0.0101 * float(spectrum.square().sum())


def test_moments_are_those_of_attended_inputs() -> None:
    """The first layer sees the embeddings; padding does not count; nothing is left behind."""
    model, ids = trained(plait.ColaConfig(r=2))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    seen: list[torch.Tensor] = []
    layer = next(model.base_model.plait_layers())
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    moments = second_moments(model, [{"input_ids": ids, "attention_mask": mask}])
    handle.remove()
    rows = seen[0].detach()[mask.bool()].double()
    name = next(n for n, m in model.get_base_model().named_modules() if m is layer)
    torch.testing.assert_close(moments[name], rows.T @ rows / len(rows))
    assert not layer._forward_pre_hooks
    assert set(moments) == {x.name for x in plait.to_lora(model, rank=1, moments=moments).layers}
