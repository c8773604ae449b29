"""Rows from real little files to tokens: formats, columns, the loss mask, splits, overlap."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from plait.core.events import PlaitWarning
from plait.run.config import config_from_dict
from plait.run.data.bundle import load_data
from plait.run.data.overlap import overlap, repeats
from plait.run.data.rows import read_rows
from plait.run.data.tokens import CUT, IGNORED, encode_chat, encode_prompt
from tests.support.runs import character_tokenizer, word_tokenizer

PAIRS = [{"prompt": "ab>", "completion": "ab"}, {"prompt": "cd>", "completion": "dc"}]
CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer():
    return character_tokenizer()


def write(name, content):
    with open(name, "w", encoding="utf-8") as file:
        file.write(content)
    return name


def jsonl(name, rows):
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def config(task="causal_lm", method=None, **data):
    return config_from_dict({"model": {"task": task}, "method": method or {}, "data": data})


def load(tokenizer, task="causal_lm", method=None, **data):
    return load_data(config(task, method, **data), tokenizer)


def error(tokenizer, task="causal_lm", method=None, kind=ValueError, **data):
    with pytest.raises(kind) as caught:
        load(tokenizer, task, method, **data)
    return str(caught.value)


def columns(**data):
    return [row.values for row in read_rows(data.pop("train"), config(**data).data, "train")]


# ------------------------------------------------------------------------------------ formats


def test_formats_read_the_same_rows():
    rows = [{"prompt": "a, b", "completion": 'say "x"'}, {"prompt": "ü", "completion": "2"}]
    jsonl("a.jsonl", rows)
    write("a.json", json.dumps(rows))
    write("split.json", json.dumps({"train": rows, "val": rows[:1]}))
    write("a.csv", 'prompt,completion\n"a, b","say ""x"""\n\nü,2\n')
    write("a.tsv", 'prompt\tcompletion\na, b\tsay "x"\nü\t2\n')
    write("a.txt", 'a, b||say "x"\nü||2\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    with gzip.open("a.jsonl.gz", "wb") as file:
        file.write(Path("a.jsonl").read_bytes())
    for name in ("a.jsonl", "a.json", "split.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"):
        assert columns(train=name) == rows, name
    assert columns(train="split.json#val") == rows[:1]
    assert columns(train="split.json", split="val") == rows[:1]
    assert columns(train="a.txt", delimiter="||") == [
        {"c0": "a, b", "c1": 'say "x"'},
        {"c0": "ü", "c1": "2"},
    ]
    assert columns(train=["a.json", "a.csv"]) == rows + rows


def test_text_without_a_delimiter_is_one_row_a_line():
    write("a.txt", "one, two\r\n\nthree\n")
    assert columns(train="a.txt") == [{"text": "one, two"}, {"text": "three"}]


def test_rows_that_are_lists_and_files_without_header_have_numbered_columns():
    write("a.json", '[["set a timer", "timer"]]')
    write("a.csv", "good,1\n")
    assert columns(train="a.json") == [{"c0": "set a timer", "c1": "timer"}]
    assert columns(train="a.csv", header=False) == [{"c0": "good", "c1": "1"}]


def test_quotes_in_a_tsv_are_text_unless_asked():
    write("a.tsv", 'text\tlabel\n"half open\t1\nb"\t0\n')
    assert [r["text"] for r in columns(train="a.tsv")] == ['"half open', 'b"']
    write("b.tsv", 'text\tlabel\n"a ""b"""\t1\n')
    assert columns(train="b.tsv", quotes=True)[0]["text"] == 'a "b"'


def test_a_byte_order_mark_is_no_part_of_a_column_name():
    with open("a.csv", "wb") as file:
        file.write(b"\xef\xbb\xbfprompt,completion\na,b\n")
    assert columns(train="a.csv") == [{"prompt": "a", "completion": "b"}]


def test_builtin_rows_come_by_split(tokenizer):
    made = config(train="builtin:shift?n=5", test="builtin:shift?n=4").data
    assert len(read_rows(made.train, made, "train")) == 5
    row = read_rows(made.test, made, "test")[0]
    assert row.where == "builtin:shift?n=4: row 1"
    assert set(row.values) == {"prompt", "completion", "task"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "a.jsonl: no rows are here. Give data.train a source with rows."),
        ("a.csv", "x,y\n", "a.csv: no rows are here. Give data.train a source with rows."),
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": \n',
            "a.jsonl: line 3: not valid JSON (Expecting value, column 7). Correct that line.",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n3\n',
            "a.jsonl: line 2: is 3. A row is an object or a list of values.",
        ),
        (
            "a.json",
            '[{"a": 1},\n{"a" 2}]',
            "a.json: line 2: not valid JSON (Expecting ':' delimiter, column 6). Correct that "
            "line; one JSON object a line is data.format: jsonl.",
        ),
        (
            "a.json",
            '{"val": [], "test": []}',
            "a.json: no list of rows under 'train'. It has val, test: choose with data.split, or "
            "write FILE#KEY.",
        ),
        (
            "a.csv",
            "x,y\na,b\nc,d,e\n",
            "a.csv: line 3: 3 values, but the header names 2 columns. Correct that line (delimiter "
            "',', quotes true).",
        ),
        (
            "a.csv",
            'x,y\na,b\n"c,d\n',
            "a.csv: line 3: unexpected end of data. Correct its quotes, or set data.quotes: false.",
        ),
        (
            "a.csv",
            "x,x\na,b\n",
            "a.csv: line 1: a column name is given twice: ['x', 'x']. Rename one.",
        ),
        (
            "a.label",
            "x",
            "data.train: the ending of a.label says no format. Set data.format to one of csv, "
            "json, jsonl, parquet, tsv, txt.",
        ),
        (
            "a.jsonl.gz",
            "x",
            "a.jsonl.gz: not a whole gzip file (Not a gzipped file (b'x')). Copy it again, or "
            "rename it without .gz.",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_line(name, content, expected):
    write(name, content)
    with pytest.raises(ValueError) as caught:
        columns(train=name)
    assert str(caught.value) == expected


def test_files_that_are_not_text_or_not_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError) as caught:
        columns(train="a.jsonl")
    assert str(caught.value) == ("a.jsonl: byte 0xff is not UTF-8 text. Convert the file to UTF-8.")
    write("a.parquet", "no")
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^a.jsonl.gz: not a whole gzip file \(Compressed file"):
        columns(train="a.jsonl.gz")
    with pytest.raises(ValueError, match=r"^a.parquet: not a readable Parquet file"):
        columns(train="a.parquet")


def test_missing_files_and_folders(tokenizer, tmp_path, monkeypatch):
    assert error(tokenizer, kind=FileNotFoundError, train="a.jsonl") == (
        "data.train: there is no file a.jsonl. Correct the path."
    )
    assert error(tokenizer, kind=FileNotFoundError, train="./rows") == (
        "data.train: there is no file ./rows. Correct the path."
    )
    (tmp_path / "rows").mkdir()
    assert error(tokenizer, kind=IsADirectoryError, train="rows") == (
        "data.train: rows is a folder, and not one of datasets' save_to_disk. Give its files: "
        "[a.jsonl, b.jsonl], or a pattern: rows/*.jsonl"
    )
    assert error(tokenizer, train=[]) == "data.train is an empty list. Give at least one source."


def test_a_hub_set_gives_its_label_names(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = config("classification", train="owner/set", subset="en").data
    assert [r.values["label"] for r in read_rows("owner/set", data, "train")] == ["pos", "neg"]
    assert read_rows("owner/set#extra", data, "test")[1].where == "owner/set: row 2"
    read_rows("owner/set", data, "validation")
    assert asked == [
        ("owner/set", "en", "train"),
        ("owner/set", "en", "extra"),
        ("owner/set", "en", "validation"),
    ]


def test_a_hub_set_that_is_not_there(tokenizer, monkeypatch):
    def load_dataset(name, subset, split):
        raise FileNotFoundError("Dataset 'owner/set' doesn't exist on the Hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert error(tokenizer, kind=FileNotFoundError, train="owner/set") == (
        "data.train: owner/set is no file here, and the hub gives no such data set (Dataset "
        "'owner/set' doesn't exist on the Hub). Correct the path or the hub id, data.subset and "
        "the split."
    )


# ---------------------------------------------------------------------------- causal language


def trained(bundle, n=0, split="train"):
    """The tokens with loss of a row, as text."""
    row = bundle.splits()[split][n]
    kept = [label for label in row["labels"] if label != IGNORED]
    assert all(a in (b, IGNORED) for a, b in zip(row["labels"], row["input_ids"], strict=True))
    return bundle.tokenizer.decode(kept)


def test_loss_is_on_the_completion_and_the_end(tokenizer):
    jsonl("a.jsonl", PAIRS)
    bundle = load(tokenizer, train="a.jsonl")
    row = bundle.train[0]
    assert bundle.kind == "completion"
    assert row["prompt_length"] == 3
    assert row["input_ids"][:3] == encode_prompt(tokenizer, "ab>")
    assert row["labels"][:3] == [IGNORED] * 3
    assert trained(bundle) == "ab</s>"
    assert (row["prompt"], row["completion"]) == ("ab>", "ab")
    assert trained(load(tokenizer, train="a.jsonl", train_on_prompt=True)) == "ab>ab</s>"
    assert trained(load(tokenizer, train="a.jsonl", add_eos=False)) == "ab"


def test_plain_text_is_trained_whole(tokenizer):
    write("a.txt", "abc\n")
    bundle = load(tokenizer, train="a.txt")
    assert bundle.kind == "text"
    assert trained(bundle) == "abc</s>"


def test_a_start_token_is_added_where_the_tokenizer_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    jsonl("a.jsonl", PAIRS)
    row = load(tokenizer, train="a.jsonl").train[0]
    assert tokenizer.decode(row["input_ids"]) == "<s>ab>ab</s>"
    assert row["prompt_length"] == 4
    assert encode_prompt(tokenizer, "ab>") == row["input_ids"][:4]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [("x a", "b", ["x", " ", "a", "b"]), ("x", " b", ["x", " b"])],
)
def test_the_prompt_has_the_same_tokens_as_in_generation(prompt, completion, expected):
    # "ab" is one token, so that prompt "x a" and completion "b" share one when read together.
    names = ["<pad>", "</s>", "x", " ", "a", "b", "ab", " b"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [("a", "b"), (" ", "b")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="<pad>", eos_token="</s>"
    )
    jsonl("a.jsonl", [{"prompt": prompt, "completion": completion}])
    row = load(tokenizer, train="a.jsonl").train[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [*expected, "</s>"]
    assert row["input_ids"][: row["prompt_length"]] == encode_prompt(tokenizer, prompt)


def test_columns_and_templates(tokenizer):
    rows = [{"question": "ab", "answer": 7, "prompt": "x", "completion": "y"}]
    jsonl("a.jsonl", rows)
    mapped = load(tokenizer, train="a.jsonl", columns={"prompt": "question", "completion": 1})
    assert (mapped.train["prompt"][0], mapped.train["completion"][0]) == ("ab", "7")
    made = load(
        tokenizer,
        train="a.jsonl",
        prompt_template="{{{question}}}\n= ",
        completion_template="{answer}.",
    )
    assert (made.train["prompt"][0], made.train["completion"][0]) == ("{ab}\n= ", "7.")
    half = load(
        tokenizer, train="a.jsonl", prompt_template="{question}=", columns={"completion": "answer"}
    )
    assert (half.train["prompt"][0], half.train["completion"][0]) == ("ab=", "7")


@pytest.mark.parametrize(
    ("row", "data", "expected"),
    [
        (
            {"question": "a", "answer": "b"},
            {},
            "a.jsonl: line 1: no column to train on. A causal model needs prompt and completion, "
            "messages, conversations, instruction and output, or text; the columns are question, "
            "answer. Map them in data.columns, or give data.prompt_template and "
            "data.completion_template.",
        ),
        (
            {"question": "a", "completion": "b"},
            {},
            "a.jsonl: line 1: there is no column 'prompt'; the columns are question, completion. "
            "Correct data.columns.prompt.",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt_template": "{question}"},
            "a.jsonl: line 1: there is no column 'question'; the columns are prompt, completion. "
            "Correct data.prompt_template.",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"columns": {"prompt": 2}},
            "a.jsonl: line 1: data.columns.prompt is 2, but the row has 2 columns, counted from 0. "
            "Give a lower number.",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt_template": "no column"},
            "data.prompt_template is 'no column': it has to name columns, like {question}. Write "
            "{{ and }} for braces that are text.",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt_template": "{a"},
            "data.prompt_template is '{a': expected '}' before end of string. Write {{ and }} for "
            "braces that are text.",
        ),
        (
            {"prompt": "a", "completion": None},
            {},
            "a.jsonl: line 1: column 'completion' is None, not text. Correct or remove the row.",
        ),
        (
            {"prompt": "a", "completion": ""},
            {},
            "a.jsonl: line 1: the completion is empty, so nothing is trained. Remove the row.",
        ),
    ],
)
def test_missing_columns_are_named_with_those_present(tokenizer, row, data, expected):
    jsonl("a.jsonl", [row])
    assert error(tokenizer, train="a.jsonl", **data) == expected


def test_too_long_rows_are_counted_and_cut_only_when_asked(tokenizer):
    jsonl("a.jsonl", [*PAIRS, {"prompt": "abcd>", "completion": "abcd"}])
    assert error(tokenizer, train="a.jsonl", max_length=6) == (
        "data.max_length is 6 tokens: 1 of 3 train rows (33.3 %) are longer, the longest 10. Raise "
        "data.max_length, or cut them with data.truncate: true."
    )
    bundle = load(tokenizer, train="a.jsonl", max_length=6, truncate=True)
    assert bundle.longest == 6
    assert trained(bundle, 2) == "a"
    assert len(bundle.train[2]["attention_mask"]) == 6
    assert bundle.train[CUT] == [False, False, True]
    assert error(tokenizer, train="a.jsonl", max_length=5, truncate=True) == (
        "data: 1 of 3 train rows have no token to train on within 5 tokens. Raise data.max_length."
    )


def test_cut_rows_of_a_classifier_are_marked():
    tokenizer = word_tokenizer()
    texts = ["good film", "good film plot", "good film plot bad", "good " * 1000]
    jsonl("a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    bundle = load(tokenizer, "classification", train="a.jsonl", max_length=3, truncate=True)
    assert list(map(len, bundle.train["input_ids"])) == [2, 3, 3, 3]
    assert bundle.train[CUT] == [False, False, True, True]


def test_a_tokenizer_without_an_end_token(tokenizer):
    tokenizer.eos_token = None
    jsonl("a.jsonl", PAIRS)
    assert error(tokenizer, train="a.jsonl") == (
        "data.add_eos is true, but the model's tokenizer has no end-of-sequence token. Set "
        "data.add_eos: false."
    )


# -------------------------------------------------------------------------------------- chats


def turns(*contents, start="user"):
    roles = ["user", "assistant"] if start == "user" else ["system", "user", "assistant"]
    messages = []
    for i, content in enumerate(contents):
        role = roles[i] if i < len(roles) else ("user", "assistant")[(i - len(roles)) % 2]
        messages.append({"role": role, "content": content})
    return {"messages": messages}


def test_only_the_assistants_turns_are_trained(tokenizer):
    tokenizer.chat_template = CHAT
    jsonl("a.jsonl", [turns("ab", "ba", "cd", "dc"), turns("h", "ab", "ba", start="system")])
    bundle = load(tokenizer, train="a.jsonl")
    assert bundle.kind == "messages"
    # "<" and "u" are unknown to this tokenizer; the end token of a turn is trained, and once.
    assert trained(bundle) == "ba</s>dc</s>"
    assert trained(bundle, 1) == "ba</s>"
    row = bundle.train[0]
    assert row["prompt"] == "<u>ab<a>ba</s><u>cd<a>"
    assert row["completion"] == "dc</s>"
    opened = encode_chat(tokenizer, turns("ab", "ba", "cd")["messages"])
    assert row["input_ids"][: row["prompt_length"]] == opened


def test_an_end_is_added_where_the_template_has_none(tokenizer):
    tokenizer.chat_template = CHAT.replace("eos_token if m.role == 'assistant'", "''")
    jsonl("a.jsonl", [turns("ab", "ba")])
    assert trained(load(tokenizer, train="a.jsonl")) == "ba</s>"


def test_what_follows_the_last_assistant_turn_is_left_out(tokenizer):
    tokenizer.chat_template = CHAT
    jsonl("a.jsonl", [turns("ab", "ba", "cd")])
    assert load(tokenizer, train="a.jsonl").train[0]["prompt"] == "<u>ab<a>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    # Shows the assistant's text only in its last turn, as templates of reasoning models do.
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last else '' }}"
    )
    jsonl("a.jsonl", [turns("ab", "ba")])
    assert trained(load(tokenizer, train="a.jsonl")) == "ba</s>"
    jsonl("a.jsonl", [turns("ab", "ba", "cd", "dc")])
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 1: the chat template of this tokenizer changes earlier turns (message 2 of "
        "4), so the trained part cannot be found. Give conversations with one assistant turn, or "
        "prompt and completion."
    )


def test_bad_conversations(tokenizer):
    jsonl("a.jsonl", [turns("ab", "ba")])
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 1: the rows are messages, but the model's tokenizer has no chat template. "
        "Give one, such as data.chat_template: chatml, or rows with prompt and completion."
    )
    tokenizer.chat_template = CHAT
    jsonl("a.jsonl", [turns("ab")])
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 1: no message has the role assistant, so nothing is trained. Remove the row."
    )
    jsonl("a.jsonl", [{"messages": "ab"}])
    assert error(tokenizer, train="a.jsonl") == (
        'a.jsonl: line 1: messages is \'ab\'. Give a list of {"role": ..., "content": ...} objects.'
    )
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    jsonl("a.jsonl", [turns("ab", "ba")])
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 1: the chat template refuses these messages (roles must alternate). Correct "
        "their roles."
    )


