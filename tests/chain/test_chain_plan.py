"""Plans: lengths, ranks, sketches, choices, learning rates, what they refuse."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plait
from plait.chain import Ledger
from plait.chain.plan import ChainPlan
from plait.chain.recipes import RECIPES

chain, rac, xgb = ChainPlan.chain, ChainPlan.rac, ChainPlan.xgb


@given(total=st.integers(1, 200), links=st.integers(1, 20))
def test_lengths_sum_up_and_the_first_links_are_one_longer(total: int, links: int) -> None:
    if total < links:
        with pytest.raises(ValueError, match=f"chain: {total} optimizer steps for {links} links"):
            chain(links).lengths(total)
        return
    lengths = chain(links).lengths(total)
    assert sum(lengths) == total
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == links
    assert lengths[0] - lengths[-1] <= 1


@given(total=st.integers(1, 100), each=st.integers(1, 30))
def test_lengths_by_steps_per_link(total: int, each: int) -> None:
    lengths = xgb(steps_per_link=each).lengths(total)
    assert sum(lengths) == total
    assert set(lengths[:-1]) <= {each}
    assert 1 <= lengths[-1] <= each


@settings(max_examples=30)
@given(
    total=st.integers(12, 120),
    links=st.integers(1, 6),
    warmup=st.integers(0, 30),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_rate_is_above_zero_and_restarts(total: int, links: int, warmup: int, shape: Any) -> None:
    plan = chain(links, warmup_steps=warmup)
    expected = []
    for T in plan.lengths(total):
        w = min(warmup, T // 10)
        for j in range(T):
            part = (j - w) / (T - w)
            after = {
                "constant": 1,
                "linear": 1 - part,
                "cosine": 0.5 + 0.5 * math.cos(math.pi * part),
            }
            expected.append((j + 1) / w if j < w else after[shape])
    assert plan.factors(total, shape) == pytest.approx(expected)
    assert min(expected) > 0
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = plait.chain_schedule(plan, optimizer, total, shape)
    seen = []
    for _ in range(total + 2):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[:total] == pytest.approx([2 * f for f in expected])
    assert seen[total:] == [seen[total - 1]] * 2
    again = plait.chain_schedule(plan, optimizer, total, shape)
    again.load_state_dict(schedule.state_dict())
    assert again.last_epoch == schedule.last_epoch


def test_global_rate_ignores_links() -> None:
    plan = xgb(steps_per_link=10, warmup_steps=4)
    assert plan.lr == "global"
    factors = plan.factors(40, "linear")
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))


@settings(max_examples=20)
@given(size=st.integers(1, 20), seed=st.integers(0, 99))
def test_orthonormal_sketch(size: int, seed: int) -> None:
    rank = 1 + seed % size
    sketch = rac(seed=seed, sketch_std=0.5).draw(3, "layer", rank, size)
    torch.testing.assert_close(
        sketch @ sketch.T, 0.25 * torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_sketch_is_isotropic() -> None:
    """E[H] = r/n I, the theory's condition; without the sign fix of QR it is not Haar."""
    plan = rac(seed=5)
    draws = torch.stack([plan.draw(k, "layer", 1, 3)[0] for k in range(4000)])
    assert draws.mean(0).abs().max() < 0.04  # standard error 0.009
    moment = draws.T @ draws / len(draws)
    torch.testing.assert_close(moment, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=0.03)


def test_draws_are_keyed_by_seed_link_and_layer() -> None:
    plan = rac(seed=1)
    first = plan.draw(0, "a", 2, 6)
    assert torch.equal(first, plan.draw(0, "a", 2, 6))
    for other in (plan.draw(1, "a", 2, 6), plan.draw(0, "b", 2, 6), rac(seed=2).draw(0, "a", 2, 6)):
        assert not torch.equal(first, other)
    gaussian = rac(sketch="gaussian", sketch_std=3.0).draw(0, "a", 50, 60)
    assert abs(float(gaussian.std()) - 3) < 0.2


