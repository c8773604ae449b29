"""Chains of plait's own low-rank methods, and `Delta.restart`."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import plait
from plait import ChainPlan
from plait.chain import chain_of, start
from plait.core.init import seeded
from plait.core.trunk import trunk_of
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import adamw, base_logits, deltas, layers, logits, steps, wrap

CASES = [
    Case("dual_module", {"r": 4, "shared_r": 2, "target_r": 1, "tinit": 1, "tfinal": 1}, lr=2e-2),
    Case("cola", {"num_A": 2, "num_B": 3}, lr=2e-2, start_error=1e-5),
    Case("cola", {"strategy": "random", "init": "kaiming"}, lr=2e-2),
    Case("cola", {"strategy": "heuristic", "init": "pissa_split"}, lr=2e-2, start_error=1e-5),
]
# No mask from the global generator, and no round in so short a training.
QUIET = {"droplora": {"inner_dropout": 0.0}, "alloc": {"rounds": 0}}
FAMILY = [
    Case(m.key, QUIET.get(m.key, {}))
    for m in plait.list_methods()
    if plait.chain_support("chain", m.key) is None
]


def run(case: Case, count: int = 12, links: int = 3, **plan: Any) -> Any:
    """A tiny Llama after some steps of a chain."""
    model = wrap(case, total_steps=None)
    start(model, ChainPlan.chain(links, **plan), count)
    steps(model, adamw(model, case.lr), count)
    return model


@pytest.mark.parametrize("storage", ["stack", "merge"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_chain_of_deltas(case: Case, storage: Any, tmp_path: Any) -> None:
    """Live == stacked through stock peft == merged; disabled it is the base."""
    model = run(case, storage=storage)
    live = logits(model)
    assert (live - base_logits(tiny.llama())).abs().max() > 1e-2
    plait.chain.save_stacked(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), str(tmp_path)).eval()
    torch.testing.assert_close(base_logits(stock), live, rtol=0, atol=1e-5)
    around = copy.deepcopy(model)
    around.merge_adapter()
    torch.testing.assert_close(logits(around), live, rtol=0, atol=1e-5)
    merged = around.merge_and_unload()
    torch.testing.assert_close(base_logits(merged), live, rtol=0, atol=1e-5)
    around = copy.deepcopy(model)
    around.merge_adapter()
    around.unmerge_adapter()
    assert torch.equal(logits(around), live)
    assert torch.equal(base_logits(copy.deepcopy(model).unload()), base_logits(tiny.llama()))
    if storage == "stack":
        with model.disable_adapter():
            assert torch.equal(logits(model), base_logits(tiny.llama()))
    merged = plait.chain.merge(model)
    torch.testing.assert_close(base_logits(merged), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_changes_at_a_tie(case: Case) -> None:
    """Golden 1, 2 for Deltas, whose restart subtracts the start it takes from the weight."""
    model = run(case, count=3, links=1)
    chain = chain_of(model)
    assert chain is not None
    before = logits(model)
    chain.lengths = [3, 3]
    chain.tie(adamw(model, case.lr))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5)
    assert all(p.grad is None for d in deltas(model) for p in d.parameters())


def test_a_new_link_starts_at_the_main_directions_of_the_effective_weight() -> None:
    case = Case("dual_module", {"r": 4, "shared_r": 2, "svd": "exact", "tinit": 0, "tfinal": 0})
    for storage in ("stack", "merge"):
        model = run(case, count=5, links=2, storage=storage)
        chain = chain_of(model)
        assert chain is not None
        layer, delta = layers(model)[0], deltas(model)[0]
        (record, *_) = chain.ledger.records
        trunk = trunk_of(layer)
        assert trunk is not None
        W0 = tiny.llama().get_submodule(layer.name).weight.detach()
        weight = W0 + record.scaling * record.B @ record.A
        torch.testing.assert_close(layer.base_weight(), weight, rtol=0, atol=1e-6)
        U, S, Vh = torch.linalg.svd(weight)
        start_part = delta.scaling * delta.B_s0 @ delta.A_s0
        expected = U[:, :2] * S[:2] @ Vh[:2]
        torch.testing.assert_close(start_part, expected, rtol=0, atol=1e-5)
        V, T, Wh = torch.linalg.svd(W0)
        assert (start_part - V[:, :2] * T[:2] @ Wh[:2]).abs().max() > 1e-3


def test_each_link_screens_within_its_own_steps() -> None:
    """total_steps is the length of the link, t counts from its start, masks come back."""
    case = Case("dual_module", {"r": 6, "shared_r": 2, "target_r": 1, "tinit": 1, "tfinal": 1})
    model = wrap(case, total_steps=999)
    chain = start(model, ChainPlan.chain(2), 11)
    optimizer = adamw(model, 2e-2)
    kept = []
    for step in range(11):
        steps(model, optimizer, 1, key=step)
        delta = deltas(model)[0]
        kept.append(int(sum(d.keep.sum() for d in deltas(model))))
        assert delta.adapter.total_steps == (6 if step < 5 else 5)
        assert delta.steps == (step + 1 if step < 5 else step - 5)
    everything, target = sum(len(d.E) for d in deltas(model)), len(deltas(model))
    assert kept == [everything] * 4 + [target] + [everything] * 4 + [target, target]
    ranks = sum(len(r.A) for r in chain.ledger.records)  # 2 r_s and the kept expert ranks
    assert ranks == 4 * len(deltas(model)) + target


def test_a_link_too_short_for_the_schedule_is_refused_at_the_start() -> None:
    model = wrap(Case("dual_module", {"r": 4, "tinit": 1, "tfinal": 1}), total_steps=None)
    with pytest.raises(ValueError, match=r"leave no step to screen in total_steps = 2. Lower them"):
        start(model, ChainPlan.chain(steps_per_link=4), 10)


@pytest.mark.parametrize("case", FAMILY, ids=str)
def test_restart_is_a_fresh_start_in_place(case: Case) -> None:
    """After training, restart gives what a new Delta has, in the same Parameter objects."""
    model = wrap(case, total_steps=5)
    optimizer = adamw(model, case.lr)
    steps(model, optimizer, 5)
    fresh = wrap(case, total_steps=5)
    for delta, expected in zip(deltas(model), deltas(fresh), strict=True):
        before = {n: id(p) for n, p in delta.named_parameters()}
        delta.restart(seeded(0, delta.base.name))
        assert {n: id(p) for n, p in delta.named_parameters()} == before
        ours, theirs = delta.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
        hidden = dict(expected.named_buffers())
        for name, buffer in delta.named_buffers():
            assert torch.equal(buffer, hidden[name]), name
    steps(model, adamw(model, case.lr), 2)
    steps(fresh, adamw(fresh, case.lr), 2)
    assert torch.equal(logits(model), logits(fresh))


def test_restart_of_a_loaded_adapter_takes_the_svd_again() -> None:
    """A Delta made to be filled from a file has no start values of its own."""
    case = Case("dual_module", {"r": 4, "tinit": 0, "tfinal": 0})
    model = wrap(case)
    config = case.config()
    config.awaits_weights = True
    loaded = PeftModel(tiny.llama(), config)
    loaded.load_state_dict(model.state_dict())
    for delta in deltas(loaded):
        delta.restart(seeded(0, delta.base.name))
    for delta, expected in zip(deltas(loaded), deltas(model), strict=True):
        assert torch.equal(delta.A_s0, expected.A_s0)


def naive_update(model: Any, name: str) -> Tensor:
    """Sum of the finished links of a layer."""
    chain = chain_of(model)
    assert chain is not None
    own = [r for r in chain.ledger.records if r.module == name]
    return torch.stack([r.scaling * r.B.double() @ r.A.double() for r in own]).sum(0)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_trunk_is_the_sum_of_the_links(case: Case) -> None:
    model = run(case)
    for layer in layers(model):
        trunk = trunk_of(layer)
        assert trunk is not None
        A, B = trunk.factors()
        torch.testing.assert_close(
            (B @ A).double(), naive_update(model, layer.name), rtol=1e-5, atol=1e-6
        )
