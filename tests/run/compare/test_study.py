"""The file of a comparison, the runs that it stands for, and the choice of ranks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("statsmodels")

from plait.run.compare.match import choose, match_arms
from plait.run.compare.study import duration, read_study
from plait.run.config import RunConfig
from tests.support import ROOT
from tests.support.runs import copy_rows, write_rows
from tests.support.studies import ARMS, sections, study_of, write_study

GRID = {"learning_rate": [1e-2, 1e-3]}


def test_arms_differ_in_their_method_and_share_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path, tune={**GRID, "seeds": 2}, seeds=3)
    assert (study.reference, study.metrics) == ("lora", ["exact_match"])
    assert study.rates == [1e-3, 1e-2]
    assert study.seeds == [7, 8, 9]
    tuning = study.tuning("dual", "", 1e-2, steps=5)
    assert [t.seed for t in tuning] == [7, 8]
    assert all(t.config.data.test is None for t in tuning)
    assert tuning[0].config.training["max_steps"] == 5
    compared = study.compared({("lora", ""): 1e-3, ("dual", ""): 1e-2})
    assert [(t.arm, t.rate, t.seed) for t in compared] == [
        (arm, rate, seed) for seed in (7, 8, 9) for arm, rate in (("lora", 1e-3), ("dual", 1e-2))
    ]
    first, other = compared[0].config, compared[1].config
    assert first.data == other.data
    assert first.training | {"learning_rate": 1e-2} == other.training
    assert len({t.key for t in (*tuning, *compared)}) == 2 + 6
    assert study.compared({("lora", ""): None, ("dual", ""): 1e-2})[0].arm == "dual"


def test_factors_make_cells(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary={"train_rows": [50, 200], "label_noise": [0, 0.2]})
    assert list(study.cells) == [
        "train rows 50, label noise 0",
        "train rows 50, label noise 0.2",
        "train rows 200, label noise 0",
        "train rows 200, label noise 0.2",
    ]
    data = study.config("dual", "train rows 50, label noise 0.2").data
    assert (data.limit, data.label_noise) == (50, 0.2)


def test_a_base_is_a_file_or_stands_in_it(tmp_path: Path) -> None:
    run = {**sections(), "method": {"name": "sora"}, "output": {"dir": "x"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    study = study_of(tmp_path, base="run.yaml")
    assert study.config("dual").method.name == "dual_lora"
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        study_of(tmp_path, base="no.yaml")


def test_lists_multiply_but_for_options_that_are_lists(tmp_path: Path) -> None:
    arms = {
        "lora": {"name": "lora", "target_modules": ["q_proj", "v_proj"]},
        "grid": {"name": "cola", "r": [4, 8], "strategy": ["full", "heuristic"]},
    }
    study = study_of(tmp_path, arms)
    assert list(study.arms) == [
        "lora",
        *[f"grid r={r} strategy={s}" for r in (4, 8) for s in ("full", "heuristic")],
    ]
    assert study.config("lora").method.options["target_modules"] == ["q_proj", "v_proj"]
    assert study.config("grid r=8 strategy=full").method.options["r"] == 8


def test_a_run_is_named_by_what_decides_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(8))
    rates: Any = dict.fromkeys([("lora", ""), ("dual", "")], 1e-3)
    first = study_of(tmp_path, seeds=1).compared(rates)[0]
    assert study_of(tmp_path, seeds=4, dir="elsewhere").compared(rates)[0].key == first.key
    changed = dataclasses.replace(first, config=study_of(tmp_path).config("lora", "", 2e-3, 7))
    assert changed.key != first.key
    write_rows(rows, copy_rows(9))
    assert study_of(tmp_path, seeds=1).compared(rates)[0].key != first.key
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    base = {**sections(), "model": {"name": str(model)}}
    known = study_of(tmp_path, base=base).compared(rates)[0].key
    (model / "config.json").write_text("{} ")
    assert study_of(tmp_path, base=base).compared(rates)[0].key != known


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"arms": ARMS, "bsae": {}}, "bsae is not known. Did you mean base?"),
        ({"base": sections(), "arms": {}}, "arms: give a method section"),
        ({"base": sections(), "arms": {"lora": {"name": "lora"}}}, "one arm, and nothing to comp"),
        ({"base": 3, "arms": ARMS}, "base is 3. Give a run file or its sections."),
        ({"base": sections(test=None), "arms": ARMS}, "base: data.test is not set"),
        (
            {"base": {**sections(), "objective": "dpo"}, "arms": ARMS},
            "base: objective is dpo, and comparisons are of supervised runs (sft).",
        ),
        (
            {"base": sections(validation=None), "arms": ARMS, "tune": GRID},
            "A rate is chosen on validation rows",
        ),
        (
            {"base": sections(), "arms": ARMS, "reference": "loar"},
            "reference is 'loar', which is not an arm. Did you mean lora?",
        ),
        (
            {"base": sections(), "arms": ARMS, "metrics": ["accuracy"]},
            "metrics: 'accuracy' is not measured by a causal_lm run.",
        ),
        ({"base": sections(), "arms": ARMS, "seeds": 0}, "seeds is 0. It should be"),
        ({"base": sections(), "arms": ARMS, "tune": {"budget": "half"}}, "tune.budget is 'half'"),
        ({"base": sections(), "arms": ARMS, "match": "time"}, "match is time, which this plait"),
        ({"base": sections(), "arms": ARMS, "engine": "ray"}, "engine is ray, which is not built"),
        ({"base": sections(), "arms": ARMS, "budget": "soon"}, "budget is 'soon'. Give a time"),
        (
            {"base": sections(), "arms": ARMS, "tune": {"learning_rate": [1e-3, 1e-3]}},
            "a rate is given twice",
        ),
        ({"base": sections(), "arms": {**ARMS, "x": {"name": "lora", "rnk": 3}}}, "arms.x"),
        (
            {"base": sections(), "arms": {f"a{i}": {"name": "lora"} for i in range(200)},
             "seeds": 1000},
            "200,000 runs. Give at most 100,000.",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: Any, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        read_study(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "examples/compare").glob("*.yaml"), *ROOT.glob("benchmarks/quality/*/study.yaml")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_files_that_come_along_are_right(path: Path) -> None:
    assert len(read_study(path).arms) > 2


def test_times_are_read() -> None:
    assert [duration(t) for t in ("90s", "30m", "1.5h", "2 d")] == [90, 1800, 5400, 172_800]
    for text in ("0m", "3", "-2h", "1h30m"):
        with pytest.raises(ValueError, match="Give a time such as 90s"):
            duration(text)


# ----------------------------------------------------------------------------------------- ranks


def _count(config: RunConfig) -> int:
    """Parameters as of a method whose every rank costs 10, or 7, or which has none."""
    name, rank = config.method.name, config.method.options.get("r", 8)
    if name == "dual_lora" and rank % 2:
        raise ValueError("an odd rank")
    return {"lora": 10 * rank, "dual_lora": 7 * rank + 2, "cola": rank * rank, "full": 999}[name]


ALL = {
    "lora": {"name": "lora", "r": 8},
    "dual": {"name": "dual_lora", "r": 32},
    "cola": {"name": "cola", "r": 2},
    "full": {"name": "full"},
}


def test_ranks_are_chosen_for_equal_parameters(tmp_path: Path) -> None:
    arms = choose(study_of(tmp_path, ALL, match="parameters"), _count)
    assert [(arm.name, arm.rank, arm.parameters) for arm in arms] == [
        ("lora", 8, 80), ("dual", 12, 86), ("cola", 9, 81), ("full", None, 999),
    ]  # fmt: skip
    assert arms[2].gap == pytest.approx(1 / 80)
    assert str(arms[1]) == "dual: r = 12, 86 trained parameters, +7.5% against the reference"
    assert "no rank to choose" in str(arms[3])


def test_ranks_are_those_of_the_reference_or_stay(tmp_path: Path) -> None:
    arms = choose(study_of(tmp_path, ALL, match="rank"), _count)
    assert [arm.rank for arm in arms] == [8, 8, 8, None]
    arms = choose(study_of(tmp_path, ALL), _count)
    assert [arm.rank for arm in arms] == [8, 32, 2, None]
    with pytest.raises(ValueError, match="match is rank, and the reference full has none"):
        choose(study_of(tmp_path, ALL, match="rank", reference="full"), _count)


def test_sizes_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(24))
    base = {
        "model": {"name": "builtin:tiny"},
        "data": {"train": str(rows), "test": str(rows), "validation": 0.25},
        "training": {"max_steps": 3, "use_cpu": True, "save_strategy": "no", "eval_strategy": "no"},
    }
    path = write_study(tmp_path, {**ARMS, "cola": {"name": "cola", "r": 1}}, base, match="rank")
    study, sizes = match_arms(read_study(path))
    assert study.arms["cola"]["r"] == 4
    assert sizes.steps == {"": 3}
    assert sizes.rows == {"": {"train": 18, "validation": 6, "test": 24}}
    monkeypatch.setattr("plait.run.compare.match._look", None)
    assert match_arms(read_study(path)) == (study, sizes)
    file = tmp_path / "out" / "arms.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=r"arms\.json: damaged"):
        match_arms(read_study(path))
