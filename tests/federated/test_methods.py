"""Federated methods on state dicts: identities, bytes, order, refusals."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from plait.core.events import PlaitWarning
from plait.federated import Client, State, algorithm, weighted_mean, weights_of
from plait.federated.adapter import Layer
from plait.federated.methods import (
    ALGORITHMS,
    FedALoraHet,
    Mapped,
    aggregation_error,
    product_norm,
    updates,
)
from tests.support.clients import (
    SHAPES,
    begun,
    clients_of,
    every,
    exact,
    gap,
    het_clients,
    states_of,
    uploads_of,
)

FP64, FP32 = torch.float64, torch.float32
TOLERANCE = {FP32: 1e-6, FP64: 1e-12}
COUNTS = {"c0": 10, "c1": 30, "c2": 25}
W = weights_of(COUNTS)


def one_round(key: str, clients: Any, states: Any, counts: Any = COUNTS, **options: Any) -> State:
    """The server's state after one round in which all take part."""
    method = algorithm(key, **options)
    method.check(clients)
    uploads = uploads_of(method, clients, states)
    start = begun(method, clients, states)
    return method.aggregate(uploads, weights_of(counts), start, clients)


def trunk(state: State, layer: str) -> torch.Tensor:
    """B A of the trunk."""
    return state.tensors[f"{layer}/trunk_B"] @ state.tensors[f"{layer}/trunk_A"]


# Identities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("key", ["fedit", "ffa"])
def test_with_a_common_A_the_mean_is_exact(key: str, dtype: torch.dtype) -> None:
    clients = clients_of([3, 3, 3])
    states = states_of(clients, dtype=dtype)
    for state in states.values():
        state |= {k: x for k, x in states["c0"].items() if k.endswith("/A")}
    found = one_round(key, clients, states).tensors
    for layer in SHAPES:
        A = found.get(f"{layer}/A", states["c0"][f"{layer}/A"])
        product = 2 * found[f"{layer}/B"] @ A
        assert gap(product, exact(clients, states, W, layer)) < TOLERANCE[dtype]


def test_fedit_is_not_exact_and_says_by_how_much() -> None:
    clients = clients_of([3, 3, 3])
    states = states_of(clients, dtype=FP64)
    found = one_round("fedit", clients, states).tensors
    errors = aggregation_error(states, W, clients)
    for layer in SHAPES:
        whole = exact(clients, states, W, layer)
        missed = whole - 2 * found[f"{layer}/B"] @ found[f"{layer}/A"]
        assert errors[layer] == pytest.approx(float(missed.norm() / whole.norm()), rel=1e-12)
        assert errors[layer] > 0.1
    same = dict.fromkeys(states, states["c0"])
    assert max(aggregation_error(same, W, clients).values()) < 1e-12


@settings(max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    s=st.lists(st.sampled_from([0.5, 1.0, 1.7, 2.0]), min_size=3, max_size=3),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    dtype=st.sampled_from([FP32, FP64]),
)
def test_flora_adds_the_exact_sum_to_the_trunk(
    ranks: list[int], s: list[float], n_in: int, n_out: int, dtype: torch.dtype
) -> None:
    clients = clients_of(ranks, s, {"x": (n_in, n_out)})
    states = states_of(clients, dtype=dtype)
    method = algorithm("flora")
    state = begun(method, clients, states)
    total = torch.zeros(n_out, n_in, dtype=FP64)
    for number in range(3):  # the trunk passes min(in, out) and is compressed, exactly
        states = states_of(clients, seed=number, dtype=dtype)
        state = method.aggregate(uploads_of(method, clients, states), W, state, clients)
        total += exact(clients, states, W, "x")
        # An SVD of fp32 factors in between: a few more roundings than a sum.
        assert gap(trunk(state, "x"), total) < TOLERANCE[dtype] * 10
        assert len(state.tensors["x/trunk_A"]) <= max(sum(ranks), min(n_in, n_out))


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_flora_stacks_as_written(dtype: torch.dtype) -> None:
    clients = clients_of([2, 1, 1], [2.0, 1.0, 0.5], {"x": (40, 30)})
    states = states_of(clients, dtype=dtype)
    found = one_round("flora", clients, states).tensors
    A = torch.cat([W[c] * clients[c].layers["x"].scaling * states[c]["x/A"] for c in sorted(W)])
    assert torch.equal(found["x/step_A"], A)
    assert torch.equal(found["x/step_B"], torch.cat([states[c]["x/B"] for c in sorted(W)], dim=1))
    assert (
        gap(found["x/step_B"] @ found["x/step_A"], exact(clients, states, W, "x"))
        < (TOLERANCE[dtype])
    )


