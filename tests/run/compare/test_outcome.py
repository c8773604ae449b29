"""Rates, verdicts, reports and plans of studies whose runs are pretended."""

import html.parser
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels")

from plait.run.compare import outcome, plan, report, runner, tables
from plait.run.compare.runner import Pool, Stopped
from plait.run.compare.study import Study, Trial
from plait.run.compare.tuning import next_rate, tune
from plait.run.metrics import metrics_of_rows
from tests.support.studies import ROWS, pretended, sizes_of, study_of

GRID = {"learning_rate": [1e-3, 1e-2, 1e-1]}
NASTY = "<script>alert(1)</script>|`$x$"


def peak(trial: Trial, at: float, best: float = 0.8) -> float:
    """A chance to be right that is best at one rate."""
    return max(0.05, best - 0.1 * abs(math.log10(trial.rate / at)))


def found(study: Study, chance: Any, ran: Any = None) -> dict[str, Any]:
    return outcome.conduct(study, sizes_of(study), pretended(study, chance, ran))


def row(results: dict[str, Any], arm: str, cell: str = "") -> dict[str, Any]:
    return next(r for r in results["results"] if (r["arm"], r["cell"]) == (arm, cell))


# ------------------------------------------------------------------------------------------- rates


def test_the_grid_grows_at_its_ends_with_equal_trials(tmp_path: Path) -> None:
    """dual's best rate is far above the grid: lora refines meanwhile, with as many trials."""
    study = study_of(tmp_path, tune={**GRID, "grow": 4}, seeds=2)
    ran: list[Trial] = []
    results = found(study, lambda t: peak(t, 1e-2 if t.arm == "lora" else 3.0), ran)
    tried = Counter(t.arm for t in ran if t.config.data.test is None)
    assert tried["lora"] == tried["dual"] == 3 + 2
    assert [rate for rate, _ in row(results, "dual")["tuned"]] == [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    assert row(results, "dual")["rate"] == 1.0
    assert row(results, "lora")["rate"] == 1e-2
    assert not row(results, "dual")["at_an_end"]
    assert {t.rate for t in ran if t.config.data.test is not None} == {1e-2, 1.0}


def test_a_grid_that_may_not_grow_is_said(tmp_path: Path) -> None:
    results = found(study_of(tmp_path, tune={**GRID, "grow": 0}, seeds=2), lambda t: peak(t, 10.0))
    assert row(results, "dual")["at_an_end"]
    assert any("dual: the best rate is at an end" in s for s in tables.conclusions(results))


def test_the_next_rate_lies_beyond_or_beside() -> None:
    assert next_rate({1e-3: 0.2, 1e-2: 0.5}, 1) == pytest.approx(1e-1)
    assert next_rate({1e-3: 0.2, 1e-2: 0.5}, -1) == pytest.approx(1e-4)
    assert next_rate({1e-3: None, 1e-2: None}, 1) == pytest.approx(1e-4)
    assert next_rate({1e-3: 0.4, 1e-2: 0.5, 1e-1: None}, 1) == pytest.approx(3.16e-3)


def test_halving_trains_all_rates_a_little_and_a_third_to_the_end(tmp_path: Path) -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    study = study_of(tmp_path, tune={"learning_rate": rates, "budget": "halving"}, seeds=2)
    ran: list[Trial] = []
    results = found(study, lambda t: peak(t, 1e-2), ran)
    steps = Counter(
        (t.arm, t.config.training.get("max_steps")) for t in ran if t.config.data.test is None
    )
    assert steps == {("lora", 25): 4, ("dual", 25): 4, ("lora", None): 2, ("dual", None): 2}
    assert row(results, "lora")["rate"] == 1e-2
    assert not row(results, "lora")["at_an_end"]


def test_a_rate_that_diverges_is_a_result(tmp_path: Path) -> None:
    study = study_of(tmp_path, tune={**GRID, "grow": 0}, seeds=3)

    def chance(t: Trial) -> float | None:
        if t.arm == "dual" and (t.rate > 1e-3 or t.seed == 9):
            return None
        return peak(t, 1e-2)

    results = found(study, chance)
    dual = row(results, "dual")
    assert dual["rate"] == 1e-3
    assert dual["tuned"][1:] == [[1e-2, None], [1e-1, None]]
    assert dual["comparison"] is None
    assert dual["why"] == "diverged in 1 of 3"
    said = " ".join(tables.conclusions(results))
    assert "dual: 2 of 3 trials of rates diverged." in said
    assert "dual: not compared, for it diverged in 1 of 3." in said
    every = found(
        study_of(tmp_path, tune={**GRID, "grow": 1}, seeds=2, dir=str(tmp_path / "every")),
        lambda t: None if t.arm == "dual" else peak(t, 1e-2),
    )
    assert row(every, "dual")["why"] == "diverged at every rate"
    assert len(row(every, "dual")["tuned"]) == 4  # a lower rate was tried
    assert row(every, "lora")["runs"]
    report.html(every)


def test_the_width_of_an_optimum() -> None:
    values: Any = {1.0: 0.90, 2.0: 1.0, 4.0: 0.90}
    assert outcome.octaves(values, True) == pytest.approx(1.0)
    assert outcome.octaves({1.0: 2.0, 2.0: 1.0}, False) == pytest.approx((1 / 0.95 - 1) / 1)
    assert outcome.octaves({1.0: 0.5, 2.0: None}, True) is None
    assert outcome.octaves({1.0: -0.5, 2.0: 0.1}, True) is None


# ---------------------------------------------------------------------------------------- verdicts


def test_an_arm_wins_loses_or_is_undecided(tmp_path: Path) -> None:
    arms = {name: {"name": "lora", "r": n} for n, name in enumerate(("a", "b", "c", "d"), 2)}
    study = study_of(tmp_path, arms, seeds=5, metrics=["exact_match", "loss"])
    share = {"a": 0.5, "b": 0.9, "c": 0.51, "d": 0.1}
    ran: list[Trial] = []
    results = found(study, lambda t: share[t.arm], ran)
    assert len(ran) == 4 * 5  # one rate: nothing to tune
    said = {r["arm"]: r["comparison"] and r["comparison"]["verdict"] for r in results["results"]}
    assert said == {"a": None, "b": "wins", "c": "undecided", "d": "loses"}
    b = row(results, "b")
    assert b["comparison"]["mean"] == pytest.approx(
        np.mean([r["value"] for r in b["runs"]])
        - np.mean([r["value"] for r in row(results, "a")["runs"]])
    )
    assert b["comparison"]["rows"] == ROWS
    assert b["others"]["loss"]["mean"] == pytest.approx(-b["comparison"]["mean"])
    text = " ".join(tables.conclusions(results))
    assert "3 comparisons with a: 1 wins, 1 loses, 1 undecided." in text
    assert re.search(r"c: undecided, \S+ measured, \S+ detectable\. To see as much", text)
    again: list[Trial] = []
    assert found(study, lambda t: share[t.arm], again) == results
    assert again == []


def test_cells_are_tuned_and_compared_apart(tmp_path: Path) -> None:
    study = study_of(tmp_path, tune=GRID, seeds=3, vary={"train_rows": [20, 80]})

    def chance(t: Trial) -> float:
        few = t.config.data.limit == 20
        return peak(t, 1e-2 if few else 1e-1, 0.9 if t.arm == "dual" and few else 0.5)

    results = found(study, chance)
    assert row(results, "dual", "train rows 20")["rate"] == 1e-2
    assert row(results, "dual", "train rows 20")["comparison"]["verdict"] == "wins"
    assert row(results, "dual", "train rows 80")["comparison"]["verdict"] == "undecided"
    _, head, rows = tables.verdict_table(results)
    assert head[:2] == ["factors", "arm"]
    assert rows[0][:2] == ["train rows 20", "lora"]


def test_time_that_is_up_leaves_what_can_be_compared(tmp_path: Path) -> None:
    study = study_of(tmp_path, tune=GRID, seeds=5)
    run, left = pretended(study, lambda t: peak(t, 1e-2)), 10

    def until(trials: Any) -> None:
        nonlocal left
        for trial in trials:
            if not left:
                raise Stopped
            run([trial])
            left -= 1

    results = outcome.conduct(study, sizes_of(study), until)
    assert (results["complete"], results["tuning_complete"]) == (False, True)
    dual = row(results, "dual")["comparison"]
    assert dual["seeds"] == 2
    assert next(tables.conclusions(results)).startswith("The study is not finished: time was up")
    left = 3
    results = outcome.conduct(
        study_of(tmp_path, tune=GRID, dir=str(tmp_path / "b")), sizes_of(study), until
    )
    assert not results["tuning_complete"]
    assert tables.verdict_table(results)[2][1][-2] == "not run"
    report.html(results)


def test_the_mean_of_the_parts_is_the_metric() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 20).astype(float)
    causal = {
        "nll": rng.random(20) * tokens, "tokens": tokens, "correct": np.floor(tokens / 2),
        "exact_match": (rng.random(20) < 0.3).astype(float),
    }  # fmt: skip
    classes = {
        "label": rng.integers(0, 3, 20).astype(float),
        "predicted": rng.integers(0, 3, 20).astype(float),
        "nll": rng.random(20),
    }
    numbers = {"label": rng.random(20), "predicted": rng.random(20)}
    for task, rows in (
        ("causal_lm", causal), ("classification", classes), ("regression", numbers),
    ):  # fmt: skip
        for metric, value in metrics_of_rows(task, rows).items():
            parts = runner.parts_of(task, metric, rows)
            assert parts.mean() == pytest.approx(value), metric
            alone = metric in ("perplexity", "macro_f1", "matthews", "pearson", "spearman")
            assert len(parts) == (1 if alone else 20), metric


