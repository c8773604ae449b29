"""Published results: read, compared, written as a page."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("statsmodels")

from plait.run.compare import page
from plait.run.compare.published import compare_published, read_published
from plait_cli import main

ROWS = 500


def published(name: str, right: int, **more: Any) -> dict[str, Any]:
    """One run in peft's format; right: of ROWS test rows."""
    return {
        "run_info": {
            "experiment_name": name,
            "train_config": {"seed": 0, "optimizer_kwargs": {"lr": more.pop("rate", 1e-4)}},
            "peft_config": {"peft_type": name.partition("/")[0].upper()},
        },
        "train_info": {
            "status": more.pop("status", "success"),
            "train_time": 600.0,
            "num_trainable_params": more.pop("parameters", 1_000_000),
            "accelerator_memory_max": None,
            "file_size": 4_000_000,
            "metrics": [{"valid accuracy": 0.1}, {"test accuracy": right / ROWS, **more}],
        },
    }


RUNS = [
    published("lora/r8", 251, forgetting=0.1),
    published("good/<b>", 320, parameters=30_000_000),
    published("near/x", 260, rate=1e-3),
    published("bad/x", 100, parameters=10_000),
    published("failed/x", 0, status="failed"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in RUNS))
    return path


def test_runs_are_read_from_lines_and_from_files_of_one(file: Path, tmp_path: Path) -> None:
    runs = read_published([file])
    assert [run.name for run in runs] == ["lora/r8", "good/<b>", "near/x", "bad/x"]
    first = runs[0]
    assert (first.method, first.accuracy, first.rate, first.seed) == ("LORA", 0.502, 1e-4, 0)
    assert (first.parameters, first.seconds, first.memory) == (1_000_000, 600.0, None)
    assert (first.stored, first.forgetting) == (4_000_000, 0.1)
    one = tmp_path / "one.json"
    one.write_text(json.dumps(published("lora/r64", 250), indent=1))
    assert next(run.name for run in read_published([one, file])) == "lora/r64"


def test_a_run_is_better_worse_or_undecided(file: Path) -> None:
    study = compare_published(read_published([file]), "r8")
    assert study.test_rows == ROWS
    assert study.inferred
    said = {row.run.name: row.verdict for row in study.rows}
    assert said == {
        "good/<b>": "wins", "near/x": "undecided", "lora/r8": None, "bad/x": "loses",
    }  # fmt: skip
    assert [row.run.name for row in study.rows][:2] == ["good/<b>", "near/x"]
    assert study.counts == {"wins": 1, "loses": 1, "undecided": 1}
    assert study.seen == pytest.approx(0.062, abs=0.001)
    assert study.detectable == pytest.approx(0.0886, abs=0.001)
    near = next(row for row in study.rows if row.run.name == "near/x")
    assert near.difference is not None
    assert near.difference.low < 0.018 < near.difference.high
    paired = compare_published(read_published([file]), "lora/r8", ROWS, correlation=0.9)
    assert paired.seen < study.seen / 2
    assert not paired.inferred
    uncertain = compare_published(read_published([file]), "lora/r8", seed_spread=0.5)
    assert uncertain.counts["undecided"] == 3


