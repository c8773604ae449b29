"""Server checkpoints and private states: whole or absent, rolled back, typed errors."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.federated import State, algorithm, weighted_mean, weights_of
from plait.federated.guard import Guard
from plait.federated.payload import Header, pack
from plait.federated.state import (
    Checkpoint,
    Checkpoints,
    ClientStore,
    CorruptState,
    MissingState,
    Spool,
    StateError,
    config_hash,
)
from tests.support.clients import clients_of, states_of, uploads_of

CONFIG = config_hash({"method": "fedit", "rounds": 3})


def checkpoint(number: int) -> Checkpoint:
    """After a round."""
    tensors = {"x/A": torch.full((2, 3), float(number)), "x/B": torch.zeros(4, 2).bfloat16()}
    return Checkpoint(
        run="run-1",
        method="fedit",
        config=CONFIG,
        state=State(number, tensors),
        last_accepted={"c0": number, "c1": number - 1},
        trunks={"c0": number},
        rejections={"c1": {"non_finite": 1}},
        accepted={"c0": "ab" * 32},
    )


def same(one: Checkpoint, two: Checkpoint) -> None:
    """Equal in every field and bit."""
    assert one.state.round == two.state.round
    assert one.state.tensors.keys() == two.state.tensors.keys()
    for key, x in one.state.tensors.items():
        assert x.dtype == two.state.tensors[key].dtype
        assert torch.equal(x, two.state.tensors[key])
    for name in ("run", "method", "config", "last_accepted", "trunks", "rejections", "accepted"):
        assert getattr(one, name) == getattr(two, name)
    assert one.versions == two.versions


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "fed")
    assert kept.latest(CONFIG) is None
    for number in (1, 2, 3, 4):
        kept.save(checkpoint(number))
    found = kept.latest(CONFIG)
    assert found is not None
    same(found, checkpoint(4))
    assert sorted(p.name for p in (tmp_path / "fed").iterdir()) == [
        "round-000003.ckpt",
        "round-000004.ckpt",
    ]
    assert Guard(rejections=found.rejections).rejections["c1"] == {"non_finite": 1}
    with pytest.raises(ValueError, match=r"keep = 0\. Give 1 or more\."):
        Checkpoints(tmp_path, keep=0)


def in_child(action: Any) -> int:
    """Run in a forked process; its exit status."""
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_server_killed_while_writing_leaves_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os._exit(9))  # killed before the rename
        assert in_child(lambda: kept.save(checkpoint(2))) == 9
        patch.undo()
        patch.setattr(os, "fsync", lambda *_: os._exit(9))  # and before all is written
        assert in_child(lambda: kept.save(checkpoint(2))) == 9
    assert len(list(tmp_path.glob(".round-*"))) == 1  # the second removed what the first left
    found = kept.latest(CONFIG)
    assert found is not None
    same(found, checkpoint(1))
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001.ckpt"]
    kept.save(checkpoint(2))
    assert kept.latest(CONFIG).state.round == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_one_before(
    tmp_path: Path, damage: str
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(checkpoint(1))
    path = kept.save(checkpoint(2))
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-9], "bit": data[:-1] + b"\x7f", "empty": b""}[damage])
    with pytest.raises(CorruptState, match=r"Remove it to go on after round 1, from round-000001"):
        kept.latest(CONFIG)
    path.unlink()
    assert kept.latest(CONFIG).state.round == 1  # type: ignore[union-attr]
    (tmp_path / "round-000001.ckpt").rename(path)
    with pytest.raises(
        CorruptState, match=r"000002\.ckpt: holds round 1\. Remove it to start from the beginning"
    ):
        kept.latest(CONFIG)
    assert issubclass(CorruptState, StateError)


def test_another_config_is_refused(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(checkpoint(1))
    assert config_hash({"b": 1, "a": 2}) == config_hash({"a": 2, "b": 1})
    with pytest.raises(ValueError, match=r"written under another config .* Put the config back"):
        kept.latest(config_hash({"method": "fedit", "rounds": 4}))


# The client -------------------------------------------------------------------------------------


def private(number: int) -> dict[str, torch.Tensor]:
    """What a client has after a round."""
    return {"x/A": torch.full((2, 3), float(number)), "x/t": torch.tensor(number)}


def test_generations_roll_back(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "run-1", "c0")
    assert store.load(0) is None
    store.save(1, private(1))
    store.save(2, private(2))  # sent, and rejected
    found = store.load(1)
    assert found is not None
    assert torch.equal(found["x/A"], private(1)["x/A"])
    assert found["x/t"].dtype == torch.int64
    assert store.generations() == [1]
    store.save(3, private(3))  # accepted
    assert torch.equal(store.load(3)["x/A"], private(3)["x/A"])  # type: ignore[index]
    assert store.generations() == [3]
    store.save(4, private(4))  # the server is killed before it can tell
    assert store.load(3) is not None
    assert store.generations() == [3]
    assert store.load(0) is None  # never accepted: from the start
    assert store.generations() == []
    with pytest.raises(ValueError, match=r"client 'c0': generation = 0\. Give a round\."):
        store.save(0, private(0))


def test_a_missing_or_damaged_generation_is_an_error(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "run-1", "c0")
    store.save(1, private(1))
    with pytest.raises(
        MissingState, match=r"generation 2 of client 'c0' is missing; there are \[1\]"
    ):
        store.load(2)
    assert store.generations() == [1]  # nothing was removed
    data = store.path(1).read_bytes()
    store.path(1).write_bytes(data[:-1])
    with pytest.raises(CorruptState, match=r"round-000001\.state: the digest does not match"):
        store.load(1)
    other = ClientStore(tmp_path, "run-1", "c1")
    other.save(1, private(1))
    store.path(1).write_bytes(other.path(1).read_bytes())
    with pytest.raises(CorruptState, match=r"holds \{'run': 'run-1', 'client': 'c1', 'round': 1\}"):
        store.load(1)
    with pytest.raises(ValueError, match=r"client = '\.\.' cannot name a file"):
        ClientStore(tmp_path, "run-1", "..")


def test_a_client_killed_while_writing_keeps_its_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClientStore(tmp_path, "run-1", "c0")
    store.save(1, private(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os._exit(9))
        assert in_child(lambda: store.save(2, private(2))) == 9
    assert torch.equal(store.load(1)["x/A"], private(1)["x/A"])  # type: ignore[index]
    assert [p.name for p in store.folder.iterdir()] == ["round-000001.state"]


# The spool --------------------------------------------------------------------------------------


def test_spooled_uploads_give_the_bits_of_those_in_memory(tmp_path: Path) -> None:
    clients = clients_of([2, 2, 2])
    method = algorithm("fedit")
    uploads = uploads_of(method, clients, states_of(clients))
    spool = Spool(tmp_path / "round")
    for name in ("c2", "c0", "c1"):
        spool.add(name, pack(Header("fedit", "run-1", 1, name, 0, 2, "fp32", 5), uploads[name]))
    assert len(spool) == 3
    assert set(spool) == set(uploads)
    weights = weights_of({"c0": 5, "c1": 5, "c2": 5})
    found, expected = (weighted_mean(x, weights, {}) for x in (spool, uploads))
    assert all(torch.equal(x, found[k]) for k, x in expected.items())
    spool.drop("c1")
    assert set(spool) == {"c0", "c2"}
    path = spool.files["c0"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptState, match=r"c0\.upload: .* Run the round again\."):
        _ = spool["c0"]
    spool.clear()
    assert not list((tmp_path / "round").iterdir())


def rounds(
    folder: Path, stop: int | None = None, lose: int | None = None, last: int = 5
) -> dict[str, torch.Tensor]:
    """A run without models: clients add what their private state says; the server averages.

    Args:
        folder: of checkpoints and stores. stop: die after the clients stored this round, before
            the checkpoint. lose: the round in which c1's update is rejected. last: last round.
    """
    clients = clients_of([2, 2], shapes={"x": (4, 3)})
    method, kept = algorithm("fedalora"), Checkpoints(folder)
    found = kept.latest(CONFIG)
    state = found.state if found else State(0, {"x/B": torch.zeros(3, 2)})
    accepted = dict(found.last_accepted) if found else {}
    for number in range(state.round + 1, last + 1):
        uploads = {}
        for name, client in clients.items():
            store = ClientStore(folder / "clients", "run-1", name)
            old = store.load(accepted.get(name, 0))
            A = torch.ones(2, 4) if old is None else old["x/A"]
            A = 1.1 * A + float(name[1]) + number  # "training": the private side advances
            B = state.tensors["x/B"] + A[:, :3].T
            local = {"x/A": A, "x/B": B}
            store.save(number, method.private(local, client))
            if not (name == "c1" and number == lose):
                uploads[name] = method.payload_up(local, client)
                accepted[name] = number
        if number == stop:
            raise KeyboardInterrupt
        weights = weights_of(dict.fromkeys(uploads, 1))
        state = method.aggregate(uploads, weights, state, clients)
        kept.save(Checkpoint("run-1", "fedalora", CONFIG, state, dict(accepted)))
    return state.tensors


@pytest.mark.parametrize("lose", [None, 2, 3])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, stop: int, lose: int | None
) -> None:
    """Although the clients' private states had advanced when the server died."""
    whole = rounds(tmp_path / "whole", lose=lose)
    with pytest.raises(KeyboardInterrupt):
        rounds(tmp_path / "torn", stop=stop, lose=lose)
    resumed = rounds(tmp_path / "torn", lose=lose)
    assert torch.equal(whole["x/B"], resumed["x/B"])
    if lose is not None:
        assert not torch.equal(whole["x/B"], rounds(tmp_path / "other")["x/B"])
