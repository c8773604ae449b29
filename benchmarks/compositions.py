"""Train every run file of examples/compositions and write the results down.

    python -m benchmarks.compositions

The shipped model and tasks, one seed and an untuned learning rate each: it shows that each
composition trains, is measured and exported. It compares nothing. Results go to
benchmarks/quality/results/compositions.json, with hardware and versions, and as a table to .md.
"""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_input import RESULTS, measure
from plait.run.folder import environment, write_atomic

CONFIGS = Path(__file__).parents[1] / "examples" / "compositions"


def table(runs: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| run | loss before | after | training s | trainable | LoRA export: ranks | logit error |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for name, run in runs.items():
        lora = run["lora"]
        export = "refused", "-"
        if "refused" not in lora:
            ranks = [r for r in lora["ranks"] if r]
            export = f"{ranks[0]} to {ranks[-1]}", f"{lora['stock_error']:.1e}"
        lines.append(
            f"| {name} | {run['before']['loss']:.3f} | {run['after']['loss']:.3f} | "
            f"{run['seconds']} | {run['trainable']:,} | {export[0]} | {export[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all."""
    torch.set_num_threads(1)
    known: dict[str, Any] = {"runs": {}, "environment": environment()}
    for file in sorted(CONFIGS.glob("*.yaml")):
        known["runs"][file.stem] = measure(file, [], export=True)
        print(file.stem, json.dumps(known["runs"][file.stem]["after"]), flush=True)
    write_atomic(RESULTS / "compositions.json", json.dumps(known, indent=1) + "\n")
    write_atomic(RESULTS / "compositions.md", table(known["runs"]))


if __name__ == "__main__":
    main()
