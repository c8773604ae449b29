"""Checks on bf16 and quantised bases and under gradient checkpointing."""

import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from plait import LowRankDelta, NotMergeable
from plait.core.bridge import PlaitLayer, keep_trainable_on_cpu
from plait.core.mix import TokenRouter
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    choices,
    deltas,
    layers,
    logits,
    naive,
    one_layer,
    relative,
    steps,
    task_ids,
    trained,
    wrap,
)


def half_precision_is_bounded(case: Case) -> None:
    """On a bf16 base the error is at most 1.5 times that of plain bf16, plus 1e-3."""
    _, exact = one_layer(case, 40, 56)
    model, half = one_layer(case, 40, 56, torch.bfloat16)
    exact.base_layer.load_state_dict(half.base_layer.state_dict())
    delta: Any = half.plait_delta["default"]
    assert {p.dtype for p in delta.parameters()} == {torch.float32}, "factors are not fp32"
    exact.plait_delta.load_state_dict(half.plait_delta.state_dict())
    x0, dy = tiny.numbers(16, 40).bfloat16(), tiny.numbers(16, 56, key=1).bfloat16()
    ids = task_ids(model, 16)
    if ids:
        ids = {"task_ids": torch.zeros(16, dtype=torch.long)}

    def run(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = x0.to(dtype).requires_grad_()
        y = forward(x)
        return y, torch.autograd.grad(y, x, dy.to(dtype))[0]

    def through(layer: PlaitLayer) -> Callable[[Tensor], Tensor]:
        deltas = layer.plait_delta["default"]
        return lambda x: layer.base_layer(x) + naive(deltas, x, ids.get("task_ids"))

    truth = run(through(exact), torch.float64)
    plain = run(through(half), torch.bfloat16)
    ours = run(lambda x: model(x, **ids), torch.bfloat16)
    for name, y, actual, reference in zip(("output", "dx"), truth, ours, plain, strict=True):
        assert actual.dtype == torch.bfloat16, f"{name} is {actual.dtype}"
        bound = 1.5 * float((reference.double() - y).detach().norm() / y.detach().norm()) + 1e-3
        error = float((actual.double() - y).detach().norm() / y.detach().norm())
        assert error <= bound, f"{name}: relative error {error:.4f} in bf16, bound {bound:.4f}"


def half_precision_trains(case: Case) -> None:
    """On a bf16 base and under autocast factors stay fp32 and losses are close to those of fp32."""
    model = wrap(case)
    expected = steps(model, adamw(model, 1e-3), 3)
    half = wrap(case, tiny.llama().bfloat16())
    losses = steps(half, adamw(half, 1e-3), 3)
    assert logits(half).dtype == torch.bfloat16
    cast = wrap(case)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = steps(cast, adamw(cast, 1e-3), 3)
    for p in (*trained(half).values(), *trained(cast).values()):
        assert p.dtype == torch.float32, f"a factor became {p.dtype}"
        assert p.isfinite().all(), "training in bf16 gave numbers that are not finite"
    for half_losses in (losses, autocast):
        near = pytest.approx(expected, rel=2e-2)
        assert half_losses == near, "bf16 losses are far from those of fp32"


def checkpointing_changes_nothing(case: Case) -> None:
    """Gradient checkpointing changes no bit of the gradients, with dropout either."""
    grads = []
    for checkpointing in (False, True):
        model = wrap(case, init_weights=False, lora_dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model.train()
        with tiny.seed(5):
            model(**batch(model)).loss.backward()
        grads.append({n: p.grad for n, p in trained(model).items()})
    for name, grad in grads[0].items():
        same = grad is grads[1][name] is None or torch.equal(grad, grads[1][name])
        assert same, f"{name}: another gradient under gradient checkpointing"


def quantised_bases_work(case: Case) -> None:
    """On 8-bit and 4-bit bases the start is exact, training works, merging names the remedy."""
    pytest.importorskip("bitsandbytes", reason='needs pip install "plait[quant]"')
    for bits in (8, 4):
        base = quantised(bits)
        expected = base_logits(base)
        model = wrap(case, base)
        assert all(layer.quantization_backend is not None for layer in layers(model))
        error = relative(logits(model), expected)
        assert error <= case.start_error, f"{bits} bit: a fresh adapter changes it by {error}"
        before = [p.detach().clone() for p in trained(model).values()]
        steps(model, adamw(model, case.lr), 3)
        for p in trained(model).values():
            assert p.dtype == torch.float32
            assert p.isfinite().all(), f"{bits} bit: not finite"
        assert any(
            not torch.equal(o, p) for o, p in zip(before, trained(model).values(), strict=True)
        )
        assert not torch.equal(logits(model), expected), f"{bits} bit: training changes nothing"
        with model.disable_adapter():
            assert torch.equal(logits(model), expected), f"{bits} bit: the base changed"
        layer = layers(model)[0]
        for choice in choices(model):
            if not isinstance(deltas(model)[0], LowRankDelta) or not isinstance(
                deltas(model)[0].mix(), TokenRouter
            ):
                dW = layer.get_delta_weight("default", **choice)
                assert dW.shape == (layer.out_features, layer.in_features)
                with pytest.raises(NotMergeable, match="merging needs a dequantised base"):
                    model.merge_adapter(**choice)


@tiny.built_once
def quantised(bits: int) -> LlamaForCausalLM:
    """The tiny Llama quantised by bitsandbytes to 8 or 4 bits."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(
                load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
            ),
        )
    keep_trainable_on_cpu(model)  # otherwise its first evaluation uses other kernels
    return model