# ------------------------------------------------------------------ classification, regression


def test_labels_are_named_in_a_fixed_order():
    tokenizer = word_tokenizer()
    jsonl("a.jsonl", [{"text": "good", "label": x} for x in ("b", "a", "b")])
    bundle = load(tokenizer, "classification", train="a.jsonl")
    assert bundle.labels == ["a", "b"]
    assert bundle.train["labels"] == [1, 0, 1]
    jsonl("b.jsonl", [{"text": "good", "label": x} for x in (10, 2.0, "2", 10)])
    bundle = load(tokenizer, "classification", train="b.jsonl")
    assert bundle.labels == ["2", "10"]
    assert bundle.train["labels"] == [1, 0, 0, 1]
    batch = bundle.collator([bundle.train[i] for i in range(4)])
    assert batch["labels"].dtype == torch.int64


def test_pairs_are_read_together():
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    write("a.tsv", "s1\ts2\tlabel\ngood film\tbad\t0\nfine\tpoor plot\t1\n")
    mapped = {"text": "s1", "text_pair": "s2"}
    bundle = load(tokenizer, "classification", train="a.tsv", columns=mapped)
    assert tokenizer.decode(bundle.train[0]["input_ids"]) == "good film </s> bad </s>"
    assert bundle.train[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    batch = bundle.collator([bundle.train[0], bundle.train[1]])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    cut = load(
        tokenizer, "classification", train="a.tsv", columns=mapped, max_length=4, truncate=True
    )
    assert tokenizer.decode(cut.train[0]["input_ids"]) == "good </s> bad </s>"


def test_a_label_outside_the_training_set_is_an_error():
    tokenizer = word_tokenizer()
    jsonl("a.jsonl", [{"text": "good", "label": x} for x in ("alpha", "beta")])
    jsonl("v.jsonl", [{"text": "good", "label": x} for x in ("beta", "alpah")])
    assert error(tokenizer, "classification", train="a.jsonl", validation="v.jsonl") == (
        "v.jsonl: line 2: the label 'alpah' is not in the training set, which has 2. Did you mean "
        "alpha?"
    )


def test_labels_of_a_source_that_is_split_or_limited_are_all_known():
    rows = [{"text": "good", "label": f"l{i}"} for i in range(10)]
    jsonl("a.jsonl", rows)
    bundle = load(word_tokenizer(), "classification", train="a.jsonl", validation=0.5, limit=2)
    assert len(bundle.labels) == 10
    assert (len(bundle.train), len(bundle.validation)) == (2, 5)


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        (
            "classification",
            ["a", "a"],
            "a.jsonl: all training rows have the label 'a'. Give rows of at least two labels, or "
            "correct data.columns.label.",
        ),
        (
            "classification",
            ["a", 0.5],
            "a.jsonl: line 2: the label is 0.5. Give a name or a whole number. For a number to "
            "predict, set model.task: regression.",
        ),
        (
            "classification",
            ["a", " "],
            "a.jsonl: line 2: the label is ' '. Give a name or a whole number. For a number to "
            "predict, set model.task: regression.",
        ),
        (
            "regression",
            [1, "high"],
            "a.jsonl: line 2: the label is 'high'. Regression needs a finite number.",
        ),
        (
            "regression",
            [1, "nan"],
            "a.jsonl: line 2: the label is 'nan'. Regression needs a finite number.",
        ),
    ],
)
def test_bad_labels(task, labels, expected):
    jsonl("a.jsonl", [{"text": "good", "label": x} for x in labels])
    assert error(word_tokenizer(), task, train="a.jsonl") == expected


