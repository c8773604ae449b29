"""The gate alloc: the importance of a rank, moving ranks between layers, new ranks."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plait
from plait.core.init import seeded
from plait.gates.alloc import allocate, shares
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    layers,
    logits,
    random_state_kept,
    relative,
    steps,
    trained,
    wrap,
)
from tests.support.allocation import CASE, give, live, live_of, scores

# The gate on the expert of dual_module, and on ranks that several A or B share.
HOSTS = [
    Case("alloc", {"init": "kaiming"}),
    Case("alloc", {"init": "pissa"}),
    Case("dual_module", {"r": 6, "tinit": 2, "tfinal": 2, "gates": ["alloc"]}),
    Case("hydra", {"num_B": 2, "gates": ["alloc"], "lora_dropout": 0.0}),
    Case("hydra", {"num_B": 2, "init": "pissa", "gates": ["alloc"], "lora_dropout": 0.0}),
    Case("molora", {"num_experts": 2, "gates": ["alloc"], "lora_dropout": 0.0}),
    Case("molora", {"num_experts": 2, "init": "pissa", "gates": ["alloc"]}),
    Case("shared_b", {"num_A": 2, "gates": ["alloc"], "lora_dropout": 0.0}),
    Case("sora", {"gates": ["alloc"]}),
]


def move(model: Any, found: list[Tensor], moved: int) -> None:
    """A round with given scores."""
    allocate(deltas(model), live_of, found, moved)


def given_scores(model: Any, *means: float) -> list[Tensor]:
    """Scores that fall with the slot, a mean for each layer; -inf where dead."""
    found = []
    for delta, mean in zip(deltas(model), means, strict=True):
        alive = delta.live_ranks.bool()
        score = torch.full_like(delta.live_ranks, -torch.inf)
        own = torch.arange(int(alive.sum()), dtype=score.dtype)
        score[alive] = mean - 1e-3 * (own - own.mean())
        found.append(score)
    return found


def test_importance_is_its_definition() -> None:
    """IS(k) = S(M) - S(M without k) + S(M with only k), up to S(M), by whole models."""
    model = give(wrap(CASE, init_weights=False))
    with torch.no_grad():
        for delta in deltas(model):
            delta.B.mul_(3)
        deltas(model)[1].live_ranks[5] = 1
        deltas(model)[1].live_ranks[0] = 0
    found = scores(model)

    def cross_entropy(masks: list[Tensor]) -> float:
        other = copy.deepcopy(model)
        for delta, mask in zip(deltas(other), masks, strict=True):
            delta.live_ranks.copy_(mask)
        with torch.no_grad():
            return float(other(**batch(other, key=99)).loss)

    whole = [delta.live_ranks.clone() for delta in deltas(model)]
    for i in range(len(whole)):
        for k in range(len(whole[i])):
            if not whole[i][k]:
                assert found[i][k] == -torch.inf
                continue
            without = [mask.clone() for mask in whole]
            without[i][k] = 0
            only = [torch.zeros_like(mask) for mask in whole]
            only[i][k] = 1
            wanted = cross_entropy(without) - cross_entropy(only)
            assert float(found[i][k]) == pytest.approx(wanted, abs=1e-6)


def test_what_contributes_nothing_goes_first() -> None:
    """A layer that stays at B = 0 while the others learn."""
    model = give(wrap(CASE, rounds=0))
    deltas(model)[2].requires_grad_(False)
    steps(model, adamw(model, 1e-2), 60, key=99)
    move(model, scores(model), 4)
    assert live(model)[2] == 0
    assert sum(live(model)) == 4 * 6


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_everything_as_it_was(training: bool) -> None:
    """Gates, weights, gradients, random state, modes, the steps; also where it fails midway."""
    model = give(wrap(CASE, init_weights=False, lora_dropout=0.3)).train(training)
    layers(model)[1].train(not training)  # a mode of its own
    model(**batch(model)).loss.backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = {n: p.grad.clone() for n, p in trained(model).items()}  # type: ignore[union-attr]
    modes = [m.training for m in model.modules()]
    assert len(set(modes)) == 2

    def unchanged() -> None:
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        for name, p in trained(model).items():
            assert torch.equal(p.grad, gradients[name]), name  # type: ignore[arg-type]
        assert [m.training for m in model.modules()] == modes

    with random_state_kept():
        first = scores(model)
    unchanged()
    for one, two in zip(first, scores(model), strict=True):  # no dropout in it
        assert torch.equal(one, two)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    handle = model.register_forward_hook(fail)
    with random_state_kept(), pytest.raises(RuntimeError, match="out of memory"):
        scores(model)
    handle.remove()
    unchanged()


@pytest.mark.parametrize(
    ("total", "means", "expected"),
    [
        (8, [1.0, 3.0, 2.0], [2, 3, 3]),
        (8, [3.0, 2.0, 1.0], [3, 3, 2]),
        (8, [1.0, 1.0, 1.0], [3, 3, 2]),  # ties go to the lower layer
        (2, [1.0, 3.0, 2.0], [0, 1, 1]),
        (6, [1.0, 3.0, 2.0], [2, 2, 2]),
        (5, [], []),
        (0, [1.0, 2.0], [0, 0]),
    ],
)
def test_shares(total: int, means: list[float], expected: list[int]) -> None:
    assert shares(total, means) == expected


def test_eight_ranks_over_three_layers() -> None:
    """3, 3, 2 by mean importance."""
    model = wrap(CASE, r=4, spare=2)
    found = given_scores(model, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0)
    for i, count in ((1, 3), (3, 3), (4, 2)):  # eight ranks below all others
        found[i][:count] = -1.0
    move(model, found, 8)
    assert live(model) == [4 + 3, 4 - 3, 4 + 2, 4 - 3, 4 - 2, 4 + 3]
    # new ranks take the lowest dead slots, lost ones were those of lowest score
    assert deltas(model)[2].live_ranks.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert deltas(model)[4].live_ranks.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_ties_go_by_layer_and_slot() -> None:
    model = wrap(CASE)
    flat = [torch.where(d.live_ranks.bool(), 0.0, -torch.inf) for d in deltas(model)]
    move(model, flat, 5)
    assert live(model) == [0, 3, 6, 5, 5, 5]
    assert deltas(model)[1].live_ranks.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


def test_nothing_is_added_where_every_layer_lost_one() -> None:
    """The budget shrinks, as in the paper."""
    model = wrap(CASE)
    found = given_scores(model, *[1.0] * 6)
    for score in found:
        score[0] = 0.0
    move(model, found, 6)
    assert live(model) == [3] * 6


def test_without_a_slot_the_next_layer_grows_then_ranks_are_dropped() -> None:
    """And the rows that a layer gets in two goes are different draws."""
    model = wrap(CASE, r=4, spare=2)
    for delta in deltas(model)[:4]:
        delta.live_ranks.fill_(1)  # no room
    found = given_scores(model, 4.0, 3.0, 2.0, 0.0, 5.0, 6.0)
    found[3][:4] = -1.0
    move(model, found, 4)  # 1 for 5, 4, 0, 1 each; 0 and 1 have no room, and 5 comes first
    assert live(model) == [8, 8, 8, 4, 5, 7]
    grown = deltas(model)[5].A[4:7]
    assert len({tuple(row) for row in grown.tolist()}) == 3

    model = wrap(CASE, r=4, spare=1)
    found = given_scores(model, 4.0, 3.0, 2.0, 0.0, 5.0, 6.0)
    text = r"alloc, step 0: 2 ranks found no free slot and are dropped\. Raise spare\."
    with pytest.warns(plait.PlaitWarning, match=text):
        move(model, found, 2)
    assert live(model) == [4, 4, 4, 2, 4, 4]


def test_a_round_never_takes_all_ranks() -> None:
    model = give(wrap(CASE, r=1, n_A=None))
    text = r"n_A = 6: a round would take all of 6 ranks\. Give a smaller n_A\."
    with pytest.raises(ValueError, match=text):
        steps(model, adamw(model, 1e-3), 1)
    model = wrap(CASE, r=1)
    text = r"alloc, step 0: 6 ranks are left, a round moves 6 and is left out\."
    with pytest.warns(plait.PlaitWarning, match=text):
        move(model, given_scores(model, *[1.0] * 6), 6)
    assert live(model) == [1] * 6


@settings(max_examples=30)
@given(data=st.data())
def test_live_ranks_never_exceed_the_budget(data: st.DataObject) -> None:
    """Whatever the scores, over several rounds."""
    model = wrap(CASE, r=data.draw(st.integers(1, 3)), spare=data.draw(st.integers(1, 3)))
    budget = sum(live(model))
    for _ in range(3):
        moved = data.draw(st.integers(1, budget))
        found = [
            torch.where(
                d.live_ranks.bool(), tiny.numbers(d.ranks, key=data.draw(st.integers(0, 99))), -1e9
            )
            for d in deltas(model)
        ]
        before = live(model)
        worst = sorted(
            float(s) for d, f in zip(deltas(model), found, strict=True) for s in f[d.live_ranks > 0]
        )[:moved]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", plait.PlaitWarning)
            move(model, found, moved)
        assert sum(live(model)) <= sum(before) <= budget
        if moved < sum(before):
            for delta, f in zip(deltas(model), found, strict=True):
                was = f > -1e9
                gone = was & (delta.live_ranks == 0)
                assert all(float(s) in worst for s in f[gone])
                assert not (gone.any() and (delta.live_ranks > was.float()).any())


def revive_all(model: Any, optimizer: Any) -> list[Tensor]:
    """Wake every dead slot, inside a step's events; returns which they were, by layer."""
    from plait.core.events import _completing

    woken = []
    with torch.no_grad(), _completing(optimizer):
        for delta in deltas(model):
            free = (delta.live_ranks == 0).nonzero()[:, 0]
            delta.revive(free, seeded("test", delta.base.name))
            delta.live_ranks[free] = 1
            woken.append(free)
    return woken