def test_many_equal_runs_are_rarely_called(tmp_path: Path) -> None:
    """One run that would be better alone is undecided among forty (Holm)."""
    lines = [published("lora/x", 250), published("lucky/x", 283)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in lines))
    alone = compare_published(read_published([path]), "lora/x", ROWS)
    assert alone.counts["wins"] == 1
    lines += [published(f"other/{i}", 250 + i) for i in range(40)]
    path.write_text("".join(json.dumps(run) + "\n" for run in lines))
    among = compare_published(read_published([path]), "lora/x", ROWS)
    assert among.counts == {"wins": 0, "loses": 0, "undecided": 41}
    assert among.alone >= 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.pop("train_info"), "line 1: train_info is missing."),
        (lambda r: r["run_info"].pop("train_config"), "run_info.train_config is missing."),
        (lambda r: r["train_info"].update(metrics=[]), "ends without a test accuracy."),
        (
            lambda r: r["train_info"]["metrics"][-1].update({"test accuracy": 1.5}),
            "line 1: test accuracy is 1.5. It should be 0 to 1.",
        ),
        (
            lambda r: r["train_info"]["metrics"][-1].update({"test accuracy": float("nan")}),
            "test accuracy is nan.",
        ),
        (lambda r: r["train_info"].update(train_time="long"), "train_time is 'long'."),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path: Path, change: Any, text: str) -> None:
    run = published("lora/x", 1)
    change(run)
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(run) + "\n")
    with pytest.raises(ValueError) as caught:
        read_published([path])
    assert text in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_runs_that_cannot_be_compared_are_refused(file: Path, tmp_path: Path) -> None:
    runs = read_published([file])
    for reference, text in (
        ("lora/r9", "there is no run 'lora/r9'. Did you mean lora/r8?"),
        ("/x", "2 runs are called '/x', among them near/x and bad/x."),
    ):
        with pytest.raises(ValueError) as caught:
            compare_published(runs, reference)
        assert text in str(caught.value)
    with pytest.raises(ValueError, match=r"the accuracy 0\.502 is no share of 7 test rows"):
        compare_published(runs, "lora/r8", 7)
    with pytest.raises(ValueError, match=r"the correlation is 1\. Give more than -1"):
        compare_published(runs, "lora/r8", correlation=1.0)
    with pytest.raises(FileNotFoundError, match=r"no\.json: is no file"):
        read_published([tmp_path / "no.json"])
    twice = tmp_path / "twice.jsonl"
    twice.write_text(2 * (json.dumps(published("lora/x", 1)) + "\n"))
    with pytest.raises(ValueError, match=r"line 2: lora/x with seed 0 was read before"):
        read_published([twice])
    twice.write_text(json.dumps(published("lora/x", 1, status="failed")) + "\n")
    with pytest.raises(ValueError, match=r"no run succeeded"):
        read_published([twice])


class Page(html.parser.HTMLParser):
    """What a page asks for, and its cells by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in ("meta", "link", "line", "rect", "circle", "polyline") or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_pages_hold_the_study(file: Path) -> None:
    study = compare_published(read_published([file]), "r8")
    text = page.markdown(study)
    assert "1 better, 1 worse, 1 undecided" in text
    assert "| good/<b> | 64.0 |" in text
    assert "differ visibly from 6.2 points on" in text
    assert "has to be 8.9 points to be seen" in text
    assert "3 of 4 runs have the learning rate 0.0001." in text
    whole = page.html(study)
    made = Page(whole)
    assert made.open == []
    assert made.asked == ["data:,"]  # asks for nothing from elsewhere
    assert not re.search(r"https?://|url\(|@import", whole)
    assert "good/&lt;b&gt;" in whole
    assert made.tags.count("tr") == 5
    assert made.tags.count("svg") == 3 + 2  # a bar for each difference; no run notes its memory
    assert len(whole) < 40_000
    values = page.as_json(study)
    assert values["runs"][0]["difference"]["verdict"] == "wins"
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_the_command_writes_or_prints(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", "--peft-results", str(file), "--reference", "r8"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("# Published runs against lora/r8\n")
    out = tmp_path / "a" / "report"
    assert main([*words, "--seed-spread", "1.5", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html", "report.json", "report.md",
    ]  # fmt: skip
    assert json.loads((out / "report.json").read_text())["seed_spread"] == 0.015
    assert "3 better" not in capsys.readouterr().out
    assert main([*words, "--test-rows", "0"]) == 2
    assert capsys.readouterr().err == "plait report: --test-rows is 0. Give 1 or more.\n"


def test_without_statsmodels_the_command_names_the_extra(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    for name in [n for n in sys.modules if n.startswith(("statsmodels", "plait.run.compare."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    assert main(["report", "--peft-results", str(file), "--reference", "r8"]) == 2
    assert 'pip install "plait[compare]"' in capsys.readouterr().err


@pytest.mark.data
def test_pefts_own_suite(real_data: Any) -> None:
    """63 runs with one seed: Holm leaves nothing better than plain LoRA."""
    runs = read_published([real_data("peft_metamath/results.jsonl")])
    assert len(runs) == 63
    study = compare_published(runs, "lora/llama-3.2-3B-rank32")
    assert (study.test_rows, study.inferred) == (1319, True)
    assert study.seen == pytest.approx(0.038, abs=0.0005)
    assert study.detectable == pytest.approx(0.0545, abs=0.0005)
    assert study.alone == 1
    assert study.counts["wins"] == 0
    stronger = compare_published(runs, "lora/llama-3.2-3B-rank64-rslora")
    assert stronger.alone == 0
    assert len(page.html(study)) < 2 * 2**20
