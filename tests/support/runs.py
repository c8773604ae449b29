"""Tiny models, tokenizers and rows on disk, and configs of runs over them."""

import json
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from plait.run.config import RunConfig, config_from_dict
from plait.run.folder import RunFolder
from plait.testing import tiny

CHARACTERS = "abcdefgh =>.?!"
WORDS = ["good", "bad", "fine", "poor", "film", "plot", "very", "not"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, bos and eos known but not added."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def save_model(kind: str, to: Path) -> Path:
    """Write a random model of a kind (llama, gpt2, bert, deberta) with its tokenizer."""
    model: Any = {
        "llama": tiny.llama,
        "gpt2": tiny.gpt2,
        "bert": lambda: tiny.bert().bert,  # no head: that is new in every run
        "deberta": lambda: tiny.deberta().deberta,
    }[kind]()
    model.save_pretrained(to)
    tokenizer = character_tokenizer() if kind in ("llama", "gpt2") else word_tokenizer()
    tokenizer.save_pretrained(to)
    return to


def write_rows(to: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return to


def copy_rows(count: int = 40, tasks: bool = False) -> list[dict[str, Any]]:
    """`ab>` -> `ab`, and with tasks also `ab?` -> `ba`."""
    rows = []
    for i in range(count):
        text = CHARACTERS[i % 8] + CHARACTERS[(i // 8 + i) % 8]
        row = {"prompt": f"{text}>", "completion": text}
        if tasks:
            row["task"] = "copy"
            if i % 2:
                row = {"prompt": f"{text}?", "completion": text[::-1], "task": "turn"}
        rows.append(row)
    return rows


def film_rows(count: int = 32) -> list[dict[str, Any]]:
    """Texts with a word that says the label; also a number to predict."""
    rows = []
    for i in range(count):
        word = WORDS[i % 4]
        text = f"{WORDS[4 + i % 3]} {WORDS[6 + i % 2]} {word}"
        rows.append({"text": text, "label": "no" if i % 2 else "yes", "score": float(i % 4)})
    return rows


def run_config(base: Path, rows: Path, run: Path, **sections: Any) -> RunConfig:
    """A config of a quick run: 10 steps of 4 rows; `section={..}` adds to a section."""
    raw: dict[str, Any] = {
        "model": {"name": str(base)},
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.1},
        "data": {"train": str(rows), "validation": 0.2},
        "training": {
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 100,
            "eval_strategy": "no",
            "use_cpu": True,
        },
        "evaluation": {"max_new_tokens": 8, "batch_size": 8},
        "output": {"dir": str(run)},
    }
    for name, values in sections.items():
        if "name" in values and name == "method":
            raw[name] = values
        else:
            raw[name] = raw.get(name, {}) | values
    return config_from_dict(raw)


class At(TrainerCallback):
    """Calls `act(model)` at the begin or the end of one step (1, 2, ..)."""

    def __init__(self, step: int, act: Any, end: bool = False):
        self.step, self.act, self.end = step, act, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.end and state.global_step + 1 == self.step:
            self.act(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.end and state.global_step == self.step:
            self.act(kwargs["model"])


def interrupt(step: int) -> At:
    return At(step, lambda model: signal.raise_signal(signal.SIGINT))


def crash(step: int) -> At:
    """As a killed process: nothing is saved any more."""

    def act(model: Any) -> None:
        raise MemoryError("killed")

    return At(step, act)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    if folder.model.is_dir():
        return load_file(folder.model / "model.safetensors")
    return load_file(folder.adapter / "adapter_model.safetensors")


def assert_same(a: RunFolder, b: RunFolder) -> None:
    """Bit for bit: the trained weights and the metrics."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert a.read_evaluation() == b.read_evaluation()
