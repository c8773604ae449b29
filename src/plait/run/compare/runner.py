"""Run the trials of a comparison: each an ordinary run folder, none of them twice.

A trial's folder is named by a digest of what decides its result, so that trials of an earlier call,
of another study or of a larger one are used again. `rows.json` is written last: a trial has
finished if it is there. A run that was interrupted goes on from its checkpoint.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.core.files import write_atomic
from plait.run.compare.study import Trial
from plait.run.config import config_from_dict, config_to_dict
from plait.run.evaluate import measure_rows
from plait.run.folder import RunFolder
from plait.run.metrics import Rows, metrics_of_rows
from plait.run.prepare import load_run
from plait.run.train import train

Finished = Callable[[Trial, int, int], None]  # a trial that has finished, how many, of how many

_ROWS = "rows.json"
_VERSION = 1
_TRIES = 3  # of workers that die one after the other without a finished trial


def run_trials(
    trials: Sequence[Trial], folder: Path, workers: int = 1, finished: Finished | None = None
) -> None:
    """Run the trials that have not finished yet.

    Args:
        trials: of one study or of several.
        folder: of the comparison; a trial's run is in runs/KEY below it.
        workers: processes; 1 runs the trials in this one.
        finished: called for each trial, those of earlier calls first.

    A loss that is NaN or infinite is a result, see `read_trial`.

    Raises what training raises; what has finished is kept. RuntimeError if workers are killed again
    and again.
    """
    open_trials, done = [], 0
    for trial in trials:
        if (_folder(trial, folder).path / _ROWS).is_file():
            done += 1
            if finished is not None:
                finished(trial, done, len(trials))
        else:
            open_trials.append(trial)
    once = {trial.key: trial for trial in open_trials}
    for key in _run(once, folder, workers):
        done += sum(trial.key == key for trial in open_trials)
        if finished is not None:
            finished(once[key], done, len(trials))


def _run(trials: dict[str, Trial], folder: Path, workers: int) -> Iterator[str]:
    """Yield the key of each trial when it has finished."""
    works = {key: (_raw(trial), str(_folder(trial, folder).path)) for key, trial in trials.items()}
    if workers == 1:
        for key, work in works.items():
            run_trial(*work)
            yield key
        return
    died = 0
    while works:
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                futures = {pool.submit(run_trial, *work): key for key, work in works.items()}
                try:
                    for future in as_completed(futures):
                        future.result()
                        del works[futures[future]]
                        died = 0
                        yield futures[future]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool as error:
            died += 1
            if died == _TRIES:
                raise RuntimeError(
                    f"{_TRIES} worker processes were killed without a finished run, the last one "
                    f"among {', '.join(list(works)[:3])}. Give the runs more memory, or fewer "
                    "workers."
                ) from error


def run_trial(raw: dict[str, Any], path: str) -> None:
    """Train one trial, or go on with it, and write what its model says of each held-out row."""
    folder = RunFolder(path)
    if (folder.path / _ROWS).is_file():
        return
    if not folder.card.is_file():
        cfg = config_from_dict({**raw, "output": {"dir": path}})
        try:
            train(cfg, resume=folder.config.is_file())
        except FloatingPointError as error:
            _write(folder, {"diverged": str(error)})
            return
    run = load_run(path)
    split = run.held_out_split
    assert split is not None
    values = measure_rows(run.model, run.load_data(split), split, run.cfg)
    _write(folder, {"split": split, "rows": {name: v.tolist() for name, v in values.items()}})


def _write(folder: RunFolder, content: dict[str, Any]) -> None:
    text = json.dumps({"schema": "plait.rows", "version": _VERSION, **content})
    write_atomic(folder.path / _ROWS, text + "\n")


def _raw(trial: Trial) -> dict[str, Any]:
    raw = config_to_dict(trial.config)
    del raw["output"]
    return raw


def _folder(trial: Trial, folder: Path) -> RunFolder:
    return RunFolder(folder / "runs" / trial.key)


# ------------------------------------------------------------------------------------- results


def read_trial(trial: Trial, folder: Path) -> Rows | None:
    """Return what a finished trial's model said of each held-out row; None if it diverged.

    Raises ValueError for a damaged file, and FileNotFoundError for a trial that has not finished.
    """
    file = _folder(trial, folder).path / _ROWS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: is missing, so this run has not finished. Run it.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "diverged" in content:
            return None
        return {str(name): np.array(v, dtype=float) for name, v in content["rows"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}). Remove it; the run is kept.") from None


def value_of(trial: Trial, folder: Path, metric: str) -> float | None:
    """Return a metric of a finished trial; None if it diverged or is not defined on these rows."""
    rows = read_trial(trial, folder)
    return None if rows is None else metrics_of_rows(trial.config.model.task, rows).get(metric)


def parts_of(task: str, metric: str, rows: Rows) -> NDArray[np.float64]:
    """Return numbers whose mean is a metric: one for each row, or the metric itself, alone.

    A mean over target tokens is cut into the rows' parts of it. Metrics of all rows together, such
    as F1 and correlations, have no parts.
    """
    if metric in ("loss", "token_accuracy") and "tokens" in rows:
        whole = rows["nll"] if metric == "loss" else rows["correct"]
        return whole * len(whole) / rows["tokens"].sum()
    if metric == "loss" and "nll" in rows:
        return rows["nll"]
    if metric == "exact_match":
        return rows["exact_match"]
    if metric == "accuracy":
        return (rows["predicted"] == rows["label"]).astype(float)
    if metric in ("mse", "loss"):
        return np.square(rows["predicted"] - rows["label"])
    value = metrics_of_rows(task, rows)[metric]
    return np.array([np.nan if value is None else value])
