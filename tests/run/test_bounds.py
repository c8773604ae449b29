"""Input made to take all memory or time, or that no file holds by accident: refused at once."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from plait.assets import builtin_rows
from plait.options import did_you_mean, shown
from plait.run.config import DataConfig, config_from_dict, load_config
from plait.run.data.rows import read_rows
from plait.run.data.tokens import tokenize
from plait_cli import main

SECONDS, BYTES = 5.0, 100 * 1024**2


def bomb(part: str) -> str:
    """Ten aliases of ten aliases of .., twelve deep: 10^12 values."""
    lines = [f"a0: &a0 {part}"]
    for i in range(1, 13):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines)


FILES: dict[str, tuple[str | bytes, str]] = {
    "a bomb": (bomb("[x]"), "line 5, column 5: more than 20,000 values"),
    "a bomb of merges": (
        "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)),
        "more than 20,000 values",
    ),
    "an alias of itself": ("a: &a [*a]", "nested more than 32 levels deep"),
    "deep lists": ("a: " + "[" * 100_000, "nested more than 32 levels deep"),
    "deep mappings": ("\n".join(" " * i + "a:" for i in range(400)), "nested more than 32 levels"),
    "many values": ("a: [" + "x," * 400_000 + "]", "more than 20,000 values"),
    "a large file": ("a: " + "x" * 2_000_000, "has 2,000,003 bytes"),
    "a number of 5,000 digits": ("training: {seed: " + "9" * 5000 + "}", "Exceeds the limit"),
    "a number of 400 digits": (
        "training: {seed: " + "9" * 400 + "}",
        "training.seed is " + "9" * 76 + " ... (400 characters)",
    ),
    "400 digits for a fraction": ("training: {weight_decay: " + "9" * 400 + "}", "weight_decay is"),
    "400 digits for a rank": ("method: {r: " + "9" * 400 + "}", "method.r is " + "9" * 76 + " ..."),
    "a base of 60": ("training: {seed: " + "1:" * 20_000 + "1}", "training.seed is"),
    "a long name": ("model: {" + "k" * 900 + ": 1}", "model." + "k" * 200 + " is not known"),
    "a long method": ("method: {name: " + "m" * 4000 + "}", "method.name is 'mmmm"),
    "a long folder": ("output: {dir: runs/" + "d" * 256 + "}", "of 256 bytes. Give names of up to"),
    "half a pair": ('model: {name: "\\ud800"}', "line 1, column 15: half of a surrogate pair"),
    "no UTF-8": (b"model: {name: \xff}", "byte 0xff is not UTF-8 text"),
    "a zero byte": (b"model: \x00", "special characters are not allowed"),
    "month 13": ("data: {train: 2020-13-01}", "month must be in 1..12"),
    "a list as a key": ("? [a]\n: b", "unhashable key"),
    "a tag": ("model: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a huge rank": ("method: {r: 1000000}", "method.r is 1000000"),
    "many experts": (
        "method: {name: molora, num_experts: 999999999}",
        "method.num_experts is 999999999",
    ),
    "many links": ("chain: {links: 999999999}", "chain.links is 999999999"),
    "many workers": ("training: {dataloader_num_workers: 1000000}", "dataloader_num_workers is"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_config_file_is_refused_at_once(tmp_path: Path, case: str) -> None:
    content, text = FILES[case]
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    load_config(_small(tmp_path))  # imports what reading takes
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_config(file)
    taken, most = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert text in message
    assert str(file) in message
    assert len(message) < 600
    assert "\n" not in message
    assert taken < 4 * SECONDS  # tracing makes it slow
    assert most < BYTES


def _small(folder: Path) -> Path:
    file = folder / "small.yaml"
    file.write_text("method: {name: lora, r: 4}\ntraining: {max_steps: 1}\n")
    return file


def test_values_that_stay_allowed(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: &empty {}\nevaluation: *empty\nmethod: {r: 4}\n")
    assert load_config(file).method.options == {"r": 4}
    files = ", ".join(f"rows{i}.jsonl" for i in range(5000))
    file.write_text(f"data: {{train: [{files}]}}\n")
    assert len(load_config(file).data.train) == 5000


def test_values_in_errors_are_short() -> None:
    assert shown("x" * 1000) == "'" + "x" * 75 + " ... (1,002 characters)"
    assert shown(1 << 100_000) == "a number of more than 4,300 digits"
    assert shown("short") == "'short'"
    start = time.monotonic()
    did_you_mean("x" * 10_000_000, ["rank", "alpha"])
    assert time.monotonic() - start < 1


def test_a_generator_makes_a_bounded_number_of_rows() -> None:
    with pytest.raises(ValueError, match=r"builtin:shift: n is '999999999'\. Give a whole number"):
        builtin_rows("shift?n=999999999", "train", 0)
    with pytest.raises(ValueError, match=r"builtin:shift: n is '9999"):
        builtin_rows("shift?n=" + "9" * 5000, "train", 0)


# Words that YAML takes for truth values ---------------------------------------------------------


def training(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "run.yaml"
    file.write_text(f"training: {{{text}}}\n")
    return load_config(file).training


@pytest.mark.parametrize("word", ["no", "No", "NO"])
def test_no_is_a_word_where_a_word_is_meant(tmp_path: Path, word: str) -> None:
    assert training(tmp_path, f"eval_strategy: {word}")["eval_strategy"] == "no"
    assert training(tmp_path, f"save_strategy: {word}")["save_strategy"] == "no"
    assert training(tmp_path, f"report_to: {word}")["report_to"] == "none"
    cfg = load_config(_small(tmp_path), [f"training.eval_strategy={word}"])
    assert cfg.training["eval_strategy"] == "no"


def test_truth_values_stay_truth_values(tmp_path: Path) -> None:
    for text, value in (("yes", True), ("off", False), ("true", True), ("False", False)):
        assert training(tmp_path, f"bf16: {text}")["bf16"] is value
        kept = training(tmp_path, f"gradient_checkpointing_kwargs: {{use_reentrant: {text}}}")
        assert kept["gradient_checkpointing_kwargs"] == {"use_reentrant": value}
        scalar = training(tmp_path, f"include_num_input_tokens_seen: {text}")
        assert scalar["include_num_input_tokens_seen"] is value
    file = tmp_path / "run.yaml"
    file.write_text("data: {truncate: on, columns: {label: yes, task: no}, validation: null}\n")
    data = load_config(file).data
    assert (data.truncate, data.columns.label, data.columns.task) == (True, "yes", "no")
    file.write_text("method: {name: shared_b, routing: task, tasks: [yes, no, True]}\n")
    assert load_config(file).method.options["tasks"] == ["yes", "no", "True"]


def test_a_truth_value_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml: training\.max_steps is 'yes'\. It should be"):
        training(tmp_path, "max_steps: yes")


# Rows -------------------------------------------------------------------------------------------


def read(path: Path, **options: Any) -> list[Any]:
    return read_rows(str(path), DataConfig(train=str(path), **options), "train")


ROWS: dict[str, tuple[str, bytes, str]] = {
    "deep JSON": ("x.jsonl", b'{"text": ' + b"[" * 200_000, "x.jsonl: line 1: the values are nest"),
    "deep JSON file": ("x.json", b"[" * 200_000, "x.json: the values are nested too deeply"),
    "5,000 digits": (
        "x.jsonl",
        b'{"label": ' + b"9" * 5000 + b"}",
        "x.jsonl: line 1: not readable",
    ),
    "no Parquet": ("x.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "x.parquet: not a readable"),
    "empty Parquet": ("x.parquet", b"", "x.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_read_name_their_file(tmp_path: Path, case: str) -> None:
    name, content, text = ROWS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500


def test_damaged_parquet_is_a_user_s_error(tmp_path: Path) -> None:
    """Each of many damages ends in rows or in one typed error."""
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "whole.parquet"
    columns = {"text": [f"row {i}" for i in range(50)], "label": list(range(50))}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    content, refused = file.read_bytes(), 0
    damaged = tmp_path / "damaged.parquet"
    for place in range(4, len(content), 7):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            read(damaged)
        except ValueError as error:
            refused += str(error).startswith(f"{damaged}: not a readable Parquet file")
    assert refused


def test_a_name_that_no_file_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "n" * 300 + ".jsonl"
    with pytest.raises(ValueError, match=r"data\.train is 'nnn.* more than 255 characters"):
        read_rows(name, DataConfig(train=name), "train")
    assert main(["evaluate", str(tmp_path / ("r" * 300))]) == 2
    assert main(["check", str(tmp_path / ("r" * 300))]) == 2


@pytest.mark.parametrize("row", [{"prompt": "\ud800", "completion": "a"}, {"text": "a\udfff"}])
def test_half_of_a_surrogate_pair_in_a_row(tmp_path: Path, row: dict[str, str]) -> None:
    from plait.run.data.bundle import load_data
    from plait.run.model import load_tokenizer

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    config = config_from_dict({"data": {"train": str(file)}})
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1: column .* half of a surrogate"):
        load_data(config, load_tokenizer(config.model))


class Counting:
    """A tokenizer that notes the longest text it is given."""

    def __init__(self, inner: Any):
        self.inner, self.longest = inner, 0

    def __call__(self, texts: Any, *more: Any, **options: Any) -> Any:
        of = [texts] if isinstance(texts, str) else texts
        self.longest = max(self.longest, *(len(text) for text in of), 0)
        return self.inner(texts, *more, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_long_row_is_cut_before_it_is_tokenized(tmp_path: Path) -> None:
    from plait.run.data.reader import read_columns
    from plait.run.data.rows import read_splits
    from plait.run.model import load_tokenizer

    file = tmp_path / "rows.jsonl"
    long = "reverse plait=" * 100_000
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, long[:400])))
    raw = {"data": {"train": str(file), "max_length": 16, "truncate": True}}
    config = config_from_dict(raw)
    tokenizer: Any = Counting(load_tokenizer(config.model))
    source, rows = read_splits(config.data)
    columns = read_columns(config.data, "causal_lm", config.method, source, rows)
    made = tokenize(columns, config.data, True, tokenizer)["train"]
    assert tokenizer.longest <= 16 * 128
    assert made[0]["input_ids"] == made[1]["input_ids"]
    assert len(made[0]["input_ids"]) == 16
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1: has 1,400,000 characters"):
        tokenize(
            read_columns(config.data, "causal_lm", config.method, source, rows),
            config_from_dict({"data": {"train": str(file), "max_length": 16}}).data,
            True,
            tokenizer,
        )