@pytest.mark.parametrize("case", HOSTS, ids=lambda c: f"{c}-{c.options.get('init', '')}")
def test_new_ranks_change_nothing_and_then_learn(case: Case) -> None:
    """Same outputs, fresh moments, and a gradient for each tensor within three steps."""
    options = {"rounds": 0} if case.key == "alloc" else {}
    if case.key != "alloc":
        others = [g for g in case.options["gates"] if g != "alloc"]
        options["gates"] = [*others, {"name": "alloc", "rounds": 0}]
    model = wrap(case, **options)
    optimizer = adamw(model, 1e-2)
    steps(model, optimizer, 3, key=None)
    with torch.no_grad():  # as momentum and decay leave slots that are not in use
        for delta in deltas(model):
            for name, axis in delta.all_rank_axes.items():
                p = getattr(delta, name)
                if isinstance(p, torch.nn.Parameter):
                    index = (delta.live_ranks == 0).nonzero()[:, 0]
                    part = p.index_select(axis, index)
                    p.index_copy_(axis, index, part + 0.3)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        optimizer.state[p][moment].fill_(0.7)
    expected = logits(model)
    woken = revive_all(model, optimizer)
    assert all(len(free) for free in woken)
    assert relative(logits(model), expected) < 1e-6
    for delta, free in zip(deltas(model), woken, strict=True):
        used = [k for k in range(delta.ranks) if k not in free.tolist()]
        for name, axis in delta.all_rank_axes.items():
            p = getattr(delta, name)
            if not isinstance(p, torch.nn.Parameter):
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                value = optimizer.state[p][moment]
                assert not value.index_select(axis, free).any(), name
                assert bool((value.index_select(axis, torch.tensor(used)) == 0.7).all()), name
    reached: dict[str, Tensor] = {}
    model.train()
    for key in range(3):
        model(**batch(model, key=key)).loss.backward()
        for i, delta in enumerate(deltas(model)):
            for name, axis in delta.all_rank_axes.items():
                p = getattr(delta, name)
                if isinstance(p, torch.nn.Parameter):
                    seen = p.grad.index_select(axis, woken[i]).movedim(axis, 0)
                    seen = seen.reshape(len(seen), -1).any(1)
                    place = f"{i}.{name}"
                    reached[place] = reached.get(place, seen) | seen
        optimizer.step()
        optimizer.zero_grad()
    for place, seen in reached.items():
        assert seen.all(), place


