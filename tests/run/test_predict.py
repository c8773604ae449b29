"""`plait predict`: rows in, rows with predictions out."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.run.evaluate import evaluate_run
from plait.run.generate import generate_run
from plait.run.infer import predict as predict_module
from plait.run.infer.predict import predict_run
from plait.run.prepare import load_run
from plait.run.train import train
from plait_cli import main
from tests.support.runs import copy_rows, film_rows, run_config, save_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    save_model("bert", folder / "bert")
    save_model("llama", folder / "llama")
    write_rows(folder / "films.jsonl", film_rows())
    write_rows(folder / "tasks.jsonl", copy_rows(tasks=True))
    return folder


def trained(place: Path, name: str, base: str, rows: str, **sections: Any) -> Path:
    if not (place / name).is_dir():
        train(run_config(place / base, place / rows, place / name, **sections))
    return place / name


@pytest.fixture(scope="module")
def classifier(place: Path) -> Path:
    return trained(
        place, "classifier", "bert", "films.jsonl", model={"task": "classification"},
        training={"max_steps": 30, "learning_rate": 3e-2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def regression(place: Path) -> Path:
    return trained(
        place, "regression", "bert", "films.jsonl", model={"task": "regression"},
        data={"columns": {"label": "score"}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def writer(place: Path) -> Path:
    return trained(place, "writer", "llama", "tasks.jsonl", evaluation={"generate": False})


@pytest.fixture(scope="module")
def routed(place: Path) -> Path:
    return trained(
        place, "routed", "llama", "tasks.jsonl", evaluation={"generate": False},
        method={"name": "shared_b", "r": 2, "routing": "task"},
        training={"max_steps": 20, "learning_rate": 5e-2},
    )  # fmt: skip


def predicted(run: Path, rows: list[dict[str, Any]], to: Path, **options: Any) -> list[Any]:
    source, out = write_rows(to / "in.jsonl", rows), to / "out.jsonl"
    assert predict_run(run, source, out, force=True, **options) == len(rows)
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_classes_and_their_probabilities(classifier: Path, tmp_path: Path) -> None:
    rows = [{"id": i, "text": row["text"]} for i, row in enumerate(film_rows(9))]
    made = predicted(classifier, rows, tmp_path, batch_size=4)
    run = load_run(classifier)
    for row, result in zip(rows, made, strict=True):
        inputs = run.tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            shares = run.model(**inputs).logits[0].float().softmax(-1).tolist()
        expected = dict(zip(run.facts["labels"], shares, strict=True))
        assert result["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert result["prediction"] == max(expected, key=lambda name: expected[name])
        assert {k: result[k] for k in row} == row
        assert sum(result["probabilities"].values()) == pytest.approx(1)
    for one, other in zip(made, predicted(classifier, rows, tmp_path, batch_size=1), strict=True):
        assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
        assert one == other


def test_agrees_with_evaluate(classifier: Path, regression: Path, tmp_path: Path) -> None:
    rows = film_rows(12)
    made = predicted(classifier, rows, tmp_path)
    hits = sum(row["prediction"] == row["label"] for row in made) / len(made)
    test = f"data.test={tmp_path / 'in.jsonl'}"
    assert evaluate_run(classifier, "test", [test])["accuracy"] == hits
    made = predicted(regression, rows, tmp_path)
    mse = sum((row["prediction"] - row["score"]) ** 2 for row in made) / len(made)
    assert evaluate_run(regression, "test", [test])["mse"] == pytest.approx(mse)


def test_pairs(place: Path, tmp_path: Path) -> None:
    rows = [{**row, "text_pair": row["text"]} for row in film_rows()]
    write_rows(place / "pairs.jsonl", rows)
    run = trained(
        place, "pairs", "bert", "pairs.jsonl", model={"task": "classification"},
        training={"max_steps": 2},
    )  # fmt: skip
    asked = [{"text": "good film", "text_pair": pair} for pair in ("bad", "plot")]
    first, second = predicted(run, asked, tmp_path)
    assert first["probabilities"] != second["probabilities"]
    write_rows(tmp_path / "one.jsonl", [{"text": "good film"}])
    with pytest.raises(ValueError, match=r"one\.jsonl: line 1: there is no column 'text_pair'"):
        predict_run(run, tmp_path / "one.jsonl", tmp_path / "o.jsonl")


def test_texts(writer: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": text} for text in ("ab>", "h>", "abcd?")]
    made = predicted(writer, rows, tmp_path, batch_size=2, max_new_tokens=5)
    for row, result in zip(rows, made, strict=True):
        alone = generate_run(writer, row["prompt"], max_new_tokens=5)
        assert result == {**row, "prediction": alone}


def test_each_row_has_its_task(routed: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": text, "task": task} for text in ("ab>", "cd?") for task in ("copy", "turn")
    ]
    made = predicted(routed, rows, tmp_path, max_new_tokens=4)
    for row, result in zip(rows, made, strict=True):
        alone = generate_run(routed, row["prompt"], task=row["task"], max_new_tokens=4)
        assert result["prediction"] == alone
    bare = [{"prompt": row["prompt"]} for row in rows]
    forced = predicted(routed, bare, tmp_path, task="turn", max_new_tokens=4)
    assert [r["prediction"] for r in forced[1::2]] == [r["prediction"] for r in made[1::2]]
    with pytest.raises(ValueError, match=r"line 1: the row has no task, .* one of copy, turn"):
        predicted(routed, bare, tmp_path)
    with pytest.raises(ValueError, match=r"line 1: the task is 'cpoy'.* Did you mean copy"):
        predicted(routed, [{"prompt": "a>", "task": "cpoy"}], tmp_path)
    with pytest.raises(ValueError, match="--task 'cpoy' is no task of this run"):
        predicted(routed, bare, tmp_path, task="cpoy")


def test_other_formats_and_columns(classifier: Path, tmp_path: Path) -> None:
    jsonl = predicted(classifier, [{"text": "good film"}], tmp_path)
    (tmp_path / "rows.csv").write_text("text\ngood film\n")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('{"text": "good film"}\n')
    (tmp_path / "rows").write_text('{"text": "good film"}\n')
    for name in ("rows.csv", "rows.jsonl.gz", "rows"):
        predict_run(classifier, tmp_path / name, tmp_path / f"{name}.out")
        assert json.loads((tmp_path / f"{name}.out").read_text()) == jsonl[0]


REFUSED = {
    "gone": (None, "--input .*gone.jsonl: there is no such file"),
    "empty": ("", "no rows are here"),
    "broken": ('{"text": "good"}\n{"text": \n', "broken.jsonl: line 2: not valid JSON"),
    "column": ('{"text": "good"}\n{"txt": "bad"}\n', "line 2: there is no column 'text'"),
    "number": ('{"text": ["a"]}\n', "line 1: column 'text' is .*, not text"),
    "long": (
        '{"text": "good"}\n{"text": "' + "good " * 80 + '"}\n',
        "line 2: the text has 80 tokens, and the model reads 64. Shorten it, or add "
        "data.truncate=true data.max_length=64",
    ),
    "huge": ('{"text": "' + "good" * 100000 + '"}\n', "line 1: has 400,000 characters"),
    "taken": ('{"text": "a", "prediction": 3}\n', "line 1: there is a column 'prediction' already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_rows_name_file_and_line(
    name: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, text = REFUSED[name]
    source, out = tmp_path / f"{name}.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        source.write_text(content)
    arguments = ["predict", str(classifier), "--input", str(source), "--output", str(out)]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("plait predict: ")
    assert len(err.splitlines()) == 1
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        predict_run(classifier, source, out)
    assert not out.exists()
    if name == "long":
        assert main([*arguments, "data.truncate=true", "data.max_length=64"]) == 0


def test_a_prompt_that_is_too_long_or_empty(writer: Path, tmp_path: Path) -> None:
    for text, reason in (("a" * 80, "has 80 tokens, and the model reads 64"), ("", "no tokens")):
        write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": text}])
        with pytest.raises(ValueError, match=rf"in\.jsonl: line 2: the prompt .*{reason}"):
            predict_run(writer, tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_the_output_is_whole_or_not_there(
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": "good film"}])
    out = tmp_path / "out.jsonl"
    arguments = ["predict", str(classifier), "--input", str(source), "--output"]
    assert main([*arguments, str(out), "--batch-size", "3"]) == 0
    assert capsys.readouterr().out == f"1 rows written to {out}\n"
    before = out.read_bytes()
    for path, text in (
        (out, f"--output {out}: exists. Give --force to replace it, or another file."),
        (tmp_path, f"--output {tmp_path}: is a folder. Give the name of a file."),
        (source, f"--output {source}: is the input itself. Give another file."),
        (tmp_path / "x" / "o", f"--output {tmp_path / 'x' / 'o'}: there is no folder"),
    ):
        assert main([*arguments, str(path)]) == 2
        assert text in capsys.readouterr().err
    assert main([*arguments, str(source), "--force"]) == 2
    capsys.readouterr()
    assert main([*arguments, str(out), "--batch-size", "0"]) == 2
    assert capsys.readouterr().err == (
        "plait predict: --batch-size 0 is below 1. Give 1 or more.\n"
    )
    write_rows(source, [{"text": "bad film"}])
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "_scores", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict_run(classifier, source, out, force=True)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert main([*arguments, str(out), "--force"]) == 0
    assert out.read_bytes() != before


def test_needs_no_rows_of_training(classifier: Path, place: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(classifier, tmp_path / "run")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("films.jsonl", "gone.jsonl"))
    rows = [{"text": "good film"}]
    assert predicted(moved, rows, tmp_path) == predicted(classifier, rows, tmp_path)
    with pytest.raises(ValueError, match="--max-new-tokens is of generated text"):
        predicted(classifier, rows, tmp_path, max_new_tokens=3)
