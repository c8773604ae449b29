"""Logits of written exports: read by stock peft without plait, by peft here, from a GGUF file."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.run import stock_check
from plait.run.export.logits import logits_of
from plait.run.export.making import fresh_base, with_lora
from plait.run.model import quantization_options
from plait.run.prepare import TrainedRun
from plait.run.serving.gguf import FILE, read_gguf

Inputs = Mapping[str, Tensor]
# Task -> its written folder, and its inputs -> its logits.
Read = Callable[[Mapping[Any, Path], Mapping[Any, Inputs]], dict[Any, Tensor]]


def reader(run: TrainedRun, to: str) -> Read:
    """Return what reads a form: a new process without plait; for GGUF, peft in this one."""
    if to != "gguf":
        return lambda folders, inputs: read_without_plait(run, folders, to, inputs)
    return _each(run, lambda folder: with_lora(run, read_gguf(folder / FILE, fresh_base(run))))


def reader_here(run: TrainedRun) -> Read:
    """Return what reads a plain LoRA by peft in this process."""
    return _each(run, lambda folder: PeftModel.from_pretrained(fresh_base(run), str(folder)))


def _each(run: TrainedRun, load: Callable[[Path], Any]) -> Read:
    def read(folders: Mapping[Any, Path], inputs: Mapping[Any, Inputs]) -> dict[Any, Tensor]:
        return {name: logits_of(load(folder), inputs[name]) for name, folder in folders.items()}

    return read


def read_without_plait(
    run: TrainedRun,
    folders: Mapping[str, Path],
    to: str,
    inputs: Mapping[str, Inputs],
) -> dict[str, Tensor]:
    """Logits of written folders, by stock peft and transformers in one new process.

    folders, inputs: by a name each.

    Raises RuntimeError if stock peft cannot load one.
    """
    cfg = run.cfg.model
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for i, (name, folder) in enumerate(folders.items()):
            save_file(dict(inputs[name]), Path(scratch) / f"inputs{i}")
            jobs.append(
                {
                    "model": str(folder.resolve()) if to == "merged" else run.source,
                    "adapter": str(folder.resolve()) if to == "lora" else None,
                    "task": cfg.task,
                    "labels": None if cfg.task == "causal_lm" else run.model.config.num_labels,
                    "dtype": "auto" if to == "merged" else cfg.dtype,  # as it was written
                    "quantization": quantization_options(cfg) if to == "lora" else None,
                    "trust_remote_code": cfg.trust_remote_code,
                    "revision": cfg.revision if to == "lora" else None,
                    "pad": None if cfg.task == "causal_lm" else run.tokenizer.pad_token_id,
                    "inputs": str(Path(scratch) / f"inputs{i}"),
                    "logits": str(Path(scratch) / f"logits{i}"),
                }
            )
        file = Path(scratch) / "jobs"
        file.write_text(json.dumps(jobs), encoding="utf-8")
        done = subprocess.run(
            # -P: or the folder of the script would hide modules of the standard library.
            [sys.executable, "-P", str(stock_check.__file__), str(file)],
            capture_output=True,
            text=True,
            cwd=scratch,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            named = ", ".join(map(str, folders.values()))
            raise RuntimeError(f"{named}: stock peft could not load the export: {last}")
        return {
            name: load_file(job["logits"])["logits"]
            for name, job in zip(folders, jobs, strict=True)
        }
