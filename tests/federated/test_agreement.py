"""How far updates agree, and what the guard makes of it by default."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from plait.federated import agreement as module
from plait.federated import algorithm, weighted_mean, weights_of
from plait.federated.agreement import Agreement, agreement
from plait.federated.guard import Guard, GuardOptions, weigh
from plait.federated.methods import State
from plait.federated.payload import Reason, Rejected, pack_tensors, unpack_tensors
from plait.federated.protocol import Order, Reply
from plait.federated.server import ServerOptions
from plait.federated.state import Checkpoints
from tests.support.clients import begun, clients_of, het_clients, states_of, uploads_of
from tests.support.federation import federation

NAMES = tuple("abcdefghij")


def dense(key: str, update: Any, client: Any, down: Any) -> torch.Tensor:
    """The change of an update as one vector, formed as matrices."""
    parts = []
    for name, layer in client.layers.items():
        if key in ("flora", "zeropad", "fedex"):
            D = layer.scaling * update[f"{name}/B"].double() @ update[f"{name}/A"].double()
            if f"{name}/A" in down:
                D -= layer.scaling * down[f"{name}/B"].double() @ down[f"{name}/A"].double()
        elif key == "fedalora_het":
            D = update.get(f"{name}/P")
            D = update[f"{name}/B2"] @ update[f"{name}/B1"] if D is None else D
            D = D.double()
        else:
            D = torch.cat([(update[k] - down[k]).double().flatten() for k in sorted(update)])
            return D
        parts.append(D.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("key", ["fedit", "fedalora", "flora", "zeropad", "fedex", "fedalora_het"])
@pytest.mark.parametrize("held", [None, 40])
def test_norms_and_cosines_are_those_of_the_changes(
    key: str, held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the ranks, and whether or not all peers fit into memory at once."""
    if held is not None:
        monkeypatch.setattr(module, "HELD", held)
    ranks = [1, 2, 3, 2, 1, 3] if key in ("flora", "zeropad", "fedalora_het") else [2] * 6
    options: dict[str, Any] = {}
    clients = clients_of(ranks)
    if key == "fedalora_het":
        options, clients = {"common_rank": 4, "payload": "auto"}, het_clients(ranks, 4)
    method = algorithm(key, **options)
    states = states_of(clients)
    uploads = uploads_of(method, clients, states)
    start = begun(method, clients, states_of(clients, seed=5), q=4)
    found = agreement(uploads, method, start, clients)
    changes = {
        c: dense(key, uploads[c], clients[c], method.payload_down(start, clients[c]))
        for c in clients
    }
    for i, a in enumerate(found.names):
        assert found.norms[i] == pytest.approx(float(changes[a].norm()), rel=1e-6)
        for j, b in enumerate(found.names):
            cosine = float(changes[a] @ changes[b] / changes[a].norm() / changes[b].norm())
            assert float(found.cosines[i, j]) == pytest.approx(cosine, abs=1e-6)


def test_of_many_updates_each_is_compared_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEERS", 3)
    clients = clients_of([2] * 7)
    states, method = states_of(clients), algorithm("fedit")
    uploads = uploads_of(method, clients, states)
    found = agreement(uploads, method, State(0, {}), clients)
    assert list(found.peers) == [0, 3, 6]
    assert found.cosines.shape == (7, 3)
    assert len(found.of(0)) == 2
    assert len(found.of(1)) == 3


# Decisions --------------------------------------------------------------------------------------


def like(n: int, seed: int = 0, noise: float = 1.0, size: int = 400) -> torch.Tensor:
    """Changes (n, size) of clients with one direction in common, as long as their noise."""
    gen = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=gen)
    return common + noise * torch.randn(n, size, generator=gen)


def of(changes: torch.Tensor) -> Agreement:
    """The agreement of changes (n, size)."""
    x = changes.double()
    norms = x.norm(dim=1)
    scale = torch.outer(norms, norms).clamp(min=1e-300)
    names = [f"c{i}" for i in range(len(x))]
    return Agreement(
        names, norms.tolist(), list(range(len(x))), (x @ x.T / scale).round(decimals=9)
    )


def judged(changes: torch.Tensor, **options: Any) -> tuple[set[str], dict[str, float]]:
    rejections, votes = Guard(GuardOptions(**options)).judge(of(changes))
    assert all(one.reason is Reason.OPPOSED for one in rejections.values())
    return set(rejections), votes


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("n", [2, 4, 5, 10, 40])
def test_honest_updates_stay_as_they_are(n: int, noise: float) -> None:
    for seed in range(3):
        assert judged(like(n, seed, noise)) == (set(), {})
    assert judged(torch.zeros(n, 9)) == (set(), {})


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("attack", ["flip", "scaled", "copies"])
def test_a_minority_against_the_others_is_rejected(attack: str, count: int) -> None:
    x = like(10, noise=2.0)
    mean = x[count:].mean(0)
    made = {"flip": -x[:count], "scaled": -9.5 * mean, "copies": -mean.expand(count, -1)}[attack]
    x[:count] = made
    rejected, votes = judged(x)
    assert rejected == {f"c{i}" for i in range(count)}
    assert votes == {}