def test_flora_to_a_tolerance_keeps_less_and_says_the_truth() -> None:
    clients = clients_of([4, 4, 4], shapes={"x": (40, 30)})
    states = states_of(clients, dtype=FP64)
    found = one_round("flora", clients, states, tolerance=0.3)
    whole = exact(clients, states, W, "x")
    assert len(found.tensors["x/trunk_A"]) < 12
    assert 0.01 < float((trunk(found, "x") - whole).norm() / whole.norm()) <= 0.3
    with pytest.raises(ValueError, match=r"flora: tolerance = 1\. Give 0 or more, below 1\."):
        algorithm("flora", tolerance=1)


def test_a_client_that_missed_rounds_gets_the_same_trunk() -> None:
    method, clients = algorithm("flora"), clients_of([2, 3])
    states = [states_of(clients, seed=n) for n in range(4)]
    state, mine = begun(method, clients, states[0]), {}
    for number, local in enumerate(states):
        uploads = uploads_of(method, clients, local)
        state = method.aggregate(uploads, weights_of({"c0": 1, "c1": 2}), state, clients)
        down = method.payload_down(state, clients["c0"], held=number)
        assert not any("trunk" in key for key in down)
        mine = method.next_trunk(mine, down)
    late = method.next_trunk({}, method.payload_down(state, clients["c1"], held=1))
    assert mine.keys() == late.keys()
    assert all(torch.equal(mine[key], late[key]) for key in mine)
    again = method.payload_down(state, clients["c0"], held=4)
    assert method.next_trunk(mine, again) is mine  # a round that is repeated adds nothing twice


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_flexlora_gives_the_best_part_of_the_sum(dtype: torch.dtype) -> None:
    ranks, s = [5, 2, 1], [2.0, 1.0, 0.5]
    clients = clients_of(ranks, s, {"x": (7, 5)})
    states = states_of(clients, dtype=dtype)
    found = one_round("flexlora", clients, states)
    whole = exact(clients, states, W, "x")
    U, S, Vh = torch.linalg.svd(whole)
    for client, r in zip(clients.values(), ranks, strict=True):
        down = algorithm("flexlora").payload_down(found, client)
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        assert down["x/A"].shape == (r, 7)
        product = client.layers["x"].scaling * down["x/B"] @ down["x/A"]
        assert gap(product, best) < 3 * TOLERANCE[dtype]
    full = algorithm("flexlora").payload_down(found, clients["c0"])
    assert gap(2 * full["x/B"] @ full["x/A"], whole) < 3 * TOLERANCE[dtype]