def test_regression_labels_are_numbers():
    write("a.csv", "x\t0.5\tgood\ny\t4\tbad\n")
    bundle = load(
        word_tokenizer(),
        "regression",
        train="a.csv",
        header=False,
        delimiter="\t",
        columns={"text": 2, "label": 1},
    )
    assert bundle.labels is None
    assert bundle.train["labels"] == [0.5, 4.0]
    assert bundle.collator([bundle.train[0], bundle.train[1]])["labels"].dtype == torch.float32


# ------------------------------------------------------------------------------ splits, tasks


def rows_of(split):
    return list(zip(split["prompt"], split["completion"], strict=True))


def test_a_fraction_is_cut_off_the_same_way_each_time(tokenizer):
    rows = [{"prompt": f"{a}{b}>", "completion": a} for a in "abcdefgh" for b in "abcdefgh"]
    jsonl("a.jsonl", rows)
    first = load(tokenizer, train="a.jsonl", validation=0.25, seed=3)
    again = load(tokenizer, train="a.jsonl", validation=0.25, seed=3)
    other = load(tokenizer, train="a.jsonl", validation=0.25, seed=4)
    assert (len(first.train), len(first.validation)) == (48, 16)
    assert not set(rows_of(first.train)) & set(rows_of(first.validation))
    assert rows_of(first.validation) == rows_of(again.validation) != rows_of(other.validation)
    few = load(tokenizer, train="a.jsonl", validation=0.25, seed=3, limit=5, validation_limit=2)
    assert (len(few.train), len(few.validation)) == (5, 2)
    assert set(rows_of(few.train)) < set(rows_of(first.train))


