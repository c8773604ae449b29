"""The guard: what stays out, what a claim weighs, and means that bear bad updates."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.federated import algorithm, weighted_mean, weights_of
from plait.federated.guard import Guard, GuardOptions, TooFewUpdates, krum, median, trimmed_mean
from plait.federated.payload import Reason, Rejected
from tests.support.clients import begun, clients_of, het_clients, states_of, uploads_of

FAULT = Rejected(Reason.NON_FINITE, "bad", "x has NaN")


def updates(n: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Payloads of n like clients around one value."""
    gen = torch.Generator().manual_seed(seed)
    return {
        f"c{i}": {
            "x": torch.ones(3, 2) + 0.1 * torch.randn(3, 2, generator=gen),
            "y": torch.ones(1),
        }
        for i in range(n)
    }


def test_norm_filter() -> None:
    guard = Guard()
    found = guard.screen({"a": 1.0, "b": 1.2, "c": 9.0, "d": 10.9, "e": 0.8})
    assert found == {}
    found = guard.screen({"a": 1.0, "b": 1.2, "c": 1e6, "d": 12.1, "e": 0.8})
    assert set(found) == {"c", "d"}
    assert found["c"].reason is Reason.NORM_OUTLIER
    assert str(found["d"]) == (
        "client 'd': norm_outlier: norm 12.1, above 10 x the median 1.2 of 5 updates"
    )
    assert set(guard.screen({"a": 1.0, "b": 1.0, "c": float("nan")})) == {"c"}
    assert guard.screen({"a": 1.0, "b": 1e9}) == {}  # two updates have no median worth the name
    assert guard.screen({"a": 0.0, "b": 0.0, "c": 1.0}) == {}


def test_the_norm_filter_of_a_median_of_zero() -> None:
    """A majority that sends nothing does not open the door to anything."""
    guard = Guard()
    assert guard.screen({"a": 0.0, "b": 0.0, "c": 9.0}) == {}
    found = guard.screen({"a": 0.0, "b": 0.0, "c": 1e12, "d": 0.0})
    assert str(found["c"]) == (
        "client 'c': norm_outlier: norm 1e+12, above 10 x 1, for the median is 0 of 4 updates"
    )
    assert set(guard.screen({"a": 0.0, "b": 0.0, "c": 1e38})) == {"c"}


def test_a_norm_beyond_fp32_is_rejected_whatever_the_others_are() -> None:
    free = Guard(GuardOptions(max_norm_ratio=math.inf))
    for guard in (Guard(), free):
        assert set(guard.screen({"a": 1.0, "b": 1e38})) == {"b"}
        assert set(guard.screen({"a": math.nan})) == {"a"}
        assert set(guard.screen({"a": 1e38, "b": 1e38, "c": 1.0})) == {"a", "b"}
        assert set(guard.screen({"a": math.nan, "b": 1.0, "c": 1.0, "d": 1.0})) == {"a"}
    assert free.screen({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1e12}) == {}


@pytest.mark.parametrize("key", ["fedit", "fedalora", "flora", "flexlora", "hetlora", "fedex"])
def test_a_huge_update_leaves_a_server_whose_others_send_nothing(key: str) -> None:
    clients = clients_of([2] * 3)
    states = states_of(clients)
    method = algorithm(key)
    start = begun(method, clients, states)
    uploads = uploads_of(method, clients, states)
    sizes = {"c0": 0.0, "c1": 0.0}
    huge = {k: torch.full_like(x, 1e38) for k, x in uploads["c2"].items()}
    sizes["c2"] = method.size(huge, clients["c2"], start.tensors)
    assert set(Guard().screen(sizes)) == {"c2"}


@pytest.mark.parametrize("key", ["fedit", "fedalora", "flora", "flexlora", "hetlora", "fedex"])
def test_a_scaled_update_is_an_outlier_in_every_method(key: str) -> None:
    clients = clients_of([2] * 5)
    states = states_of(clients)
    method = algorithm(key)
    start = begun(method, clients, states)
    states["c3"] = {k: 1e6 * x for k, x in states["c3"].items()}
    uploads = uploads_of(method, clients, states)
    sizes = {c: method.size(uploads[c], clients[c], start.tensors) for c in clients}
    assert set(Guard().screen(sizes)) == {"c3"}


