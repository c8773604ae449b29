"""Prune: ranks whose gate is zero leave an adapter for good."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import plait
from plait.core.delta import planned
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import adamw, deltas, logits, relative, steps, task_ids, trained, wrap
from plait.upstream.export import to_lora

CASE = Case("sora", {"l1_weight": 0.1})


def set_gates(model: Any, *values: list[float]) -> None:
    """Give the first layers these gates."""
    with torch.no_grad():
        for delta, g in zip(deltas(model), values, strict=False):
            delta.g.copy_(torch.tensor(g))


UNEQUAL = ([0.5, 0, -1, 0], [0, 0, 0, 2.0], [0, 0, 0, 0], [1, 0, 1, -3.0])


def stock(export: Any, folder: Path) -> Any:
    """An export read back by stock peft."""
    export.write(folder)
    return PeftModel.from_pretrained(tiny.llama(), folder).eval()


PRUNED = [
    (Case("sora", {"l1_weight": 0.1}), 4),
    (Case("sora", {"l1_weight": 0.1, "init": "pissa"}), 4),
    (Case("sora", {"gates": [{"name": "droplora", "scope": "step"}]}), 4),
    (Case("hydra", {"num_B": 2, "gates": ["sora"], "lora_dropout": 0.0}), 4),
    (Case("molora", {"num_experts": 2, "gates": ["sora"], "init": "pissa"}), 4),
    (Case("shared_b", {"routing": "task", "tasks": ["a", "b"], "gates": ["sora"]}), 4),
]


@pytest.mark.parametrize(("case", "r"), PRUNED, ids=lambda v: str(v))
def test_prune_keeps_the_outputs(case: Case, r: int, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"v_proj": 5.0}}
    model = wrap(case, r=r, init_weights=False, **patterns)
    for delta in deltas(model):
        if delta.A0 is not None:
            delta.A0.copy_(0.1 * tiny.numbers(*delta.A0.shape, dtype=torch.float32))
            delta.B0.copy_(0.1 * tiny.numbers(*delta.B0.shape, key=1, dtype=torch.float32))
    gate = [[0.5, 0, -1, 0], [0, 0, 0, 2.0], [0, 0, 0], [1, 0, 1, -3.0], [1, 1, 1, 1.0], [0, 1, 2]]
    set_gates(model, *gate)
    names = [delta.base.name for delta in deltas(model)]
    scales = [delta.scaling for delta in deltas(model)]
    expected = logits(model)
    kept = plait.prune(model)
    assert kept == dict(zip(names, [2, 1, 1, 3, 4, 2], strict=True))
    assert float((logits(model) - expected).abs().max()) < 1e-6
    assert [delta.scaling for delta in deltas(model)] == scales
    for delta, g in zip(deltas(model), gate, strict=True):
        assert delta.g.tolist() == ([v for v in g if v] or [0.0])
        assert delta.A.shape[-2] == delta.B.shape[-1] == kept[delta.base.name]
        assert delta.A.requires_grad
    found = sum(p.numel() for p in trained(model).values())
    assert found == planned(
        (case.method.delta, d.config, d.base.in_features, d.base.out_features)
        for d in deltas(model)
    )
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny.llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=lean
        )
        assert relative(logits(loaded.eval()), logits(model)) < 1e-6
        assert [d.config.r for d in deltas(loaded)] == list(kept.values())
        for delta, scale in zip(deltas(loaded), scales, strict=True):
            assert delta.scaling == pytest.approx(scale, rel=1e-12)
    if case.method.exact_export:
        own = {k: torch.zeros_like(v) for k, v in task_ids(model, 4).items()}
        other = stock(to_lora(model), tmp_path / "lora")
        with torch.no_grad():
            assert relative(other(input_ids=tiny.tokens()).logits, logits(model, **own)) < 1e-5
    losses = steps(loaded, adamw(loaded, 1e-2), 10)
    assert losses[-1] < losses[0]
    again = plait.prune(loaded)
    assert all(again[name] <= kept[name] for name in names)


def test_prune_names_layers_fully() -> None:
    """Patterns are regular expressions that match a name's end: a short one would hit others."""
    model = wrap(CASE, init_weights=False)
    set_gates(model, [1, 0, 0, 0.0])
    plait.prune(model)
    name = deltas(model)[0].base.name
    config = model.peft_config["default"]
    assert config.rank_pattern == {"^" + name.replace(".", r"\."): 1}
    assert config.alpha_pattern == {"^" + name.replace(".", r"\."): 2.0}


def test_prune_of_one_adapter_leaves_the_other() -> None:
    model = wrap(CASE, init_weights=False)
    model.add_adapter("other", CASE.config(init_weights=False))
    model.set_adapter("other")
    expected = logits(model)
    set_gates(model, *UNEQUAL)
    plait.prune(model)
    assert torch.equal(logits(model), expected)
    assert {d.config.r for d in deltas(model, "other")} == {4}
    assert not model.peft_config["other"].rank_pattern


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("droplora"), "none of its gates trains to zero"),
        (Case("alloc"), "its dead ranks are the room that others grow into"),
        (Case("sora", {"gates": ["alloc"]}), "its dead ranks are the room that others grow into"),
        (Case("dual_module"), "its factors have no row and column for each rank alone"),
        (Case("dual_lora"), "its factors have no row and column for each rank alone"),
    ],
    ids=str,
)
def test_prune_refuses_what_it_cannot_serve(case: Case, why: str) -> None:
    text = (
        rf"prune: {case.key} cannot lose ranks for good: {why}\. Export it, "
        r"plait\.to_lora\(model, 'default'\): ranks that do nothing are left out there\."
    )
    with pytest.raises(ValueError, match=text):
        plait.prune(wrap(case))


def test_prune_of_an_adapter_that_is_not_there() -> None:
    text = r"prune: no adapter of plait is named 'law'\. The model has: default\."
    with pytest.raises(ValueError, match=text):
        plait.prune(wrap(CASE), "law")
