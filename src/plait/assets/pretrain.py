"""The recipe of the shipped tiny model: `python -m plait.assets.pretrain --out FOLDER`.

A Llama of three layers learns the `pretrain` families of `plait.assets.generator` at character
level; the loss is taken on completions. Same seed, versions and number of threads: same weights
on the same kind of CPU. The folder gets the model in bfloat16, the tokenizer, training_log.jsonl
and recipe.json.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plait.assets.generator import GENERATORS, pretraining_rows
from plait.run.config import config_from_dict
from plait.run.data.bundle import load_data
from plait.run.data.tokens import IGNORED
from plait.run.evaluate import evaluate_model
from plait.run.folder import environment, replace_dir, write_atomic

SEED = 0
STEPS = 1200
BATCH = 128  # rows a step
PEAK_LR = 4e-3
WARMUP = 100  # steps
# Two threads save a third of the time on free cores, but stall on busy ones; sums are split by
# threads, so their number is part of the recipe.
THREADS = 1
LOG_EVERY = 50  # steps
# Sums are the hardest family and get twice the share of each of the others.
FAMILIES = ("copy", "reverse", "sort", "upper", "first", "last", "add", "add")
MAX_LENGTH = 256  # tokens
TEST_ROWS = 600
PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # tokens 0 to 3

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each printable ASCII character and the newline.

    A text starts with <s>. A conversation is rendered as its bare contents, each answer closed
    by </s>: a user's `reverse plait=` is just the prompt of a row.
    """
    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 342,048 parameters, embedding and head shared."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers draws its start from the global generator
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int
) -> list[dict[str, float]]:
    """Train in place with AdamW, a linear warm-up and a cosine to zero.

    Returns a record each LOG_EVERY steps: step, loss (nats per token, mean since the last record)
    and learning_rate.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01
    )
    rows = pretraining_rows(FAMILIES, seed)
    model.train()
    log, total = [], 0.0
    for step in range(1, steps + 1):
        rate = PEAK_LR * min(1, step / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = _batch(rows, tokenizer)
        # Rows are padded on the right, so a causal model needs no attention mask.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % LOG_EVERY == 0:
            log.append({"step": step, "loss": round(total / LOG_EVERY, 5), "learning_rate": rate})
            print(f"step {step} of {steps}: loss {log[-1]['loss']:.4f}", flush=True)
            total = 0.0
    return log


def exact_match(folder: Path, generator: str) -> dict[str, float]:
    """Return the share of test rows that the saved model answers exactly, per family and mean.

    All families of the generator ("pretrain" or "shift") share TEST_ROWS rows.
    """
    families = ",".join(GENERATORS[generator])
    rows = f"builtin:{generator}?families={families}&n={TEST_ROWS}"
    config = config_from_dict(
        {
            "data": {"train": rows, "test": rows},
            "evaluation": {"max_new_tokens": 20, "batch_size": 100},
        }
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    metrics = evaluate_model(model, load_data(config, tokenizer), "test", config)
    found = {task: values["exact_match"] for task, values in metrics["tasks"].items()}
    return {**found, "mean": metrics["task_mean"]["exact_match"]}


def build(folder: Path, seed: int = SEED, steps: int = STEPS) -> dict[str, Any]:
    """Train the model and put it at `folder`, which is replaced at the end; return the recipe."""
    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    log = train(model, tokenizer, seed, steps)
    recipe: dict[str, Any] = {
        "command": "python -m plait.assets.pretrain",
        "seed": seed,
        "steps": steps,
        "rows_per_step": BATCH,
        "peak_learning_rate": PEAK_LR,
        "warmup_steps": WARMUP,
        "families": FAMILIES,
        "parameters": model.num_parameters(),
        "final_loss": log[-1]["loss"],
        "training_seconds": round(time.perf_counter() - started, 1),
        "environment": environment(),
    }

    def write(new: Path) -> None:
        model.bfloat16().save_pretrained(new)
        tokenizer.save_pretrained(new)
        for generator in ("pretrain", "shift"):
            recipe[f"exact_match_{generator}"] = exact_match(new, generator)
        write_atomic(new / "training_log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        write_atomic(new / "recipe.json", json.dumps(recipe, indent=2) + "\n")

    replace_dir(folder, write)
    return recipe


def _batch(
    rows: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Return ids and labels, (BATCH, longest); a label is -100 where no loss is taken."""
    texts = list(itertools.islice(rows, BATCH))
    ids = tokenizer(
        [prompt + completion + EOS for prompt, completion in texts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )["input_ids"]
    labels = ids.masked_fill(ids == SPECIAL.index(PAD), IGNORED)
    for row, (prompt, _) in enumerate(texts):
        labels[row, : 1 + len(prompt)] = IGNORED  # <s> and one token a character
    return ids, labels


def main() -> None:
    """Build the model and print what the recipe measured."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny model that plait ships.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; replaced if there"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    args = parser.parse_args()
    print(json.dumps(build(args.out, args.seed, args.steps), indent=2))


if __name__ == "__main__":
    main()