def test_new_ranks_start_as_in_lora() -> None:
    """A Kaiming from the keyed generator, B = 0; those of the start are untouched."""
    model = wrap(CASE, init_weights=False)
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    with random_state_kept():
        revive_all(model, None)
    for delta in deltas(model):
        prefix = next(n for n, p in trained(model).items() if p is delta.A)[:-1]
        assert torch.equal(delta.A[:4], before[f"{prefix}A"][:4])
        assert torch.equal(delta.B[:, :4], before[f"{prefix}B"][:, :4])
        assert not delta.B[:, 4:].any()
        bound = delta.base.in_features**-0.5
        assert 0.5 * bound < float(delta.A[4:].detach().abs().max()) <= bound
    assert not torch.equal(*[d.A[4:, :24] for d in deltas(model)][:2])


def test_forgets_in_8_bit_optimizers() -> None:
    """Their moments are codes, of which 0 is not the number zero."""
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny.OneLinear(1024, 64, torch.float32)
    model = wrap(CASE, base, target_modules=["linear"], task_type=None, rounds=0)
    delta = deltas(model)[0]
    optimizer = bnb.optim.AdamW8bit(delta.parameters(), lr=1e-3)
    model.train()(tiny.numbers(4, 1024, dtype=torch.float32)).square().sum().backward()
    delta.A.grad = tiny.numbers(8, 1024, dtype=torch.float32)
    optimizer.step()
    assert delta.steps == 1  # its steps are seen like those of torch
    state = optimizer.state[delta.A]
    assert state["state1"].dtype == torch.uint8
    kept = state["state1"][:4].clone()
    revive_all(model, optimizer)
    for n in "12":
        assert not state[f"qmap{n}"][state[f"state{n}"][4:].long()].any()
    assert torch.equal(state["state1"][:4], kept)