def test_chosen_blocks() -> None:
    blocks = list("abcdef")
    plan = xgb(seed=3)
    assert all(len(plan.chosen(k, blocks)) == 2 for k in range(9))  # a third
    assert len({frozenset(plan.chosen(k, blocks)) for k in range(20)}) > 5
    assert plan.chosen(4, blocks) == xgb(seed=3).chosen(4, blocks)
    assert len(xgb(blocks_per_link=1.0).chosen(0, blocks)) == 6
    assert len(xgb(blocks_per_link=1).chosen(0, blocks)) == 1
    with pytest.raises(ValueError, match="chain: blocks_per_link = 7, the adapter has 6 blocks"):
        xgb(blocks_per_link=7).chosen(0, blocks)


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (chain, {"links": 0}, "chain: links = 0. Give a whole number from 1 on."),
        (chain, {"links": 2, "steps_per_link": 5}, "chain: links = 2 and steps_per_link = 5. Give"),
        (chain, {"links": 3, "ranks": [2, 1]}, "chain: ranks has 2 entries for 3 links. Give one"),
        (chain, {"ranks": [2, 1, 0]}, "chain: ranks = 0. Give a whole number from 1 on."),
        (chain, {"lr": "cyclic"}, "chain: lr = 'cyclic' is not known. Use one of 'restart', 'gl"),
        (chain, {"storage": "disk"}, "chain: storage = 'disk' is not known. Use one of 'stack'"),
        (rac, {"freeze": "C"}, "chain: freeze = 'C' is not known. Use one of 'A', 'B'."),
        (rac, {"sketch_std": 0.0}, "chain: sketch_std = 0.0. Give a number above 0."),
        (xgb, {"blocks_per_link": 1.5}, "chain: blocks_per_link = 1.5. Give a number of blocks"),
        (xgb, {"rank": 0}, "chain: ranks = 0. Give a whole number from 1 on."),
    ],
)
def test_plans_are_checked(make: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert str(caught.value).startswith(text)


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"ranks has 2 entries for 3 links"):
        chain(steps_per_link=4, ranks=[2, 1]).lengths(12)
    with pytest.raises(ValueError, match=r"link 1 has rank 5, the adapter r = 4. Give the adapter"):
        chain(2, ranks=[4, 5]).rank(1, 4)
    with pytest.raises(ValueError, match=r"x has 3 features on its frozen side, r = 4 orthonormal"):
        rac().draw(0, "x", 4, 3)
    with pytest.raises(ValueError, match=r"cannot restart as 'polynomial'. Use one of 'constant'"):
        chain().factors(9, "polynomial")  # type: ignore[arg-type]


def test_a_plan_survives_json() -> None:
    for plan in (chain(ranks=[3, 2, 1]), rac(freeze="B", seed=4), xgb(blocks_per_link=2)):
        table = Ledger(plan, 30, "default", []).plan.to_dict()
        assert table == plan.to_dict()


def test_support() -> None:
    """Every method is answered; what works is listed, what does not says why."""
    support = plait.chain_support
    for plan in ("chain", "rac", "xgb"):
        assert support(plan, "lora") is None
        assert support(plan, "rslora") is None
        for key in ("pissa", "dora", "adalora", "vera", "vblora", "unilora", "full"):
            assert str(support(plan, key)).startswith(f"{plan}: {key}")
        for method in plait.list_methods():
            reason = support(plan, method.key)
            assert reason is None or reason.startswith(f"{plan}: {method.key}")
    assert support("chain", "dual_module") is None
    assert support("chain", "cola") is None
    assert support("chain", "dual_lora") == (
        "chain: dual_lora's update has full rank and no factors that a finished link could keep."
    )
    assert support("chain", "shared_b") == (
        "chain: shared_b's update depends on the input, so a finished link is no matrix."
    )
    assert "one side could be frozen" in str(support("rac", "cola"))
    assert "switched off by block" in str(support("xgb", "dual_module"))
    with pytest.raises(ValueError, match=r"chain: plan = 'boost' is not known"):
        support("boost", "lora")
    with pytest.raises(ValueError, match="Method 'lorra' is not known"):
        support("chain", "lorra")


# Recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_a_plan_of_its_defaults(name: str) -> None:
    plan = ChainPlan.of(name)
    table = plan.to_dict()
    for option, value in {**RECIPES[name].options, **RECIPES[name].length}.items():
        assert table["ranks" if option == "rank" else option] == value
    assert plan.recipe == name
    assert plan.lengths(60)
    assert ChainPlan.of(name, links=2).lengths(60) == [30, 30]


def test_short_forms_are_recipes() -> None:
    assert chain(4, ranks=[4, 3, 2, 1]) == ChainPlan.of("chain", links=4, ranks=(4, 3, 2, 1))
    assert rac(freeze="B") == ChainPlan.of("rac", freeze="B")
    assert xgb(rank=2, steps_per_link=5) == ChainPlan.of("xgb", rank=2, steps_per_link=5)


def test_recipes_refuse_what_they_do_not_take() -> None:
    with pytest.raises(ValueError) as caught:
        ChainPlan.of("rac", rank=2)
    assert str(caught.value).startswith("chain: rank is no option of the plan rac. ")
    with pytest.raises(ValueError, match=r"chain: storag is no option .*Did you mean storage\?"):
        ChainPlan.of("chain", storag="merge")
    with pytest.raises(ValueError, match=r"chain: plan = 'boost' is not known. Use one of 'chain'"):
        ChainPlan.of("boost")
    with pytest.raises(ValueError, match=r"chain: freeze = 'A' is not known. Use one of None"):
        ChainPlan(recipe="chain", links=2, freeze="A")