def test_flexlora_leaves_no_rank_dead() -> None:
    """A client of rank 6 after a round of rank-1 clients: the rest starts as LoRA does."""
    clients = clients_of([6, 1, 1], shapes={"x": (9, 8)})
    states = states_of(clients)
    method = algorithm("flexlora")
    uploads = uploads_of(method, clients, states)
    few = {name: uploads[name] for name in ("c1", "c2")}
    weights = weights_of({"c1": 1, "c2": 1})
    state = method.aggregate(few, weights, begun(method, clients, states), clients)
    down = method.payload_down(state, clients["c0"])
    assert down["x/A"].shape == (6, 9)
    assert (down["x/A"] != 0).any(1).all()
    assert gap(2 * down["x/B"] @ down["x/A"], exact(clients, states, weights, "x")) < 1e-5
    # Before the first sum there is nothing to send.
    assert method.payload_down(begun(method, clients, states), clients["c0"]) == {}


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("side", [60, 6])  # deviation pairs, and dense
def test_fedex_is_exact_in_either_form(side: int, dtype: torch.dtype) -> None:
    clients = clients_of([2, 2, 2], shapes={"x": (side, side + 1)})
    states = states_of(clients, dtype=dtype)
    found = one_round("fedex", clients, states)
    A, B = (found.tensors[f"x/{name}"] for name in "AB")
    whole = exact(clients, states, W, "x")
    residual = trunk(found, "x")
    assert gap(2 * B @ A + residual, whole) < 2 * TOLERANCE[dtype]
    assert ("x/step" in found.tensors) == (side == 6)
    direct = whole - 2 * B.double() @ A.double()
    assert gap(residual, direct) < 3 * TOLERANCE[dtype]
    sizes = torch.linalg.svdvals(residual.double())
    assert int((sizes > 1e-5 * sizes[0]).sum()) == (3 - 1) * 2


def test_fedex_of_one_client_has_no_residual() -> None:
    clients = clients_of([3])
    found = one_round("fedex", clients, states_of(clients), {"c0": 7})
    for layer in SHAPES:
        assert not trunk(found, layer).any()


def test_equal_ranks_make_zeropad_fedit() -> None:
    clients = clients_of([3, 3, 3])
    states = states_of(clients)
    padded, plain = (
        algorithm(key).payload_down(one_round(key, clients, states), clients["c1"])
        for key in ("zeropad", "fedit")
    )
    assert padded.keys() == plain.keys()
    assert all(torch.equal(padded[k], plain[k]) for k in plain)


def test_equal_ranks_and_norms_make_hetlora_fedit_of_equal_weights() -> None:
    clients = clients_of([3, 3, 3])
    states = states_of(clients, dtype=FP64)
    for state in states.values():
        for layer in SHAPES:
            size = product_norm(state[f"{layer}/A"], state[f"{layer}/B"])
            state[f"{layer}/B"] = state[f"{layer}/B"] / size
    padded = algorithm("hetlora").payload_down(one_round("hetlora", clients, states), clients["c0"])
    plain = one_round("fedit", clients, states, dict.fromkeys(COUNTS, 1))
    for key, x in plain.tensors.items():
        assert gap(padded[key], x) < 1e-12


@pytest.mark.parametrize("key", ["zeropad", "hetlora"])
def test_padding_against_a_loop(key: str) -> None:
    ranks, s = [1, 4, 2], [2.0, 1.0, 0.5]
    clients = clients_of(ranks, s, {"x": (7, 5)})
    states = states_of(clients, dtype=FP64)
    p = dict(W)
    if key == "hetlora":
        norms = {
            c: clients[c].layers["x"].scaling * float((x["x/B"] @ x["x/A"]).norm())
            for c, x in states.items()
        }
        p = {c: n / sum(norms.values()) for c, n in norms.items()}
    found = one_round(key, clients, states)
    for client, r in zip(clients.values(), ranks, strict=True):
        down = algorithm(key).payload_down(found, client)
        A, B = torch.zeros(r, 7, dtype=FP64), torch.zeros(5, r, dtype=FP64)
        for (c, state), scaling in zip(states.items(), s, strict=True):
            for k in range(min(r, len(state["x/A"]))):
                A[k] += p[c] * state["x/A"][k]
                B[:, k] += p[c] * scaling * state["x/B"][:, k] / client.layers["x"].scaling
        assert gap(down["x/A"], A) < 1e-12
        assert gap(down["x/B"], B) < 1e-12