def test_a_fraction_of_one_row_is_refused(tokenizer):
    jsonl("a.jsonl", PAIRS[:1])
    assert error(tokenizer, train="a.jsonl", validation=0.5) == (
        "data.validation is 0.5, but there is 1 training row. Give validation rows."
    )


def test_rows_with_an_equal_value_stay_on_one_side_of_a_split(tokenizer):
    rows = [{"prompt": f"{a}>", "completion": b} for b in "abcd" for a in "abcdefgh"]
    jsonl("a.jsonl", rows)
    alone = load(tokenizer, train="a.jsonl", validation=0.25, seed=3)
    assert set(alone.train["prompt"]) & set(alone.validation["prompt"])
    first = load(tokenizer, train="a.jsonl", validation=0.25, seed=3, split_by="prompt")
    again = load(tokenizer, train="a.jsonl", validation=0.25, seed=3, split_by=0)
    other = load(tokenizer, train="a.jsonl", validation=0.25, seed=4, split_by="prompt")
    assert (len(first.train), len(first.validation)) == (24, 8)
    assert not set(first.train["prompt"]) & set(first.validation["prompt"])
    assert sorted(rows_of(first.train) + rows_of(first.validation)) == sorted(
        (row["prompt"], row["completion"]) for row in rows
    )
    assert rows_of(first.validation) == rows_of(again.validation) != rows_of(other.validation)


