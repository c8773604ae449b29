"""Inspect two runs: sizes, ranks, likeness of experts, what the router does.

Trains a token-routed adapter and a plain LoRA on the shipped tiny model for a few steps.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from plait.run.config import config_from_dict
from plait.run.inspect.runs import inspect_runs
from plait.run.train import train

folder = Path(tempfile.mkdtemp())


def run(name: str, **method: Any) -> Path:
    """The folder of a run of 20 steps."""
    config = config_from_dict(
        {
            "model": {"name": "builtin:tiny"},
            "method": {"name": name, "r": 4, **method},
            "data": {"train": "builtin:shift?n=200", "test": "builtin:shift?n=40"},
            "training": {"max_steps": 20, "learning_rate": 1e-2, "save_strategy": "no"},
            "evaluation": {"generate": False},
            "output": {"dir": str(folder / name)},
        }
    )
    return train(config).path


routed, plain = run("shared_b"), run("lora")

# --8<-- [start:inspect]
out, report = inspect_runs([routed, plain], folder / "report")  # plait inspect RUN RUN --out DIR

for m in report.modules:
    if m.module.endswith("q_proj"):
        print(
            f"{m.run}, q_proj: |dW| / |W| {m.relative:.2f}, "
            f"effective rank {m.effective_rank:.1f} of {m.rank[1]}"
        )
for s in report.similarity:
    if s.kind == "A" and s.overlap is not None:
        print(f"{s.a}, {s.b}: overlap {s.overlap:.2f}, by chance {s.chance:.2f}")
for load in report.loads:
    shares = " ".join(f"{share:.2f}" for share in load.load)
    print(f"router, {load.task or 'all tasks'}: {shares}, entropy {load.entropy:.2f} nats")
# --8<-- [end:inspect]

# --8<-- [start:json]
stored = json.loads((out / "inspect.json").read_text())
largest = max(stored["layers"], key=lambda layer: layer["updates"][0]["relative"])
print(f"the layer that changed most: {largest['name']} of {largest['run']}")
print("pictures:", ", ".join(sorted(path.name for path in out.glob("*.svg"))))
# --8<-- [end:json]
