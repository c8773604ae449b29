"""Dual LoRA: the formula, its gradients, the gate, and what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import plait
from plait.methods.dual_lora import DualLora
from plait.testing import case, helpers, tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    deltas,
    layers,
    logits,
    one_delta,
    one_layer,
    relative,
    steps,
    wrap,
)

CASE = Case("dual_lora")


layer = partial(one_delta, CASE)  # of one fp64 layer, in training


def fill(delta: DualLora, **factors: list[list[float]]) -> None:
    """Set factors to given numbers."""
    with torch.no_grad():
        for name, value in factors.items():
            delta.get_parameter(name).copy_(torch.tensor(value))


def closed_form(delta: Any, G: Tensor, gate: float = 1.0) -> dict[str, Tensor]:
    """Gradients of the four factors from G = dL/d(dW), as the method defines them."""
    A, B, C, D = (getattr(delta, n).detach() for n in "ABCD")
    P, Z, gs = B @ A, D @ C, gate * delta.scaling
    GP = gs * G * torch.where(Z > 0, 1.0, -1.0) * (P > 0)
    GZ = gs * G * P.relu()
    if delta.config.ste == "clip":
        GZ = GZ.clamp(-1, 1)
    return {"A": B.T @ GP, "B": GP @ A.T, "C": D.T @ GZ, "D": GZ @ C.T}


@pytest.mark.parametrize("ste", ["clip", "identity"])
def test_worked_example(ste: str) -> None:
    # By hand: P = [[2,-4,1],[-1,2,-.5]], Z = [[1,1,0],[-3,-3,0]] with two exact zeros.
    model, delta = layer(3, 2, r=2, lora_alpha=4, ste=ste)
    fill(delta, A=[[1, -2, 0.5]], B=[[2], [-1]], C=[[1, 1, 0]], D=[[1], [-3]])
    assert delta.scaling == 4
    assert delta.weight().tolist() == [[8, 0, -4], [0, -8, 0]]
    x = torch.tensor([[1.0, 0, 1], [0, 1, 2]], dtype=torch.float64)
    model(x).backward(torch.tensor([[1.0, 2], [0, -1]], dtype=torch.float64))
    found = {n: p.grad.tolist() for n, p in delta.named_parameters() if p.grad is not None}
    assert found["A"] == [[8, -4, -8]]
    assert found["B"] == [[2], [-8]]
    assert found["C"] == ([[1, 3, 1]] if ste == "clip" else [[8, 24, 4]])
    assert found["D"] == ([[1], [-1]] if ste == "clip" else [[8], [-8]])


@settings(max_examples=25)
@given(
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    r1=st.integers(1, 3),
    r2=st.integers(1, 3),
    tile=st.sampled_from([1, 2, 7, None]),
    ste=st.sampled_from(["clip", "identity"]),
)
def test_gradients_are_the_closed_form(
    n_in: int, n_out: int, r1: int, r2: int, tile: int | None, ste: str
) -> None:
    model, delta = layer(n_in, n_out, r=r1 + r2, r1=r1, r2=r2, ste=ste)
    delta.tile = tile
    x, dy = tiny.numbers(6, n_in), 40 * tiny.numbers(6, n_out, key=1)
    model(x).backward(dy)
    for name, wanted in closed_form(delta, dy.T @ x).items():
        assert relative(getattr(delta, name).grad, wanted) < 1e-10, name


def test_clip_acts_on_the_incoming_gradient() -> None:
    """Not on |z|; here about half of the living entries are clipped."""
    model, delta = layer(40, 30, r=8)
    x, dy = tiny.numbers(6, 40), 20 * tiny.numbers(6, 30, key=1)
    G = dy.T @ x
    with torch.no_grad():
        GZ = delta.scaling * G * (delta.B @ delta.A).relu()
    clipped = (GZ.abs() > 1)[GZ != 0].double().mean()
    assert 0.25 < clipped < 0.75
    model(x).backward(dy)
    for name, wanted in closed_form(delta, G).items():
        assert relative(getattr(delta, name).grad, wanted) < 1e-10, name


def test_naive_autograd_agrees() -> None:
    """A second definition: autograd through relu and a straight-through sign."""
    model, delta = layer(ste="identity")
    A, B, C, D = (p.detach().clone().requires_grad_() for p in delta.parameters())
    Z = D @ C
    sign = torch.where(Z > 0, 1.0, -1.0).to(Z) + Z - Z.detach()
    dW = delta.scaling * torch.relu(B @ A) * sign
    assert relative(delta.weight(), dW) < 1e-15
    x = tiny.numbers(4, 7)
    (x @ dW.T).square().sum().backward()
    y = model(x) - layers(model)[0].base_layer(x)
    y.square().sum().backward()
    for name, p in zip("ABCD", (A, B, C, D), strict=True):
        assert relative(getattr(delta, name).grad, p.grad) < 1e-12, name  # type: ignore[arg-type]


def test_gate_by_step() -> None:
    model, delta = layer(init_weights=True, gate_steps=100, ste="identity")
    delta.to(torch.float64)
    x, dy = tiny.numbers(6, 7), tiny.numbers(6, 5, key=1)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.0)
    for step in range(1, 103):
        gate = min(1.0, step / 100)
        model(x).backward(dy)
        if step in (1, 2, 50, 100, 102):
            for name, wanted in closed_form(delta, dy.T @ x, gate).items():
                assert relative(getattr(delta, name).grad, wanted) < 1e-6, (step, name)
        optimizer.step()
        optimizer.zero_grad()
        now = delta.weight() / (delta.scaling * (delta.B @ delta.A).relu()).clamp_min(1e-30)
        assert float(now.detach().abs().max()) == pytest.approx(gate, rel=1e-6), (
            step
        )  # evaluation: t / 100
    assert delta.steps == 102


def test_a_closed_gate_gives_exactly_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, delta = layer()
    monkeypatch.setattr(DualLora, "gate", lambda self: 0.0)
    model(tiny.numbers(6, 7)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in delta.parameters())


def test_gate_is_that_of_the_forward() -> None:
    """eval() between forward and backward changes nothing."""
    grads = []
    for switch in (False, True):
        model, delta = layer(init_weights=True)
        y = model(tiny.numbers(6, 7))
        if switch:
            model.eval()
        y.sum().backward()
        grads.append(delta.A.grad)
    assert torch.equal(grads[0], grads[1])
    assert grads[0].any()


@pytest.mark.parametrize("n_out", [20, 4100])
def test_fresh_adapter_has_the_bits_of_the_base(n_out: int) -> None:
    """With a bias and with many tiles, where W + 0 by tiles is rounded in another way."""
    net = tiny.OneLinear(300, n_out, torch.float32)
    x = tiny.numbers(5, 300, dtype=torch.float32)
    expected = net(x)
    model = get_peft_model(net, plait.DualLoraConfig(r=4, target_modules=["linear"])).eval()  # type: ignore[arg-type]
    assert torch.equal(model(x), expected)
    model.train()
    assert not torch.equal(model(x), expected)


def test_parameters_equal_those_of_lora(llama: Any) -> None:
    ours = sum(p.numel() for p in helpers.trained(wrap(CASE, r=6)).values())
    lora = get_peft_model(llama, LoraConfig(r=6, target_modules=case.TARGETS))
    assert ours == sum(p.numel() for p in helpers.trained(lora).values())


def test_magnitude_and_sign() -> None:
    _, delta = layer(9, 8)
    with torch.no_grad():
        delta.D[0] = 0  # a row of exact zeros in D C
    P, Z = (delta.B @ delta.A).detach(), (delta.D @ delta.C).detach()
    dW = delta.weight()
    assert torch.equal(dW.abs(), delta.scaling * P.relu())
    alive = P > 0
    assert torch.equal(dW.sign()[alive], torch.where(Z > 0, 1.0, -1.0).to(dW)[alive])
    assert (dW[0][P[0] > 0] < 0).all()  # sgn(0) = -1
    assert alive[0].any()


def test_linear_in_alpha_and_blind_to_the_size_of_the_direction() -> None:
    _, one = layer(lora_alpha=8)
    _, two = layer(lora_alpha=24)
    assert relative(two.weight(), 3 * one.weight()) < 1e-15
    before = one.weight()
    with torch.no_grad():
        one.D.mul_(7)
    assert torch.equal(one.weight(), before)


def test_scale() -> None:
    _, delta = layer(r=6, r1=2, r2=4, lora_alpha=8)
    assert delta.scaling == pytest.approx(8 / 8**0.5)
    assert [tuple(p.shape) for p in delta.parameters()] == [(2, 7), (5, 2), (4, 7), (5, 4)]


def test_rank_is_not_that_of_the_factors() -> None:
    _, delta = layer(256, 256, r=8)
    assert int(torch.linalg.matrix_rank(delta.weight())) > 16
    assert delta.rank() == 256


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r": 7}, "r = 7 cannot be split into two equal ranks. Give an even r, or r1 and r2"),
        ({"r": 8, "r1": 3, "r2": 4}, "r1 = 3, r2 = 4: .* sum to r = 8"),
        ({"r": 8, "r1": 8}, "r1 = 8, r2 = 0"),
        ({"ste": "soft"}, "ste = 'soft' is not known. Use one of 'clip', 'identity'"),
        ({"gate_steps": -1}, "gate_steps = -1 is out of range"),
        ({"init_std": 0.0}, "init_std = 0.0 is out of range"),
        ({"rank_pattern": {"q_proj": 3}}, "r = 3 cannot be split"),
    ],
)
def test_refused_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.DualLoraConfig(**options)


def test_one_rank_gives_the_other() -> None:
    assert plait.DualLoraConfig(r=8, r1=3).split(8) == (3, 5)
    assert plait.DualLoraConfig(r=8, r2=3).split(8) == (5, 3)


def test_no_gate_is_warned() -> None:
    with pytest.warns(plait.PlaitWarning, match="gate_steps = 0, so the start is not the base"):
        config = plait.DualLoraConfig(gate_steps=0, target_modules=["linear"])
    model = get_peft_model(tiny.OneLinear(7, 5, torch.float32), config)  # type: ignore[arg-type]
    assert helpers.deltas(model)[0].weight().any()


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_zero_magnitude_is_refused_at_load(name: str, tmp_path: Any) -> None:
    wrap(CASE, init_weights=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith(f".{name}"))
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"dual_lora: {name} of .* zero, so no gradient can ever"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_merge_inside_the_warm_up_uses_the_gate() -> None:
    model = wrap(CASE, gate_steps=8)
    steps(model, adamw(model, 1e-2), 3)
    expected = logits(model)
    assert deltas(model)[0].gate() == pytest.approx(3 / 8)
    model.merge_adapter()
    assert relative(logits(model), expected) < 1e-5


def test_active_clip_does_not_accumulate() -> None:
    """The documented difference: clips of micro-batches do not add up to the clip of their sum."""

    def grads(ste: str, parts: int) -> Tensor:
        model, delta = layer(ste=ste)
        x, dy = tiny.numbers(8, 7), 40 * tiny.numbers(8, 5, key=1)
        for i in range(parts):
            rows = slice(i * 8 // parts, (i + 1) * 8 // parts)
            model(x[rows]).backward(dy[rows])
        assert delta.C.grad is not None
        return delta.C.grad

    assert relative(grads("identity", 4), grads("identity", 1)) < 1e-12
    assert relative(grads("clip", 4), grads("clip", 1)) > 0.01


def test_fp16_autocast_and_clip() -> None:
    model = wrap(CASE).train()
    inputs = helpers.batch(model)
    text = 'ste="clip" depends on the loss scale of fp16. Use bf16, or ste="identity"'
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=text):
        model(**inputs)
    other = wrap(CASE, ste="identity").train()
    with torch.autocast("cpu", torch.float16):
        assert other(**inputs).loss.isfinite()


def test_forward_and_merge_use_the_same_signs() -> None:
    """On a bf16 base too: no entry flips between the forward's dW and the merged one."""
    _, host = one_layer(CASE, 40, 30, torch.bfloat16)
    delta: Any = host.plait_delta["default"]
    eye = torch.eye(40)
    with torch.no_grad():
        forward = delta(eye).T
    assert torch.equal(forward.sign(), delta.weight().sign())
    assert relative(forward, delta.weight()) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_input_dropout_leaves_the_base_alone(dropout: float) -> None:
    """y = W x + dW drop(x)."""
    model, delta = layer(lora_dropout=dropout)
    x = tiny.numbers(6, 7)
    with tiny.seed(3):
        found = model(x)
    with tiny.seed(3):
        dropped = torch.nn.functional.dropout(x, dropout)
    expected = layers(model)[0].base_layer(x) + dropped @ delta.weight().T
    assert relative(found, expected) < 1e-12