@pytest.mark.parametrize("fraction", [0.01, 0.6, 0.99])
def test_a_group_is_never_split_and_never_all(tokenizer, fraction):
    rows = [{"prompt": "a>", "completion": c} for c in "abcde"]
    rows += [{"prompt": "b>", "completion": f"{c}{d}"} for c in "abc" for d in "abcde"]
    jsonl("a.jsonl", rows)
    sizes = set()
    for seed in range(4):
        bundle = load(tokenizer, train="a.jsonl", validation=fraction, seed=seed, split_by="prompt")
        sizes.add(len(bundle.validation))
        assert len(set(bundle.validation["prompt"])) == 1
    assert sizes == {5, 15}  # with two groups, the seed alone decides


def test_a_split_by_a_column_that_is_missing_or_constant(tokenizer):
    jsonl("a.jsonl", [{**row, "source": ["x"]} for row in PAIRS])
    assert error(tokenizer, train="a.jsonl", validation=0.5, split_by="source") == (
        "data.split_by is 'source', and all 2 rows have the same value there. Give another "
        "column, or validation rows."
    )
    assert error(tokenizer, train="a.jsonl", validation=0.5, split_by=3) == (
        "a.jsonl: line 1: data.split_by is 3, and the columns are prompt, completion, source. "
        "Known: completion, prompt, source."
    )


