"""The report of federated runs: figures by hand from a made metrics.jsonl, texts, pictures."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from plait.federated import algorithm
from plait.federated.privacy import PrivacyReport
from plait.run.federated.engines import simulate
from plait.run.federated.folder import FederatedFolder
from plait.run.federated.report import (
    Summary,
    differences,
    fault_lines,
    labels,
    summary,
    tables,
    traffic_rows,
    write_comparison,
    write_report,
)
from plait_cli import main
from tests.support.federated_runs import config

NAMES = ("ann", "bob", "eve")
SETTING: dict[str, Any] = {
    "model": {"name": "m"}, "data": {"train": "d"}, "partition": {"seed": 0},
    "local": {}, "output": {}, "federated": {},
}  # fmt: skip


def traffic(up: int, down: int) -> dict[str, int]:
    return {
        "up": up, "up_formula": up, "up_frame": up + 10,
        "down": down, "down_formula": down + 1, "down_frame": down + 20,
    }  # fmt: skip


def round_line(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "kind": "round", "round": number, "selected": list(NAMES), "accepted": ["ann", "bob"],
        "metrics": {c: {"loss": 3.0 - number} for c in NAMES}, "weights": {"ann": 0.5, "bob": 0.5},
        "capped": [], "rejected": [], "failed": {},
        "traffic": {c: traffic(100 * number, 50) for c in ("ann", "bob")},
        "aggregation_error": {"x": 0.1 * number, "y": 0.01},
    }  # fmt: skip
    return line | changes


def evaluation(number: int, losses: list[float], scores: list[float] | None = None) -> Any:
    clients: dict[str, dict[str, Any]] = {
        c: {"rows": 4, "loss": x} for c, x in zip(NAMES, losses, strict=False)
    }
    for c, x in zip(NAMES, scores or [], strict=False):
        clients[c]["accuracy"] = x
    return {"kind": "evaluation", "round": number, "clients": clients}


LINES: list[dict[str, Any]] = [
    evaluation(0, [4.0, 4.0, 4.0], [0.1, 0.1, 0.1]),
    round_line(
        1,
        rejected=[["eve", "norm_outlier", "client 'eve': norm_outlier: norm 9 | too large"]],
        similarity={
            "A": {"cosine": 0.5, "overlap": 0.25, "chance": 0.125},
            "B": {"overlap": 0.75, "chance": 0.125},
        },
    ),
    evaluation(1, [3.0, 2.0, 4.0], [0.5, 0.7, 0.2]),
    round_line(2, failed={"eve": "OSError: gone\naway"}, seconds={"ann": 1.5, "bob": 0.25}),
    evaluation(2, [2.0, 1.0, 3.0], [0.6, 0.9, 0.3]),
]


def made(path: Path, lines: list[dict[str, Any]] | None = None) -> FederatedFolder:
    path.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines or LINES)
    (path / "metrics.jsonl").write_text(text)
    return FederatedFolder(path)


def loss_rows(summaries: list[Summary]) -> Any:
    """The rows of the first table, that of the losses."""
    return tables(summaries)[0][2]


def ended(path: Path, method: str, losses: list[float], **config: Any) -> Summary:
    """A run of a method with these losses at the end, and scores 1 - loss / 10."""
    scores = [1 - x / 10 for x in losses]
    lines = [evaluation(0, [9.0] * len(losses), [0.1] * len(losses)), round_line(1)]
    lines.append(evaluation(1, losses, scores))
    return summary(made(path, lines), method, SETTING | config)


def test_figures_by_hand(tmp_path: Path) -> None:
    s = summary(made(tmp_path / "run"), "fedit")
    assert (s.rounds, s.clients, s.score) == (2, ["ann", "bob", "eve"], "accuracy")
    assert (s.up, s.up_formula, s.down, s.down_formula) == (600, 600, 200, 204)
    assert s.frames == 600 + 40 + 200 + 80
    assert s.error == 0.2
    (title, head, losses), (of_score, _, scores), (_, columns, traffic) = tables([s])
    assert title == "held-out loss, over the clients"
    assert of_score == "held-out accuracy, over the clients"
    assert head[1:3] == ("loss first", "loss last")
    assert losses == [("fedit", "4", "2", "eve 3", "2", "-", "-")]
    assert scores == [("fedit", "0.1", "0.6", "eve 0.3", "0.6", "-", "-")]
    assert len(columns) == len(traffic[0])
    assert traffic == [("fedit", "600", "600", "200", "204", "920", "0.2")]
    assert fault_lines(s) == [
        "eve: norm_outlier, 1 x, last in round 1: norm 9 | too large",
        "eve: failed in round 2: OSError: gone\naway",
    ]


def test_gain_over_local_and_towards_central(tmp_path: Path) -> None:
    runs = [
        ended(tmp_path / "l", "local", [4.0, 6.0]),
        ended(tmp_path / "c", "central", [1.0]),
        ended(tmp_path / "f", "fedit", [2.0, 2.0]),
        ended(tmp_path / "s", "fedsa", [6.0, 6.0]),
        ended(tmp_path / "o", "flora", [2.0, 2.0], data={"train": "other"}),
    ]
    assert [row[-2:] for row in loss_rows(runs)] == [
        ("0", "0.00"), ("4", "1.00"), ("3", "0.75"), ("-1", "-0.25"), ("-", "-"),
    ]  # fmt: skip
    # Of scores the larger is the better: 0.5 of local, 0.9 of central.
    assert [row[-2:] for row in tables(runs)[1][2]] == [
        ("0", "0.00"), ("0.4", "1.00"), ("0.3", "0.75"), ("-0.1", "-0.25"), ("-", "-"),
    ]  # fmt: skip
    assert loss_rows(runs[1:3])[1][-2:] == ("-", "-")  # no local
    assert loss_rows([runs[0], runs[2]])[1][-2:] == ("3", "-")  # no central
    for name, loss in (("equal", 5.0), ("worse", 7.0)):  # central is no better than local
        other = ended(tmp_path / name, "central", [loss])
        assert loss_rows([runs[0], other, runs[2]])[2][-2:] == ("3", "-")


def test_runs_of_one_method_go_by_their_folders(tmp_path: Path) -> None:
    a, b = (ended(tmp_path / name, "fedit", [2.0]) for name in ("one", "two"))
    c = ended(tmp_path / "deep" / "one", "fedit", [2.0])
    assert labels([a]) == ["fedit"]
    assert labels([a, b]) == ["fedit one", "fedit two"]
    assert labels([a, b, ended(tmp_path / "l", "local", [1.0])])[2] == "local"
    assert labels([a, c]) == [f"fedit {a.path}", f"fedit {c.path}"]
    other = ended(
        tmp_path / "x",
        "fedsa",
        [2.0],
        local={"steps": 2},
        output={"dir": "x"},
        federated={"run": "x"},
    )
    assert differences([a, other]) == ["fedsa: local.steps: (not set) -> 2"]


def test_what_is_missing_is_a_dash(tmp_path: Path) -> None:
    lines = [round_line(1, traffic={}, aggregation_error={}, accepted=[])]
    s = summary(made(tmp_path / "run", lines), "fedit")
    assert (s.losses, s.scores, s.score, s.privacy) == ([], [], "", "")
    assert [title for title, _, _ in tables([s])] == ["bytes, over all rounds and clients"]
    assert loss_rows([ended(tmp_path / "l", "local", [4.0]), s])[1] == ("fedit", *["-"] * 6)
    assert traffic_rows([s]) == [("fedit", "0", "0", "0", "0", "0", "-")]
    with pytest.raises(ValueError, match=r"run: no round is complete\. Go on with --resume"):
        summary(made(tmp_path / "new" / "run", [evaluation(0, [1.0])]), "fedit")


def test_report_of_a_run(tmp_path: Path) -> None:
    spent = PrivacyReport(3.0, 1e-5, 8.0, 1.0, 0.8, 1.0, 3, 2)
    failed = evaluation(2, [2.0, 1.0, 3.0], [0.6, 0.9, 0.3])
    failed["clients"]["ann"] = {"failed": "ValueError: no rows"}
    lines = [*LINES[:-1], failed, {"kind": "privacy", "round": 2, **asdict(spent)}]
    folder = made(tmp_path / "run", lines)
    write_report(folder, algorithm("fedit"), "fedit")
    text = (folder.path / "report.md").read_text()
    for line in (
        "# fedit, 2 rounds, 3 clients",
        f"Privacy: {spent}",
        "| round | clients | loss | worst client | spread | accuracy | worst client | spread |",
        "| 1 | 3 | 3 | eve 4 | 2 | 0.4667 | eve 0.2 | 0.5 |",
        "| 1 | 2 of 3 | 1 | 0 | 200 | 200 | 100 | 102 | 0.1 |",
        "| 2 | 2 of 3 | 0 | 1 | 400 | 400 | 100 | 102 | 0.2 |",
        "| round | A cosine | A overlap | A chance | B cosine | B overlap | B chance |",
        "| 1 | 0.500 | 0.250 | 0.125 | - | 0.750 | 0.125 |",
        "| client | times | loss first | loss last | accuracy first | accuracy last |",
        "| ann | 2 | 4 | 3 | 0.1 | 0.5 |",
        "| bob | 3 | 4 | 1 | 0.1 | 0.9 |",
        "| ann | 2 of 2 | 0 | 1 | 300 | 300 | 100 | 102 | 1.5 |",
        "| eve | 0 of 2 | 1 | 1 | 0 | 0 | 0 | 0 | - |",
        "- eve: norm_outlier, 1 x, last in round 1: norm 9 | too large",
        "- eve: failed in round 2: OSError: gone away",
        "- ann: failed in round 2: evaluation: ValueError: no rows",
    ):
        assert f"{line}\n" in text, line
    for name in ("loss", "score", "similarity", "bytes"):
        assert f"![{name}]({name}.png)" in text
        assert not blank(folder.path / f"{name}.png")


TRAINED = [
    *LINES[:3],
    LINES[1] | {"held_out": {"ann": {"loss": 2.0, "accuracy": 0.6}, "eve": {"failed": "gone"}}},
    LINES[3]
    | {
        "held_out": {
            "ann": {"loss": 1.0, "accuracy": 0.8},
            "bob": {"loss": 0.5, "accuracy": 0.9},
        }
    },
    LINES[4],
]


def test_what_a_client_writes_is_text_in_the_report(tmp_path: Path) -> None:
    """No link, tag, picture or code of a client gets into report.md or comparison.md."""
    text = "![x](http://evil/?a) <script>alert(1)</script> `rm` *b* [a](javascript:b) \\"
    lines = [*LINES[:-1], round_line(3, failed={"eve": text}), evaluation(3, [1.0, 1.0, 1.0])]
    folder = made(tmp_path / "run", lines)
    write_report(folder, algorithm("fedit"), "fedit")
    out = write_comparison(tmp_path / "out", [summary(folder, "fedit")])
    escaped = (
        r"eve: failed in round 3: !\[x\](http://evil/?a) \<script\>alert(1)\</script\> "
        r"\`rm\` \*b\* \[a\](javascript:b) \\"
    )
    assert f"- {escaped}\n" in (folder.path / "report.md").read_text()
    assert f"- fedit: {escaped}\n" in (out / "comparison.md").read_text()


def test_both_stages_are_told_apart(tmp_path: Path) -> None:
    folder, plain = made(tmp_path / "run", TRAINED), made(tmp_path / "plain")
    s = summary(folder, "fedit")
    assert (s.losses, s.scores) == ((p := summary(plain, "fedit")).losses, p.scores)
    assert s.trained_losses == [(1, {"ann": 2.0}), (2, {"ann": 1.0, "bob": 0.5})]
    assert s.trained_scores == [(1, {"ann": 0.6}), (2, {"ann": 0.8, "bob": 0.9})]
    assert (p.trained_losses, p.trained_scores) == ([], [])
    assert "eve: failed in round 1: evaluation after local training: gone" in fault_lines(s)
    assert [title for title, _, _ in tables([s, p])] == [
        "held-out loss, over the clients",
        "held-out accuracy, over the clients",
        "held-out loss after local training, over the clients",
        "held-out accuracy after local training, over the clients",
        "bytes, over all rounds and clients",
    ]
    assert tables([s])[2][2] == [("fedit", "2", "0.75", "ann 1", "0.5", "-", "-")]
    for run in (folder, plain):
        write_report(run, algorithm("fedit"), "fedit")
    text, other = ((run.path / "report.md").read_text() for run in (folder, plain))
    rounds = text.partition("## By round: held out, after local training\n")[2]
    assert "| 2 | 2 | 0.75 | ann 1 | 0.5 | 0.85 | ann 0.8 | 0.1 |\n" in rounds.partition("##")[0]
    clients = text.partition("## By client: held out, after local training\n")[2].partition("##")[0]
    assert "| ann | 2 | 2 | 1 | 0.6 | 0.8 |\n" in clients
    assert "| bob | 1 | 0.5 | 0.5 | 0.9 | 0.9 |\n" in clients
    assert "| eve | 0 | - | - | - | - |\n" in clients
    assert "*After local training*: right after its own training" in text
    assert "local training" not in other
    for name in ("loss.png", "score.png"):  # a line more in each
        assert (folder.path / name).read_bytes() != (plain.path / name).read_bytes()
    rows = tables([summary(plain, "local", SETTING), summary(folder, "fedit", SETTING)])[2][2]
    assert [row[1:3] for row in rows] == [("-", "-"), ("2", "0.75")]


def test_gains_after_local_training_are_those_over_the_same_clients(tmp_path: Path) -> None:
    def run(name: str, method: str, held_out: dict[str, float]) -> Summary:
        measured = {"held_out": {c: {"loss": x} for c, x in held_out.items()}}
        lines = [evaluation(0, [9.0, 9.0]), round_line(1, **measured), evaluation(1, [5.0, 5.0])]
        return summary(made(tmp_path / name, lines), method, SETTING)

    both = run("l", "local", {"ann": 4.0, "bob": 6.0})
    runs = [both, run("c", "central", {"pooled": 1.0}), run("f", "fedit", {"ann": 2.0, "bob": 2.0})]
    assert [row[-2:] for row in tables(runs)[1][2]] == [("0", "0.00"), ("4", "1.00"), ("3", "0.75")]
    some = run("s", "fedsa", {"ann": 2.0})  # bob was not drawn, or its update was rejected
    assert tables([*runs[:2], some])[1][2][-1][-2:] == ("-", "-")
    assert loss_rows([*runs[:2], some])[-1][-2:] == ("0", "-")  # all are measured as a round starts
    picture = write_comparison(tmp_path / "out", runs) / "comparison.png"
    assert not blank(picture)
    assert "after local training" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_report_without_numbers_draws_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", [round_line(1, metrics={}, traffic={})])
    write_report(folder, algorithm("local"), "local")
    assert "Privacy: none." in (folder.path / "report.md").read_text()
    assert not list(folder.path.glob("*.png"))


def test_many_clients_are_cut_to_the_worst(tmp_path: Path) -> None:
    names = [f"c{i:03}" for i in range(101)]
    for count in (100, 101):
        lines = [
            round_line(1, selected=names[:count], accepted=names[:count], traffic={}),
            {
                "kind": "evaluation", "round": 1,
                "clients": {c: {"loss": float(i)} for i, c in enumerate(names[:count])},
            },
        ]  # fmt: skip
        folder = made(tmp_path / str(count), lines)
        write_report(folder, algorithm("fedit"), "fedit")
        text = (folder.path / "report.md").read_text()
        assert ("the 100 of the largest loss" in text) == (count == 101)
        assert ("\n| c000 | " in text) == (count == 100)
        assert "\n| c001 | " in text


def test_a_comparison_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    runs = [
        ended(tmp_path / "l", "local", [4.0, 6.0]),
        ended(tmp_path / "f", "fedit", [2.0, 2.0], local={"steps": 2}),
    ]
    out = write_comparison(tmp_path / "out", runs)
    text = (out / "comparison.md").read_text()
    assert "| fedit | 9 | 2 | ann 2 | 0 | 3 | - |\n" in text
    assert "## What differs from the first\n\n- fedit: local.steps: (not set) -> 2\n" in text
    assert "## Rejected and failed\n\nNone.\n" in text
    assert not blank(out / "comparison.png")
    with pytest.raises(FileExistsError, match=r"out: exists\. Give a new folder, or remove it"):
        write_comparison(out, runs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "l", "out"]


def test_report_verb_compares_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("local", "fedit"):
        folder = made(tmp_path / method)
        text = "data: {train: 'builtin:shift?n=8'}\nmodel: {name: 'builtin:tiny'}\n"
        text += f"method: {{name: lora}}\nfederated: {{method: {method}}}\nlocal: {{steps: 1}}\n"
        text += f"partition: {{clients: 3}}\noutput: {{dir: '{folder.path}'}}\n"
        folder.config.write_text(text)
    runs = [str(tmp_path / method) for method in ("local", "fedit")]
    assert main(["federate", "report", *runs, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"written: {tmp_path / 'out'}" in shown
    assert "norm_outlier, 1 x" in shown
    assert "| fedit | 4 | 2 | eve 3 | 2 | 0 | - |" in (tmp_path / "out/comparison.md").read_text()
    assert main(["federate", "report", *runs, "--out", str(tmp_path / "out")]) == 2
    assert "out: exists." in capsys.readouterr().err


def blank(path: Path) -> bool:
    """Whether a picture has one colour."""
    return bool(np.ptp(np.asarray(Image.open(io.BytesIO(path.read_bytes())))) == 0)


def test_training_rows_by_client_and_label(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "partition": {"kind": "by_column", "by": "task", "clients": None},
        "local": {"rounds": 1},
        "evaluation": {"every": 0},
    }
    folder = simulate(config(tmp_path / "run", changes))
    counts = folder.read_row_counts()
    partition = folder.read_partition()
    assert {name: sum(own.values()) for name, own in counts.items()} == {
        name: len(rows) for name, rows in partition.items()
    }
    assert counts["next"] == {"next": 6, "rotate": 0, "shout": 0, "swap": 0}
    report = (folder.path / "report.md").read_text()
    assert "| client | rows | next | rotate | shout | swap |" in report
    assert "| next | 6 | 6 | 0 | 0 | 0 |" in report
