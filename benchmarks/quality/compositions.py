"""Train every run file of examples/compositions and write down the results.

    python -m benchmarks.quality.compositions

Each run uses the shipped model and tasks, one seed and an untuned learning rate: the results show
that each composition trains, is evaluated and exported, and rank nothing. They go to
results/compositions.json, with hardware and versions, and as a table to compositions.md.
"""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import ROOT, table, write_results
from benchmarks.quality.real_input import measure
from plait.run.folder import environment

CONFIGS = ROOT / "examples" / "compositions"
RESULTS = Path(__file__).parent / "results" / "compositions.json"


def report(runs: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    head = ["run", "loss before", "after", "training s", "trainable"]
    head += ["LoRA export: ranks", "logit error"]
    rows = []
    for name, run in runs.items():
        lora = run["lora"]
        export = "refused", "-"
        if "refused" not in lora:
            ranks = [r for r in lora["ranks"] if r]
            export = f"{ranks[0]} to {ranks[-1]}", f"{lora['stock_error']:.1e}"
        losses = [f"{run[when]['loss']:.3f}" for when in ("before", "after")]
        rows.append([name, *losses, run["seconds"], f"{run['trainable']:,}", *export])
    return table(head, rows, "|---|---:|---:|---:|---:|---|---|")


def main() -> None:
    """Train all."""
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for file in sorted(CONFIGS.glob("*.yaml")):
        runs[file.stem] = measure(file, [], export=True)
        print(file.stem, json.dumps(runs[file.stem]["after"]), flush=True)
    write_results(RESULTS, {"runs": runs, "environment": environment()}, report(runs))


if __name__ == "__main__":
    main()