def test_tasks_have_an_index_in_the_order_of_their_names(tokenizer):
    rows = [{**PAIRS[0], "task": t} for t in ("turn", "copy", "turn")]
    jsonl("a.jsonl", rows)
    jsonl("t.jsonl", [{**PAIRS[1], "task": "new"}])
    bundle = load(tokenizer, train="a.jsonl", test="t.jsonl")
    assert bundle.tasks == ["copy", "turn", "new"]
    assert bundle.train["task_id"] == [1, 0, 1]
    assert bundle.test["task"] == ["new"]
    assert "task_ids" not in bundle.collator([bundle.train[0]])


def test_a_method_that_routes_by_task_gets_task_ids(tokenizer):
    routed = {"name": "shared_b", "routing": "task"}
    jsonl("a.jsonl", [{**PAIRS[0], "task": t} for t in ("turn", "copy")])
    bundle = load(tokenizer, method=routed, train="a.jsonl")
    assert bundle.collator([bundle.train[0], bundle.train[1]])["task_ids"].tolist() == [1, 0]
    named = load(tokenizer, method={**routed, "tasks": ["turn", "copy"]}, train="a.jsonl")
    assert named.tasks == ["turn", "copy"]
    assert named.train["task_id"] == [0, 1]
    jsonl("t.jsonl", [{**PAIRS[1], "task": "new"}])
    assert error(tokenizer, method=routed, train="a.jsonl", test="t.jsonl") == (
        "t.jsonl: line 1: the task 'new' is not among the tasks of the method (copy, turn). Remove "
        "the row."
    )
    jsonl("n.jsonl", PAIRS)
    assert error(tokenizer, method=routed, train="n.jsonl") == (
        "method.routing is 'task', but the rows have no task column. Name it in data.columns.task."
    )


def test_batches_are_padded_to_their_longest_row(tokenizer):
    jsonl("a.jsonl", [*PAIRS, {"prompt": "abcd>", "completion": "abcd"}])
    bundle = load(tokenizer, train="a.jsonl")
    batch = bundle.collator([bundle.train[0], bundle.train[2]])
    assert batch["input_ids"].shape == (2, 10)
    assert batch["attention_mask"].sum(1).tolist() == [6, 10]
    assert (batch["labels"][0, 6:] == IGNORED).all()
    assert (batch["input_ids"][0, 6:] == tokenizer.pad_token_id).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


# ------------------------------------------------------------------------------------ overlap


def test_overlap_counts_inputs_that_also_stand_in_train(tokenizer):
    jsonl("a.jsonl", PAIRS)
    jsonl(
        "t.jsonl",
        [
            {"prompt": " AB> ", "completion": "ab"},  # the same but for case and space
            {"prompt": "cd>", "completion": "cd"},  # the same input, another answer
            {"prompt": "ef>", "completion": "ef"},
        ],
    )
    (found,) = overlap(load(tokenizer, train="a.jsonl", test="t.jsonl"))
    assert (found.split, found.rows, found.identical, found.total) == ("test", 2, 1, 3)
    assert found.examples == ["ab>", "cd>"]


def test_overlap_of_texts_and_of_pairs():
    tokenizer = word_tokenizer()
    jsonl("a.jsonl", [{"text": "good", "text_pair": p, "label": p} for p in ("film", "plot")])
    jsonl("v.jsonl", [{"text": "good", "text_pair": "film", "label": "plot"}])
    (found,) = overlap(load(tokenizer, "classification", train="a.jsonl", validation="v.jsonl"))
    assert (found.rows, found.identical) == (1, 0)
    write("a.txt", "abc\nabd\n")
    write("b.txt", "abd\nabe\n")
    (found,) = overlap(load(character_tokenizer(), train="a.txt", test="b.txt"))
    assert (found.rows, found.identical, found.examples) == (1, 1, ["abd"])


