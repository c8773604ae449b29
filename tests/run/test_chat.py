"""Chat templates for models without one, and `plait chat`."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.run.data.templates import TEMPLATES, set_chat_template
from plait.run.evaluate import evaluate_run
from plait.run.generate import generate_run
from plait.run.infer.chat import open_chat
from plait.run.infer.predict import predict_run
from plait.run.model import load_tokenizer
from plait.run.prepare import load_run, prepare
from plait.run.train import train
from plait_cli import main
from tests.support.runs import copy_rows, film_rows, run_config, save_model, write_rows

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\nhello</s>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|system|>\nbe brief</s>\n<|user|>\nhi</s>\n<|assistant|>\nhello</s>\n"
    "<|user|>\nbye</s>\n<|assistant|>\n",
    "llama": "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST] hello </s>[INST] bye [/INST]",
    "alpaca": "be brief\n\n### Instruction:\nhi\n\n### Response:\nhello</s>\n\n"
    "### Instruction:\nbye\n\n### Response:\n",
}
# What is written between the turns is in the vocabulary of the characters.
OWN = (
    "{% for m in messages %}{{ '>' if m['role'] == 'user' else '=' }}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_model("llama", folder / "llama")
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["completion"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in copy_rows(4)
    ] * 4
    write_rows(folder / "talk.jsonl", rows)
    (folder / "own.jinja").write_text(OWN)
    return folder


def config(place: Path, to: Path, template: str | None, **sections: Any) -> Any:
    data = {"validation": 0.2} | ({} if template is None else {"chat_template": template})
    options: dict[str, Any] = {"data": data, **sections}
    return run_config(place / "llama", place / "talk.jsonl", to, **options)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run that answers with what it is told, and whose template file is gone."""
    own = place / "gone.jinja"
    own.write_text(OWN)
    cfg = config(
        place, place / "run", str(own), method={"name": "full"},
        training={"max_steps": 60, "lr_scheduler_type": "constant", "save_strategy": "no"},
    )  # fmt: skip
    folder = train(cfg)
    own.unlink()
    assert folder.read_evaluation()["after"]["exact_match"] == 1.0
    return folder.path


# ------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_forms(name: str, place: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config(place, tmp_path, None).model)
    set_chat_template(tokenizer, name)
    render: Any = tokenizer.apply_chat_template
    assert render(TALK, tokenize=False, add_generation_prompt=True) == EXPECTED[name]
    whole = render(TALK[:3], tokenize=False)
    assert whole.startswith(render(TALK[:2], tokenize=False, add_generation_prompt=True))
    assert "</s>" in whole


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_base_without_a_template_trains_on_messages(
    name: str, place: Path, tmp_path: Path
) -> None:
    data = prepare(config(place, tmp_path / "run", name)).data
    row, tokenizer = data.train[0], data.tokenizer
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    assert tokenizer.eos_token_id in trained
    answer = row["completion"].strip()
    text = tokenizer.decode(trained, skip_special_tokens=True)
    assert text.strip().startswith(answer[:2])