def test_copies_weigh_as_one() -> None:
    x = like(10)
    x[:2] = x[2:].mean(0) - 1.5 * x[2:].std(0)
    x[1] *= 1.7  # of another length
    assert judged(x, max_pull=math.inf) == (set(), {"c0": 0.5, "c1": 0.5})
    x[9] = x[8] + 0.01 * x[0]
    assert judged(x, max_pull=math.inf)[1] == dict.fromkeys(("c0", "c1", "c8", "c9"), 0.5)
    same = like(10)
    same[:9] = same[0]  # most pairs are alike: nobody is a copy
    assert judged(same) == (set(), {})


def test_long_changes_weigh_less() -> None:
    x = like(10)
    x[0] *= 8
    _, votes = judged(x)
    norms = of(x).norms
    assert votes == {"c0": pytest.approx(3 * statistics.median(norms) / norms[0])}
    assert judged(x, max_pull=math.inf) == (set(), {})


def test_clients_with_nothing_in_common_are_left_alone() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(10, 400, generator=gen)
    x[0] = -x[1:].mean(0)
    assert judged(x)[0] == set()


def test_weights_without_votes_keep_their_bits() -> None:
    weights = weights_of({"a": 3, "b": 7, "c": 1})
    assert weigh(weights, {}) == weights
    found = weigh(weights, {"b": 0.5})
    assert sum(found.values()) == pytest.approx(1)
    assert found["b"] / found["a"] == pytest.approx(7 / 6)


def test_an_opposed_client_is_never_excluded() -> None:
    """Honest but unlike data can oppose most others."""
    guard = Guard(GuardOptions(quarantine_after=1))
    guard.count(Rejected(Reason.OPPOSED, "a", ""))
    assert not guard.quarantined("a")


# Rounds -----------------------------------------------------------------------------------------


def ten(folder: Any, **options: Any) -> Any:
    return federation(folder, names=NAMES, rounds=2, **options)


def test_a_clean_round_has_the_bits_of_the_plain_mean(tmp_path: Any) -> None:
    plain = ten(tmp_path / "plain", guard=GuardOptions(agreement=False))
    guarded = ten(tmp_path / "guarded")
    for _ in range(2):
        plain.step()
        record = guarded.step()
        assert record.votes == {}
        assert record.accepted == list(NAMES)
    tensors = guarded.state.tensors
    assert all(torch.equal(x, tensors[key]) for key, x in plain.state.tensors.items())


def test_colluders_in_a_round(tmp_path: Any) -> None:
    """-9.5 x the mean from two of ten passed as a plain mean; now it does not enter."""
    seen: dict[str, Any] = {}

    def step(guard: GuardOptions, folder: str) -> tuple[dict[str, torch.Tensor], Any]:
        made = ten(tmp_path / folder, guard=guard)

        def exchange(orders: Any) -> Any:
            frames = {name: orders[name] for name in orders}
            down = Order.unpack(frames["a"])[1]
            replies = {n: Reply.unpack(made.site.answer(x)) for n, x in frames.items()}
            sent = {n: unpack_tensors(reply.upload) for n, reply in replies.items()}
            gen = torch.Generator().manual_seed(0)
            common = {k: torch.randn(x.shape, generator=gen) for k, x in down.items()}
            honest = {}
            for name in NAMES[2:]:  # their rows have something in common
                noise = {k: torch.randn(x.shape, generator=gen) for k, x in down.items()}
                honest[name] = {k: x + common[k] + noise[k] for k, x in down.items()}
                upload = pack_tensors(sent[name][0], honest[name])
                replies[name] = replace(replies[name], upload=upload)
            mean = weighted_mean(honest, dict.fromkeys(honest, 0.125), {})
            for name in NAMES[:2]:
                bad = {k: down[k] - 9.5 * (x - down[k]) for k, x in mean.items()}
                upload = pack_tensors(sent[name][0], bad)
                replies[name] = replace(replies[name], upload=upload)
            seen.update(honest=honest, mean=mean, start=down)
            yield from ((name, reply.pack()) for name, reply in replies.items())

        record = made.server.step(exchange)
        return made.state.tensors, record

    tensors, record = step(GuardOptions(agreement=False), "off")
    assert record.rejected == []
    moved = {k: x - seen["start"][k] for k, x in seen["mean"].items()}
    along = sum(float(((tensors[k] - seen["start"][k]) * x).sum()) for k, x in moved.items())
    assert along < 0, "the plain mean went the other way"
    tensors, record = step(GuardOptions(), "on")
    assert [row[:2] for row in record.rejected] == [("a", "opposed"), ("b", "opposed")]
    expected = weighted_mean(seen["honest"], record.weights, {})
    assert all(torch.equal(x, tensors[k]) for k, x in expected.items())


def test_a_run_that_began_without_it_goes_on_without_it(tmp_path: Any) -> None:
    """The hash of the options is that of plait 0.1 where nothing is compared."""
    began = ten(tmp_path, guard=GuardOptions(agreement=False))
    began.step()
    config = Checkpoints(tmp_path / "server").newest().config  # type: ignore[union-attr]
    resumed = ten(tmp_path, resume=True)
    assert not resumed.server._compares
    resumed.step()
    assert Checkpoints(tmp_path / "server").newest().config == config  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="was written under another config"):
        ten(tmp_path, resume=True, guard=GuardOptions(agreement=True))
    assert ServerOptions().guard.compares(private=False)
    assert not ServerOptions().guard.compares(private=True)
    assert not GuardOptions(aggregator="median").compares(private=False)
