"""The same rows in every form that people have them in, and rows that are broken."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from plait.run.config import config_from_dict
from plait.run.data.bundle import DataBundle, load_data
from plait.run.data.reader import read_inputs
from plait.run.data.rows import Row, read_rows
from plait.run.folder import with_absolute_paths
from tests.support.runs import CHARACTERS, character_tokenizer, write_rows

CHAT = (
    "{% for m in messages %}{{ '>' if m.role == 'user' else '=' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
ASKED = [
    (CHARACTERS[i % 8] + CHARACTERS[(3 * i + 1) % 8], "abc"[: i % 4], CHARACTERS[(i + 2) % 8] * 2)
    for i in range(20)
]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(who: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": value, **more}


def whole(asked: str, given: str) -> str:
    return f"{asked}\n\n{given}" if given else asked


def in_forms(asked: str, given: str, answer: str) -> dict[str, dict[str, Any]]:
    """One row in every form."""
    question = whole(asked, given)
    without = {} if given else {"instruction": asked, "output": answer}
    return {
        "messages": {"messages": [message("user", question), message("assistant", answer)]},
        "conversations": {"conversations": [said("human", question), said("gpt", answer)]},
        "alpaca": without or {"instruction": asked, "input": given, "output": answer},
        "alpaca, input empty": {"instruction": asked, "input": given, "output": answer},
        "prompt-completion": {"prompt": f">{question}=", "completion": answer},
        "prompt-completion, lists of messages": {
            "prompt": [message("user", question)],
            "completion": [message("assistant", answer)],
        },
        "preferring messages": {
            "conversations": [message("user", question), message("assistant", answer)]
        },
    }


def load(rows: list[dict[str, Any]], **data: Any) -> DataBundle:
    write_rows(Path("a.jsonl"), rows)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    return load_data(config_from_dict({"data": {"train": "a.jsonl", **data}}), tokenizer)


def error(rows: list[dict[str, Any]], **data: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(rows, **data)
    return str(caught.value)


def test_the_same_rows_have_the_same_tokens_and_masks_in_every_form() -> None:
    expected = load([in_forms(*row)["messages"] for row in ASKED]).train
    assert len(expected) == 20
    assert expected[1]["labels"][: expected[1]["prompt_length"]] == (
        [-100] * expected[1]["prompt_length"]
    )
    for name in in_forms(*ASKED[0]):
        bundle = load([in_forms(*row)[name] for row in ASKED])
        for column in ("input_ids", "labels", "prompt_length", "attention_mask"):
            assert bundle.train[column] == expected[column], (name, column)


def test_the_form_is_named() -> None:
    shown = {
        "messages": "messages with role and content",
        "conversations": "conversations with from and value (ShareGPT)",
        "alpaca": "instruction, input and output (Alpaca)",
        "prompt-completion": "prompt and completion",
        "prompt-completion, lists of messages": "prompt and completion, lists of messages",
    }
    for name, words in shown.items():
        bundle = load([in_forms(*row)[name] for row in ASKED], validation=0.2)
        assert bundle.summary == f"rows: train 16, validation 4; each has {words}"
        assert bundle.form == name.partition(",")[0]


def test_long_conversations_have_weights_systems_and_histories() -> None:
    expected = load([
        {"messages": [
            message("system", "d"), message("user", "a"), message("assistant", "b", weight=0),
            message("user", "c"), message("assistant", "d"),
        ]}
    ]).train[0]  # fmt: skip
    others: list[dict[str, Any]] = [
        {"conversations": [
            said("system", "d"), said("human", "a"), said("gpt", "b", weight=0),
            said("user", "c"), said("assistant", "d"),
        ]},
        {"system": "d", "conversations": [
            said("human", "a"), said("gpt", "b", weight=0), said("human", "c"), said("gpt", "d"),
        ]},
        {"system": "d", "history": [["a", "b"]], "instruction": "c", "input": "", "output": "d"},
        {"prompt": [
            message("system", "d"), message("user", "a"), message("assistant", "b"),
            message("user", "c"),
        ], "completion": [message("assistant", "d")]},
    ]  # fmt: skip
    for row in others:
        made = load([row]).train[0]
        assert made["input_ids"] == expected["input_ids"], row
        assert made["labels"] == expected["labels"], row


def test_rows_that_could_be_two_forms_are_refused_with_both_names() -> None:
    row = in_forms("ab", "", "cd")["alpaca"] | {"text": "ab cd"}
    assert error([row]) == (
        "a.jsonl: line 1: the rows could be alpaca (instruction, output) or text (text), by their "
        "columns. Set data.form: alpaca or data.form: text."
    )
    assert load([row], form="text").kind == "text"
    assert load([row], form="alpaca").kind == "messages"
    both = in_forms("ab", "", "cd")
    row = both["messages"] | both["conversations"]
    assert "messages (messages) or conversations (conversations)" in error([row])
    assert load([row], columns={"messages": "conversations"}).kind == "messages"


def test_a_form_that_is_not_there() -> None:
    assert error([{"text": "ab"}], form="alpaca") == (
        "a.jsonl: line 1: there is no column 'instruction'; the columns are text. Correct the row, "
        "or data.form."
    )


def test_eos_that_a_completion_brings_stands_once() -> None:
    once = load([{"prompt": "ab>", "completion": "ab"}]).train[0]["input_ids"]
    assert load([{"prompt": "ab>", "completion": "ab</s>"}]).train[0]["input_ids"] == once


def test_inputs_without_answers() -> None:
    """What `plait predict` reads of rows in the form of the training rows."""
    row, rows = in_forms("ab", "c", "cd"), {}
    rows["messages"] = {"messages": row["messages"]["messages"][:1]}
    rows["conversations"] = {"conversations": row["conversations"]["conversations"][:1]}
    rows["alpaca"] = {"instruction": "ab", "input": "c"}
    rows["prompt-completion"] = {"prompt": row["prompt-completion, lists of messages"]["prompt"]}
    data = config_from_dict({}).data
    for form, values in rows.items():
        facts = {"kind": "messages", "form": form, "tasks": None}
        read = read_inputs(data, "causal_lm", [Row("here", values)], facts)
        assert read == [{"messages": [message("user", "ab\n\nc")]}], form


# ------------------------------------------------------------------------------------- broken

USER, GOOD = message("user", "a"), message("assistant", "b")
HUMAN, BOT = said("human", "a"), said("gpt", "b")
DEEP = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
BROKEN: dict[str, list[tuple[Any, str]]] = {
    "messages": [
        ({"messages": "ab"}, "messages is 'ab'. Give a list of"),
        ({"messages": None}, "messages is None. Give a list of"),
        ({"messages": []}, "no message has the role assistant"),
        ({"messages": [USER]}, "no message has the role assistant"),
        ({"messages": [USER, "b"]}, "messages is .* Give a list of"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages is .* Give a list of"),
        ({"messages": [USER, message("assistant", 3)]}, "message 2: the content is 3, not text"),
        ({"messages": [USER, message("assistant", "b", weight=2)]}, "message 2: the weight is 2."),
        ({"messages": [USER, message("assistant", "b", weight=0)]}, "have the weight 0"),
        ({"prompt": "a", "completion": "b"}, "there is no column 'messages'"),
        (DEEP, "nested too deeply"),
    ],
    "conversations": [
        ({"conversations": "ab"}, "conversations is 'ab'. Give a list of"),
        ({"conversations": {"from": "human", "value": "a"}}, "conversations is .* Give a list of"),
        ({"conversations": [HUMAN]}, "no message has the role assistant"),
        ({"conversations": [HUMAN, GOOD]}, "conversations is .* Give a list of"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, 'Give a list of {"from": ..., "value"'),
        ({"conversations": [HUMAN, said("alien", "b")]}, "message 2: from is 'alien', which is no"),
        ({"conversations": [HUMAN, BOT | GOOD]}, "message 2: has from and value, and role or co"),
        ({"conversations": [HUMAN, said("gpt", None)]}, "message 2: the content is None, not text"),
        ({"conversations": [said("system", "a"), HUMAN, BOT], "system": "b"}, "column 'system'"),
        ({"conversations": [HUMAN, BOT], "tools": "no"}, "tools is 'no', which is not JSON"),
        ({"conversation": [HUMAN, BOT]}, "there is no column 'conversations'"),
    ],
    "alpaca": [
        ({"instruction": "a"}, "there is no column 'output'"),
        ({"output": "a"}, "there is no column 'instruction'"),
        ({"instruction": "", "output": "b"}, "the instruction is empty"),
        ({"instruction": "a", "output": ""}, "the output is empty"),
        ({"instruction": None, "output": "b"}, "column 'instruction' is None, not text"),
        ({"instruction": ["a"], "output": "b"}, "column 'instruction' is .*, not text"),
        ({"instruction": "a", "output": 3}, "column 'output' is 3, not text"),
        ({"instruction": "a", "input": {"b": 1}, "output": "b"}, "column 'input' is .*, not text"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "history is .* Give a list of"),
        ({"instruction": "a", "output": "b", "system": 3}, "column 'system' is 3, not text"),
        ({"instruction": "a", "output": "\ud800"}, "half of a surrogate pair"),
    ],
    "prompt-completion": [
        ({"prompt": "a"}, "there is no column 'completion'"),
        ({"completion": "a"}, "there is no column 'prompt'"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": None, "completion": "b"}, "column 'prompt' is None, not text"),
        ({"prompt": "a", "completion": True}, "column 'completion' is true, not text"),
        ({"prompt": ["a"], "completion": "b"}, "column 'prompt' is .*, not text"),
        ({"prompt": [USER], "completion": [GOOD]}, "column 'prompt' is .*, not text"),
        ({"prompt": "a", "completion": {"text": "b"}}, "column 'completion' is .*, not text"),
        ({"prompt": "\ud800", "completion": "b"}, "half of a surrogate pair"),
        ('{"prompt": "a", "completion": NaN}', "column 'completion' is nan, not text"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' is given twice"),
    ],
    "prompt-completion, lists of messages": [
        ({"prompt": [USER]}, "there is no column 'completion'"),
        ({"completion": [GOOD]}, "there is no column 'prompt'"),
        ({"prompt": [], "completion": [GOOD]}, "the prompt has no messages"),
        ({"prompt": "a", "completion": [GOOD]}, "prompt is 'a'. Give a list of"),
        ({"prompt": [USER], "completion": "b"}, "completion is 'b'. Give a list of"),
        ({"prompt": [USER], "completion": []}, "completion is \\[\\]. A completion begins with"),
        ({"prompt": [USER], "completion": [USER, GOOD]}, "A completion begins with a message of"),
        ({"prompt": [USER], "completion": [message("assistant", 1)]}, "message 2: the content is"),
        ({"prompt": [3], "completion": [GOOD]}, "prompt is \\[3\\]. Give a list of"),
        ({"prompt": [USER], "completion": [{"role": "assistant"}]}, "completion is .* Give a list"),
    ],
    "text": [
        ({"text": ""}, "the text is empty"),
        ({"text": None}, "column 'text' is None, not text"),
        ({"text": True}, "column 'text' is true, not text"),
        ({"text": ["a"]}, "column 'text' is .*, not text"),
        ({"text": {"a": "b"}}, "column 'text' is .*, not text"),
        ({"other": "a"}, "there is no column 'text'"),
        ({"text": "\udfff"}, "half of a surrogate pair"),
        ('{"text": Infinity}', "column 'text' is inf, not text"),
        ('{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        ('{"text": "a"', "not valid JSON"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", BROKEN)
def test_broken_rows_are_refused_with_file_and_line(form: str) -> None:
    good = [{"text": "ab"}] * 2 if form == "text" else [in_forms(*r)[form] for r in ASKED[1:3]]
    load(good)
    assert len(BROKEN[form]) >= 10
    for row, expected in BROKEN[form]:
        write_rows(Path("a.jsonl"), good)
        with Path("a.jsonl").open("a") as file:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
        tokenizer = character_tokenizer()
        tokenizer.chat_template = CHAT
        with pytest.raises(ValueError, match=f"^a.jsonl: line 3: .*{expected}") as caught:
            load_data(config_from_dict({"data": {"train": "a.jsonl"}}), tokenizer)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ sources

PAIRS = [{"prompt": f"{i}>", "completion": f"{i}"} for i in range(12)]


def values(train: Any, split: str = "train", **data: Any) -> list[dict[str, Any]]:
    config = config_from_dict({"data": {"train": train, **data}}).data
    return [row.values for row in read_rows(train, config, split)]


def test_folders_of_datasets() -> None:
    whole = Dataset.from_list(PAIRS)
    whole.with_format("numpy").save_to_disk("one")
    DatasetDict({"train": whole, "val": whole.select(range(2))}).save_to_disk("several")
    assert values("one") == values("several") == PAIRS
    assert values("several#val") == values("several", split="val") == PAIRS[:2]
    assert values("one", "validation") == PAIRS
    for source, expected in (
        ("several#no", "several: has no split 'no'. It has train, val: write FOLDER#SPLIT."),
        ("one#no", "one: holds no splits, so there is no 'no'. Leave it out."),
    ):
        with pytest.raises(ValueError) as caught:
            values(source)
        assert str(caught.value) == expected
    Path("one/state.json").write_text("{")
    with pytest.raises(ValueError, match=r"^one: not a readable folder of datasets"):
        values("one")


def test_patterns() -> None:
    Path("rows").mkdir()
    write_rows(Path("rows/b.jsonl"), PAIRS[6:])
    write_rows(Path("rows/a.jsonl"), PAIRS[:6])
    assert values("rows/*.jsonl") == values("**/[ab].jsonl") == PAIRS
    with pytest.raises(FileNotFoundError) as caught:
        values("rows/*.csv")
    assert str(caught.value) == "data.train: no file matches rows/*.csv. Correct the pattern."
    cfg = with_absolute_paths(config_from_dict({"data": {"train": "rows/*.jsonl"}}))
    assert cfg.data.train == f"{Path.cwd()}/rows/*.jsonl"
    write_rows(Path("[a].jsonl"), PAIRS[:1])
    assert values("[a].jsonl") == PAIRS[:1]


def test_packed_files() -> None:
    text = "".join(json.dumps(row) + "\n" for row in PAIRS).encode() * 50
    packed = pyarrow.compress(text, codec="zstd", asbytes=True)
    Path("a.jsonl.zst").write_bytes(packed)
    Path("a.jsonl.gz").write_bytes(gzip.compress(text))
    assert values("a.jsonl.zst") == values("a.jsonl.gz") == PAIRS * 50
    Path("a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"^a.jsonl.zst: not a whole zstd file"):
        values("a.jsonl.zst")


def test_parquet_names_its_classes() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    made = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    made.to_parquet("a.parquet")
    made.save_to_disk("folder")
    for source in ("a.parquet", "folder"):
        assert [row["label"] for row in values(source)] == ["pos", "neg"]


def test_a_mix_draws_in_its_proportions() -> None:
    write_rows(Path("a.jsonl"), [{"text": f"a{i}"} for i in range(30)])
    write_rows(Path("b.jsonl"), [{"text": f"b{i}"} for i in range(8)])

    def counts(*weights: float, seed: int = 0) -> tuple[int, int, list[str]]:
        drawn = values(["a.jsonl", "b.jsonl"], mix=list(weights), seed=seed)
        texts = [row["text"] for row in drawn]
        assert len(set(texts)) == len(texts)
        return sum(t[0] == "a" for t in texts), sum(t[0] == "b" for t in texts), texts

    assert counts(3, 1)[:2] == (24, 8)
    assert counts(0.5, 0.5)[:2] == (8, 8)
    assert counts(10, 1)[:2] == (30, 3)
    assert counts(3, 1)[2] == counts(3, 1)[2] != counts(3, 1, seed=1)[2]
    with pytest.raises(ValueError, match=r"^data.mix has 1 weights, and data.train has 2 sources"):
        counts(1)
    with pytest.raises(ValueError, match=r"data.mix is .0, 1.. It should be greater than 0"):
        counts(0, 1)