# ------------------------------------------------------------------------------------------ plans


def planned(study: Study, chance: Any = lambda t: 0.5) -> plan.Plan:
    pool = Pool(study.folder)
    pool.run = pretended(study, chance)  # type: ignore[method-assign,assignment]
    return plan.make_plan(study, sizes_of(study), pool)


def test_a_plan_says_what_can_be_seen_and_what_it_takes(tmp_path: Path) -> None:
    made = planned(study_of(tmp_path, tune={**GRID, "grow": 0}, seeds=5))
    lines = list(made.lines())
    # A step takes 1 s / 8; 0.5 s of 2 are neither training nor measuring; 60 rows take 0.6 s.
    assert made.arms[0].step == pytest.approx(0.125)
    assert made.arms[0].run == pytest.approx(0.5 + 100 * 0.125 + 0.6)
    assert made.tuning == pytest.approx(2 * 3 * (0.5 + 12.5 + 0.5))
    assert made.seed == pytest.approx(2 * 13.6)
    small = made.detectable(5, ROWS)
    assert lines[0].startswith(
        f"smallest detectable difference of exact match (80 % power, 5 seeds, 60 test rows): "
        f"{small:.3g}; "
    )
    assert "assumed" in lines[1]
    assert "a correlation of 0.6" in lines[1]
    rows = int(re.search(r"to halve it: ([\d,]+) test rows", lines[2])[1].replace(",", ""))  # type: ignore[index]
    assert made.detectable(5, rows) <= small / 2 < made.detectable(5, rows - 1)
    assert any("100 MB" in line for line in lines)


