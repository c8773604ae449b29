"""What a plain LoRA of rank k keeps of a full-rank update: plain SVD, weighted SVD, distillation.

    python -m benchmarks.serving.truncation

Three runs of dual_lora (r = 8) on the shipped model and its four unseen tasks: three seeds of data
and training, one learning rate. For k = r, 2 r, 4 r, 8 r the update is cut by plain SVD, by SVD
weighted with the second moments of the inputs on 128 training rows, and by the latter with 100
steps of distillation. The figures are the share of the run's gain that the export keeps on 200
test rows, (export - base) / (run - base), of exact match and of the loss: 1 is the run, 0 the base
model. They go to results/truncation.json, with hardware and versions, and a table to truncation.md.
"""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

import plait
from benchmarks._common import table, write_results
from plait.run.config import config_from_dict
from plait.run.evaluate import evaluate_model
from plait.run.export.fitting import MOMENT_BATCHES, distilled, training_batches
from plait.run.export.making import fresh_base
from plait.run.folder import environment
from plait.run.prepare import TrainedRun, load_run
from plait.run.train import train
from plait.upstream.export import LoraExport, to_lora
from plait.upstream.moments import second_moments

RESULTS = Path(__file__).parent / "results" / "truncation.json"
SEEDS = (0, 1, 2)
RANK = 8
STEPS = 100  # of distillation


def run_of(seed: int, place: Path) -> TrainedRun:
    """Train dual_lora."""
    config = {
        "model": {"name": "builtin:tiny"},
        "method": {"name": "dual_lora", "r": RANK, "gate_steps": 20},
        "data": {
            "train": "builtin:shift?n=4000",
            "test": "builtin:shift?n=200",
            "max_length": 64,
            "seed": seed,
        },
        "training": {
            "learning_rate": 5e-3,
            "seed": seed,
            "per_device_train_batch_size": 16,
            "max_steps": 300,
            "save_strategy": "no",
        },
        "evaluation": {"max_new_tokens": 16, "batch_size": 100},
        "output": {"dir": str(place / str(seed))},
    }
    return load_run(train(config_from_dict(config, file=f"seed {seed}")).path)


def student(run: TrainedRun, lora: LoraExport) -> PeftModel:
    """A new base model with an export on it."""
    model: Any = get_peft_model(fresh_base(run), lora.config)
    set_peft_model_state_dict(model, lora.tensors)
    return model


def measured(run: TrainedRun, model: Any) -> dict[str, float]:
    """Exact match and loss on the test rows."""
    metrics = evaluate_model(model, run.load_data("test"), "test", run.cfg)
    return {name: metrics[name] for name in ("exact_match", "loss")}


def cut(seed: int, place: Path) -> list[dict[str, Any]]:
    """The rows of one run."""
    run = run_of(seed, place)
    trained = measured(run, run.model)
    with run.model.disable_adapter():  # type: ignore[operator]
        base = measured(run, run.model)
    few = islice(training_batches(run, None), MOMENT_BATCHES)
    moments = second_moments(run.model, few)  # type: ignore[arg-type]
    rows = []
    for rank in (RANK, 2 * RANK, 4 * RANK, 8 * RANK):
        plain = to_lora(run.model, rank=rank)  # type: ignore[arg-type]
        weighted = to_lora(run.model, rank=rank, moments=moments)  # type: ignore[arg-type]
        better = distilled(run, weighted, student(run, weighted), STEPS, None)
        exports = {"svd": plain, "weighted": weighted, "distilled": better}
        row: dict[str, Any] = {"seed": seed, "rank": rank, "left out": plain.error}
        for name, lora in exports.items():
            values = measured(run, student(run, lora))
            for metric, value in values.items():
                gain = trained[metric] - base[metric]
                row[f"{name} {metric}"] = (value - base[metric]) / gain
        rows.append({**row, "trained": trained, "base": base})
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for seed in SEEDS for row in cut(seed, Path(folder))]
    facts = {"environment": environment(), "plait": plait.__version__, "distill steps": STEPS}
    write_results(RESULTS, {**facts, "rows": rows}, page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    """The table of exact match and loss kept."""
    names = ("svd", "weighted", "distilled")
    head = ["seed", "rank", "left out", *(f"{n}: match, loss" for n in names)]
    lines = [
        [
            str(row["seed"]),
            str(row["rank"]),
            f"{row['left out']:.0%}",
            *(f"{row[f'{n} exact_match']:.2f}, {row[f'{n} loss']:.2f}" for n in names),
        ]
        for row in rows
    ]
    return table(head, lines)


if __name__ == "__main__":
    main()
