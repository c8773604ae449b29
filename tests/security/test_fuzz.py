"""Damaged and hostile files: exit code 0 or 2, no traceback, bounded time and memory.

The short form runs with all tests. PLAIT_FUZZ_SECONDS=600 gives each target ten minutes of CPU.
Files in `corpus` once broke something, or are whole ones to start from.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import strategies as st

from plait.federated.guard import TooFewUpdates
from plait.federated.payload import Rejected, Round, Upload, unpack
from plait.federated.protocol import Reply
from plait.run.train import train
from tests.support.federation import federation
from tests.support.fuzz import ODD, changed, command, damaged, fuzz
from tests.support.runs import copy_rows, run_config, save_model, write_rows

CORPUS = Path(__file__).parent / "corpus"
Act = Callable[[Any], None]


def corpus(target: str) -> list[bytes]:
    """The files of a target, by name."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and no network."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with a checkpoint."""
    path = tmp_path_factory.mktemp("finished") / "run"
    rows = write_rows(path.parent / "rows.jsonl", copy_rows(8))
    options = {"max_steps": 1, "save_steps": 1}
    train(run_config(llama, rows, path, training=options, evaluation={"generate": False}))
    return path


# Configs ----------------------------------------------------------------------------------------

YAML_WORDS = [b"&a ", b"*a", b"<<: ", b"!!python/object:x.Y ", b"!!binary ", b"? ", b"- ", b"\t"]
YAML_WORDS += [
    b"---\n",
    b"...\n",
    b"%YAML 9.9\n",
    b"[" * 50,
    b"{a: " * 40,
    b"9" * 400,
    b".inf",
    b"~",
]
YAML_WORDS += [
    b"|\n",
    b">-\n",
    b"'",
    b'"',
    b'"\\ud800"',
    b"\xff",
    b"\x00",
    b"2020-13-01",
    b": ",
    b"#",
]


def documents(target: str) -> st.SearchStrategy[bytes]:
    """YAML files: changed as trees, or as texts."""
    texts = corpus(target)
    trees = changed([yaml.safe_load(text) for text in texts])
    dumped = trees.map(lambda tree: yaml.dump(tree, allow_unicode=True).encode("utf-8", "replace"))
    return st.one_of(dumped, damaged(texts, YAML_WORDS))


def run_yaml(data: bytes) -> None:
    Path("run.yaml").write_bytes(data)
    command("check", "run.yaml")


def federated_yaml(data: bytes) -> None:
    Path("run.yaml").write_bytes(data)
    command("federate", "simulate", "run.yaml")


def test_run_yaml(here: Path) -> None:
    assert fuzz(documents("run"), run_yaml, here / "log", short=12)


def test_federated_yaml(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first round, which may be one of a million."""

    def stop(*args: Any, **options: Any) -> None:
        raise ValueError("the rounds would begin here")

    monkeypatch.setattr("plait.run.federated.engines.conduct", stop)
    assert fuzz(documents("federated"), federated_yaml, here / "log", short=12)


# Rows -------------------------------------------------------------------------------------------

ROWS: list[Any] = [
    {"prompt": "ab>", "completion": "ab", "task": "copy"},
    {"text": "good film", "label": "yes", "score": 1.5},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "weight": 1}]},
    {"prompt": "ab>", "completion": "ab", "tools": [], "extra": None},
]