def test_padding_keeps_ranks_that_nobody_sent() -> None:
    clients = clients_of([4, 2], shapes={"x": (7, 5)})
    states = states_of(clients)
    method = algorithm("zeropad")
    start = begun(method, clients, states)
    upload = method.payload_up(states["c1"], clients["c1"])
    state = method.aggregate({"c1": upload}, {"c1": 1.0}, start, clients)
    assert torch.equal(state.tensors["x/A"][:2], states["c1"]["x/A"])
    assert torch.equal(state.tensors["x/A"][2:], start.tensors["x/A"][2:])
    assert torch.equal(state.tensors["x/B"][:, 2:], start.tensors["x/B"][:, 2:])
    down = method.payload_down(state, clients["c0"])
    assert torch.equal(down["x/B"][:, 2:], states["c0"]["x/B"][:, 2:])


@pytest.mark.parametrize("payload", ["product", "auto"])
def test_het_three_rounds_are_the_closed_form(payload: Any) -> None:
    q, ranks = 4, [8, 1, 2]
    clients = het_clients(ranks, q, {"x": (12, 20)})
    method = FedALoraHet(common_rank=q, payload=payload)
    method.check(clients)
    state = begun(method, clients, states_of(clients, dtype=FP64), q)
    B_bar = torch.zeros(20, q, dtype=FP64)
    for number in range(3):
        states = states_of(clients, seed=number, dtype=FP64)
        uploads = uploads_of(method, clients, states)
        state = method.aggregate(uploads, W, state, clients)
        for c, w in W.items():
            B_bar += w * states[c]["x/B2"] @ states[c]["x/B1"]
    assert gap(state.tensors["x/B_bar"], B_bar) < 1e-12
    assert [method.factored(c.layers["x"]) for c in clients.values()] == (
        [False, True, True] if payload == "auto" else [False] * 3
    )
    shapes = {tuple(u["x/P"].shape) for u in uploads.values() if "x/P" in u}
    assert shapes == {(20, q)}


def test_het_ranks_of_8_to_64_meet_in_one_shape() -> None:
    clients = het_clients([64, 64, 32, 32, 16, 16, 8, 8], 16, {"x": (96, 80)})
    method, states = algorithm("fedalora_het"), states_of(clients)
    uploads = uploads_of(method, clients, states)
    assert {tuple(u["x/P"].shape) for u in uploads.values()} == {(80, 16)}
    state = method.aggregate(
        uploads, weights_of(dict.fromkeys(clients, 1)), begun(method, clients, states, 16), clients
    )
    assert state.tensors["x/B_bar"].shape == (80, 16)
    assert FedALoraHet().wider(clients) == ["c0", "c1", "c2", "c3"]
    with pytest.warns(PlaitWarning, match="the rank of c0, c1, c2, c3 is above common_rank = 16"):
        method.check(clients)


# The server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*every(), algorithm("fedalora_het", common_rank=3)], ids=repr)
def test_order_of_arrival_changes_no_bit(method: Any) -> None:
    het = method.key == "fedalora_het"
    clients = het_clients([3, 3, 3], 3) if het else clients_of([3, 3, 3])
    states = states_of(clients)
    uploads, start = uploads_of(method, clients, states), begun(method, clients, states, 3)
    found = []
    for order in itertools.permutations(uploads):
        shuffled = {c: dict(reversed(uploads[c].items())) for c in order}
        counts = {c: COUNTS[c] for c in reversed(order)}
        found.append(method.aggregate(shuffled, weights_of(counts), start, clients).tensors)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(x, other[key]) for key, x in found[0].items())


@pytest.mark.parametrize("key", ["flora", "flexlora", "fedex"])
def test_layers_read_in_parts_give_the_same_bits(key: str, monkeypatch: Any) -> None:
    shapes = {"a": (7, 5), "b": (6, 6), "c": (5, 9)}
    clients = clients_of([3, 3, 3] if key == "fedex" else [3, 1, 2], shapes=shapes)
    states = states_of(clients)
    reads: list[str] = []
    method, start = algorithm(key), begun(algorithm(key), clients, states)
    uploads = Mapped(uploads_of(method, clients, states), lambda c, x: reads.append(c) or x)
    found = []
    for held in (updates.HELD, 1):
        monkeypatch.setattr(updates, "HELD", held)
        found.append(method.aggregate(uploads, W, start, clients).tensors)
    mean = 3 if key == "fedex" else 0
    assert len(reads) == (mean + 3) + (mean + 9)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][k]) for k, x in found[0].items())


