"""Upstream's methods through plait's door keep what the contract asks of plait's own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import plait
from plait.run.config import MethodConfig, peft_config
from plait.testing import tiny
from plait.testing.helpers import adamw, base_logits, relative, trained
from plait.upstream.export import to_lora
from plait.upstream.table import BASELINES


@dataclass(frozen=True)
class Baseline:
    """Options and learning rate for the tiny Llama, and what is documented of the method.

    start_error: of a fresh adapter's output, relative. count: trained numbers of a layer.
    """

    options: dict[str, Any] = field(default_factory=lambda: {"r": 4})
    lr: float = 1e-2
    start_error: float = 0.0
    count: Any = None


# A method that is not here is tried with the rank alone.
DOCUMENTED = {
    "lora": Baseline({"r": 4}, count=lambda i, o: 4 * (i + o)),
    "rslora": Baseline({"r": 4}, count=lambda i, o: 4 * (i + o)),
    # The base is edited in place, so the start is right to rounding.
    "pissa": Baseline({"r": 4}, start_error=1e-4, count=lambda i, o: 4 * (i + o)),
    "dora": Baseline({"r": 4}, start_error=1e-5, count=lambda i, o: 4 * (i + o) + o),
    "adalora": Baseline(
        {"target_r": 2, "init_r": 4, "total_step": 60, "tinit": 5, "tfinal": 20},
        lr=5e-2,
        count=lambda i, o: 4 * (i + o + 1),
    ),
    "vera": Baseline({"r": 16}, lr=1e-1, count=lambda i, o: 16 + o),
    # A bank of small random vectors: its start is near the base model, not at it.
    "vblora": Baseline(
        {"r": 4, "num_vectors": 16, "vector_length": 4, "topk": 2}, lr=5e-2, start_error=0.1
    ),
    "unilora": Baseline({"r": 4, "theta_d_length": 64}, lr=5e-2, start_error=0.1),
}
CASES = {name: DOCUMENTED.get(name, Baseline()) for name in BASELINES if name != "full"}


def wrapped(name: str) -> Any:
    """The tiny Llama with a baseline, made as `plait train` makes it."""
    case = CASES[name]
    targets = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
    method = MethodConfig(name=name, options={**case.options, **targets})
    with tiny.seed():
        config = peft_config(method, "causal_lm", total_steps=60)
        assert config is not None
        return get_peft_model(tiny.llama(), config).eval()


def steps(model: Any, lr: float, count: int) -> list[float]:
    """Train on one batch; returns the losses."""
    optimizer = adamw(model, lr)
    model.train()
    losses = []
    for _ in range(count):
        loss = model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def test_every_baseline_is_here() -> None:
    assert set(CASES) == set(BASELINES) - {"full"}
    assert set(DOCUMENTED) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_start(name: str) -> None:
    model = wrapped(name)
    error = relative(base_logits(model), base_logits(tiny.llama()))
    assert error <= CASES[name].start_error


@pytest.mark.parametrize("name", CASES)
def test_trains_the_adapter_alone(name: str) -> None:
    model = wrapped(name)
    ids = {id(p) for p in trained(model).values()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in ids}
    counted = CASES[name].count
    if counted is not None:
        shapes = [(24, 24), (24, 12), (24, 40)] * 2  # q, v, up of two blocks
        assert sum(p.numel() for p in trained(model).values()) == sum(counted(*s) for s in shapes)
    if name == "adalora":
        plait.drive_adalora(model)
    losses = steps(model, CASES[name].lr, 40)
    assert losses[-1] < losses[0] - 0.1, f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), f"training changed {n}"


@pytest.mark.parametrize("name", CASES)
def test_save_load_disable_merge_export(name: str, tmp_path: Path) -> None:
    model = wrapped(name)
    if name == "adalora":
        plait.drive_adalora(model)
    steps(model, CASES[name].lr, 5)
    expected = base_logits(model)
    if name != "pissa":  # the base holds the residual; plait converts it before saving
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.llama(), str(tmp_path)).eval()
        assert relative(base_logits(loaded), expected) < 1e-6
        with model.disable_adapter():
            assert torch.equal(base_logits(model), base_logits(tiny.llama()))
    if BASELINES[name].exact_export and name != "pissa":
        folder = tmp_path / "lora"
        to_lora(model).write(folder)
        stock = PeftModel.from_pretrained(tiny.llama(), str(folder)).eval()
        assert relative(base_logits(stock), expected) < 1e-5
    assert BASELINES[name].mergeable
    merged = model.merge_and_unload()
    assert relative(base_logits(merged), expected) < 1e-4
