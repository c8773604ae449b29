"""Clipping, noise and the account of them."""

import math
import sys
from typing import Any

import pytest
import torch

from plait.federated import State, algorithm, weights_of
from plait.federated.guard import GuardOptions
from plait.federated.methods import norm
from plait.federated.privacy import Privacy, clip, gaussian_noise
from tests.support.clients import clients_of, het_clients, states_of, uploads_of

KEY = "0123456789abcdef"
OPEN = GuardOptions(max_norm_ratio=math.inf)


def test_clip() -> None:
    change = {"a": torch.full((3,), 2.0), "b": torch.full((4,), -1.0)}
    assert norm(change) == 4
    clipped = clip(change, 1.0)
    assert norm(clipped) == pytest.approx(1.0, abs=1e-7)
    assert torch.allclose(clipped["a"], change["a"] / 4)
    assert all(torch.equal(x, change[k]) for k, x in clip(change, 4.0).items())


def test_noise_is_keyed_and_normal() -> None:
    like = torch.zeros(200, 50, dtype=torch.float64)
    one = gaussian_noise(KEY, 1, "x/B", like)
    assert torch.equal(one, gaussian_noise(KEY, 1, "x/B", like))
    others = [
        gaussian_noise(KEY + "g", 1, "x/B", like),
        gaussian_noise(KEY, 2, "x/B", like),
        gaussian_noise(KEY, 1, "x/A", like),
    ]
    for other in others:
        assert abs(float((one * other).mean())) < 0.05
    assert abs(float(one.mean())) < 0.03
    assert abs(float(one.std()) - 1) < 0.03
    assert 0.0015 < float((one.abs() > 3).double().mean()) < 0.0045


@pytest.mark.parametrize("key", ["fedit", "ffa", "fedalora"])
def test_the_private_mean_against_a_loop(key: str) -> None:
    clients = clients_of([2, 2, 2])
    states = states_of(clients)
    method = algorithm(key)
    client = clients["c0"]
    start = State(0, {k: torch.full(s, 0.1) for k, s in method.share(client).items()})
    uploads = uploads_of(method, clients, states)
    privacy = Privacy(clip=1.5, noise=0.7, key=KEY)
    weights = weights_of({"c0": 1, "c1": 1, "c2": 10**6})  # claims weigh nothing here
    found = method.aggregate(uploads, weights, start, clients, privacy.mean(4.0, 1))
    total = {k: torch.zeros(x.shape, dtype=torch.float64) for k, x in start.tensors.items()}
    for name in uploads:
        change = {k: x.double() - start.tensors[k].double() for k, x in uploads[name].items()}
        size = math.sqrt(sum(float((x**2).sum()) for x in change.values()))
        assert size > 1.5
        for k, x in change.items():
            total[k] += x * 1.5 / size
    for k, x in found.tensors.items():
        noise = 0.7 * 1.5 * gaussian_noise(KEY, 1, k, total[k])
        expected = start.tensors[k].double() + (total[k] + noise) / 4
        assert float((x.double() - expected).abs().max()) < 1e-6
        assert x.dtype == torch.float32


def test_one_client_moves_the_sum_by_clip_at_most() -> None:
    clients = clients_of([2] * 4)
    states = states_of(clients)
    states["c3"] = {k: 1e9 * x for k, x in states["c3"].items()}
    method, privacy = algorithm("fedit"), Privacy(clip=0.5, noise=1e-6, key=KEY)
    start = State(0, {k: torch.zeros(s) for k, s in method.share(clients["c0"]).items()})
    uploads = uploads_of(method, clients, states)
    few = {name: uploads[name] for name in ("c0", "c1", "c2")}
    ends = [
        method.aggregate(some, {}, start, clients, privacy.mean(4.0, 1)).tensors
        for some in (uploads, few)
    ]
    moved = norm({k: ends[0][k] - ends[1][k] for k in ends[0]})
    assert moved == pytest.approx(0.5 / 4, rel=1e-4)


