"""What an adapter costs in llama.cpp: size on disk, time to load, tokens a second against merged.

    make test-servers                                   # installs llama.cpp
    OMP_NUM_THREADS=1 python -m benchmarks.serving.llamacpp [--rounds 5]

A random Llama of LAYERS blocks with random LoRAs on all linear layers, float32 files, one thread,
one request. Speeds do not depend on the values of weights. The forms take turns in every round, so
that what else the machine does hits all alike; the table shows medians with the smallest and the
largest value. Results: results/llamacpp.json and .md.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._common import median_and_range, parser, table, write_results
from plait.run.folder import environment
from plait.run.serving.gguf import write_gguf
from plait.testing import tiny
from plait.upstream.export import to_lora
from tests.support import llamacpp

RESULTS = Path(__file__).parent / "results" / "llamacpp.json"
LAYERS, HIDDEN = 8, 512
RANKS = (8, 16, 64)
PROMPT, NEW = 128, 64
MERGED = f"r = {RANKS[0]}, merged"


def base() -> LlamaForCausalLM:
    """A random Llama with grouped-query attention."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=HIDDEN, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    with tiny.seed():
        return LlamaForCausalLM(config).eval()


def write(folder: Path) -> dict[str, dict[str, int]]:
    """Write every form of every adapter; return form -> file -> bytes."""
    base().save_pretrained(folder / "base")
    jobs = [llamacpp.base_job(folder / "base", folder / "base.gguf")]
    for rank in RANKS:
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False
        )
        with tiny.seed():
            model: Any = get_peft_model(base(), config)
        lora = to_lora(model)
        lora.write(folder / f"r{rank}")
        write_gguf(lora, model.get_base_model(), folder / f"r{rank}.gguf")
        if rank == RANKS[0]:
            model.merge_and_unload().save_pretrained(folder / "merged")
            jobs.append(llamacpp.base_job(folder / "merged", folder / "merged.gguf"))
    failures = [failure for failure in llamacpp.convert(jobs, folder) if failure]
    if failures:
        raise SystemExit(failures[0])
    sizes: dict[str, dict[str, int]] = {
        "base": {"GGUF": (folder / "base.gguf").stat().st_size},
        MERGED: {"GGUF": (folder / "merged.gguf").stat().st_size},
    }
    for rank in RANKS:
        sizes[f"r = {rank}"] = {
            "safetensors": (folder / f"r{rank}" / "adapter_model.safetensors").stat().st_size,
            "GGUF": (folder / f"r{rank}.gguf").stat().st_size,
        }
    return sizes


def speeds(server: llamacpp.LlamaCpp, prompt: list[int]) -> tuple[float, float]:
    """Tokens a second of reading the prompt and of writing after it."""
    start = time.perf_counter()
    server.logits(prompt)
    middle = time.perf_counter()
    for token in prompt[:NEW]:
        server.llama.eval([token])
    return PROMPT / (middle - start), NEW / (time.perf_counter() - middle)


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Form -> what is measured -> a value for each round."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    prompt = np.random.default_rng(0).integers(3, 4096, PROMPT).tolist()
    for _ in range(rounds):
        for form, file in (("base", "base.gguf"), (MERGED, "merged.gguf")):
            start = time.perf_counter()
            server = llamacpp.LlamaCpp(folder / file, 256)
            values[form]["load"].append(time.perf_counter() - start)
            forms = {form: None}
            if form == "base":
                for rank in RANKS:
                    start = time.perf_counter()
                    forms[f"r = {rank}"] = server.load(folder / f"r{rank}.gguf")
                    values[f"r = {rank}"]["load"].append(time.perf_counter() - start)
            server.logits(prompt)  # the first call is slower
            for name, adapter in forms.items():
                server.use(*([] if adapter is None else [adapter]))
                for key, speed in zip(("read", "write"), speeds(server, prompt), strict=True):
                    values[name][key].append(speed)
            server.close()
    return {form: dict(measured) for form, measured in values.items()}


def report(sizes: dict[str, Any], values: dict[str, Any], where: str) -> str:
    """The table and what it was measured on."""
    rows = []
    for form, size in sizes.items():
        measured, reference = values[form], values["base"]
        kept = (
            f"{statistics.median(measured[key]) / statistics.median(reference[key]):.0%}"
            for key in ("read", "write")
        )
        rows.append([
            form,
            *(f"{size[k] / 1e6:.2f}" if k in size else "" for k in ("safetensors", "GGUF")),
            median_and_range([1000 * s for s in measured["load"]], ".1f"),
            *(median_and_range(measured[key], ".0f") for key in ("read", "write")),
            " / ".join(kept),
        ])  # fmt: skip
    head = ["", "safetensors, MB", "GGUF, MB", "load, ms", "tokens/s, prompt", "tokens/s, writing",
            "of the base's speed"]  # fmt: skip
    return f"{where}\n\n{table(head, rows)}"


def main() -> None:
    """Measure and write the results."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    rounds = options.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sizes = write(Path(scratch))
        values = measure(Path(scratch), rounds)
    numbers = sum(p.numel() for p in base().parameters())
    known = environment()
    used = {name: version(name) for name in ("llama-cpp-python", "gguf")}
    where = (
        f"A Llama of {numbers / 1e6:.0f} M parameters ({LAYERS} blocks of {HIDDEN}) in float32, "
        f"LoRA on all linear layers, a prompt of {PROMPT} tokens, {NEW} written one by one. "
        f"{known['cpu_count']} CPU cores that other work kept busy, one thread, without native "
        f"instructions (GGML_NATIVE=OFF), llama-cpp-python {used['llama-cpp-python']}, gguf "
        f"{used['gguf']}. Median (smallest to largest) of {rounds} rounds, in which the forms take "
        "turns."
    )
    results = {"sizes": sizes, "values": values, "packages": used, "environment": known}
    write_results(RESULTS, results, report(sizes, values, where))
    print(report(sizes, values, where))


if __name__ == "__main__":
    main()