def test_rows_that_repeat_in_train_are_counted(tokenizer):
    again = [{"prompt": "AB >", "completion": "ab"}, {"prompt": "ab>", "completion": "AB"}]
    jsonl("a.jsonl", [*PAIRS, {"prompt": "cd>", "completion": "cd"}, *again, PAIRS[1]])
    found = repeats(load(tokenizer, train="a.jsonl"))
    # "ab >" is an input of its own; "ab>" comes again with the same answer, "cd>" with both.
    assert (found.rows, found.identical, found.inputs) == (3, 2, 3)
    jsonl("b.jsonl", PAIRS)
    found = repeats(load(tokenizer, train="b.jsonl"))
    assert (found.rows, found.identical, found.inputs) == (0, 0, 2)


# ------------------------------------------------------------------------- used as meant, or not


def text_part(text):
    return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]


def turn(role, content):
    return {"role": role, "content": content}


def test_text_parts_are_joined_and_other_parts_refused(tokenizer):
    tokenizer.chat_template = CHAT
    row = {"messages": [turn("user", text_part("ab")), turn("assistant", text_part("ba"))]}
    jsonl("a.jsonl", [row, turns("ab", "ba")])
    bundle = load(tokenizer, train="a.jsonl")
    assert bundle.train["input_ids"][0] == bundle.train["input_ids"][1]
    assert bundle.train["labels"][0] == bundle.train["labels"][1]
    row["messages"][0]["content"] = [{"type": "image", "url": "a.png"}]
    jsonl("a.jsonl", [turns("ab", "ba"), row])
    assert error(tokenizer, train="a.jsonl").startswith(
        "a.jsonl: line 2: message 1: the content has the part {'type': 'image', 'url': 'a.png'}. "
    )


@pytest.mark.parametrize("content", [None, 3, {"text": "a"}])
def test_a_content_that_is_no_text_is_refused(tokenizer, content):
    tokenizer.chat_template = CHAT
    jsonl("a.jsonl", [{"messages": [turn("user", content), turn("assistant", "b")]}])
    assert error(tokenizer, train="a.jsonl") == (
        f"a.jsonl: line 1: message 1: the content is {content!r}, not text. Correct or remove the "
        "row."
    )


def test_a_turn_of_weight_0_is_not_trained(tokenizer):
    tokenizer.chat_template = CHAT
    row = turns("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    jsonl("a.jsonl", [row])
    assert trained(load(tokenizer, train="a.jsonl")) == "d</s>"
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 1, 0
    jsonl("a.jsonl", [row])
    assert trained(load(tokenizer, train="a.jsonl")) == "b</s>"
    row["messages"][1]["weight"] = 0
    jsonl("a.jsonl", [row])
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 1: all assistant turns have the weight 0, so nothing is trained. Remove the "
        "row."
    )
    row["messages"][1]["weight"] = 0.5
    jsonl("a.jsonl", [row])
    assert error(tokenizer, train="a.jsonl").startswith(
        "a.jsonl: line 1: message 2: the weight is 0.5. Give 1, or 0"
    )


def test_tools_reach_the_chat_template_or_are_refused(tokenizer):
    row = {**turns("a", "b"), "tools": [{"name": "cd"}]}
    jsonl("a.jsonl", [row, {**row, "tools": json.dumps(row["tools"])}, turns("a", "b")])
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHAT
    prompts = load(tokenizer, train="a.jsonl").train["prompt"]
    assert prompts[0] == prompts[1] == "cd" + prompts[2]
    tokenizer.chat_template = CHAT
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 1: the row has tools, and the chat template of this tokenizer shows none to "
        "the model. Use a model with tools, or remove them from the rows."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "b"}\n'),
        ("b.jsonl", '\n{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n'),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]'),
    ],
)
def test_a_json_key_that_stands_twice_is_refused(name, content):
    write(name, content)
    with pytest.raises(ValueError) as caught:
        columns(train=name)
    key = "content" if name == "b.jsonl" else "prompt"
    line = f"{name}: line 2" if name.endswith("l") else name
    assert str(caught.value) == (
        f"{line}: the key {key!r} is given twice in an object ('a', 'b'). Remove one."
    )


@pytest.mark.parametrize("value", ["NaN", "Infinity", "true", "null"])
def test_what_is_no_text_in_json_is_refused_as_text(tokenizer, value):
    write("a.jsonl", f'{{"prompt": "a", "completion": {value}}}\n')
    assert error(tokenizer, train="a.jsonl").startswith("a.jsonl: line 1: column 'completion' is ")
    write("a.jsonl", f'{{"prompt": "a", "completion": "b", "score": {value}}}\n')
    assert len(load(tokenizer, train="a.jsonl").train) == 1  # a column that nobody reads