def test_bos_comes_first_where_the_tokenizer_adds_it(place: Path, tmp_path: Path) -> None:
    class Adds:
        bos_token_id, chat_template = 1, None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 5]}

    tokenizer: Any = Adds()
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template == "{{ bos_token }}" + TEMPLATES["chatml"]


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("chatlm", "data.chat_template is 'chatlm', which is neither a file nor a template of "
         "plait's. Did you mean chatml?"),
        ("broken.jinja", "broken.jinja: line 2: "),
        ("latin.jinja", "latin.jinja: byte 0xe9 is not UTF-8 text"),
        (None, "no chat template. Give one, such as data.chat_template: chatml"),
    ],
)  # fmt: skip
def test_refused(
    verb: str, template: str | None, text: str, place: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from plait.run.config import dump_config

    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for m in messages %}\n{% endif %}")
    Path("latin.jinja").write_bytes(b"caf\xe9")
    Path("run.yaml").write_text(dump_config(config(place, tmp_path / "run", template)))
    assert main([verb, "run.yaml"]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_template_is_stored_in_the_run(run: Path, place: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    loaded = load_run(moved)
    assert loaded.tokenizer.chat_template == OWN
    assert load_tokenizer(loaded.cfg.model).chat_template is None
    assert (moved / "model" / "chat_template.jinja").read_text() == OWN
    text = copy_rows(4)[1]["completion"]
    assert generate_run(moved, text) == text
    assert evaluate_run(moved, "train")["exact_match"] == 1.0
    write_rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": text}]}])
    predict_run(moved, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == text
    other = load_run(moved, ["data.chat_template=zephyr"])
    assert other.tokenizer.chat_template == TEMPLATES["zephyr"]


# ----------------------------------------------------------------------------------------- chat


def talk(arguments: list[str], lines: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *arguments])


def test_piped(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [row["completion"] for row in copy_rows(4)]
    lines = f"{texts[0]}\n\n/reset\n{texts[1]}\n/help\n/reset\n{texts[2]}\n/exit\n{texts[3]}\n"
    assert talk([str(run)], lines, monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == texts[:3]
    assert captured.err == (
        "/help is no command. /reset begins a new conversation, /exit ends it.\n"
    )
    assert talk([str(run)], texts[3], monkeypatch) == 0  # the end of the input
    assert capsys.readouterr().out.split() == texts[3:]


def test_turns_are_remembered_and_streamed(run: Path) -> None:
    chat = open_chat(run, system="abc", max_new_tokens=6)
    pieces: list[str] = []
    answer = chat.say("ab", pieces.append)
    assert "".join(pieces).strip() == answer
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.say("cd", pieces.append)
    assert [m["content"] for m in chat.messages[:4]] == ["abc", "ab", answer, "cd"]
    before = list(chat.messages)
    with pytest.raises(ValueError, match="tokens, the model's context 64"):
        chat.say("a" * 80, pieces.append)
    assert chat.messages == before
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "abc"}]


def test_an_answer_comes_piece_by_piece(run: Path) -> None:
    chat = open_chat(run, max_new_tokens=6, overrides=["evaluation.min_new_tokens=6"])
    pieces: list[str] = []
    answer = chat.say("ab", pieces.append)
    assert len(pieces) > 1
    beams = open_chat(run, max_new_tokens=6, overrides=["evaluation.num_beams=2"])
    whole: list[str] = []
    assert beams.say("ab", whole.append) == "".join(whole)
    assert len(whole) == 1
    assert "".join(pieces).strip() == answer


def test_refused_chats(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    films = write_rows(tmp_path / "films.jsonl", film_rows())
    encoder = train(
        run_config(
            save_model("bert", tmp_path / "bert"), films, tmp_path / "encoder",
            model={"task": "classification"}, training={"max_steps": 1},
        )
    ).path  # fmt: skip
    plain = train(
        run_config(
            place / "llama", write_rows(tmp_path / "rows.jsonl", copy_rows()), tmp_path / "plain",
            training={"max_steps": 1}, evaluation={"generate": False},
        )
    ).path  # fmt: skip
    capsys.readouterr()
    for arguments, text in (
        ([str(encoder)], "model.task is classification, which generates no text. Use: plait "
         f"predict {encoder}"),
        ([str(plain)], "no chat template. Add one to the command, such as "
         "data.chat_template=chatml."),
        ([str(run), "--task", "x"], "--task x: this run does not route. Leave --task out."),
        ([str(run), "--temperature", "-1"], "--temperature -1.0 is out of range."),
        ([str(run), "--temperature", "nan"], "--temperature nan is out of range."),
    ):  # fmt: skip
        assert talk(arguments, "ab\n", monkeypatch) == 2
        err = capsys.readouterr().err
        assert text in err
        assert len(err.splitlines()) == 1
    assert talk([str(plain), "data.chat_template=chatml"], "ab\n", monkeypatch) == 0
    assert talk([str(run)], "a" * 80 + "\n", monkeypatch) == 2
