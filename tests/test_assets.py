"""The generated tasks and the shipped tiny model."""

import hashlib
import json
import random
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from plait.assets import builtin_rows, generator, pretrain, tiny_model_dir
from plait.run.config import config_from_dict
from plait.run.data import load_data
from plait.run.evaluate import evaluate_model

SPLITS = ("train", "validation", "test")


def _input(row):
    """The word or the numbers of a row: `rotate plait=` -> `plait`."""
    return row["prompt"].removeprefix(row["task"] + " ").removesuffix("=")


def _caesar(word):
    code = {"z": "a"}
    return "".join(code[c] if c in code else chr(ord(c) + 1) for c in word)


def _swapped(word):
    letters = list(word)
    for i in range(0, len(letters) - 1, 2):
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def _insertion_sorted(word):
    done = []
    for c in word:
        done.insert(sum(other <= c for other in done), c)
    return done


# Written apart from the generator's own answers, in another way where there is one.
REFERENCE = {
    "copy": lambda w: "".join(w),
    "reverse": lambda w: "".join(reversed(w)),
    "sort": lambda w: "".join(_insertion_sorted(w)),
    "upper": lambda w: "".join(chr(ord(c) - 32) for c in w),
    "first": lambda w: next(iter(w)),
    "last": lambda w: list(w).pop(),
    "add": lambda pair: f"{eval('+'.join(pair.split()))}",
    "rotate": lambda w: (w * 2)[1 : len(w) + 1],
    "next": _caesar,
    "descend": lambda w: "".join(reversed(_insertion_sorted(w))),
    "swap": _swapped,
    "ends": lambda w: "".join(w[{0: len(w) - 1, len(w) - 1: 0}.get(i, i)] for i in range(len(w))),
    "skip": lambda w: "".join(c for i, c in enumerate(w) if i % 2 == 0),
    "double": lambda w: "".join(w[i // 2] for i in range(2 * len(w))),
    "shout": lambda w: "".join(chr(ord(c) - 32) for c in reversed(w)),
}


@pytest.mark.parametrize("name", generator.GENERATORS)
def test_answers_match_an_independent_reference(name):
    families = generator.GENERATORS[name]
    spec = f"{name}?families={','.join(families)}&n={50 * len(families)}"
    rows = builtin_rows(spec, "train", 0)
    assert Counter(row["task"] for row in rows) == dict.fromkeys(families, 50)
    for row in rows:
        assert row["prompt"] == f"{row['task']} {_input(row)}="
        assert row["completion"] == REFERENCE[row["task"]](_input(row)), row


def test_the_shift_is_new():
    assert not set(generator.SHIFT) & set(generator.PRETRAIN)
    assert len(generator.SHIFT) >= len(generator.DEFAULT_FAMILIES["shift"]) >= 4


def test_rows_follow_from_the_seed_and_leave_the_global_generators_alone():
    states = random.getstate(), torch.get_rng_state()
    rows = builtin_rows("shift?n=200&label_noise=0.5", "train", 3)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert rows == builtin_rows("builtin:shift?n=200&label_noise=0.5", "train", 3)
    assert rows != builtin_rows("shift?n=200&label_noise=0.5", "train", 4)
    # The same on every machine and in every version of Python: runs are compared by these rows.
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest == "cf81c48d66a8029bdf585bc59646b1d2c35d1149cb51f1905e051000e48fb638"


def test_a_smaller_n_gives_the_first_rows_of_a_larger_one():
    assert builtin_rows("shift?n=40", "train", 0) == builtin_rows("shift?n=90", "train", 0)[:40]


@pytest.mark.parametrize("name", generator.GENERATORS)
def test_no_input_is_in_two_splits_or_twice_in_one(name):
    inputs = {
        split: [_input(row) for seed in (0, 1) for row in builtin_rows(name, split, seed)]
        for split in ("validation", "test")
    }
    inputs["train"] = [_input(row) for row in builtin_rows(f"{name}?n=4000", "train", 0)]
    for split, texts in inputs.items():
        for other in set(SPLITS) - {split}:
            assert not set(texts) & set(inputs[other])
    assert len(set(inputs["train"])) == 4000
    held_out = [_input(row) for row in builtin_rows("shift", "test", 0)]
    assert len(set(held_out)) == len(held_out)


def test_pretraining_never_shows_a_held_out_input():
    rows = pretrain.pretraining_rows(pretrain.FAMILIES, 0)
    texts = [next(rows)[0].partition(" ")[2].removesuffix("=") for _ in range(3000)]
    assert {generator.split_of(text) for text in texts} == {"train"}


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_label_noise_replaces_this_share_of_the_training_answers(noise):
    clean = builtin_rows("shift?n=4000", "train", 0)
    noisy = builtin_rows(f"shift?n=4000&label_noise={noise}", "train", 0)
    assert [row["prompt"] for row in noisy] == [row["prompt"] for row in clean]
    wrong = [a["completion"] != b["completion"] for a, b in zip(clean, noisy, strict=True)]
    assert sum(wrong) / len(wrong) == pytest.approx(noise, abs=0.02)
    for split in ("validation", "test"):
        assert builtin_rows(f"shift?label_noise={noise}", split, 0) == builtin_rows(
            "shift", split, 0
        )


def test_more_noise_keeps_the_wrong_answers_of_less():
    few, many = (
        builtin_rows(f"shift?n=500&label_noise={noise}", "train", 0) for noise in (0.2, 0.4)
    )
    clean = builtin_rows("shift?n=500", "train", 0)
    for a, b, right in zip(few, many, clean, strict=True):
        assert a["completion"] in (right["completion"], b["completion"])


@pytest.mark.parametrize(
    ("spec", "split", "text"),
    [
        ("shft", "train", "builtin:shft: 'shft' is not a generator. Did you mean shift?"),
        ("zzz", "train", "builtin:zzz: 'zzz' is not a generator. Known: pretrain, shift."),
        (
            "shift?familes=rotate",
            "train",
            "builtin:shift: 'familes' is not an option. Did you mean families?",
        ),
        (
            "builtin:shift?families=rotate,rotat",
            "train",
            "builtin:shift: families has 'rotat', which is not known. Did you mean rotate?",
        ),
        (
            "shift?n=0",
            "train",
            "builtin:shift: n is '0'. Give a whole number of rows, 1 or more, at most 1,000,000.",
        ),
        (
            "shift?n=many",
            "train",
            "builtin:shift: n is 'many'. "
            "Give a whole number of rows, 1 or more, at most 1,000,000.",
        ),
        (
            "shift?label_noise=1.5",
            "train",
            "builtin:shift: label_noise is '1.5'. Give a fraction from 0 to 1.",
        ),
        (
            "shift?label_noise=nan",
            "train",
            "builtin:shift: label_noise is 'nan'. Give a fraction from 0 to 1.",
        ),
        ("shift?n", "train", "builtin:shift: n has no value. Write n=VALUE."),
        ("shift?n=1&n=2", "train", "builtin:shift: n is given twice. Give it once."),
        ("shift", "tset", "builtin:shift: 'tset' is not a split. Did you mean test?"),
        (
            "pretrain?families=add&n=9000",
            "train",
            "builtin:pretrain: family add has no more train inputs after 6957 rows. Lower n.",
        ),
    ],
)
def test_a_bad_spec_is_an_error_with_the_remedy(spec, split, text):
    with pytest.raises(ValueError) as error:
        builtin_rows(spec, split, 0)
    assert str(error.value) == text


# ---------------------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def test_the_folder_is_small_and_holds_its_recipe():
    files = {path.name: path for path in tiny_model_dir().iterdir()}
    assert sum(path.stat().st_size for path in files.values()) < 2_000_000
    assert files["model.safetensors"].stat().st_size < 1_000_000
    recipe = json.loads(files["recipe.json"].read_text())
    log = [json.loads(line) for line in files["training_log.jsonl"].read_text().splitlines()]
    assert recipe["seed"] == pretrain.SEED
    assert recipe["steps"] == pretrain.STEPS == log[-1]["step"]
    assert recipe["final_loss"] == log[-1]["loss"] < log[0]["loss"]
    assert recipe["families"] == list(pretrain.FAMILIES)


def test_the_tokenizer_is_the_recipes_and_gives_every_text_back(tokenizer):
    assert tokenizer.get_vocab() == pretrain.make_tokenizer().get_vocab()
    text = "reverse plait=  ~tialp!\nNext line, <b>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.bos_token_id, tokenizer.unk_token_id]
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]


def test_the_chat_template_marks_the_answers(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "copy ab="},
        {"role": "assistant", "content": "ab"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>Be brief.\ncopy ab=ab</s>"
    made = tokenizer.apply_chat_template(
        messages[1:], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert made["assistant_masks"] == [0] * 9 + [1, 1, 1]


def test_the_model_solves_its_own_families_and_none_of_the_shift():
    known = pretrain.exact_match(tiny_model_dir(), "pretrain")
    assert min(known[family] for family in generator.PRETRAIN) >= 0.9
    shifted = pretrain.exact_match(tiny_model_dir(), "shift")
    assert max(shifted[family] for family in generator.SHIFT) <= 0.03


def test_the_model_answers_by_generation(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
    assert model.num_parameters() == 342_048
    ids = tokenizer("reverse plait=", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert tokenizer.decode(made, skip_special_tokens=True) == "reverse plait=tialp"


@pytest.mark.slow
def test_an_adapter_learns_the_shift(tokenizer):
    """Stock LoRA on two of the families: from nothing to most rows in 120 steps."""
    rows = "builtin:shift?families=rotate,shout"
    config = config_from_dict(
        {
            "data": {"train": f"{rows}&n=3840", "test": f"{rows}&n=100"},
            "evaluation": {"max_new_tokens": 12, "batch_size": 100},
        }
    )
    data = load_data(config, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    before = evaluate_model(model, data, "test", config)["exact_match"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=120)
    for batch in DataLoader(data.train, batch_size=32, collate_fn=data.collator):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert before <= 0.03
    assert evaluate_model(model, data, "test", config)["exact_match"] >= 0.6


def test_the_recipe_writes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    monkeypatch.setattr(pretrain, "BATCH", 8)
    monkeypatch.setattr(pretrain, "TEST_ROWS", 16)
    threads = torch.get_num_threads()
    try:
        recipes = [pretrain.build(tmp_path / name, steps=2) for name in "ab"]
    finally:
        torch.set_num_threads(threads)
    assert recipes[0]["final_loss"] == recipes[1]["final_loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        path.name for path in tiny_model_dir().iterdir()
    )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
