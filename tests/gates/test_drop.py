"""The gate droplora on other methods."""

from typing import Any

import pytest
import torch

from plait.core.init import seeded
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import deltas, logits, relative, wrap


@pytest.mark.parametrize("scope", ["token", "step"])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("cola", {}),
        ("dual_module", {"tinit": 2, "tfinal": 2}),
        ("hydra", {"num_B": 2}),
        ("molora", {"num_experts": 2}),
        ("shared_b", {"num_A": 2}),
        ("sora", {}),
    ],
)
def test_as_a_gate_of_other_methods(key: str, options: dict[str, Any], scope: str) -> None:
    """Nothing in evaluation; in training rank k is dropped in every group that has it."""
    gate = {"name": "droplora", "scope": scope, "inner_dropout": 0.5}
    case = Case(key, {**options, "gates": [gate], "lora_dropout": 0.0})
    plain = Case(key, {**options, "lora_dropout": 0.0})
    model, other = wrap(case, init_weights=False), wrap(plain, init_weights=False)
    assert torch.equal(logits(model), logits(other))
    with tiny.seed():
        assert relative(logits(model.train()), logits(other.train())) > 1e-4
    if scope == "step":
        delta = deltas(model)[0]
        gen = seeded(delta.config.seed, 0, delta.base.name)
        z = (torch.rand(delta.ranks, generator=gen) >= 0.5).float() * 2
        own = delta.gates[-1].value(delta)
        assert torch.equal(own, z)
        groups = delta.spread(z).unflatten(0, (-1, delta.ranks)) if key != "dual_module" else None
        if groups is not None:
            assert all(torch.equal(group, z) for group in groups)