def json_lines(rows: list[Any]) -> bytes:
    """Rows as JSONL; what JSON has no name for stays as Python writes it, such as NaN."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table_of(rows: list[Any]) -> bytes:
    """Rows as Parquet; an empty file where Arrow takes them for no table."""
    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), out)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError, AttributeError, ValueError):
        return b""
    return out.getvalue()


def delimited(rows: list[Any], delimiter: str) -> bytes:
    """Rows as CSV or TSV, under the names of the first."""
    out = io.StringIO()
    names = list(rows[0]) if rows and isinstance(rows[0], Mapping) else ["text"]
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        writer.writerow(list(row.values()) if isinstance(row, Mapping) else [row])
    return out.getvalue().encode("utf-8", "replace")


def row_files(target: str, dump: Callable[[list[Any]], bytes]) -> st.SearchStrategy[bytes]:
    """Files of rows: rows changed as trees, or a whole file as bytes."""
    words = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\r", b"\n\n", b"," * 50, b"\t", b"{}\n"]
    words += [
        b"NaN",
        b"[" * 2000,
        b"9" * 5000,
        b'"\\ud800"',
        b'{"a":1,"a":2}\n',
        b"null\n",
        b"1e999",
    ]
    return st.one_of(changed([3 * [row] for row in ROWS]).map(dump), damaged(corpus(target), words))


DUMPS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": json_lines,
    "csv": lambda rows: delimited(rows, ","),
    "tsv": lambda rows: delimited(rows, "\t"),
    "parquet": table_of,
}


@pytest.mark.parametrize("kind", DUMPS)
def test_rows(kind: str, here: Path, llama: Path) -> None:
    task = st.sampled_from(["causal_lm", "causal_lm", "classification", "regression"])
    inputs = st.tuples(task, row_files(kind, DUMPS[kind]))
    file = here / f"rows.{kind}"
    config = {
        "model": {"name": str(llama)},
        "method": {"name": "lora", "r": 2},
        "data": {"train": str(file)},
        "training": {"max_steps": 1, "use_cpu": True},
    }
    (here / "run.yaml").write_text(yaml.safe_dump(config))

    def act(drawn: tuple[str, bytes]) -> None:
        file.write_bytes(drawn[1])
        command("check", "run.yaml", f"model.task={drawn[0]}")

    assert fuzz(inputs, act, here / "log", short=4)


# Folders ----------------------------------------------------------------------------------------

VERBS: list[tuple[str, ...]] = [
    ("generate", "--prompt", "ab>", "--max-new-tokens", "2"),
    ("evaluate",),
    ("inspect",),
    ("export", "--to", "lora", "--out", "exported"),
]


def folder_files(run: Path, names: list[str]) -> st.SearchStrategy[tuple[str, bytes]]:
    """A file of a run and what is in it now: JSON and YAML changed as trees, or any as bytes."""

    def of(name: str) -> st.SearchStrategy[bytes]:
        data = (run / name).read_bytes()
        ways = [damaged([data], [*YAML_WORDS, b'{"a": 1}', b"NaN", b"1e999", b"\xff" * 8])]
        if name.endswith((".json", ".yaml")):
            tree = json.loads(data) if name.endswith(".json") else yaml.safe_load(data)
            ways.append(changed([tree]).map(lambda tree: json.dumps(tree).encode()))
        return st.one_of(ways)

    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), of(name)))


def fuzz_folder(run: Path, names: list[str], here: Path, short: int) -> None:
    """Damage one file of a run and call a verb."""
    inputs = st.tuples(folder_files(run, names), st.sampled_from(VERBS[:-1]))

    def act(drawn: tuple[tuple[str, bytes], tuple[str, ...]]) -> None:
        (name, data), (verb, *words) = drawn
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(run, "run")
        (Path("run") / name).write_bytes(data)
        command(verb, "run", *words)

    assert fuzz(inputs, act, here / "log", short)


def test_adapter_folder(finished: Path, here: Path) -> None:
    names = [f"adapter/{path.name}" for path in (finished / "adapter").iterdir() if path.is_file()]
    fuzz_folder(finished, sorted(names), here, short=2)


def test_run_folder(finished: Path, here: Path) -> None:
    names = [p.name for p in finished.iterdir() if p.suffix in (".json", ".jsonl", ".yaml")]
    fuzz_folder(finished, sorted(names), here, short=2)


# The wire ---------------------------------------------------------------------------------------


def frames(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a frame with damage, and with a digest that is right again."""
    import hashlib

    broken = damaged([data], [b"\xff\xff\xff\xff", b"\x00" * 8, b"9" * 400, b'"', b"{", b"[" * 999])
    mended = damaged([data[32:]]).map(lambda body: hashlib.sha256(body).digest() + body)
    return st.one_of(broken, mended)


@pytest.fixture
def sent(tmp_path: Path) -> tuple[Any, dict[str, bytes]]:
    """A federation before its first round, and an honest reply of each client."""
    made = federation(tmp_path / "federation", rounds=10**6)
    orders = {name: made.server.order("train", name) for name in made.clients}
    packed = {name: order.pack(down) for name, (order, down) in orders.items()}
    return made, {name: made.site.answer(data) for name, data in packed.items()}


def test_payload(sent: Any, here: Path) -> None:
    made, replies = sent
    upload = Reply.unpack(replies["a"]).upload
    expected = Round("run", 1, made.server.method, made.clients, {})
    assert isinstance(unpack(upload, expected, "a"), Upload)

    def act(data: bytes) -> None:
        text = ""
        try:
            assert isinstance(unpack(data, expected, "a"), Upload)
        except Rejected as rejected:
            text = str(rejected)
        assert len(text) < 600

    assert fuzz(frames(upload), act, here / "log", short=100)


def test_reply(sent: Any, here: Path) -> None:
    """Anything in place of two of three replies: a round, or too few updates; never an error."""
    made, replies = sent
    head = json.loads(replies["a"][4 : 4 + int.from_bytes(replies["a"][:4], "big")])

    def packed(drawn: tuple[Any, bytes]) -> bytes:
        text = json.dumps(drawn[0]).encode()
        return len(text).to_bytes(4, "big") + text + drawn[1]

    upload = Reply.unpack(replies["a"]).upload
    metrics = {"metrics": {"loss": 1.0}, "held_out": {"clients": {"a": {"loss": 1.0}}}}
    heads = st.one_of(changed([head, head | metrics]), ODD)
    bodies = st.one_of(st.just(upload), frames(upload))
    inputs = st.one_of(st.tuples(heads, bodies).map(packed), damaged([replies["a"]]))
    state = made.server._last

    def act(data: bytes) -> None:
        def exchange(orders: Any) -> Any:
            yield "a", data
            yield "b", data
            yield "c", replies["c"]

        made.server._last = state
        try:
            record = made.server.step(exchange, measure=True)
        except TooFewUpdates:
            return
        text = json.dumps(record.to_dict(), allow_nan=False)
        assert len(text) < 100_000
        assert all(torch.isfinite(x).all() for x in made.state.tensors.values())

    assert fuzz(inputs, act, here / "log", short=20)