def test_size_of_an_update() -> None:
    clients = clients_of([2], shapes={"x": (4, 3)})
    state = states_of(clients)["c0"]
    A, B = state["x/A"].double(), state["x/B"].double()
    flora = algorithm("flora").size(state, clients["c0"], {})
    assert flora == pytest.approx(2 * float((B @ A).norm()), rel=1e-6)
    reference = {"x/A": torch.ones(2, 4), "x/B": torch.ones(3, 2)}
    fedit = algorithm("fedit").size(state, clients["c0"], reference)
    assert fedit == pytest.approx(
        float(((A - 1) ** 2).sum() + ((B - 1) ** 2).sum()) ** 0.5, rel=1e-6
    )


def test_size_of_unequal_ranks_is_that_of_the_product() -> None:
    clients = het_clients([1, 8], 4, {"x": (12, 20)})
    states = states_of(clients)
    for name, client in clients.items():
        P = states[name]["x/B2"] @ states[name]["x/B1"]
        for payload in ("product", "auto"):
            method = algorithm("fedalora_het", common_rank=4, payload=payload)
            upload = method.payload_up(states[name], client)
            size = method.size(upload, client, {})
            assert size == pytest.approx(float(P.norm()), rel=1e-6)


def test_claimed_counts_are_capped() -> None:
    guard = Guard()
    assert guard.counts({"a": 10, "b": 12, "c": 10**12}) == {"a": 10, "b": 12, "c": 120}
    assert guard.counts({"a": 10, "b": 10**12}) == {"a": 10, "b": 100}
    assert guard.counts({"a": 10**12}) == {"a": 10**12}
    assert guard.counts({}) == {}
    free = Guard(GuardOptions(max_count_ratio=math.inf))
    assert free.counts({"a": 10, "b": 10**12}) == {"a": 10, "b": 10**12}
    weights = weights_of(guard.counts({"a": 10, "b": 12, "c": 10**12}))
    assert weights["c"] < 0.85


def test_quarantine() -> None:
    guard = Guard(GuardOptions(quarantine_after=2))
    sizes = {"a": 1.0, "b": 1.0, "c": 1.0, "bad": 1.0}
    for n in range(2):
        assert not guard.quarantined("bad"), n
        assert guard.screen(sizes) == {}
        guard.count(FAULT)
    assert guard.quarantined("bad")
    found = guard.screen(sizes)
    assert {c: x.reason for c, x in found.items()} == {"bad": Reason.QUARANTINED}
    assert guard.rejections == {"bad": {"non_finite": 2}}
    again = Guard(GuardOptions(quarantine_after=2), guard.rejections)  # as a checkpoint restores it
    assert again.quarantined("bad")
    # It does not move the median either: an outlier is one among the free clients.
    found = guard.screen({"a": 1.0, "b": 1.0, "c": 1.0, "bad": 1e9})
    assert found["bad"].reason is Reason.NORM_OUTLIER


def test_faults_of_the_transport_do_not_quarantine() -> None:
    guard = Guard(GuardOptions(quarantine_after=1))
    for reason in ("wrong_run", "stale_round", "duplicate", "unknown_client", "quarantined"):
        guard.count(Rejected(Reason(reason), "late", ""))
    assert not guard.quarantined("late")
    assert sum(guard.rejections["late"].values()) == 5


def test_too_few_updates() -> None:
    guard = Guard(GuardOptions(min_updates=3))
    guard.require(["a", "b", "c"], 1)
    guard.count(FAULT)
    with pytest.raises(
        TooFewUpdates, match=r"round 4: 2 updates were accepted, 3 are needed \(rej"
    ):
        guard.require(["a", "b"], 4)
    with pytest.raises(TooFewUpdates, match=r"rejections of the run: non_finite 1"):
        guard.require([], 4)
    with pytest.raises(TooFewUpdates, match=r"round 1: 0 updates.*rejections of the run: none"):
        Guard().require([], 1)


