"""Tasks of the EleutherAI evaluation harness on a finished run."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plait.run.config import did_you_mean
from plait.run.generate import plain_generation
from plait.run.prepare import load_run


def harness_run(
    path: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    task: str | None = None,
) -> dict[str, Any]:
    """Run tasks of the EleutherAI evaluation harness on a causal run; write eval.json.

    tasks: names that lm_eval knows, or that are in include_path (a folder with task files).
    limit: only the first rows of each task, for a quick look. overrides: as in load_run.
    task: of the run, if it routes by task.
    Returns task -> metric -> value, as lm_eval names them; they stand under `harness` in
    eval.json. Raises ImportError without lm_eval, ValueError for an unknown task.
    """
    try:
        harness: Any = importlib.import_module("lm_eval")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
        task_files: Any = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise ImportError(
            f'--harness needs lm_eval ({error}). Install it with: pip install "plait[eval]"'
        ) from error
    run = load_run(path, overrides)
    run.folder.read_evaluation()  # a damaged file is refused before the work
    if run.cfg.model.task != "causal_lm":
        raise ValueError(
            f"{path}: the harness needs a causal language model, model.task is "
            f"{run.cfg.model.task}. "
            "Evaluate it without --harness."
        )
    run.set_task(task)
    # Indexing lm_eval's own task files takes long; tasks of include_path alone do not need it.
    where = None if include_path is None else str(include_path)
    manager = task_files.TaskManager(include_path=where, include_defaults=False)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        manager = task_files.TaskManager(include_path=where)
        unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"--harness: {unknown[0]} is no task of lm_eval. "
            + did_you_mean(unknown[0], manager.all_tasks)
        )
    # HFLM reads its context length and device off the model; the class it wants is the base's.
    wrapped = models.HFLM(
        pretrained=run.model,
        tokenizer=run.tokenizer,
        batch_size=run.cfg.evaluation.batch_size,
    )
    with plain_generation(run.model):
        measured = harness.simple_evaluate(
            wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    results = {
        task: {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in measured["results"].items()
    }
    known = run.folder.read_evaluation().get("harness", {})
    run.folder.write_evaluation(harness=known | results)
    return results