@pytest.mark.parametrize("column", ["label", "task"])
def test_names_that_differ_in_case_or_white_space_are_shown(column):
    rows = [{"text": "good", "label": f"l{i}", "task": f"t{i}"} for i in range(3)]
    rows[2][column] = f" {rows[1][column].upper()}"
    jsonl("a.jsonl", rows)
    with pytest.warns(PlaitWarning) as caught:
        load(word_tokenizer(), "classification", train="a.jsonl")
    first, second = rows[1][column], rows[2][column].strip()
    assert [str(warning.message) for warning in caught] == [
        f"a.jsonl: line 3: the {column} {second!r} differs from {first!r} (a.jsonl: line 2) only "
        f"in case or white space. They are two {column}s; correct the rows if one is meant."
    ]


def test_texts_without_content_are_refused_or_shown(tokenizer):
    jsonl("a.jsonl", [{"text": "ab"}, {"text": ""}])
    assert error(tokenizer, train="a.jsonl") == (
        "a.jsonl: line 2: the text is empty. Remove the row."
    )
    jsonl("a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}])
    with pytest.warns(PlaitWarning, match=r"a\.jsonl: line 2: the completion is blank, as in 1 of"):
        load(tokenizer, train="a.jsonl")
    jsonl("a.jsonl", [{"text": "good", "label": 0}, {"text": " ", "label": 1}])
    with pytest.warns(PlaitWarning, match=r"a\.jsonl: line 2: the text is blank, as in 1 of 2"):
        message = error(word_tokenizer(), "classification", train="a.jsonl")
    assert message == "a.jsonl: line 2: the text has no tokens. Remove the row."
    tokenizer.chat_template = CHAT
    jsonl("a.jsonl", [turns("a", "b"), turns("a", "")])
    with pytest.warns(PlaitWarning, match=r"line 2: the assistant's text is blank, as in 1 of 2"):
        load(tokenizer, train="a.jsonl")


def test_a_held_out_row_without_a_prompt_is_refused_where_it_would_be_generated(tokenizer):
    jsonl("a.jsonl", PAIRS)
    jsonl("v.jsonl", [*PAIRS, {"prompt": "", "completion": "a"}])
    assert error(tokenizer, train="a.jsonl", validation="v.jsonl") == (
        "v.jsonl: line 3: the prompt has no tokens, so no completion can be generated. Remove the "
        "row, or set evaluation.generate: false."
    )
    assert len(load(tokenizer, train="v.jsonl").train) == 3


def test_a_digest_tells_rows_apart_that_have_equal_counts(tokenizer):
    def digest(rows):
        jsonl("a.jsonl", rows)
        return load(tokenizer, train="a.jsonl").digest("train")

    first = digest(PAIRS)
    assert digest([dict(row) for row in PAIRS]) == first
    assert digest(PAIRS[::-1]) != first
    swapped = [
        {**a, "completion": b["completion"]} for a, b in zip(PAIRS, PAIRS[::-1], strict=True)
    ]
    assert digest(swapped) != first


# ------------------------------------------------------------------------------------------- noise


def test_label_noise_exchanges_answers_of_train_rows_alone(tokenizer):
    rows = [{"prompt": f"{a}{b}>", "completion": a + b} for a in "abcdef" for b in "abcdef"]
    jsonl("r.jsonl", rows)
    jsonl("t.jsonl", rows[:9])
    noisy = {x: load(tokenizer, train="r.jsonl", test="t.jsonl", label_noise=x) for x in (0.2, 0.6)}
    wrong = {
        x: [i for i, row in enumerate(data.train) if row["prompt"] != row["completion"] + ">"]
        for x, data in noisy.items()
    }
    assert len(wrong[0.2]) < len(wrong[0.6])
    assert {*wrong[0.2]} < {*wrong[0.6]}  # more noise adds rows
    assert 0.3 * 36 < len(wrong[0.6]) < 0.9 * 36
    answers = {row["completion"] for row in rows}
    assert {row["completion"] for row in noisy[0.6].train} <= answers
    assert all(row["prompt"] == row["completion"] + ">" for row in noisy[0.6].test)
    plain = load(tokenizer, train="r.jsonl", test="t.jsonl")
    assert plain.digest("train") != noisy[0.2].digest("train")
    assert plain.digest("test") == noisy[0.2].digest("test")


def test_label_noise_stays_within_a_task_and_needs_answers(tokenizer):
    rows = [
        {"prompt": "a>", "completion": c, "task": t} for t, c in ("xa", "xb", "yc") for _ in "1234"
    ]
    jsonl("r.jsonl", rows)
    data = load(tokenizer, train="r.jsonl", label_noise=0.9)
    assert {r["completion"] for r in data.train if r["task"] == "x"} == {"a", "b"}
    assert {r["completion"] for r in data.train if r["task"] == "y"} == {"c"}
    jsonl("t.jsonl", [{"text": "abc"}])
    text = error(tokenizer, train="t.jsonl", label_noise=0.5)
    assert "data.label_noise is 0.5, and the rows are of the kind text" in text