def test_times_in_steps_and_shares() -> None:
    def times(**options: Any) -> list[int]:
        delta = deltas(wrap(CASE, **options))[0]
        return list(delta.gates[0].times(delta))

    assert times(first=2, every=3, rounds=3, total_steps=None) == [2, 5, 8]
    assert times(first=0.1, every=0.025, rounds=4, total_steps=200) == [20, 25, 30, 35]
    assert times(first=0.1, every=0.025, rounds=3, total_steps=10) == [1, 2, 3]
    assert times(rounds=0) == []


def test_rounds_fire_when_due_and_keep_the_budget() -> None:
    model = give(wrap(CASE, r=2, n_A=3))
    optimizer = adamw(model, 2e-2)
    seen = [live(model)]
    for _ in range(9):
        steps(model, optimizer, 1, key=None)
        seen.append(live(model))
    moved = [t for t in range(1, 10) if seen[t] != seen[t - 1]]
    assert moved
    assert set(moved) <= {2, 4, 6}
    assert all(sum(counts) <= 12 for counts in seen)
    assert len(set(seen[-1])) > 1
    assert {delta.scaling for delta in deltas(model)} == {4.0}  # that of the start


def test_default_moves_a_rank_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.gates import alloc

    seen = []
    monkeypatch.setattr(alloc, "allocate", lambda *a: seen.append(a[-1]))
    model = give(wrap(CASE, n_A=None))
    steps(model, adamw(model, 1e-3), 6)
    assert seen == [6, 6, 6]


NO_BATCH = (
    r"alloc: there is no development batch to score ranks on\. Call "
    r"plait\.set_development_batch\(model, batch\) before training; for plait train set "
    r"data\.validation\."
)


def test_missing_development_batch() -> None:
    """A warning in the first step, an error in the first round; a copy needs its own."""
    warned = rf"alloc: there is no development batch; step {CASE.options['first']} needs it\. Call"
    for model in (wrap(CASE), copy.deepcopy(give(wrap(CASE)))):
        with pytest.warns(plait.PlaitWarning, match=warned):
            steps(model, adamw(model, 1e-3), 1)
        with pytest.raises(ValueError, match=NO_BATCH):
            steps(model, adamw(model, 1e-3), 4)
    other = give(copy.deepcopy(give(wrap(CASE))))
    model = wrap(CASE, rounds=0)  # nothing to score
    with warnings.catch_warnings():
        warnings.simplefilter("error", plait.PlaitWarning)
        steps(other, adamw(other, 1e-3), 2)
        steps(model, adamw(model, 1e-3), 1)


def test_batch_without_labels() -> None:
    model = wrap(CASE)
    plait.set_development_batch(model, {"input_ids": tiny.tokens()})
    text = r"The development batch \(input_ids\) gives no loss\. Put labels into it\."
    with pytest.raises(ValueError, match=text):
        steps(model, adamw(model, 1e-3), 2)


def test_batch_for_a_model_that_does_not_allocate() -> None:
    with pytest.raises(ValueError, match="no adapter of this model allocates ranks"):
        plait.set_development_batch(wrap(Case("sora")), {})


def test_shares_of_steps_need_their_number() -> None:
    model = give(wrap(CASE, first=0.5, total_steps=None))
    with pytest.raises(ValueError, match=r"alloc: total_steps is not known .* AllocLoraConfig\("):
        steps(model, adamw(model, 1e-3), 1)
    model = give(wrap(CASE, total_steps=None))
    steps(model, adamw(model, 1e-3), 2)


@pytest.mark.parametrize("key", ["nola", "tied", "cola"])
def test_ranks_that_cannot_start_anew(key: str) -> None:
    with pytest.raises(ValueError, match=r"gates: alloc restarts single ranks, but the factors"):
        Case(key, {"gates": ["alloc"]}).config()


@pytest.mark.parametrize("case", HOSTS[2:], ids=lambda c: f"{c}-{c.options.get('init', '')}")
def test_as_a_gate(case: Case) -> None:
    """The budget holds, ranks move, a fresh adapter is the base model, all of it is saved."""
    others = [g for g in case.options["gates"] if g != "alloc"]
    gate = {"name": "alloc", "first": 1, "every": 1, "rounds": 4, "n_A": 4}
    model = wrap(case, gates=[*others, gate], r=3)
    assert torch.equal(logits(model), base_logits(tiny.llama()))
    budget = sum(live(model))
    give(model)
    optimizer = adamw(model, 2e-2)
    for _ in range(6):
        steps(model, optimizer, 1, key=None)
        assert sum(live(model)) <= budget
    assert len(set(live(model))) > 1
