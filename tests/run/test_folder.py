"""The JSON files of a run folder: schema and version, files of plait 0.1, damaged ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from plait.run.folder import RunFolder, read_json, read_lines, write_json, write_lines

ROWS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.begin("model: {}\n", {"training": 1}, {"train_rows": 4, "train_tokens": 9})
    folder.write_evaluation(split="test", before={"loss": 2.0})
    folder.write_metrics(ROWS)
    return folder


def test_each_file_says_what_it_is(folder: RunFolder) -> None:
    heads = {
        path.name: json.loads(text)
        for path, text in (
            (folder.evaluation, folder.evaluation.read_text()),
            (folder.environment, folder.environment.read_text()),
            (folder.metrics, folder.metrics.read_text().splitlines()[0]),
        )
    }
    assert {name: (head["schema"], head["version"]) for name, head in heads.items()} == {
        "eval.json": ("plait.eval", 1),
        "environment.json": ("plait.environment", 1),
        "metrics.jsonl": ("plait.metrics", 1),
    }


def test_what_is_read_is_what_was_written(folder: RunFolder) -> None:
    folder.write_evaluation(after={"loss": 1.0})
    assert folder.read_evaluation() == {
        "split": "test", "before": {"loss": 2.0}, "after": {"loss": 1.0},
    }  # fmt: skip
    folder.note(steps=5)
    assert folder.read_facts() == {"train_rows": 4, "train_tokens": 9, "steps": 5}
    assert folder.read_environment()["seeds"] == {"training": 1}
    folder.append_metrics({"step": 3})
    assert folder.read_metrics() == [*ROWS, {"step": 3}]


def test_an_empty_folder_has_nothing_to_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_evaluation() == folder.read_environment() == folder.read_facts() == {}
    assert folder.read_metrics() == []


def test_files_of_0_1_are_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.evaluation.write_text('{"split": "test", "after": {"loss": 1.0}}')
    folder.environment.write_text('{"python": "3.11", "run": {"steps": 5}}')
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n')
    assert folder.read_evaluation() == {"split": "test", "after": {"loss": 1.0}}
    assert folder.read_facts() == {"steps": 5}
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]
    folder.note(stored=3)
    assert json.loads(folder.environment.read_text())["version"] == 1


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_newer_version_is_refused(version: Any, tmp_path: Path) -> None:
    head = {"schema": "plait.x", "version": version}
    one, lines = tmp_path / "x.json", tmp_path / "x.jsonl"
    one.write_text(json.dumps(head))
    lines.write_text(json.dumps(head) + "\n")
    for path, read in ((one, lambda p: read_json(p, "plait.x", "")), (lines, _read_lines)):
        with pytest.raises(ValueError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}: version is {version!r}, and this plait reads versions up to 1. Upgrade "
            "plait: pip install --upgrade plait"
        )


def _read_lines(path: Path) -> Any:
    return read_lines(path, "plait.x")


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", "plait.x", {"a": 1})
    with pytest.raises(ValueError, match=r"a.json: schema is 'plait.x', it should be 'plait.y'"):
        read_json(tmp_path / "a.json", "plait.y", "Train again.")
    write_lines(tmp_path / "a.jsonl", "plait.y", ROWS)
    with pytest.raises(ValueError, match=r"a.jsonl: schema is 'plait.y', it should be 'plait.x'"):
        _read_lines(tmp_path / "a.jsonl")


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "{}\n{}"])
def test_a_damaged_file_names_the_remedy(text: str, folder: RunFolder) -> None:
    folder.evaluation.write_text(text)
    with pytest.raises(ValueError) as caught:
        folder.read_evaluation()
    assert str(caught.value).startswith(f"{folder.evaluation}: ")
    assert str(caught.value).endswith("Remove it and evaluate again.")
    folder.environment.write_bytes(b"\xff")
    with pytest.raises(ValueError) as caught:
        folder.read_facts()
    assert str(caught.value).startswith(f"{folder.environment}: ")
    assert str(caught.value).endswith("Train again.")


def test_an_unfinished_last_line_is_dropped_and_no_other(folder: RunFolder) -> None:
    whole = folder.metrics.read_text()
    folder.metrics.write_text(whole + '{"step": 3, "lo')
    assert folder.read_metrics() == ROWS
    folder.metrics.write_text(whole.replace('{"step": 1', '{"step" 1'))
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not JSON: .*Remove that line."):
        folder.read_metrics()
