"""Dual-Module Collaborative LoRA: formula, start, penalty, importance, budget, screening."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import plait
from plait.gates.screening import Screening
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    batch,
    deltas,
    logits,
    one_delta,
    relative,
    steps,
    trained,
)
from plait.testing.helpers import wrap as wrap_case
from plait.upstream.export import to_lora

CASE = Case("dual_module", {"r": 8, "shared_r": 2, "target_r": 3, "tinit": 2, "tfinal": 3})


def wrap(**options: Any) -> Any:
    """The tiny Llama with the method."""
    return wrap_case(CASE, **options)


def layer(n_in: int = 9, n_out: int = 7, **options: Any) -> tuple[Any, Any]:
    """`one_delta` of CASE."""
    return one_delta(CASE, n_in, n_out, **options)


def three_terms(delta: Any, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """The update of x as the paper writes it; mask: of the expert's rank activations."""
    shared = x @ delta.A_s.T @ delta.B_s.T - x @ delta.A_s0.T @ delta.B_s0.T
    expert = (mask * (x @ delta.A_e.T) * delta.E * delta.keep) @ delta.B_e.T
    return delta.scaling * (shared + expert)


@settings(max_examples=20)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), r_s=st.integers(1, 3), r_e=st.integers(1, 3)
)
def test_stacked_forward_is_three_terms(n_in: int, n_out: int, r_s: int, r_e: int) -> None:
    model, delta = layer(n_in, n_out, r=r_s + r_e, shared_r=r_s, target_r=1)
    with torch.no_grad():
        for buffer in (delta.A_s0, delta.B_s0):
            buffer.copy_(tiny.numbers(*buffer.shape))
        delta.keep[0] = 0
    x = tiny.numbers(5, n_in)
    base = model.base_model.model.linear.base_layer(x)
    assert relative(model(x) - base, three_terms(delta, x)) < 1e-12
    params = list(delta.parameters())
    dy = tiny.numbers(5, n_out, key=1)
    found = torch.autograd.grad(model(x), params, dy)
    for p, ours, wanted in zip(
        params, found, torch.autograd.grad(three_terms(delta, x), params, dy), strict=True
    ):
        assert relative(ours, wanted) < 1e-12, p.shape


def test_expert_dropout_acts_on_rank_activations() -> None:
    model, delta = layer(lora_dropout=0.5)
    x = tiny.numbers(50, 9)
    with tiny.seed(1):
        found = model(x) - model.base_model.model.linear.base_layer(x)
    with tiny.seed(1):
        mask = nn.functional.dropout(torch.ones(50, 6, dtype=torch.float64), 0.5)
    assert 0 < (mask == 0).double().mean() < 1
    assert relative(found, three_terms(delta, x, mask)) < 1e-12


def test_scale_is_of_the_total_rank() -> None:
    assert plait.DualModuleLoraConfig(r=8).lora_alpha == 8
    _, delta = layer(lora_alpha=24)
    assert delta.scaling == 3
    shapes = {n: tuple(p.shape) for n, p in delta.named_parameters()}
    assert shapes == {"A_s": (2, 9), "B_s": (7, 2), "A_e": (6, 9), "B_e": (7, 6), "E": (6,)}


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_start_takes_the_principal_part(svd: str) -> None:
    net = tiny.OneLinear(30, 20)
    W = net.linear.weight.detach().clone()
    options = {"target_modules": ["linear"], "task_type": None, "svd": svd}
    model = get_peft_model(net, CASE.config(**options))  # type: ignore[arg-type]
    delta = deltas(model)[0]
    S = torch.linalg.svdvals(W)
    rest = torch.linalg.matrix_norm(W - delta.scaling * delta.B_s0 @ delta.A_s0, 2)
    assert float(rest) == pytest.approx(float(S[2]), rel=1e-6 if svd == "exact" else 0.02)
    assert torch.equal(delta.A_s, delta.A_s0)
    assert torch.equal(delta.B_s, delta.B_s0)
    balance = delta.A_s0 @ delta.A_s0.T - delta.B_s0.T @ delta.B_s0  # the square root split
    assert float(balance.abs().max()) < 1e-6
    assert not delta.weight().any()