def test_weights() -> None:
    assert weights_of({"b": 3, "a": 1}) == {"a": 0.25, "b": 0.75}
    assert list(weights_of({"b": 3, "a": 1})) == ["a", "b"]
    dropped = weights_of({"c0": 10, "c2": 25})
    assert dropped == {"c0": 10 / 35, "c2": 25 / 35}
    with pytest.raises(ValueError, match=r"client 'a' has 0 examples\. Leave it out\."):
        weights_of({"a": 0})
    with pytest.raises(ValueError, match="no client is left"):
        weights_of({})


def test_weighted_by_examples_is_the_pooled_mean() -> None:
    """Each example votes once: 1 client of 3 examples and 3 equal clients of 1 are the same."""
    clients = clients_of([2, 2])
    states = states_of(clients, dtype=FP64)
    found = weighted_mean(states, weights_of({"c0": 3, "c1": 1}), {})
    for key, x in found.items():
        pooled = torch.stack([states["c0"][key]] * 3 + [states["c1"][key]]).mean(0)
        assert gap(x, pooled) < 1e-15


@pytest.mark.parametrize("method", [*every(), algorithm("fedalora_het", common_rank=3)], ids=repr)
def test_an_empty_round_changes_nothing(method: Any) -> None:
    het = method.key == "fedalora_het"
    clients = het_clients([3, 3, 3], 3) if het else clients_of([3, 3, 3])
    states = states_of(clients)
    state = begun(method, clients, states, 3)
    state = method.aggregate(uploads_of(method, clients, states), W, state, clients)
    empty = method.aggregate({}, {}, state, clients)
    assert empty.round == state.round + 1
    steps = ("step", "step_A", "step_B")
    for key, x in state.tensors.items():
        if key.rpartition("/")[2] not in steps:
            assert torch.equal(empty.tensors[key], x)
    assert not any(key.rpartition("/")[2] in steps for key in empty.tensors)


def test_half_precision_payloads_are_summed_in_fp32() -> None:
    ones = {f"c{i:04}": {"x": torch.full((2,), 1.0).bfloat16()} for i in range(1000)}
    found = weighted_mean(ones, weights_of(dict.fromkeys(ones, 1)), {})
    assert found["x"].dtype == FP32
    assert gap(found["x"], torch.ones(2, dtype=FP64)) < 1e-5


