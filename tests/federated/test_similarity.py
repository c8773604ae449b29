"""Similarity of the clients' factors: a naive loop, its invariances, and what a server sees."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.federated import Client, algorithm
from plait.federated.adapter import Layer, StateDict
from plait.federated.similarity import factor_similarity
from tests.support.clients import clients_of, het_clients, states_of, uploads_of


def naive(matrices: list[list[Tensor]]) -> dict[str, float]:
    """The formulas by projectors, pair by pair; matrices: layer -> client -> (n, k)."""
    sums: dict[str, list[float]] = {"cosine": [], "overlap": [], "chance": []}
    for layer in matrices:
        for i in range(len(layer)):
            for j in range(i):
                x, y = layer[i].double(), layer[j].double()
                if x.shape == y.shape:
                    total = sum(float(a * b) for a, b in zip(x.flatten(), y.flatten(), strict=True))
                    sums["cosine"].append(total / float(x.norm() * y.norm()))
                P, Q = (m @ torch.linalg.inv(m.T @ m) @ m.T for m in (x, y))  # full column rank
                k = min(x.shape[1], y.shape[1])
                sums["overlap"].append(float(torch.trace(P @ Q)) / k)
                sums["chance"].append(max(x.shape[1], y.shape[1]) / len(x))
    return {name: sum(v) / len(v) for name, v in sums.items() if v}


def close(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert found == pytest.approx(dict(expected), abs=1e-9)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 1000))
def test_a_naive_loop_agrees(ranks: list[int], seed: int) -> None:
    clients = clients_of(ranks)
    states = states_of(clients, seed)
    found = factor_similarity(states, clients)
    assert list(found) == ["A", "B"]
    for kind in "AB":
        parts = [[s[f"{n}/{kind}"] for s in states.values()] for n in ("one", "two")]
        close(found[kind], naive([[x.T for x in p] for p in parts] if kind == "A" else parts))
    assert ("cosine" in found["A"]) == (len(set(ranks)) < len(ranks))


def test_fedalora_het_has_products() -> None:
    clients = het_clients([4, 2, 3], 2)
    states = states_of(clients)
    found = factor_similarity(states, clients)
    assert list(found) == ["A", "M A", "P"]
    for kind, of in (
        ("M A", lambda s, n: (s[f"{n}/M"].double() @ s[f"{n}/A"].double()).T),
        ("P", lambda s, n: s[f"{n}/B2"].double() @ s[f"{n}/B1"].double()),
    ):
        close(found[kind], naive([[of(s, n) for s in states.values()] for n in ("one", "two")]))
    assert "cosine" in found["P"]  # one shape, whatever the ranks
    assert "cosine" not in found["A"]
    for payload in ("product", "auto"):  # a server sees the products alone, formed or not
        method = algorithm("fedalora_het", common_rank=2, payload=payload)
        seen = factor_similarity(uploads_of(method, clients, states), clients)
        assert list(seen) == ["P"]
        assert seen["P"] == pytest.approx(found["P"], abs=1e-6)


def test_the_overlap_ignores_the_basis_and_the_cosine_does_not() -> None:
    clients = clients_of([3, 3])
    states = states_of(clients)
    gen = torch.Generator().manual_seed(1)
    for client in states.values():
        for key in client:
            client[key] = states["c0"][key].clone()
    close(factor_similarity(states, clients)["A"], {"cosine": 1, "overlap": 1, "chance": 13 / 28})
    R = torch.randn(3, 3, generator=gen)
    for name in ("one", "two"):
        states["c1"][f"{name}/A"] = R @ states["c0"][f"{name}/A"]
        states["c1"][f"{name}/B"] = states["c0"][f"{name}/B"] @ torch.linalg.inv(R)
    turned = factor_similarity(states, clients)
    for kind in "AB":
        assert turned[kind]["overlap"] == pytest.approx(1, abs=1e-6)
        assert turned[kind]["cosine"] < 0.9


def test_spans_in_one_another_and_at_right_angles() -> None:
    layer = {"x": Layer(4, 4, 2, 1.0)}
    clients = {n: Client.lora(n, layer) for n in "ab"}
    eye = torch.eye(4)
    states = {"a": {"x/A": eye[:2], "x/B": eye[:, :2]}, "b": {"x/A": eye[2:], "x/B": eye[:, 1:2]}}
    found = factor_similarity(states, clients)
    close(found["A"], {"cosine": 0, "overlap": 0, "chance": 0.5})
    close(found["B"], {"overlap": 1, "chance": 0.5})


def test_a_server_sees_what_is_shared() -> None:
    clients = clients_of([2, 2, 2])
    states = states_of(clients)
    whole = factor_similarity(states, clients)
    for key, kind in (("fedsa", "A"), ("fedalora", "B")):
        seen = factor_similarity(uploads_of(algorithm(key), clients, states), clients)
        assert seen == {kind: whole[kind]}
    assert factor_similarity({}, clients) == {}
    assert factor_similarity({"c0": states["c0"]}, clients) == {}


def test_zero_factors_and_other_tensors_are_left_out() -> None:
    clients = clients_of([2, 2])
    states = states_of(clients)
    for name in ("one", "two"):
        states["c0"][f"{name}/B"].zero_()
    extra: StateDict = {
        "one/t": torch.ones(2, 2), "one/experts": torch.ones(2, 5, 2), "head/A": torch.ones(2, 7),
        "trunk:one/trunk_A": torch.ones(2, 7), "one/B_bar": torch.ones(5, 2),
    }  # fmt: skip
    found = factor_similarity({n: s | extra for n, s in states.items()}, clients)
    assert list(found) == ["A"]


def test_large_federations_are_measured_on_some() -> None:
    clients = clients_of([2] * 9)
    states = states_of(clients)
    some = {name: states[name] for name in ("c0", "c3", "c6")}
    assert factor_similarity(states, clients, most=3) == factor_similarity(some, clients)
    with pytest.raises(ValueError, match=r"similarity: most = 1\. Give 2 clients or more"):
        factor_similarity(states, clients, most=1)
