"""Compare the memory that `plait check` estimates with what training and evaluation take.

Each shape runs in a process of its own. After a small run has loaded every library, the resident
memory is the baseline; the kernel's high-water mark is reset before training and before the
evaluation, and read after each. glibc is told to return freed memory at once, so that the mark
counts what was held at a time and not what the allocator keeps for later.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import parser, read_results, table, write_results

RESULTS = Path(__file__).parent / "results" / "memory.json"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 >"

# What differs between the shapes. model: keywords of the config class. row: characters of a row.
SHAPES: dict[str, dict[str, Any]] = {
    "large vocabulary": {
        "kind": "llama",
        "model": {"vocab_size": 32_000, "hidden_size": 128, "layers": 2},
        "row": 128,
        "batch": 8,
    },
    "deep": {
        "kind": "llama",
        "model": {"vocab_size": 512, "hidden_size": 256, "layers": 6},
        "row": 256,
        "batch": 16,
        "method": {"name": "dual_lora", "r": 8},
    },
    "full fine-tuning": {
        "kind": "llama",
        "model": {"vocab_size": 16_000, "hidden_size": 512, "layers": 6},
        "row": 64,
        "batch": 2,
        "method": {"name": "full"},
    },
    "classifier": {
        "kind": "bert",
        "model": {"vocab_size": 2_000, "hidden_size": 256, "layers": 4},
        "row": 128,
        "batch": 32,
        "method": {"name": "cola", "r": 8},
    },
    "long generation": {
        "kind": "gpt2",
        "model": {"vocab_size": 512, "hidden_size": 256, "layers": 8},
        "row": 32,
        "batch": 4,
        "generate": 224,
    },
    "recomputed, bf16, routed": {
        "kind": "llama",
        "model": {"vocab_size": 4_000, "hidden_size": 256, "layers": 6},
        "row": 256,
        "batch": 16,
        "method": {"name": "molora", "r": 4, "num_experts": 4},
        "training": {"gradient_checkpointing": True, "bf16": True},
    },
}


def save_base(shape: dict[str, Any], to: Path) -> None:
    """Write a random model of a shape, and a tokenizer with a token for each character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    size = dict(shape["model"])
    layers, hidden = size.pop("layers"), size["hidden_size"]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if shape["kind"] == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
                intermediate_size=3 * hidden, max_position_embeddings=512, **size, **special,
            )
        )  # fmt: skip
    elif shape["kind"] == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size["vocab_size"], n_embd=hidden, n_layer=layers, n_head=8,
                n_positions=512, **special,
            )
        )  # fmt: skip
    else:
        model = BertModel(
            BertConfig(
                num_hidden_layers=layers,
                num_attention_heads=8,
                intermediate_size=4 * hidden,
                **size,
            )
        )
    model.save_pretrained(to)
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(to)  # fmt: skip


def config_of(shape: dict[str, Any], folder: Path) -> Any:
    """Write base and rows of a shape; return the config of a run of two steps."""
    from plait.run.config import config_from_dict

    save_base(shape, folder / "base")
    half, classifier = shape["row"] // 2, shape["kind"] == "bert"
    rows = []
    for i in range(96):
        text = "".join(CHARACTERS[(i * 7 + j) % len(CHARACTERS)] for j in range(2 * half - 1))
        causal = {"prompt": text[:half], "completion": text[half:]}
        rows.append({"text": text, "label": i % 2} if classifier else causal)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"batch_size": 32, "max_new_tokens": shape.get("generate", 4)}
    return config_from_dict(
        {
            "model": {
                "name": str(folder / "base"),
                "task": "classification" if classifier else "causal_lm",
            },
            "method": shape.get("method", {"name": "lora", "r": 8}),
            "data": {"train": str(folder / "rows.jsonl"), "validation": 0.34},
            "evaluation": evaluation,
            "training": {
                "max_steps": 2,
                "per_device_train_batch_size": shape["batch"],
                "save_strategy": "no",
                "eval_strategy": "no",
                "use_cpu": True,
                **shape.get("training", {}),
            },
            "output": {"dir": str(folder / "run")},
        }
    )


def resident() -> int:
    """Return the bytes that this process holds, after what is free was returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}.")


def _restart_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(shape: dict[str, Any]) -> dict[str, int]:
    """Train two steps, evaluate, and return bytes: estimated and measured, above the baseline."""
    import torch

    from plait.run.check import check
    from plait.run.evaluate import evaluate_model
    from plait.run.folder import RunFolder
    from plait.run.prepare import prepare
    from plait.run.trainer import RunTrainer

    torch.set_num_threads(1)

    def train(shape: dict[str, Any], folder: Path) -> tuple[int, int]:
        run = prepare(config_of(shape, folder))
        out = RunFolder.create(folder / "run")
        out.begin("", run.seeds, run.facts)
        trainer = RunTrainer(run, out)
        resident()
        _restart_mark()
        trainer.fit()
        training = _status("VmHWM")
        resident()
        _restart_mark()
        evaluate_model(run.model, run.data, "validation", run.cfg)
        return training, _status("VmHWM")

    small = {**shape, "model": {"vocab_size": 64, "hidden_size": 32, "layers": 1}, "row": 16}
    small = {**small, "batch": 2, "generate": 2}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        train(small, Path(first))
        baseline = resident()
        training, evaluation = train(shape, Path(second))
        estimate = check(config_of(shape, Path(second))).memory  # last: it leaves caches behind
    assert estimate.evaluating is not None
    return {
        "training_estimated": estimate.training,
        "training_measured": training - baseline,
        "evaluation_estimated": estimate.evaluating,
        "evaluation_measured": evaluation - baseline,
        "traced": int(estimate.traced),
    }


def main() -> None:
    """Measure the shapes that are not in the results yet, and write the table."""
    options = parser(__doc__)
    options.add_argument("--shape", help="measure this one in this process, as JSON on stdout")
    options.add_argument("--again", action="store_true", help="measure all shapes again")
    args = options.parse_args()
    if args.shape:
        print(json.dumps(measure(SHAPES[args.shape])))
        return
    from plait.run.folder import environment

    results = {} if args.again else read_results(RESULTS)
    measured = results.get("shapes", {})
    for name in SHAPES:
        if name in measured:
            continue
        command = [sys.executable, "-m", "benchmarks.check.memory", "--shape", name]
        done = subprocess.run(
            command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        measured[name] = json.loads(done.stdout.splitlines()[-1])
        write_results(RESULTS, {"environment": environment(), "shapes": measured}, _table(measured))
    print(_table(measured))


def _table(measured: dict[str, dict[str, int]]) -> str:
    rows = []
    for name, values in measured.items():
        cells = [name]
        for phase in ("training", "evaluation"):
            estimated, real = values[f"{phase}_estimated"], values[f"{phase}_measured"]
            cells += [f"{estimated / 2**20:.0f}", f"{real / 2**20:.0f}"]
            cells.append(f"{100 * (estimated / real - 1):+.1f} %")
        rows.append(cells)
    head = ["shape", "training: estimate, MiB", "measured", "error"]
    head += ["evaluation: estimate, MiB", "measured", "error"]
    return table(head, rows, "|---" + "|---:" * 6 + "|")


if __name__ == "__main__":
    main()