def test_products_are_clipped_as_products() -> None:
    clients = het_clients([4, 2], 3, {"x": (7, 5)})
    states = states_of(clients)
    method = algorithm("fedalora_het", common_rank=3)
    start = State(0, {"x/B_bar": torch.ones(5, 3)})
    privacy = Privacy(clip=0.1, noise=1e-9, key=KEY)
    uploads = uploads_of(method, clients, states)
    end = method.aggregate(uploads, {}, start, clients, privacy.mean(2.0, 1))
    assert norm({"x": end.tensors["x/B_bar"] - 1}) <= 0.1 + 1e-6


def test_what_the_guarantee_does_not_cover() -> None:
    privacy = Privacy(clip=1.0, noise=0.8, key=KEY)
    privacy.check(algorithm("fedit"), OPEN, 8)
    cases: list[tuple[Any, Any, int, str]] = [
        (algorithm("flora"), OPEN, 8, "privacy: flora does not average one payload shape"),
        (algorithm("fedalora_het", payload="auto"), OPEN, 8, 'Use payload = "product"'),
        (
            algorithm("fedit"),
            GuardOptions(max_norm_ratio=math.inf, aggregator="median"),
            8,
            "sensit",
        ),
        (algorithm("fedit"), GuardOptions(), 8, r"max_norm_ratio = 10 lets one client's norm"),
        (algorithm("fedit"), OPEN, 10**6, r"delta = 1e-05 with 1000000 clients allows to publish"),
    ]
    for method, guard, clients, text in cases:
        with pytest.raises(ValueError, match=text):
            privacy.check(method, guard, clients)
    for name, value, text in (
        ("clip", 0.0, r"privacy\.clip = 0\.0 is out of range\. Give more than 0\."),
        ("noise", 0.0, r"privacy\.noise = 0\.0 is out of range\. Give more than 0\."),
        (
            "delta",
            1.0,
            r"privacy\.delta = 1\.0 is out of range\. Give more than 0 and less than 1\.",
        ),
        ("key", "short", r"privacy\.key has 5 characters"),
    ):
        with pytest.raises(ValueError, match=text):
            Privacy(**{"clip": 1.0, "noise": 0.8, "key": KEY, name: value})
    with pytest.raises(ValueError, match=r"sampling rate = 0\. Give a share"):
        privacy.report(0, 8, 1)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(
        ImportError, match=r'needs opacus\. Install it with: pip install "plait\[pri'
    ):
        Privacy(clip=1.0, noise=0.8, key=KEY).report(0.1, 100, 10)


def test_the_account() -> None:
    """Against the closed form at full participation, and figures of another accountant."""
    pytest.importorskip("opacus")
    full = Privacy(clip=1.0, noise=1.2, key=KEY).report(1.0, 8, 20)

    def epsilon(a: float) -> float:  # RDP of the Gaussian, then the conversion of Balle et al. 2020
        rdp = 20 * a / (2 * 1.2**2)
        return rdp + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1)

    assert full.epsilon == pytest.approx(min(epsilon(1 + k / 10) for k in range(1, 100)), rel=1e-9)
    # dp-accounting 0.6.0, RdpAccountant, PoissonSampledDpEvent(0.01, GaussianDpEvent(1.1)) 1000 x
    sampled = Privacy(clip=1.0, noise=1.1, key=KEY).report(0.01, 1000, 1000)
    assert sampled.epsilon == pytest.approx(1.7117701662, rel=1e-5)
    assert str(full) == (
        "(23.6, 1e-05)-DP for one client of 8: 20 rounds, sampling rate 1 (Poisson), clip 1, noise "
        "multiplier 1.2. The server is trusted."
    )
    more = Privacy(clip=1.0, noise=1.2, key=KEY).report(1.0, 8, 40)
    assert more.epsilon > full.epsilon