@settings(max_examples=25)
@given(n=st.integers(1, 9), seed=st.integers(0, 99))
def test_robust_means_against_loops(n: int, seed: int) -> None:
    given_ = updates(n, seed)
    x = torch.stack([given_[c]["x"] for c in sorted(given_)])
    flat = [[float(v) for v in row.flatten()] for row in x]
    cut = -(-n // 5)
    middle, trimmed = [], []
    for k in range(6):
        ordered = sorted(row[k] for row in flat)
        middle.append((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
        inner = ordered[cut : n - cut]
        trimmed.append(sum(inner) / len(inner) if inner else 0.0)
    found = median(given_, {}, {})["x"].flatten()
    assert torch.allclose(found, torch.tensor(middle), atol=1e-6)
    if n > 2 * cut:
        found = trimmed_mean(given_, {}, {})["x"].flatten()
        assert torch.allclose(found, torch.tensor(trimmed), atol=1e-6)
    if n >= 5:
        scores = []
        for i in range(n):
            far = sorted(
                sum((a - b) ** 2 for a, b in zip(flat[i], flat[j], strict=True))
                for j in range(n)
                if j != i
            )
            scores.append(sum(far[: n - 3]))
        best = scores.index(min(scores))
        assert torch.equal(krum(given_, {}, {})["x"], x[best])
        several = sorted(sorted(range(n), key=lambda i: (scores[i], i))[: n - 1])
        found = krum(given_, {}, {}, multi=True)["x"]
        assert torch.allclose(found, x[several].mean(0), rtol=0, atol=1e-6)


def test_a_share_that_floats_round_up_cuts_no_more() -> None:
    assert 0.28 * 25 > 7
    squares = {f"c{i:02}": {"x": torch.tensor([float(i * i)])} for i in range(25)}
    inner = [i * i for i in range(7, 18)]
    assert float(trimmed_mean(squares, {}, {}, trim=0.28)["x"]) == sum(inner) / len(inner)


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_a_fifth_of_flipped_signs_is_borne(aggregator: str) -> None:
    """10 clients, 2 send the negative of what they have, 10 times as large."""
    clients = clients_of([2] * 10)
    base = states_of(clients)["c0"]
    noise = states_of(clients, seed=1)
    states = {c: {k: x + 0.05 * noise[c][k] for k, x in base.items()} for c in clients}
    clean = {c: states[c] for c in clients if c not in ("c3", "c7")}
    for c in ("c3", "c7"):
        states[c] = {k: -10 * x for k, x in states[c].items()}
    method = algorithm("fedalora")
    start = begun(method, clients, states)
    options = GuardOptions(aggregator=aggregator, faulty=2)

    def error(mean: Any) -> float:
        uploads = uploads_of(method, clients, states)
        weights = weights_of(dict.fromkeys(uploads, 1))
        found = method.aggregate(uploads, weights, start, clients, mean).tensors
        true = weighted_mean(clean, weights_of(dict.fromkeys(clean, 1)), {})
        return max(float((x - true[k]).norm() / true[k].norm()) for k, x in found.items())

    assert error(weighted_mean) > 1
    assert error(options.mean(method)) < 0.1


def test_means_and_options_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"guard\.aggregator = 'median': flora does not average one"
    ):
        GuardOptions(aggregator="median").mean(algorithm("flora"))
    assert GuardOptions().mean(algorithm("flora")) is weighted_mean
    with pytest.raises(
        ValueError, match=r"guard\.aggregator = 'medain' is not known\. Did you mean"
    ):
        GuardOptions(aggregator="medain")
    with pytest.raises(ValueError, match=r"krum with faulty = 1 needs 5 updates, here are 4"):
        krum(updates(4), {}, {})
    with pytest.raises(ValueError, match=r"trimmed_mean with trim = 0\.4 leaves none of 2 updates"):
        trimmed_mean(updates(2), {}, {}, trim=0.4)
    for name, value, text in (
        ("max_norm_ratio", 0.5, "1 or more"),
        ("max_norm_ratio", float("nan"), "1 or more"),
        ("quarantine_after", 0, "1 or more"),
        ("min_updates", 0, "1 or more"),
        ("trim", 0.5, "0 or more and less than 0.5"),
    ):
        with pytest.raises(
            ValueError, match=rf"guard\.{name} = {value} is out of range\. Give {text}"
        ):
            GuardOptions(**{name: value})