def test_a_plan_uses_finished_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=2)
    found(study, lambda t: 0.5 + 0.1 * (t.arm == "dual"))
    made = planned(study_of(tmp_path, seeds=8))
    assert made.source == "the finished runs: the widest of 1 comparisons, 2 seeds"


def test_a_plan_says_what_a_budget_skips(tmp_path: Path) -> None:
    for budget, text in (
        ("2m", "covers the rates and 1 of 5 seeds; the other 4 will be skipped"),
        ("1h", "the budget of 1h covers all of it"),
        ("5s", "does not cover the choice of the rates"),
    ):
        study = study_of(tmp_path, tune={**GRID, "grow": 0}, budget=budget)
        assert text in list(planned(study).lines())[-1]


# ---------------------------------------------------------------------------------------- reports


class Page(html.parser.HTMLParser):
    """What a page asks for, its tags, and those left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    arms = {"lora": {"name": "lora"}, NASTY: {"name": "lora", "r": 2}}
    arms |= {f"arm {n}": {"name": "lora", "r": 3 + n} for n in range(8)}
    study = study_of(tmp_path, arms, tune=GRID, seeds=3)
    made = found(study, lambda t: peak(t, 1e-2, 0.5 + 0.03 * list(study.arms).index(t.arm)))
    for n, of_arm in enumerate(made["results"]):
        of_arm["curve"] = {"training": [[1, 2.0], [5, 1.0 + n]], "validation": [[5, 1.1]]}
        for run in of_arm["runs"]:
            run |= {"trainable": 1000 * (n + 1), "seconds": 1.0 + n, "steps": 10, "stored": 5000}
    outcome.write(study, made)
    return outcome.read(study.folder)


def test_the_page_is_whole_and_asks_for_nothing(results: dict[str, Any]) -> None:
    text = report.html(results)
    page = Page(text)
    assert page.open == []
    assert {asked for asked in page.asked if not asked.startswith("#")} == {"data:,"}
    assert not re.search(r"https?://|@import", text)
    assert {name[1:] for name in page.asked if name.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))  # also those of different pictures
    assert page.tags.count("svg") == 5  # forest, rates, two costs (memory is equal), losses
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"#0\d0\d0\d", text)  # stand-in colours
    assert len(text) < 400_000


def test_the_markdown_is_no_markup_of_others(results: dict[str, Any]) -> None:
    text = report.markdown(results)
    assert "<script" not in text
    line = next(line for line in text.splitlines() if "alert(1)" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 9
    assert "## How it was made\n\n- Model: builtin:tiny, causal\\_lm." in text.replace(
        "causal_lm", "causal\\_lm"
    )


def test_pefts_schema_is_read_back(results: dict[str, Any], tmp_path: Path) -> None:
    from plait.run.compare.published import read_published

    report.write_report(results, tmp_path / "r")
    runs = read_published([tmp_path / "r" / "peft_results.jsonl"])
    assert len(runs) == 10 * 3
    first = runs[0]
    assert (first.name, first.seed, first.rate) == ("lora/seed7", 7, 1e-2)
    assert first.accuracy == row(results, "lora")["runs"][0]["metrics"]["exact_match"]
    assert (first.parameters, first.stored, first.seconds) == (1000, 5000, 1.0)


def test_damaged_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results of a comparison are here"):
        outcome.read(tmp_path)
    file = tmp_path / "results.json"
    for content in ("{", "[]", '{"schema": "x"}', '{"results": 3}', '{"results": [{"arm": "a"}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"results\.json: "):
            outcome.read(tmp_path)


def test_tuning_leaves_the_test_rows_alone(tmp_path: Path) -> None:
    study, ran = study_of(tmp_path, tune=GRID, seeds=2), list[Trial]()
    tune(study, pretended(study, lambda t: peak(t, 1e-2), ran), {})
    assert ran
    assert all(trial.config.data.test is None for trial in ran)
    json.dumps([trial.key for trial in ran])