class Work(TorchDispatchMode):
    """Counts the operations on tensors, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in out if isinstance(out, tuple | list) else [out]:
            self.written += x.numel() if isinstance(x, torch.Tensor) else 0
        return out


@pytest.mark.parametrize("key", ["fedalora", "hetlora", "flexlora", "flora", "fedex"])
def test_a_further_update_costs_a_few_passes_over_it(key: str) -> None:
    """Exact counts, for a clock measures the machine: a thousand updates are a second at most."""
    method, r = algorithm(key), 4 if key == "fedalora" else 2
    layers = {f"l{i}": Layer(64, 64, r, 2.0) for i in range(8)}
    client = Client.lora("c0", layers)
    state = states_of({"c0": client})
    start, upload = begun(method, {"c0": client}, state), method.payload_up(state["c0"], client)
    size = sum(x.numel() for x in upload.values())
    assert size == 2048
    seen = []
    for count in (100, 200):
        clients = {f"c{i}": Client.lora(f"c{i}", layers) for i in range(count)}
        weights = weights_of(dict.fromkeys(clients, 1))
        with Work() as work:
            method.aggregate(dict.fromkeys(clients, upload), weights, start, clients)
        seen.append(work)
    assert (seen[1].operations - seen[0].operations) / 100 <= 18 * len(layers)
    assert (seen[1].written - seen[0].written) / 100 <= 8 * size


# What travels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [SHAPES, {"x": (64, 48), "y": (48, 64)}], ids=["small", "wide"])
@pytest.mark.parametrize("method", every(), ids=repr)
def test_bytes_are_those_of_the_formula(method: Any, shapes: Any) -> None:
    clients = clients_of([3, 3, 3], shapes=shapes)
    states = states_of(clients)
    start = begun(method, clients, states)
    uploads = uploads_of(method, clients, states)
    state = method.aggregate(uploads, W, start, clients)
    for name, client in clients.items():
        assert set(uploads[name]) == set(method.share(client))
        assert {k: tuple(x.shape) for k, x in uploads[name].items()} == method.share(client)
        assert sum(x.numel() for x in uploads[name].values()) == method.numbers_up(client)
        down = method.payload_down(state, client, held=0)
        assert sum(x.numel() for x in down.values()) == method.numbers_down(
            client, clients.values()
        )
        private = method.private(states[name], client)
        shared = method.shared(states[name], client)
        frozen = {k for k in states[name] if method.frozen and k.endswith("/A")}
        assert not set(private) & set(shared)
        assert {*private, *shared, *frozen} == set(states[name])


@pytest.mark.parametrize("payload", ["product", "auto"])
def test_bytes_of_unequal_ranks(payload: Any) -> None:
    clients = het_clients([8, 1, 2], 4, {"x": (12, 20)})
    method, states = FedALoraHet(common_rank=4, payload=payload), states_of(clients)
    state = begun(method, clients, states, 4)
    for name, client in clients.items():
        upload = method.payload_up(states[name], client)
        assert sum(x.numel() for x in upload.values()) == method.numbers_up(client)
        down = method.payload_down(state, client)
        assert sum(x.numel() for x in down.values()) == method.numbers_down(client) == 4 * 20
        private = method.private(states[name], client)
        assert set(private) == {"x/A", "x/M"}
    clients = clients_of([5, 1, 2])
    for key in ("zeropad", "hetlora", "flexlora"):
        state = one_round(key, clients, states_of(clients))
        for client in clients.values():
            down = algorithm(key).payload_down(state, client)
            assert sum(x.numel() for x in down.values()) == algorithm(key).numbers_down(client)


RANKS = [64, 64, 32, 32, 16, 16, 8, 8]


@pytest.mark.parametrize(
    ("modules", "side", "fedit", "one", "padded", "het"),
    [  # LLaMA2-7B, q and v; Qwen2-7B, q and o. The last: Fed-ALoRA with B2 up, and B2, B1, M.
        (64, 4096, 8.388608, 4.194304, 49.283072, ("12.06", "12.12")),
        (56, 3584, 6.422528, 3.211264, 37.732352, ("9.232", None)),
    ],
)
def test_published_communication(
    modules: int, side: int, fedit: float, one: float, padded: float, het: tuple[str, str | None]
) -> None:
    """Millions of numbers up and down for a client and a round."""
    shapes = {f"l{i}": (side, side) for i in range(modules)}

    def both(key: str, clients: Any, **options: Any) -> float:
        method = algorithm(key, **options)
        sums = [method.numbers_up(c) + method.numbers_down(c) for c in clients.values()]
        return sum(sums) / len(sums) / 1e6

    equal = clients_of([8] * 8, shapes=shapes)
    assert both("fedit", equal) == fedit
    for key in ("ffa", "fedsa", "fedalora"):
        assert both(key, equal) == one
    unequal = clients_of(RANKS, shapes=shapes)
    # The paper's server sends all r_max ranks to every client; ours the r_i that it uses.
    up = sum(algorithm("zeropad").numbers_up(c) for c in unequal.values()) / 8
    assert (up + algorithm("zeropad").numbers_down(unequal["c0"])) / 1e6 == padded
    assert both("zeropad", unequal) < padded
    # The paper counts B2 up (Qwen), or B2, B1 and M (LLaMA), and B_bar down.
    clients = het_clients(RANKS, 16, shapes)
    down = algorithm("fedalora_het").numbers_down(clients["c0"])
    for names, figure in zip((["B2"], ["B2", "B1", "M"]), het, strict=True):
        if figure is None:
            continue
        sent = sum(
            a * b
            for client in clients.values()
            for key, (a, b) in client.shapes.items()
            if key.rpartition("/")[2] in names
        )
        assert f"{(sent / 8 + down) / 1e6:.4g}" == figure
    assert both("fedalora_het", clients) == 2 * 16 * side * modules / 1e6
    assert both("fedalora_het", clients, payload="auto") < both("fedalora_het", clients)


def test_private_state_keep_reset_redraw() -> None:
    clients = clients_of([2])
    client = clients["c0"]
    first, kept_all, fresh, sent = (states_of(clients, seed=n)["c0"] for n in range(4))
    for policy, source in (("keep", kept_all), ("reset", first), ("redraw", fresh)):
        method = algorithm("fedalora", private_policy=policy)
        kept = method.private(kept_all, client)
        down = method.shared(sent, client)
        state = method.begin(down, client, 2, first, kept, lambda: fresh)
        assert state.keys() == first.keys()
        for layer in SHAPES:
            assert torch.equal(state[f"{layer}/A"], source[f"{layer}/A"]), policy
            assert torch.equal(state[f"{layer}/B"], sent[f"{layer}/B"])
    method = algorithm("fedalora")
    never = method.begin(method.shared(sent, client), client, 5, first, None, lambda: fresh)
    assert torch.equal(never["one/A"], first["one/A"])


def test_a_head_is_averaged_or_stays() -> None:
    clients = {
        c.id: dataclasses.replace(c, shapes={**c.shapes, "score/weight": (3, 4)})
        for c in clients_of([2, 2, 2]).values()
    }
    states = states_of(clients)
    for method in every():
        uploads = uploads_of(method, clients, states)
        state = method.aggregate(uploads, W, begun(method, clients, states), clients)
        mean = sum(w * states[c]["score/weight"].double() for c, w in W.items())
        assert gap(state.tensors["score/weight"], mean) < 1e-6, method.key
        down = method.payload_down(state, clients["c1"])
        assert torch.equal(down["score/weight"], state.tensors["score/weight"])
        assert sum(x.numel() for x in uploads["c0"].values()) == method.numbers_up(clients["c0"])
        alone = dataclasses.replace(method, head="private")
        assert "score/weight" not in alone.share(clients["c0"])
        assert "score/weight" in alone.private(states["c0"], clients["c0"])


# What is refused ----------------------------------------------------------------------------------


def test_clients_that_a_method_cannot_serve() -> None:
    with pytest.raises(ValueError, match=r"fedit: there is no client\."):
        algorithm("fedit").check({})
    mixed = clients_of([2, 3])
    for key in ("fedit", "ffa", "fedsa", "fedalora", "fedex"):
        with pytest.raises(ValueError, match=rf"{key}: one has r = 3, s = 2 on client 'c1' and r"):
            algorithm(key).check(mixed)
    for key in ("local", "zeropad", "hetlora", "flexlora", "flora"):
        algorithm(key).check(mixed)
    with pytest.raises(ValueError, match=r"fedit: one has r = 2, s = 1 on client 'c1'"):
        algorithm("fedit").check(clients_of([2, 2], [2.0, 1.0]))
    other = {"c0": mixed["c0"], "c1": clients_of([2, 2], shapes={"one": (7, 5)})["c1"]}
    with pytest.raises(ValueError, match="clients 'c0' and 'c1' adapt different layers"):
        algorithm("flora").check(other)
    wide = {
        "c0": mixed["c0"],
        "c1": clients_of([2, 2], shapes={"one": (7, 6), "two": (6, 6)})["c1"],
    }
    with pytest.raises(ValueError, match="one has different sizes on clients 'c0' and 'c1'"):
        algorithm("flora").check(wide)
    headed = dict(mixed)
    headed["c1"] = dataclasses.replace(mixed["c1"], shapes={**mixed["c1"].shapes, "h/b": (2,)})
    with pytest.raises(ValueError, match="train different tensors outside the adapted layers"):
        algorithm("flora").check(headed)


def test_het_refuses_unlike_widths_and_scalings() -> None:
    clients = het_clients([4, 2], 3)
    with pytest.raises(ValueError, match=r"one of client 'c0' has common_rank = 3, the server 16"):
        algorithm("fedalora_het").check(clients)
    layers = {n: dataclasses.replace(x, scaling=1.0) for n, x in clients["c1"].layers.items()}
    clients["c1"] = dataclasses.replace(clients["c1"], layers=layers)
    with pytest.raises(ValueError, match=r"one has s = 1 on client 'c1' and 2 on 'c0'.*2 r on all"):
        algorithm("fedalora_het", common_rank=3).check(clients)


def test_patterns_cover_each_parameter_once() -> None:
    client = clients_of([2])["c0"]
    assert set(algorithm("fedavg", shared_names=("A",)).share(client)) == {"one/A", "two/A"}
    assert set(algorithm("fedavg", private_names=("one/*",)).share(client)) == {"two/A", "two/B"}
    assert len(algorithm("fedavg").share(client)) == 4
    with pytest.raises(ValueError, match=r"fedavg: one/A is both shared and private by shared_nam"):
        algorithm("fedavg", shared_names=("*",), private_names=("A",)).share(client)
    with pytest.raises(ValueError, match=r"fedavg: one/B is neither shared nor private"):
        algorithm("fedavg", shared_names=("one/A",), private_names=("two/*",)).share(client)
    with pytest.raises(ValueError, match=r"the pattern 'C' fits no parameter\. There are: A, B\."):
        algorithm("fedavg", shared_names=("A", "C")).share(client)
    with pytest.raises(ValueError, match=r"fedavg: nothing is shared"):
        algorithm("fedavg", private_names=("*",)).check({"c0": client})
    with pytest.raises(ValueError, match=r"has the shape \(3, 7\) on client 'c1' and \(2, 7\)"):
        algorithm("fedavg", shared_names=("A",)).check(_same_layers([2, 3]))


def _same_layers(ranks: list[int]) -> dict[str, Client]:
    """Clients that declare one rank and send factors of others."""
    found = clients_of(ranks)
    layers = found["c0"].layers
    return {c.id: dataclasses.replace(c, layers=layers) for c in found.values()}


def test_names_and_options() -> None:
    assert set(ALGORITHMS) == {
        *("local", "central", "fedit", "ffa", "fedsa", "fedalora", "fedalora_het"),
        *("flora", "hetlora", "zeropad", "flexlora", "fedex", "fedavg"),
    }
    with pytest.raises(
        ValueError, match=r"federated\.method = 'fedalra' is not known\. Did you me"
    ):
        algorithm("fedalra")
    with pytest.raises(ValueError, match=r"fedit: privte is not known\. Did you mean"):
        algorithm("fedit", privte=1)
    with pytest.raises(
        ValueError, match=r"private_policy = 'kept' is not known\. Use one of 'keep'"
    ):
        algorithm("fedsa", private_policy="kept")
    with pytest.raises(ValueError, match=r"ffa: init = 'per_client': its frozen A is common"):
        algorithm("ffa", init="per_client")
    with pytest.raises(ValueError, match=r"payload = 'factors' is not known\. Use 'product' or"):
        algorithm("fedalora_het", payload="factors")
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm("fedit").seed = 1  # type: ignore[misc]


def test_local_exchanges_nothing() -> None:
    clients = clients_of([2, 3])
    for key in ("local", "central"):
        method = algorithm(key)
        states = states_of(clients)
        assert method.payload_up(states["c0"], clients["c0"]) == {}
        assert method.numbers_up(clients["c0"]) == method.numbers_down(clients["c0"]) == 0
        assert method.private(states["c0"], clients["c0"]).keys() == states["c0"].keys()
        assert method.aggregate({}, {}, State(), clients) == State(1)
