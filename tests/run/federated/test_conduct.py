"""A run from its config file: the engines, the server without data, privacy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from plait.federated.privacy import Privacy
from plait.run.federated.clients import make_clients
from plait.run.federated.conduct import conduct
from plait.run.federated.config import load_federate_config
from plait.run.federated.engines import simulate
from plait.run.federated.setup import prepare_federation
from plait_cli import main
from tests.support.federated_runs import config, lines, write
from tests.support.federated_states import equal, states


def test_worker_processes_write_the_lines_of_one_process(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "federated": {"method": "fedalora"},
        "engine": {"threads": 1},
        "evaluation": {"after_training": True},
    }
    one = simulate(config(tmp_path / "one", changes))
    changes["engine"]["workers"] = 2
    two = simulate(config(tmp_path / "two", changes))
    assert lines(two) == lines(one)
    assert equal(states(one), states(two))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"timeouts": {"first": 5.0}}, "one process cannot end itself"),
        (
            {"engine": {"workers": -1}},
            "engine.workers is -1. It should be greater than or equal to 0.",
        ),
        (
            {"engine": {"threads": 0}},
            "engine.threads is 0. It should be greater than or equal to 1.",
        ),
        ({"timeouts": {"wait": 0.0}}, "timeouts.wait is 0.0. It should be greater than 0."),
        (
            {"evaluation": {"every": -1}},
            "evaluation.every is -1. It should be greater than or equal to 0.",
        ),
        (
            {"evaluation": {"every": 0, "after_training": True}},
            "evaluation.after_training is true and evaluation.every 0",
        ),
        (
            {"sampling": {"retries": -1}},
            "sampling.retries is -1. It should be greater than or equal to 0.",
        ),
        ({"privacy": {"clip": 1.0}}, "privacy.noise is not set."),
        (
            {"privacy": {"clip": 0.0, "noise": 1.0}},
            "privacy.clip is 0.0. It should be greater than 0.",
        ),
        ({"partition": {"kind": "own"}}, "own takes the names of the clients"),
        (
            {"partition": {"kind": "own", "clients": ["a", "a"]}},
            "Give each name once, and at least one.",
        ),
        (
            {"partition": {"kind": "own", "clients": ["a"], "labels": ["x"]}},
            "Own rows to classify need the labels",
        ),
        (
            {"partition": {"kind": "own", "clients": ["a"]}, "federated": {"method": "central"}},
            "pools all rows",
        ),
        ({"partition": {"kind": "own", "clients": ["a", "b"]}}, "Use 'files' to simulate"),
        ({"federated": {"run": "a/b"}}, "run = 'a/b' cannot name a file"),
        ({"federated": {"scaling": 0.0}}, "federated.scaling is 0.0. It should be greater than 0."),
        (
            {"federated": {"scaling": 2.0}, "method": {"lora_alpha": 8}},
            "federated.scaling is 2 and method.lora_alpha 8. Give one of them.",
        ),
        (
            {"federated": {"scaling": 2.0}, "method": {"r": None}},
            "federated.scaling needs the ranks. Give federated.ranks or method.r.",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_exit_code_2(
    changes: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        file = write(tmp_path / "run", **changes)
    except ValueError:  # the helper reads what it writes
        file = str(tmp_path / "run.yaml")
    assert main(["federate", "simulate", file]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "server").exists()


def test_one_scaling_for_unequal_ranks(tmp_path: Path) -> None:
    federated = {"method": "zeropad", "ranks": [8, 4, 2], "scaling": 2.0}
    loaded = prepare_federation(config(tmp_path / "run", {"federated": federated}))
    found = [layer for c in loaded.roster.clients.values() for layer in c.layers.values()]
    assert {layer.r for layer in found} == {8, 4, 2}
    assert {layer.scaling for layer in found} == {2.0}


# Own rows ---------------------------------------------------------------------------------------


def test_a_server_without_data_and_sites_with_their_own_rows(tmp_path: Path) -> None:
    """Each machine has its own file and config; the result is that of `files` in one process."""
    names = ["north", "south"]
    for i, name in enumerate(names):
        rows = [{"text": f"{name} {k} {k + i}", "label": f"l{(k + i) % 3}"} for k in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in names]
    changes: dict[str, Any] = {
        "model": {"task": "classification"},
        "federated": {"method": "fedalora"},
        "data": {"train": files, "validation": files[0]},
        "partition": {"kind": "files", "clients": None},
        "evaluation": {"after_training": True},
    }
    together = simulate(config(tmp_path / "together", changes))
    own = {"kind": "own", "clients": names, "labels": ["l0", "l1", "l2"]}
    nowhere = {"train": "nowhere.jsonl", "validation": "nowhere.jsonl"}
    server = config(tmp_path / "server", {**changes, "partition": own, "data": nowhere})
    sites = {}
    for name, file in zip(names, files, strict=True):
        data = {"train": file, "validation": files[0]}
        its = config(tmp_path / f"its-{name}", {**changes, "partition": own, "data": data})
        sites[name] = make_clients(prepare_federation(its, name), tmp_path / f"private-{name}")

    def exchange(orders: Mapping[str, bytes]) -> Any:
        return ((name, sites[name].answer(orders[name])) for name in reversed(list(orders)))

    apart = conduct(prepare_federation(server), exchange)
    assert equal(states(apart), states(together))
    for row in (found := lines(apart)) + (all_ := lines(together)):
        alike = row.pop("similarity", {})
        assert "B" in alike or row["kind"] != "round"  # a server sees what is sent
    assert found == all_
    assert list((tmp_path / "private-north" / "run").iterdir()) == [
        tmp_path / "private-north" / "run" / "north"
    ]
    with pytest.raises(ValueError, match="client 'east' is none of the run's"):
        prepare_federation(server, "east")


# Privacy ----------------------------------------------------------------------------------------

PRIVATE: dict[str, Any] = {
    "federated": {"method": "fedalora"},
    "partition": {"kind": "iid", "clients": 6},
    "sampling": {"fraction": 0.6},
    "guard": {"max_norm_ratio": float("inf")},
    "privacy": {"clip": 0.1, "noise": 0.5, "delta": 1e-3},
}


def test_a_private_run_reports_what_it_spent_and_resumes_with_its_secret(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the accountant needs plait[privacy]")
    secret = tmp_path / "key"
    secret.write_text("0123456789abcdef\n")
    changes = {**PRIVATE, "privacy": {**PRIVATE["privacy"], "key_file": str(secret)}}
    whole = simulate(config(tmp_path / "whole", changes))
    spent = [row for row in lines(whole) if row["kind"] == "privacy"]
    expected = Privacy(0.1, 0.5, "0123456789abcdef", 1e-3).report(0.6, 6, 2)
    assert [row["round"] for row in spent] == [1, 2]
    assert spent[-1]["epsilon"] == expected.epsilon
    assert spent[-1]["rounds"] == 2
    selected = [row["selected"] for row in lines(whole) if row["kind"] == "round"]
    for row in lines(whole):
        assert row["kind"] != "round" or len(set(row["weights"].values())) == 1
    assert len({len(names) for names in selected} | {3}) > 1  # Poisson: not always 0.6 x 6

    def stop(record: Any) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path / "cut", changes)
    with pytest.raises(KeyboardInterrupt):
        simulate(cut, done=stop)
    assert equal(states(simulate(cut, resume=True)), states(whole))
    plain = simulate(
        config(tmp_path / "plain", {k: v for k, v in changes.items() if k != "privacy"})
    )
    assert not equal(states(plain), states(whole))


def test_the_secret_is_made_for_the_server_alone(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the accountant needs plait[privacy]")
    one, two = (simulate(config(tmp_path / name, PRIVATE)) for name in ("one", "two"))
    key = one.path / "privacy.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_text() != (two.path / "privacy.key").read_text()
    assert key.read_text().strip() not in one.config.read_text()
    assert not equal(states(one), states(two))  # other noise, and maybe other clients


def test_a_private_run_refuses_a_guard_that_breaks_the_guarantee(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the accountant needs plait[privacy]")
    for guard, text in (
        ({"max_norm_ratio": 10.0}, "guard.max_norm_ratio = 10"),
        ({"max_norm_ratio": float("inf"), "min_updates": 6}, "draws . clients, 6 are needed"),
    ):
        run = tmp_path / text[:12].replace(" ", "")
        with pytest.raises(ValueError, match=text):
            simulate(config(run, {**PRIVATE, "guard": guard}))
        assert not run.exists()  # so that a corrected run can start there


def test_a_missing_secret_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="the accountant needs plait[privacy]")
    privacy = {**PRIVATE["privacy"], "key_file": str(tmp_path / "none")}
    file = tmp_path / "run.yaml"
    config(tmp_path / "run", {**PRIVATE, "privacy": privacy})
    assert yaml.safe_load(file.read_text())["privacy"]["key_file"] == str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"privacy\.key_file"):
        simulate(load_federate_config(file))


# Flower -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_simulation_on_flower_writes_the_lines_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower needs plait[federated]")
    changes: dict[str, Any] = {
        "federated": {"method": "fedalora"},
        "engine": {"threads": 1},
        "evaluation": {"after_training": True},
    }
    one = simulate(config(tmp_path / "one", changes))
    two = simulate(
        config(tmp_path / "two", {**changes, "engine": {"threads": 1, "kind": "flower"}})
    )
    assert lines(two) == lines(one)
    assert equal(states(one), states(two))
