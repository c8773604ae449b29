"""Rows a second of `plait train` on two processes of one core against one process of one core.

    python -m benchmarks.parallel.throughput FOLDER

Both train the same run (the same rows in each step) of a random Llama of 11 million parameters.
The seconds are those of training, without loading and evaluation. The CPU time of a process tells
what is to be expected of a machine that does nothing else.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from plait.run.config import ModelConfig
from plait.run.folder import RunFolder
from plait.run.model import load_tokenizer

STEPS, ROWS, TOKENS = 12, 16, 256


def prepare(folder: Path) -> Path:
    """Write a model, rows and a run file; return the file."""
    tokenizer = load_tokenizer(ModelConfig())
    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = "".join(chr(97 + i * i % 26) + " " * (i % 5 == 0) for i in range(4 * TOKENS))
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text[i:]}) + "\n" for i in range(64))
    config = {
        "model": {"name": str(folder / "model")},
        "method": {"name": "sora", "r": 8},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": TOKENS, "truncate": True},
        "training": {
            "max_steps": STEPS,
            "logging_steps": STEPS,
            "save_strategy": "no",
            "use_cpu": True,
            "per_device_train_batch_size": ROWS,
        },
        "output": {"dir": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def run(file: Path, processes: int, number: int) -> tuple[float, float]:
    """Train; return the seconds of training and the CPU seconds of the whole command."""
    to = file.parent / f"run-{processes}-{number}"
    words = [f"output.dir={to}", f"training.per_device_train_batch_size={ROWS // processes}"]
    command = [sys.executable, "-m", "plait", "train", str(file), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, "--processes", str(processes)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return RunFolder.open(to).read_facts()["seconds"], cpu


def main(folder: Path) -> None:
    """Measure both in turn, three times."""
    folder.mkdir(parents=True)
    file = prepare(folder)
    for number in range(3):
        load = os.getloadavg()[0]
        (one, cpu_one), (two, cpu_two) = run(file, 1, number), run(file, 2, number)
        print(
            f"load {load:.1f}: one process {one:.1f} s ({cpu_one:.0f} s CPU), two {two:.1f} s "
            f"({cpu_two:.0f} s CPU): {one / two:.2f} times as fast",
            flush=True,
        )
        time.sleep(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
