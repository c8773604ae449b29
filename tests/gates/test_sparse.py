"""The gate sora: the proximal step and its schedule, options, and use on other methods."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plait
from plait.gates.sparse import proximal
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    logits,
    one_layer,
    relative,
    steps,
    trained,
    wrap,
)

CASE = Case("sora", {"l1_weight": 0.1})


STILL = {"l1_weight": 0.0, "xi": 0.0}  # neither penalty nor threshold


def layer(n_in: int = 7, n_out: int = 5, **options: Any) -> tuple[Any, Any]:
    """A model of one fp64 layer with random factors, and its Delta."""
    model, host = one_layer(CASE, n_in, n_out, **options)
    return model.train(), host.plait_delta["default"]


def gates(model: Any) -> list[Tensor]:
    """Copies of all gates."""
    return [delta.g.detach().clone() for delta in deltas(model)]


@pytest.mark.parametrize(
    ("prox", "xi", "g", "expected"),
    [
        (
            "exact", 3e-4, [0.5, -0.2, 0.0004, 0, 1, -0.0001],
            [0.4997, -0.1997, 0.0001, 0, 0.9997, 0],
        ),
        ("official", 0.1, [0.05, 0.15, 0.19, 0.21, 0.5], [0, 0, 0, 0.11, 0.4]),
        ("official", 0.1, [-0.05, -0.15, -0.19, -0.21, -0.5], [0, 0, 0, -0.11, -0.4]),
    ],
)  # fmt: skip
def test_proximal_numbers(prox: str, xi: float, g: list[float], expected: list[float]) -> None:
    found = proximal(torch.tensor(g, dtype=torch.float64), xi, prox)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert float((found - wanted).abs().max()) < 1e-12
    assert torch.equal(found == 0, wanted == 0)


def scalar(g: float, xi: float, prox: str) -> float:
    """One entry by the written rules."""
    if prox == "exact":
        return math.copysign(max(abs(g) - xi, 0.0), g)
    if g > xi:
        g -= xi
    if g < -xi:
        g += xi
    return 0.0 if abs(g) < xi else g


@settings(max_examples=60)
@given(
    g=st.lists(st.floats(-2, 2), min_size=1, max_size=6), xi=st.floats(1e-6, 1),
    prox=st.sampled_from(["exact", "official"]),
)  # fmt: skip
def test_proximal_is_the_loop(g: list[float], xi: float, prox: str) -> None:
    found = proximal(torch.tensor(g, dtype=torch.float64), xi, prox).tolist()
    assert found == [scalar(one, xi, prox) for one in g]
    if prox == "official":
        assert all(new == 0 for new, old in zip(found, g, strict=True) if abs(old) < xi)


def test_threshold_comes_after_the_step_and_is_not_scaled_by_the_rate() -> None:
    for lr in (0.5, 0.0):
        _, delta = layer(l1_weight=0.0, xi=0.01)
        before = delta.g.detach().clone()
        optimizer = torch.optim.SGD(delta.parameters(), lr=lr)
        for p in delta.parameters():
            p.grad = torch.full_like(p, 0.25)
        optimizer.step()
        assert relative(delta.g, proximal(before - lr * 0.25, 0.01)) < 1e-12


def test_once_for_each_optimizer_step_under_accumulation() -> None:
    model = wrap(CASE, l1_weight=0.0, xi=0.01).train()
    before = gates(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    for part in range(4):
        model(**batch(model, rows=2, key=part)).loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(before, gates(model), strict=True))
    optimizer.step()
    for old, new in zip(before, gates(model), strict=True):
        assert torch.equal(new, proximal(old, 0.01))


@pytest.mark.parametrize("fused", [True, False])
def test_not_on_a_step_that_a_scaler_skips(fused: bool) -> None:
    model = wrap(CASE, xi=0.01, gate_lr=0.5).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3, fused=fused, weight_decay=0.5)
    for broken in (True, False):
        before = gates(model)
        scaler.scale(model(**batch(model)).loss).backward()
        if broken:
            deltas(model)[0].A.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, gates(model), strict=True)]
        assert all(same) if broken else not any(same)
        assert {delta.steps for delta in deltas(model)} == {0 if broken else 1}


def test_a_zero_gate_may_return() -> None:
    """Its moments are kept."""
    _, delta = layer(l1_weight=0.0, xi=0.05)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.1)
    seen = []
    with torch.no_grad():
        delta.g.fill_(0.2)
    for sign in (1, 1, 1, -1, -1, -1, -1, -1, -1):
        for p in delta.parameters():
            p.grad = torch.full_like(p, float(sign))
        optimizer.step()
        seen.append(float(delta.g[0].detach()))
    assert 0.0 in seen
    assert seen[-1] > 0
    assert optimizer.state[delta.g]["exp_avg"].all()


def test_schedule_stages() -> None:
    """The first value rules before, each next one for xi_every steps; the last beyond the end."""
    xis = [0.1, 0.2, 0.3]
    for every, expected in (
        (2, [0.1] * 6 + [0.2] * 2 + [0.3] * 2 + [0.3]),
        (0.3, [0.1] * 4 + [0.2] * 3 + [0.3] * 3 + [0.3]),
        (5, [0.2] * 5 + [0.3] * 5 + [0.3]),
    ):
        _, delta = layer(xi_schedule=xis, xi_every=every, total_steps=10, l1_weight=0.0)
        optimizer = torch.optim.SGD(delta.parameters(), lr=0.0)
        taken = []
        for _ in range(11):
            with torch.no_grad():
                delta.g.fill_(1.0)
            for p in delta.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            taken.append(1 - float(delta.g[0].detach()))
        assert taken == pytest.approx(expected)


def test_schedule_needs_the_number_of_steps() -> None:
    model = wrap(CASE, xi_schedule=[0.1, 0.2], total_steps=None)
    with pytest.raises(ValueError, match=r"sora: total_steps is not known .* SoraConfig\(total"):
        steps(model, adamw(model, 1e-3), 1)
    model = wrap(CASE, total_steps=None)
    steps(model, adamw(model, 1e-3), 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"xi": -1.0}, r"xi = -1\.0 is out of range\. Give 0 or more\."),
        ({"prox": "soft"}, r"prox = 'soft' is not known\. Use one of 'exact', 'official'\."),
        ({"gate_lr": 0.0}, r"gate_lr = 0\.0 is out of range\. Give more than 0\."),
        (
            {"xi_schedule": [0.1, -1]},
            r"xi_schedule = \[0\.1, -1\]: -1 is no threshold\. Give numbers from 0\.",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.SoraConfig(**options)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("cola", {}),
        ("dual_module", {"tinit": 2, "tfinal": 2}),
        ("hydra", {"num_B": 2}),
        ("molora", {"num_experts": 2}),
        ("shared_b", {"num_A": 2}),
        ("tied", {}),
        ("nola", {"num_basis_A": 8, "num_basis_B": 8}),
    ],
)
def test_as_a_gate(key: str, options: dict[str, Any]) -> None:
    """Trained, thresholded, penalised; a zero gate takes its rank out in every group."""
    case = Case(key, {**options, "gates": [{"name": "sora", "xi": 0.02}], "lora_dropout": 0.0})
    model = wrap(case)
    before = gates(model)
    steps(model, adamw(model, 1e-2), 4, key=None)
    for old, new in zip(before, gates(model), strict=True):
        assert not torch.equal(old, new)
    assert any(bool((g == 0).any()) for g in gates(model))
    dead = wrap(case, init_weights=False)
    with torch.no_grad():
        for delta in deltas(dead):
            delta.g.zero_()
    if key == "dual_module":
        return  # its shared module knows no gate
    assert torch.equal(logits(dead), base_logits(tiny.llama()))
