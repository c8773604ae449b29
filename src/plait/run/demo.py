"""The demo: a shipped model that cannot do the shipped tasks, and two adapters that learn them.

Plain LoRA and Dual LoRA train with the same number of trainable parameters on the built-in shift.
One seed and one learning rate each: it shows that both learn, not which one is better.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plait.run.config import RunConfig, config_from_dict
from plait.run.evaluate import Progress
from plait.run.folder import RunFolder, write_atomic
from plait.run.train import train

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8},
    "dual_lora": {"r": 8, "gate_steps": 20},  # the default of 100 is half of so short a run
}


def demo_config(method: str, folder: Path, steps: int) -> RunConfig:
    """The config of one of the demo's runs."""
    return config_from_dict(
        {
            "model": {"name": "builtin:tiny"},
            "method": {"name": method, "target_modules": "all-linear", **METHODS[method]},
            "data": {
                "train": "builtin:shift?n=4000",
                "test": "builtin:shift?n=200",
                "max_length": 64,
            },
            "training": {
                "learning_rate": 1e-2,
                "warmup_steps": 10,
                "per_device_train_batch_size": 32,
                "max_steps": steps,
                "logging_steps": 10,
                "save_strategy": "no",
            },
            "evaluation": {"max_new_tokens": 16, "batch_size": 100},
            "output": {"dir": str(folder / method)},
        },
        file="demo",
    )


def demo(
    path: str | Path,
    steps: int = 200,
    announce: Callable[[str], None] = lambda method: None,
    callbacks: Callable[[], list[Any]] = list,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Train both methods below a folder and draw their exact match beside the base model's.

    Args:
        path: a folder that is not there yet.
        steps: optimizer steps of each run.
        announce: called with the method's name before its run.
        callbacks, progress: as for train; callbacks makes those of one run.

    Returns:
        Share of test completions reproduced exactly, by arm ("base", then the methods) and task,
        with the mean as "all".

    Raises:
        FileExistsError: there is something at `path`.
    """
    folder = RunFolder.create(path).path
    torch.set_num_threads(1)  # a model this small is slower on two: 0.1 s a step against 1.5
    scores: dict[str, dict[str, float]] = {}
    for method in METHODS:
        announce(method)
        run = train(demo_config(method, folder, steps), callbacks=callbacks(), progress=progress)
        measured = run.read_evaluation()
        scores.setdefault("base", _exact_match(measured["before"]))
        scores[method] = _exact_match(measured["after"])
    write_atomic(folder / "exact_match.png", _picture(scores))
    return scores


def _exact_match(metrics: dict[str, Any]) -> dict[str, float]:
    tasks = {name: values["exact_match"] for name, values in metrics["tasks"].items()}
    return {**tasks, "all": metrics["exact_match"]}


def _picture(scores: dict[str, dict[str, float]]) -> bytes:
    """Bars of exact match by task, one for each arm, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tasks = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for k, (arm, values) in enumerate(scores.items()):
        places = [i + (k - (len(scores) - 1) / 2) * width for i in range(len(tasks))]
        bars = axes.bar(places, [values[t] for t in tasks], width, label=arm)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("exact match on held-out inputs")
    axes.legend(frameon=False, ncols=len(scores), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
