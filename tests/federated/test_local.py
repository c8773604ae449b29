"""The runner in one process: methods, faults, rollback, resume; one client is local training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import plait
from plait.federated import adapter, algorithm
from plait.federated.client import Trained
from plait.federated.engines.local import Federation
from plait.federated.guard import GuardOptions, TooFewUpdates
from plait.federated.payload import Header, pack, unpack_tensors
from plait.federated.privacy import Privacy
from plait.federated.server import RoundRecord
from plait.testing import tiny
from tests.support.federation import (
    METHODS,
    NAMES,
    TARGETS,
    federation,
    lora,
    loss_of,
    run,
    training,
)


def same(a: Federation, b: Federation) -> None:
    """Bit-equal server states and local states of all clients."""
    assert a.round == b.round
    assert a.state.tensors.keys() == b.state.tensors.keys()
    assert all(torch.equal(x, b.state.tensors[k]) for k, x in a.state.tensors.items())
    for name in a.clients:
        one, two = (adapter.read(f.model_of(name)) for f in (a, b))
        assert one.keys() == two.keys()
        assert all(torch.equal(x, two[k]) for k, x in one.items()), name


@pytest.mark.parametrize(
    ("key", "changes"), METHODS, ids=[f"{i}-{key}" for i, (key, _) in enumerate(METHODS)]
)
def test_resume_is_the_uninterrupted_run_and_bytes_are_the_formula(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    whole = federation(tmp_path / "whole", key, rounds=3, **changes)
    records = run(whole)
    first = federation(tmp_path / "cut", key, rounds=3, **changes)
    cut = [first.step(), first.step()]
    # Killed between the client's answers and the checkpoint: the private states have advanced.
    with pytest.raises(KeyboardInterrupt):
        first.step(interrupt)
    resumed = federation(tmp_path / "cut", key, rounds=3, resume=True, **changes)
    assert resumed.round == 2
    cut += run(resumed)
    assert cut == records
    same(whole, resumed)
    for record in records:
        assert record.accepted == [*NAMES]
        assert not record.failed
        assert not record.rejected
        for bytes_ in record.traffic.values():
            assert bytes_.up == bytes_.up_formula
            if record.round > 1 or key != "flexlora":  # whose first round starts from nothing
                assert bytes_.down == bytes_.down_formula
            assert 0 < bytes_.up_frame - bytes_.up < 4096
    moving = "A" if key == "fedsa" else "B"  # with "reset", B is back at its start
    for name in NAMES:
        first, now = whole.site.roster.first(name), adapter.read(whole.model_of(name))
        trunk = [x for k, x in whole.state.tensors.items() if k.endswith("trunk_B")]
        moved = any(not torch.equal(x, now[k]) for k, x in first.items() if f"/{moving}" in k)
        moved |= any(bool(x.any()) for k, x in now.items() if k.endswith("/B_bar"))
        assert moved or any(bool(x.any()) for x in trunk), name


def interrupt(record: RoundRecord) -> None:
    raise KeyboardInterrupt


def test_resume_repeats_dropout_and_the_selection(tmp_path: Path) -> None:
    def config(r: int) -> LoraConfig:
        return lora(r, dropout=0.5)

    changes: dict[str, Any] = {"config": config, "fraction": 0.7, "rounds": 4}
    whole = federation(tmp_path / "whole", "fedalora", **changes)
    records = run(whole)
    torch.rand(3)  # the global generator is somewhere else now
    for _ in range(2):
        federation(tmp_path / "cut", "fedalora", resume=True, **changes).step()
    resumed = federation(tmp_path / "cut", "fedalora", resume=True, **changes)
    assert run(resumed) == records[2:]
    same(whole, resumed)
    assert len({tuple(r.selected) for r in records}) > 1
    assert {len(r.selected) for r in records} == {2}


@pytest.mark.parametrize("key", ["fedit", "ffa", "fedsa", "fedalora"])
def test_one_client_is_local_training(key: str, tmp_path: Path) -> None:
    one = federation(tmp_path / "one", key, names=("a",), rounds=3)
    run(one)
    alone = federation(tmp_path / "alone", "local", names=("a",), rounds=3)
    if key == "ffa":  # whose A is frozen
        adapter.freeze(next(iter(alone.site.roster._kinds.values())).model, ["A"])
    run(alone)
    found, expected = (adapter.read(f.model_of("a")) for f in (one, alone))
    assert all(torch.equal(x, found[k]) for k, x in expected.items())


def test_the_base_model_is_shared_and_stays(tmp_path: Path) -> None:
    base = tiny.llama()
    before = {k: x.clone() for k, x in base.state_dict().items()}
    configs = {"a": lora(1), "b": lora(2)}
    made = Federation(base, configs, algorithm("flora"), training(("a", "b")), tmp_path)
    run(made)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[k]) for k, x in base.state_dict().items())
    weights = {
        id(p) for kind in made.site.roster._kinds.values() for n, p in kind.model.named_parameters()
        if "lora_" not in n
    }  # fmt: skip
    assert weights == {id(p) for p in base.parameters()}


# Faults ------------------------------------------------------------------------------------------


def tampered(name: str, change: Any) -> Any:
    """Deliveries in which one client's upload is changed in rounds after the first."""

    def deliver(client: str, round: int, data: bytes) -> list[bytes]:
        if client != name or round == 1:
            return [data]
        changed = change(*unpack_tensors(data))
        return [data, data] if changed is None else [changed]

    return deliver