def test_expert_gate_learns_from_the_first_step() -> None:
    model = wrap()
    model(**batch(model)).loss.backward()
    for delta in deltas(model):
        assert not delta.E.any()
        assert delta.E.grad.any()
        assert not delta.A_e.grad.any()  # E = 0 hides the expert's factors in step 1


def test_a_dead_expert_is_refused_at_load(tmp_path: Path) -> None:
    wrap(init_weights=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = next(k for k in tensors if k.endswith(".E"))[:-2]
    for names in (["E"], ["B_e"], ["E", "B_e"]):
        zeros = {f"{prefix}.{n}": torch.zeros_like(tensors[f"{prefix}.{n}"]) for n in names}
        save_file({**tensors, **zeros}, path, metadata={"format": "pt"})
        if len(names) < 2:
            PeftModel.from_pretrained(tiny.llama(), tmp_path)
            continue
        with pytest.raises(ValueError, match=r"dual_module: E and B_e of .* no gradient can ever"):
            PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_closed_expert_leaves_the_shared_part() -> None:
    model, delta = layer()
    x = tiny.numbers(5, 9)
    with torch.no_grad():
        delta.E.zero_()
    shared = delta.scaling * x @ (delta.B_s @ delta.A_s - delta.B_s0 @ delta.A_s0).T
    assert relative(model(x) - model.base_model.model.linear.base_layer(x), shared) < 1e-12


# The penalty -----------------------------------------------------------------------------------


def test_penalty_is_zero_on_orthonormal_experts() -> None:
    _, delta = layer(9, 8, orth_reg_weight=0.1)
    with torch.no_grad():
        delta.A_e.copy_(torch.linalg.qr(tiny.numbers(9, 6)).Q.T)
        delta.B_e.copy_(torch.linalg.qr(tiny.numbers(8, 6)).Q)
    assert float(delta.penalty().detach()) < 1e-15
    with torch.no_grad():
        delta.A_e.copy_(torch.eye(6, 9))  # exactly: norm has gradient 0 at 0, not NaN
        delta.B_e.copy_(torch.eye(8, 6))
    delta.penalty().backward()
    assert not delta.A_e.grad.any()


@pytest.mark.parametrize("orth", ["expert", "cross"])
def test_penalty_formula(orth: str) -> None:
    _, delta = layer(orth=orth, orth_reg_weight=0.3)
    A, B, eye = delta.A_e, delta.B_e, torch.eye(6, dtype=torch.float64)
    gaps = (A @ A.T - eye, B.T @ B - eye)
    if orth == "cross":
        gaps = (delta.A_s @ A.T, delta.B_s.T @ B)
    wanted = 0.3 / 2 * torch.stack([gap.square().sum().sqrt() for gap in gaps]).sum()
    assert float(delta.penalty().detach()) == pytest.approx(float(wanted.detach()))
    params = [delta.A_e, delta.B_e]
    for found, expected in zip(
        torch.autograd.grad(delta.penalty(), params),
        torch.autograd.grad(wanted, params),
        strict=True,
    ):
        assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("parts", [1, 4])
def test_penalty_enters_once_per_step(task_type: str | None, parts: int) -> None:
    """The gradient of lambda times the mean over the 2 L matrices, whatever the accumulation."""
    grads = []
    for weight in (0.0, 0.1):
        model = wrap(task_type=task_type, orth_reg_weight=weight, init_weights=False).train()
        inputs = batch(model, rows=8)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
        for i in range(parts):
            rows = slice(i * 8 // parts, (i + 1) * 8 // parts)
            loss = model(**{n: v[rows] for n, v in inputs.items()}).loss
            (loss / parts).backward()
        optimizer.step()
        grads.append([d.A_e.grad for d in deltas(model)] + [d.B_e.grad for d in deltas(model)])
    model.zero_grad()
    eye = torch.eye(6)
    norms = [torch.linalg.norm(d.A_e @ d.A_e.T - eye) for d in deltas(model)]
    norms += [torch.linalg.norm(d.B_e.T @ d.B_e - eye) for d in deltas(model)]
    (0.1 * torch.stack(norms).mean()).backward()
    wanted = [d.A_e.grad for d in deltas(model)] + [d.B_e.grad for d in deltas(model)]
    for without, with_it, expected in zip(*grads, wanted, strict=True):
        assert relative(with_it - without, expected) < 1e-4
    assert float(plait.penalty(model)) == pytest.approx(float(0.1 * torch.stack(norms).mean()))  # type: ignore[arg-type]


# Importance and budget -------------------------------------------------------------------------


def test_masked_ranks_can_be_removed(tmp_path: Path) -> None:
    """weight() and the export hold 2 r_s + kept ranks; stock peft gives the same logits."""
    model = wrap(total_steps=12, tinit=2, tfinal=4, deltaT=2)
    steps(model, adamw(model, 1e-2), 12, key=None)
    for delta in deltas(model):
        A, B = delta.folded()
        kept = int(delta.keep.sum())
        assert A.shape[0] == B.shape[1] == 2 * 2 + kept
        full = three_terms(delta, torch.eye(A.shape[1])).T
        assert relative(delta.weight(), full) < 1e-5
    export = to_lora(model)
    assert [layer.rank for layer in export.layers] == [4 + int(d.keep.sum()) for d in deltas(model)]
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        found = stock(input_ids=tiny.tokens()).logits
    assert float((found - logits(model)).abs().max()) < 1e-6


def test_saved_files(tmp_path: Path) -> None:
    """Averages are in the file while they are needed, and not afterwards."""
    model = wrap()
    optimizer = adamw(model, 1e-2)
    steps(model, optimizer, 4)
    for count, there in ((0, True), (6, False)):
        steps(model, optimizer, count)
        model.save_pretrained(tmp_path)
        names = {k.rpartition(".")[2] for k in load_file(tmp_path / "adapter_model.safetensors")}
        always = {"A_s", "B_s", "A_e", "B_e", "E", "keep", "A_s0", "B_s0", "t"}
        averages = {f"{m}_{n}" for m in ("Ibar", "Ubar") for n in ("A_e", "B_e", "E")}
        assert names == (always | averages if there else always)
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
        assert torch.equal(logits(loaded), logits(model))


def test_unknown_length_raises_at_the_first_step() -> None:
    model = wrap(total_steps=None)
    model(**batch(model)).loss.backward()
    text = r"total_steps is not known.*total_steps=.*PlaitCallback.*plait train"
    with pytest.raises(ValueError, match=text):
        torch.optim.SGD(trained(model).values(), lr=0.0).step()


def test_defaults_and_refused_options() -> None:
    config = plait.DualModuleLoraConfig(r=128)
    assert config.ranks(128) == (32, 96)
    assert Screening.of(config).target(96) == 80
    assert (config.tinit, config.tfinal, config.deltaT) == (0.15, 0.5, 10)
    assert (config.beta1, config.beta2, config.orth_reg_weight) == (0.85, 0.85, 0.1)
    with pytest.raises(ValueError, match="r = 4, shared_r = 5"):
        plait.DualModuleLoraConfig(r=4, shared_r=5)
    with pytest.raises(ValueError, match=r"target_r = 4.* = 3"):
        plait.DualModuleLoraConfig(r=4, shared_r=1, target_r=4)
    with pytest.raises(ValueError, match="orth = 'both' is not known"):
        plait.DualModuleLoraConfig(orth="both")  # type: ignore[arg-type]


def test_a_layer_without_expert_trains() -> None:
    model = wrap(shared_r=8, target_r=None)
    losses = steps(model, adamw(model, 1e-2), 10)
    assert losses[-1] < losses[0]
