"""Files of comparisons, and results of runs that were never trained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.run.compare.match import Arm, Sizes
from plait.run.compare.runner import has_finished, run_folder
from plait.run.compare.study import Study, Trial, read_study

ARMS = {"lora": {"name": "lora", "r": 4}, "dual": {"name": "dual_lora", "r": 4}}
ROWS = 60


def sections(**data: Any) -> dict[str, Any]:
    """A base on rows that need not be there."""
    return {
        "model": {"name": "builtin:tiny"},
        "data": {"train": "rows.jsonl", "test": "test.jsonl", "validation": 0.2, **data},
        "training": {"seed": 7},
    }


def write_study(folder: Path, arms: Any = None, base: Any = None, **options: Any) -> Path:
    """Write the file of a comparison whose results go to `out` beside it."""
    content = {
        "base": sections() if base is None else base,
        "arms": ARMS if arms is None else arms,
        "dir": str(folder / "out"),
        "workers": 1,
        **options,
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(content))
    return path


def study_of(folder: Path, arms: Any = None, base: Any = None, **options: Any) -> Study:
    """Read the file that `write_study` writes."""
    return read_study(write_study(folder, arms, base, **options))


def sizes_of(study: Study) -> Sizes:
    """What preparing the arms would find."""
    return Sizes(
        [Arm(name, 4, 1000, 0.0) for name in study.arms],
        dict.fromkeys(study.cells, 100),
        {cell: {"train": 200, "validation": 50, "test": ROWS} for cell in study.cells},
    )


def pretended(
    study: Study, chance: Callable[[Trial], float | None], ran: list[Trial] | None = None
) -> Callable[[Sequence[Trial]], None]:
    """Return what runs trials by drawing answers to ROWS rows, each right with a chance.

    chance: None for a trial that diverges. ran: gets the trials that had not finished.
    """

    def run(trials: Sequence[Trial]) -> None:
        for trial in trials:
            if has_finished(trial, study.folder):
                continue
            if ran is not None:
                ran.append(trial)
            folder, share = run_folder(trial, study.folder), chance(trial)
            folder.path.mkdir(parents=True)
            content: dict[str, Any] = {
                "wall": 2.0, "trained": 1.0, "measured": 0.5, "peak_memory": 10**8,
                "serves": "a plain LoRA",
            }  # fmt: skip
            if share is None:
                content["diverged"] = "the loss is nan in step 1"
            else:
                hard = np.random.default_rng(trial.seed).random(ROWS)
                right = (hard < share).astype(float)
                content["rows"] = {
                    "nll": (2 - right).tolist(), "tokens": [1.0] * ROWS,
                    "correct": right.tolist(), "exact_match": right.tolist(),
                }  # fmt: skip
            (folder.path / "rows.json").write_text(json.dumps(content))

    return run
