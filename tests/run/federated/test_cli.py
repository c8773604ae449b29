"""`plait federate`: the config, the run folder, resume, exit codes, the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from plait.federated.server import RoundRecord
from plait.run.federated.engines import simulate
from plait.run.federated.folder import FederatedFolder, read_rounds
from plait.run.federated.report import summary
from plait.run.folder import RunFolder
from plait_cli import main
from tests.support import ROOT, warm
from tests.support.federated_runs import config, lines, write
from tests.support.runs import copy_rows, write_rows


def test_simulate_fills_the_run_folder_and_report_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["federate", "simulate", write(run)]) == 0
    assert "round 2: 3 of 3 updates, training loss" in capsys.readouterr().out
    partition = FederatedFolder(run).read_partition()
    assert sorted(row for rows in partition.values() for row in rows) == list(range(24))
    rows = read_rounds(run / "metrics.jsonl")
    assert [(x["kind"], x["round"]) for x in rows] == [
        ("evaluation", 0), ("round", 1), ("evaluation", 1), ("round", 2), ("evaluation", 2),
    ]  # fmt: skip
    s = summary(RunFolder(run), "fedit")
    assert s.up == s.up_formula > 0
    assert s.down == s.down_formula > 0
    assert s.frames > s.up + s.down
    assert s.error is not None
    assert len(set(s.last.values())) == 1  # one common model
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "## Rejected and failed\n\nNone." in (run / "report.md").read_text()
    local = tmp_path / "local"
    assert main(["federate", "simulate", write(local, federated={"method": "local"})]) == 0
    capsys.readouterr()
    assert main(["federate", "report", str(run), str(local)]) == 0
    shown = capsys.readouterr().out
    assert "fedit" in shown
    assert "gain over" in shown


def test_a_plugin_is_known_to_worker_processes_too(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run",
        method={"name": "lora", "lora_alpha": None, "r": 2},
        federated={"method": "fedavg"},
        engine={"workers": 2},
        local={"rounds": 1},
    )
    text = Path(file).read_text().replace("name: lora", "name: gated")
    Path(file).write_text(text)
    code = "import sys, plait_cli; sys.exit(plait_cli.main(sys.argv[1:]))"
    plugin = str(ROOT / "examples/custom_method.py")
    done = warm.python("--import", plugin, "federate", "simulate", file, code=code, peft=True)
    assert done.returncode == 0, done.stderr
    assert "round 1: 3 of 3 updates" in done.stdout


def test_resume_continues_to_the_same_lines(tmp_path: Path) -> None:
    changes = {
        "local": {"rounds": 3},
        "federated": {"method": "fedalora"},
        "evaluation": {"after_training": True},
    }
    whole = simulate(config(tmp_path / "whole", changes))

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    cut = config(tmp_path / "cut", changes)
    with pytest.raises(KeyboardInterrupt):
        simulate(cut, done=stop)
    with pytest.raises(FileExistsError, match="Continue it with --resume"):
        simulate(cut)
    resumed = simulate(cut, resume=True)
    assert lines(resumed) == lines(whole)
    states = [sorted((f.path / "server").glob("round-*"))[-1] for f in (whole, resumed)]
    assert states[0].name == states[1].name == "round-000003.ckpt"
    # The config names the place of the run nowhere, so whole files are equal.
    assert states[0].read_bytes() == states[1].read_bytes()
    longer = config(tmp_path / "cut", {**changes, "local": {"rounds": 4}})
    assert read_rounds(simulate(longer, resume=True).metrics)[-1]["round"] == 4
    other = config(tmp_path / "cut", {**changes, "local": {"rounds": 5, "learning_rate": 1.0}})
    with pytest.raises(ValueError, match="another config"):
        simulate(other, resume=True)


def test_too_few_updates_exit_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "run", guard={"min_updates": 4}, evaluation={"every": 0})
    assert main(["federate", "simulate", file]) == 3
    error = capsys.readouterr().err
    assert "round 1: 3 updates were accepted, 4 are needed" in error
    assert f"Go on with: plait federate simulate {file} --resume" in error


def test_a_diverged_client_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = {"learning_rate": 1e30, "rounds": 1, "steps": 2}
    assert main(["federate", "simulate", write(tmp_path / "run", local=local)]) == 3
    assert "client 'client-0': non_finite: " in capsys.readouterr().err


def test_central_makes_the_steps_of_all_clients(tmp_path: Path) -> None:
    folder = simulate(config(tmp_path / "run", {"federated": {"method": "central"}}))
    record = read_rounds(folder.metrics)[1]
    assert record["metrics"]["pooled"]["steps"] == 3
    assert record["traffic"]["pooled"]["up"] == 0


def test_central_is_measured_on_the_rows_of_each_client(tmp_path: Path) -> None:
    changes = {
        "partition": {"kind": "by_column", "by": "task", "clients": None},
        "local": {"rounds": 1},
    }
    changes["federated"] = {"method": "central"}
    central = simulate(config(tmp_path / "central", changes))
    changes["federated"] = {"method": "fedit"}
    fedit = simulate(config(tmp_path / "fedit", changes))
    starts = [read_rounds(folder.metrics)[0]["clients"] for folder in (central, fedit)]
    assert starts[0] == starts[1]  # before round 1 all are the base model
    assert set(starts[0]) == {"next", "rotate", "shout", "swap"}


@pytest.mark.parametrize("method", ["central", "local", "fedalora"])
def test_clients_are_measured_after_training_in_the_rounds_that_are_due(
    method: str, tmp_path: Path
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "partition": {"kind": "by_column", "by": "task", "clients": None},
        "local": {"rounds": 3},
        "federated": {"method": method},
        "evaluation": {"every": 2, "after_training": True},
    }
    rows = read_rounds(simulate(config(tmp_path / "run", changes)).metrics)
    starts = {row["round"]: row["clients"] for row in rows if row["kind"] == "evaluation"}
    trained = {row["round"]: row["held_out"] for row in rows if row["kind"] == "round"}
    assert trained[1] == {}
    for number in (2, 3):
        assert list(trained[number]) == ["next", "rotate", "shout", "swap"]
        assert trained[number]["swap"].keys() == starts[number]["swap"].keys()
        # Where nothing is averaged, the next round starts with what was trained.
        assert (trained[number] == starts[number]) == (method != "fedalora")
    changes["evaluation"] = {"every": 2}
    plain = read_rounds(simulate(config(tmp_path / "plain", changes)).metrics)
    for row, other in zip(rows, plain, strict=True):
        assert other.get("held_out", {}) == {}
        for key in ("metrics", "clients", "weights", "similarity"):
            assert row.get(key) == other.get(key)


def test_clients_by_column_have_their_own_held_out_rows_and_ranks(tmp_path: Path) -> None:
    changes = {
        "partition": {"kind": "by_column", "by": "task", "clients": None},
        "federated": {"method": "flora", "ranks": {"next": 3, "rotate": 2, "shout": 1, "swap": 2}},
    }
    folder = simulate(config(tmp_path / "run", changes))
    last = read_rounds(folder.metrics)[-1]
    assert {name: m["rows"] for name, m in last["clients"].items()} == dict.fromkeys(
        ("next", "rotate", "shout", "swap"), 2
    )
    s = summary(folder, "flora")
    assert (s.up, s.down) == (s.up_formula, s.down_formula)


def test_a_file_for_each_client(tmp_path: Path) -> None:
    for name, count in (("ann", 3), ("bob", 2)):
        rows = [{"prompt": f"{name}{i}", "completion": "ab"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = [str(tmp_path / "ann.jsonl"), str(tmp_path / "bob.jsonl")]
    changes = {
        "data": {"train": train, "validation": None},
        "partition": {"kind": "files", "clients": None},
        "local": {"rounds": 1},
    }
    folder = simulate(config(tmp_path / "run", changes))
    assert folder.read_partition() == {
        "ann": [0, 1, 2], "bob": [3, 4],
    }  # fmt: skip
    assert read_rounds(folder.metrics)[0]["weights"] == {"ann": 0.6, "bob": 0.4}


def test_a_method_with_a_schedule_gets_its_steps(tmp_path: Path) -> None:
    changes = {
        "method": {"name": "dual_module"},
        "federated": {"method": "fedavg", "options": {"private_names": ["A_e", "B_e", "E"]}},
    }
    folder = simulate(config(tmp_path / "run", changes))
    assert read_rounds(folder.metrics)[-1]["round"] == 2
    s = summary(folder, "fedavg")
    assert s.up == s.up_formula > 0
    assert len(set(s.last.values())) == 3  # a model for each client


def test_a_new_head_is_averaged_with_the_adapters(tmp_path: Path) -> None:
    changes = {
        "model": {"name": "builtin:tiny", "task": "classification"},
        "federated": {"method": "flora", "ranks": [1, 2, 2]},
        "data": {"columns": {"text": "prompt", "label": "task"}},
    }
    folder = simulate(config(tmp_path / "run", changes))
    s = summary(folder, "flora")
    assert (s.up, s.down) == (s.up_formula, s.down_formula)
    assert len(set(s.last.values())) == 1  # one common model, head included
    assert set(lines(folder)[-1]["clients"]) == {"client-0", "client-1", "client-2"}
    # The head is drawn by the sampling seed, so a second run is the same.
    again = simulate(config(tmp_path / "again", changes))
    assert lines(again) == lines(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"federatd": {}}, r"federatd is not known\. Did you mean federated\?"),
        ({"partition": {"alfa": 1}}, r"partition\.alfa is not known\. Did you mean alpha\?"),
        ({"federated": {"method": "fedti"}}, r"federated\.method = 'fedti' is not known"),
        ({"federated": {"options": {"sed": 1}}}, r"fedit: sed is not known\. Did you mean seed\?"),
        ({"method": {"rank_": 2}}, r"method\.rank_ is not an option of lora"),
        ({"local": {"rounds": "x"}}, r"local\.rounds is 'x'\. It should be a valid integer"),
        ({"local": {"epochs": 1}}, r"steps = 1, epochs = 1\. Give one of them"),
        ({"guard": {"trim": 0.5}}, r"guard\.trim is 0\.5\. It should be less than 0\.5\."),
        ({"sampling": {"fraction": 0}}, r"sampling\.fraction is 0\. It should be greater than 0\."),
        ({"partition": {"alpha": 1}}, r"partition\.alpha is no option of iid\. Remove it"),
        ({"partition": {"clients": None}}, r"partition\.clients is not set, and iid needs it"),
        ({"method": {"name": "full", "r": None, "target_modules": None}}, r"'full', which has no"),
        (
            {"method": {"name": "vera"}},
            r"method\.name is 'vera': fedit: vera is neither upstream's",
        ),
    ],
)
def test_what_is_wrong_in_a_config(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        config(tmp_path / "run", changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"federated": {"ranks": [1, 2]}}, r"2 ranks for 3 clients"),
        ({"federated": {"ranks": {"client-9": 1}}}, r"names 'client-9', which is not a client"),
        ({"federated": {"ranks": [1, 2, 3]}}, r"needs one rank and scaling"),
        ({"federated": {"ranks": 0}}, r"has rank 0\. Give 1 or more"),
        (
            {"partition": {"kind": "shards", "by": "colour"}},
            r"partition\.by is 'colour', and the rows have task\.",
        ),
    ],
)
def test_what_does_not_fit_the_data(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        simulate(config(tmp_path / "run", changes))


def test_help_says_what_travels(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["federate", "--help"])
    assert "`simulate` does all on this machine and sends nothing over a network" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "federated").glob("*.yaml")))
def test_examples_run(path: Path, tmp_path: Path) -> None:
    overrides = ["local.rounds=1", "local.steps=1", f"output.dir={tmp_path / 'run'}"]
    overrides += ["data.validation=builtin:shift?n=4"]
    assert main(["federate", "simulate", str(path), *overrides]) == 0


QUERY = {"target_modules": ["q_proj"]}
SCHEDULED: dict[str, dict[str, Any]] = {
    "lora": {},
    "dual_module": {
        "method": {"name": "dual_module"},
        "federated": {"method": "fedavg", "options": {"private_names": ["A_e", "B_e", "E"]}},
    },
    "cola": {
        "method": QUERY | {"name": "cola", "r": None},
        "federated": {"method": "fedavg", "options": {"private_names": ["A"]}},
    },
    "fedalora_het": {
        "method": QUERY | {"name": "fedalora_het", "common_rank": 2, "r": None},
        "federated": {
            "method": "fedalora_het", "ranks": [2, 3, 4], "options": {"common_rank": 2},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("method", SCHEDULED)
def test_more_rounds_keep_the_schedule(method: str, tmp_path: Path) -> None:
    """They give what an unbroken run with that schedule gives."""
    changes = SCHEDULED[method]
    run = tmp_path / "run"
    simulate(config(run, changes))
    for rounds in (3, 4):
        longer = config(run, {**changes, "local": {"rounds": rounds}})
        assert read_rounds(simulate(longer, resume=True).metrics)[-1]["round"] == rounds
    whole = config(tmp_path / "whole", {**changes, "local": {"rounds": 4, "schedule_rounds": 2}})
    assert lines(simulate(whole)) == lines(FederatedFolder(run))


def test_a_refused_resume_names_what_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    simulate(config(run))
    other = config(run, {"local": {"rounds": 3, "learning_rate": 1.0}})
    with pytest.raises(ValueError, match=r"another config.*Changed: local\.learning_rate: "):
        simulate(other, resume=True)


def test_resume_with_reordered_rows_is_refused(tmp_path: Path) -> None:
    rows = copy_rows(24)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"data": {"train": str(data), "validation": None}}
    run = tmp_path / "run"
    simulate(config(run, changes))
    write_rows(data, rows[::-1])
    longer = config(run, {**changes, "local": {"rounds": 3}})
    with pytest.raises(ValueError, match=r"the data changed since this run began \(train_digest"):
        simulate(longer, resume=True)
    write_rows(data, rows)
    simulate(longer, resume=True)
