"""Screening: importance, budget, the schedule, the final choice."""

from typing import Any

import pytest
import torch

from plait.gates import screening
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import adamw, batch, deltas, one_layer, relative, steps, trained
from plait.testing.helpers import wrap as wrap_case

CASE = Case("dual_module", {"r": 8, "shared_r": 2, "target_r": 3, "tinit": 2, "tfinal": 3})


def wrap(**options: Any) -> Any:
    """The tiny Llama with the method."""
    return wrap_case(CASE, **options)


def layer(n_in: int = 9, n_out: int = 7, **options: Any) -> tuple[Any, Any]:
    """A model of one fp64 layer with random factors, and its Delta."""
    model, host = one_layer(CASE, n_in, n_out, **options)
    return model.train(), host.plait_delta["default"]


def test_importance_by_hand() -> None:
    """I = 2, 1, 4 through the optimizer's own hook; numbers worked out by hand."""
    _, delta = layer(total_steps=100, orth_reg_weight=0.0)
    with torch.no_grad():
        delta.E.fill_(1.0)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.0)
    expected = [
        (0.3, 0.255, 0.0765),
        (0.405, 0.306, 0.12393),
        (0.94425, 0.7184625, 0.678408215625),
    ]
    for importance, (mean, deviation, score) in zip((2.0, 1.0, 4.0), expected, strict=True):
        for p in delta.parameters():
            p.grad = torch.zeros_like(p)
        delta.E.grad[0] = -importance
        optimizer.step()
        assert float(delta.Ibar_E[0]) == pytest.approx(mean, rel=1e-12)
        assert float(delta.Ubar_E[0]) == pytest.approx(deviation, rel=1e-12)
        assert float(screening.score(delta, "E")[0]) == pytest.approx(score, rel=1e-12)
        assert not delta.Ibar_E[1:].any()


def test_importance_takes_the_value_after_the_step() -> None:
    _, delta = layer(total_steps=100, orth_reg_weight=0.0)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.5)
    for p in delta.parameters():
        p.grad = torch.full_like(p, 0.25)
    before = delta.A_e.detach().clone()
    optimizer.step()
    assert relative(delta.Ibar_A_e, 0.15 * ((before - 0.125) * 0.25).abs()) < 1e-12


def test_score_of_a_rank_adds_gate_and_means() -> None:
    _, delta = layer()
    names = ("A_e", "B_e", "E")
    for key, name in enumerate(names):
        for mean in ("Ibar", "Ubar"):
            buffer = getattr(delta, f"{mean}_{name}")
            buffer.copy_(tiny.numbers(*buffer.shape, key=key).abs())
    products = {n: getattr(delta, f"Ibar_{n}") * getattr(delta, f"Ubar_{n}") for n in names}
    for k, found in enumerate(delta.gates[0].scores(delta)):
        wanted = products["E"][k] + products["A_e"][k].mean() + products["B_e"][:, k].mean()
        assert float(found) == pytest.approx(float(wanted))


@pytest.mark.parametrize(
    ("layer_count", "expected"),
    [
        (1, [96, 95, 92, 87, 84, 81, 80, 80]),
        (224, [21504, 21490, 20702, 19667, 18872, 18316, 18000, 17920]),
    ],
)
def test_published_budgets(layer_count: int, expected: list[int]) -> None:
    """r_e 96, target 80, tinit 235, tfinal 780 of 1562 steps: the numbers of the method's page."""
    times = [235, 236, 300, 400, 500, 600, 700, 782]
    start, end = 96 * layer_count, 80 * layer_count
    found = [screening.budget(t, 235, 1562 - 780, start, end, power=2) for t in times]
    assert found == expected
    curve = [screening.budget(t, 235, 782, start, end, power=2) for t in range(1562)]
    assert curve == sorted(curve, reverse=True)
    assert (curve[0], curve[-1]) == (start, end)


def test_schedule_in_steps_and_shares() -> None:
    _, delta = layer(tinit=0.15, tfinal=0.5, total_steps=1562)
    assert screening.window(delta) == (234, 781)
    _, delta = layer(tinit=235, tfinal=780, total_steps=1562)
    assert screening.window(delta) == (235, 782)
    _, delta = layer(tinit=6, tfinal=5, total_steps=10)
    with pytest.raises(ValueError, match=r"tinit = 6 and tfinal = 5 leave no step .* = 10"):
        screening.window(delta)


def alive(model: Any) -> int:
    """Expert ranks that act, over all layers."""
    return sum(int((d.E * d.keep != 0).sum()) for d in deltas(model))


def test_exactly_the_budget_is_alive_after_each_screening() -> None:
    """And between screenings masked ranks stay trainable and regrow."""
    model = wrap(total_steps=20, tinit=2, tfinal=6, deltaT=3)
    count = len(deltas(model))
    optimizer = adamw(model, 1e-2)
    seen = {}
    for t in range(1, 21):
        steps(model, optimizer, 1)
        seen[t] = alive(model)
    budget = {t: screening.budget(t, 2, 14, 6 * count, 3 * count, 2) for t in range(1, 21)}
    assert {t: seen[t] for t in (3, 6, 9, 12)} == {t: budget[t] for t in (3, 6, 9, 12)}
    assert seen[4] > budget[3]  # regrown
    assert [seen[t] for t in range(14, 21)] == [3 * count] * 7  # for good
    assert all(int(d.keep.sum()) <= 6 for d in deltas(model))


def test_ties_leave_exactly_the_budget() -> None:
    model = wrap(total_steps=20, tinit=2, tfinal=6, deltaT=1, orth_reg_weight=0.0)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    count = len(deltas(model))
    with torch.no_grad():
        for delta in deltas(model):
            delta.E.fill_(1.0)
    for t in range(1, 15):
        for p in trained(model).values():
            p.grad = torch.zeros_like(p)  # every score is 0
        optimizer.step()
        with torch.no_grad():
            assert alive(model) == screening.budget(t, 2, 14, 6 * count, 3 * count, 2)
            if t < 14:
                for delta in deltas(model):
                    delta.E.fill_(1.0)
    whole, none = divmod(3 * count, 6)  # ties go to the lower layer, then the lower rank
    assert not none
    kept = [d.keep.tolist() for d in deltas(model)]
    assert kept == [[1.0] * 6] * whole + [[0.0] * 6] * (count - whole)


def test_nothing_is_masked_before_the_budget_falls() -> None:
    model = wrap(total_steps=20, tinit=10, tfinal=5, deltaT=1)
    optimizer = adamw(model, 1e-2)
    steps(model, optimizer, 10)
    assert alive(model) == 6 * len(deltas(model))


def test_no_rank_revives_after_the_final_choice() -> None:
    model = wrap(total_steps=60, tinit=2, tfinal=50, deltaT=2)
    optimizer = adamw(model, 1e-2)
    steps(model, optimizer, 10)
    chosen = [d.keep.clone() for d in deltas(model)]
    assert alive(model) == 3 * len(chosen)
    for delta in deltas(model):
        assert delta.Ibar_A_e is None  # the averages are freed
        assert delta.Ubar_E is None
    steps(model, optimizer, 50)
    for delta, keep in zip(deltas(model), chosen, strict=True):
        assert torch.equal(delta.keep, keep)
        assert not delta.gate()[-6:][keep == 0].any()


def test_a_missing_gradient_raises() -> None:
    model = wrap()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    model(**batch(model)).loss.backward()
    deltas(model)[3].E.grad = None
    with pytest.raises(RuntimeError, match="E has no gradient after the step, so its importance"):
        optimizer.step()