def packed(header: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> bytes:
    return pack(Header(**{**header, **changes}), tensors)


def with_first(tensors: dict[str, Tensor], change: Any) -> dict[str, Tensor]:
    key = min(tensors)
    return {**tensors, key: change(tensors[key])}


FAULTS = {
    "non_finite": lambda h, t: packed(h, with_first(t, lambda x: x * float("nan"))),
    "bad_shape": lambda h, t: packed(h, with_first(t, lambda x: x.T.contiguous())),
    "missing_key": lambda h, t: packed(h, {k: x for k, x in t.items() if k != min(t)}),
    "extra_key": lambda h, t: packed(h, {**t, "more": torch.ones(1)}),
    "bad_dtype": lambda h, t: packed(h, t, dtype="bf16"),
    "stale_round": lambda h, t: packed(h, t, round=1),
    "wrong_run": lambda h, t: packed(h, t, run="other"),
    "unknown_client": lambda h, t: packed(h, t, client="c"),
    "method_mismatch": lambda h, t: packed(h, t, method="ffa"),
    "norm_outlier": lambda h, t: packed(h, {k: 1e6 * x for k, x in t.items()}),
    "bad_hash": lambda h, t: packed(h, t)[:-1],
    "oversize": lambda h, t: packed(h, {**t, "more": torch.ones(2**20)}),
    "duplicate": lambda h, t: None,
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_bad_upload_is_rejected_and_its_private_side_rolls_back(
    reason: str, tmp_path: Path
) -> None:
    made = federation(tmp_path, "fedalora", rounds=3, deliver=tampered("b", FAULTS[reason]))
    first, second, third = run(made)
    assert not first.rejected
    assert [(c, r) for c, r, _ in second.rejected] == [("b", reason)]
    assert second.accepted == ([*NAMES] if reason == "duplicate" else ["a", "c"])
    assert sum(second.weights.values()) == pytest.approx(1)
    assert all(torch.isfinite(x).all() for x in made.state.tensors.values())
    generation = 3 if reason == "duplicate" else 1
    assert made.server._last.last_accepted["b"] == generation
    made.model_of("b")  # takes the generation of the last accepted update, and drops the others
    assert made.site._store("b").generations() == [generation]
    assert sum(made.server.guard.rejections["b"].values()) == 2
    assert third.round == 3


def test_a_client_that_raises_or_diverges_is_a_failure(tmp_path: Path) -> None:
    inner = training()

    def train(model: torch.nn.Module, client: str, round: int) -> Trained:
        if (client, round) == ("a", 2):
            raise RuntimeError("out of memory")
        result = inner(model, client, round)
        if client == "b" and round == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
        return result

    records = run(federation(tmp_path, train=train, rounds=3))
    assert records[1].failed == {"a": "RuntimeError: out of memory"}
    assert [(c, r) for c, r, _ in records[1].rejected] == [("b", "non_finite")]
    assert records[1].accepted == ["c"]
    assert records[2].accepted == [*NAMES]


@pytest.mark.parametrize(("key", "factor"), [("fedalora", "A"), ("fedsa", "B"), ("local", "B")])
def test_a_private_factor_that_is_not_finite_is_a_failure(
    key: str, factor: str, tmp_path: Path
) -> None:
    inner = training()

    def train(model: torch.nn.Module, client: str, round: int) -> Trained:
        result = inner(model, client, round)
        if (client, round) == ("b", 2):
            with torch.no_grad():
                named = dict(model.named_parameters())
                next(p for n, p in named.items() if f"lora_{factor}" in n).view(-1)[0] = torch.nan
        return result

    made = federation(tmp_path, key, train=train, rounds=3)
    _, second, third = run(made)
    assert second.accepted == ["a", "c"]
    assert "which stays on the client, has NaN" in second.failed["b"]
    assert third.accepted == [*NAMES]  # from the private state of round 1
    assert made.site._store("b").generations() == [1, 3]


@pytest.mark.parametrize("claim", [10**12, -5, 0])
def test_a_lying_number_of_examples(claim: int, tmp_path: Path) -> None:
    inner = training()

    def train(model: torch.nn.Module, client: str, round: int) -> Trained:
        result = inner(model, client, round)
        return Trained(claim) if client == "a" else result

    (record,) = run(federation(tmp_path, train=train, rounds=1))
    if claim > 0:  # rows: b 5, c 6; ten times the median counts
        assert record.capped == ["a"]
        assert record.weights == {"a": 60 / 71, "b": 5 / 71, "c": 6 / 71}
    else:
        assert record.failed == {
            "a": f"ValueError: payload: n_examples = {claim} is below 1. Correct the header."
        }
        assert record.weights == {"b": 5 / 11, "c": 6 / 11}


def test_a_damaged_private_state_is_that_clients_failure(tmp_path: Path) -> None:
    made = federation(tmp_path, "fedalora", rounds=2)
    made.step()
    path = made.site._store("b").path(1)
    path.write_bytes(path.read_bytes()[:-1])
    made.site._store("c").path(1).unlink()
    record = made.step()
    assert record.accepted == ["a"]
    assert record.failed["b"].startswith(f"CorruptState: {path}: the digest does not match")
    assert record.failed["c"].startswith("MissingState: ")


def test_quarantine_ends_the_asking(tmp_path: Path) -> None:
    made = federation(
        tmp_path, rounds=4, guard=GuardOptions(quarantine_after=2),
        deliver=tampered("b", FAULTS["non_finite"]),
    )  # fmt: skip
    records = run(made)
    assert [[r for _, r, _ in x.rejected] for x in records] == [
        [], ["non_finite"], ["non_finite"], ["quarantined"],
    ]  # fmt: skip
    assert "b" not in records[3].metrics


def test_averaged_parameters_act_on_one_basis(tmp_path: Path) -> None:
    configs = {
        name: plait.NolaConfig(target_modules=TARGETS, num_basis_A=4, num_basis_B=4, seed=seed)
        for name, seed in (("a", 0), ("b", 1))
    }
    with pytest.raises(ValueError, match=r"clients 'a' and 'b' have the adapter's seed = 0 and 1"):
        Federation(tiny.llama(), configs, algorithm("fedavg"), training(), tmp_path)
    Federation(tiny.llama(), configs, algorithm("local"), training(), tmp_path)


def test_two_runs_of_one_secret_draw_noises_of_their_own(tmp_path: Path) -> None:
    privacy = Privacy(clip=1e-2, noise=100.0, key="0123456789abcdef")
    states = []
    for folder, name in (("first", "one"), ("again", "one"), ("other", "two")):
        made = federation(
            tmp_path / folder, "ffa", run=name, rounds=1, privacy=privacy,
            guard=GuardOptions(max_norm_ratio=torch.inf),
        )  # fmt: skip
        made.step()
        states.append(torch.cat([x.flatten() for x in made.state.tensors.values()]))
    assert torch.equal(states[0], states[1])
    apart = 2**0.5 * 1e-2 * 100 / len(NAMES)  # of two independent noises; the clip allows .01
    assert float((states[0] - states[2]).std()) == pytest.approx(apart, rel=0.2)


def test_too_few_updates_are_loud_and_keep_the_state(tmp_path: Path) -> None:
    inner = training()

    def train(model: torch.nn.Module, client: str, round: int) -> Trained:
        if round == 2 and client != "c":
            raise OSError("no disk")
        return inner(model, client, round)

    made = federation(tmp_path, train=train, rounds=2, guard=GuardOptions(min_updates=2))
    made.step()
    before = made.state
    with pytest.raises(TooFewUpdates, match=r"round 2: 1 updates .*2 are needed(.|\n)*a failed: "):
        made.step()
    assert made.state is before
    with pytest.raises(TooFewUpdates):
        made.step()
    assert federation(
        tmp_path, rounds=2, guard=GuardOptions(min_updates=2), resume=True
    ).step().accepted == [*NAMES]


# Refusals ----------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs one rank and scaling"):
        federation(tmp_path, "fedit", ranks=[1, 2, 2])
    with pytest.raises(ValueError, match=r"init_lora_weights = 'gaussian'.*Use True\."):
        federation(
            tmp_path,
            config=lambda r: LoraConfig(r=r, init_lora_weights="gaussian", target_modules=TARGETS),
        )
    with pytest.raises(ValueError, match=r"steps = 1, epochs = 1\. Give one of them\."):
        training(epochs=1, steps=1)
    with pytest.raises(ValueError, match=r"trains a weight of the base model \(bias\)"):
        federation(
            tmp_path,
            names=("a",),
            config=lambda r: LoraConfig(r=r, bias="all", target_modules=["query"]),
            base=tiny.bert(),
        )
    federation(tmp_path).step()
    with pytest.raises(ValueError, match=r"holds round 1 of a run\. Resume it"):
        federation(tmp_path)
    with pytest.raises(ValueError, match="another config"):
        federation(tmp_path, "fedsa", resume=True)
    with pytest.raises(ValueError, match="another config"):
        federation(tmp_path, facts={"data": 2}, resume=True)


def test_uploads_in_half_the_bytes(tmp_path: Path) -> None:
    (record,) = run(federation(tmp_path, dtype="bf16", rounds=1))
    traffic = record.traffic["a"]
    assert traffic.up == traffic.up_formula == traffic.down // 2


def test_aggregation_error_is_measured_where_factors_are_averaged(tmp_path: Path) -> None:
    records = run(federation(tmp_path / "fedit"))
    assert all(0 < x < 1 for x in records[1].aggregation_error.values())
    assert run(federation(tmp_path / "ffa", "ffa"))[1].aggregation_error == {}


def test_epochs_count_steps() -> None:
    passes = training(steps=None, epochs=2, batch_size=2)
    assert [passes.steps_of(name) for name in NAMES] == [4, 6, 6]


def test_progress_names_each_client_even_one_that_fails(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, str]] = []
    inner = training()

    def train(model: torch.nn.Module, client: str, round: int) -> Trained:
        if client == "b":
            raise RuntimeError("no")
        return inner(model, client, round)

    run(federation(tmp_path, train=train, rounds=1, progress=lambda *args: seen.append(args)))
    assert seen == [(1, 1, 3, "a"), (1, 2, 3, "b"), (1, 3, 3, "c")]


def test_a_failed_round_that_is_repeated_counts_its_rejections_once(tmp_path: Path) -> None:
    made = federation(
        tmp_path, guard=GuardOptions(min_updates=3), deliver=tampered("b", FAULTS["non_finite"])
    )
    made.step()
    for _ in range(3):
        with pytest.raises(TooFewUpdates, match="non_finite 1"):
            made.step()


def test_what_an_adapter_drops_in_training_stays_dropped(tmp_path: Path) -> None:
    def config(r: int) -> Any:
        return plait.DualModuleLoraConfig(r=r, target_modules=TARGETS, total_steps=6)

    made = federation(
        tmp_path, "fedavg", rounds=3, config=config, method={"private_names": ("A_e", "B_e", "E")}
    )
    run(made)
    now = adapter.read(made.model_of("a"))
    assert any("/Ibar" in key for key in made.site.roster.first("a"))
    assert not any("/Ibar" in key for key in now)


# Measuring after training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "changes"), METHODS, ids=[f"{i}-{key}" for i, (key, _) in enumerate(METHODS)]
)
def test_measuring_after_training_changes_no_bit(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    uploads: dict[str, list[bytes]] = {"plain": [], "measured": []}
    runs = {}
    for name, sent in uploads.items():

        def deliver(client: str, round: int, data: bytes, sent: list[bytes] = sent) -> list[bytes]:
            sent.append(data)
            return [data]

        made = federation(
            tmp_path / name, key, rounds=3, evaluate=loss_of, deliver=deliver, **changes
        )
        runs[name] = made, [made.step(measure=name == "measured") for _ in range(3)]
    (plain, before), (measured, after) = runs.values()
    assert uploads["measured"] == uploads["plain"]
    assert len(uploads["plain"]) == 9
    same(plain, measured)
    for a, b in zip(before, after, strict=True):
        assert (a.held_out, list(b.held_out)) == ({}, [*NAMES])
        assert (b.metrics, b.weights, b.similarity) == (a.metrics, a.weights, a.similarity)
    starts = measured.server.evaluate(measured.exchange, NAMES)
    if key == "local":  # nothing happens between a client's training and its next start
        assert starts == after[-1].held_out
    else:
        assert starts != after[-1].held_out


def test_what_is_measured_is_the_trained_model_without_dropout(tmp_path: Path) -> None:
    inner, seen = training(), {}

    def train(model: torch.nn.Module, client: str, round: int) -> Trained:
        result = inner(model, client, round)
        seen[client] = loss_of(model.eval(), client)
        return result

    made = federation(
        tmp_path, "fedalora", train=train, evaluate=loss_of, config=lambda r: lora(r, dropout=0.5)
    )
    assert made.step(measure=True).held_out == seen
    assert len({x["loss"] for x in seen.values()}) == 3


def test_a_measurement_that_fails_loses_no_update(tmp_path: Path) -> None:
    def evaluate(model: torch.nn.Module, client: str) -> dict[str, float]:
        if client == "b":
            raise MemoryError("too many rows")
        return loss_of(model, client)

    record = federation(tmp_path / "b", evaluate=evaluate).step(measure=True)
    assert record.accepted == [*NAMES]
    assert record.held_out["b"] == {"failed": "MemoryError: too many rows"}
    assert set(record.held_out["a"]) == {"loss"}
    none = federation(tmp_path / "none").step(measure=True)
    assert none.accepted == [*NAMES]
    assert "nothing to evaluate with" in none.held_out["a"]["failed"]


@pytest.mark.parametrize("reason", ["bad_hash", "norm_outlier"])
def test_a_rejected_update_takes_its_measurement_with_it(reason: str, tmp_path: Path) -> None:
    made = federation(tmp_path, deliver=tampered("b", FAULTS[reason]), evaluate=loss_of)
    first, second = made.step(measure=True), made.step(measure=True)
    assert list(first.held_out) == [*NAMES]
    assert [(c, r) for c, r, _ in second.rejected] == [("b", reason)]
    assert list(second.held_out) == ["a", "c"]
