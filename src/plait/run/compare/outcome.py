"""What a comparison found: rates, verdicts, facts of each arm; written as results.json.

    conduct    runs what is missing of a study and returns its results, as JSON holds them
    read       what an earlier call wrote

The results hold everything that a report shows, so that it can be made without the runs.
"""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.run.compare.match import Sizes
from plait.run.compare.runner import Stopped, has_finished, parts_of, read_result, run_folder
from plait.run.compare.statistics import (
    Difference,
    holm,
    needed,
    paired_difference,
    variance_components,
    verdicts,
)
from plait.run.compare.study import Study, Trial
from plait.run.compare.tuning import Run, Tuned, tune
from plait.run.config import config_to_dict
from plait.run.folder import read_json, write_json
from plait.run.metrics import METRICS, metrics_of_rows

RESULTS = "results.json"
_SCHEMA = "plait.comparison"
_POINTS = 60  # of a loss curve that results keep
_NEAR = 0.95  # of the best value, within which a rate counts as good

Key = tuple[str, str]  # arm, cell


def conduct(study: Study, sizes: Sizes, run: Run) -> dict[str, Any]:
    """Run what is missing of a study; return its results.

    The rates are chosen on validation rows, with runs that do not see the test rows; these are
    measured once for each arm and seed. What could not be run when `run` raises Stopped is missing
    in the results, which say so.

    study: with the ranks of `sizes`.

    Raises what `run` raises, and ValueError for a damaged result.
    """
    tuned: dict[Key, Tuned] = {}
    compared: list[Trial] = []
    stopped = True
    try:
        tuned = tune(study, run, sizes.steps)
        compared = study.compared({key: one.rate for key, one in tuned.items()})
        run(compared)
        stopped = False
    except Stopped:
        compared = [trial for trial in compared if has_finished(trial, study.folder)]
    return results_of(study, sizes, tuned, compared, complete=not stopped)


def results_of(
    study: Study,
    sizes: Sizes,
    tuned: dict[Key, Tuned],
    compared: Sequence[Trial],
    complete: bool,
) -> dict[str, Any]:
    """Return the results of finished runs; tuned: {} if tuning has not ended.

    An arm that diverged with some seed is not compared: its other seeds alone would flatter it.
    """
    runs: dict[Key, dict[int, tuple[Trial, dict[str, Any]]]] = {}
    for trial in compared:
        of_arm = runs.setdefault((trial.arm, trial.cell), {})
        of_arm[trial.seed] = trial, read_result(trial, study.folder)
    rows = []
    for cell in study.cells:
        for arm in (study.reference, *study.others):
            of_arm, known = runs.get((arm, cell), {}), tuned.get((arm, cell), Tuned())
            reference = runs.get((study.reference, cell), {})
            made, why = None, ""
            if arm != study.reference:
                made, why = _compared(study, of_arm, reference, known)
            rows.append(
                {
                    "cell": cell,
                    "arm": arm,
                    "rate": known.rate,
                    "carried": known.carried,
                    "at_an_end": known.at_an_end(),
                    "first": _pairs(known.first),
                    "tuned": _pairs(known.values),
                    "octaves": octaves(known.values, study.higher_is_better),
                    "runs": [_run(study, t, result) for t, result in of_arm.values()],
                    "comparison": made,
                    "others": {} if made is None else _others(study, of_arm, reference),
                    "why": why,
                    "curve": _curve(study, of_arm),
                }
            )
    _judge(study, rows)
    reference = study.config(study.reference)
    raw = config_to_dict(reference)
    environment: dict[str, Any] = {}
    for trial in compared[:1]:
        environment = run_folder(trial, study.folder).read_environment()
        environment = {k: v for k, v in environment.items() if k not in ("run", "seeds")}
    return {
        "file": study.file,
        "reference": study.reference,
        "task": reference.model.task,
        "metrics": study.metrics,
        "seeds": study.seeds,
        "match": study.options.match,
        "tune": vars(study.options.tune)
        | {"learning_rate": study.rates, "transfer": study.transfers},
        "cells": list(study.cells),
        "steps": sizes.steps,
        "rows": sizes.rows,
        "complete": complete,
        "tuning_complete": bool(tuned),
        "arms": [
            {**vars(arm), "method": study.arms[arm.name]} for arm in sizes.arms
        ],
        "base": {name: raw[name] for name in ("model", "data", "training", "evaluation")},
        "results": rows,
        "environment": environment,
    }  # fmt: skip


def write(study: Study, results: dict[str, Any]) -> bool:
    """Write results.json into the folder of the comparison; return whether it changed."""
    path, plain = study.folder / RESULTS, json.loads(json.dumps(results, default=str))
    with suppress(ValueError):  # a damaged file is replaced
        if read_json(path, _SCHEMA, "") == plain:
            return False
    write_json(path, _SCHEMA, plain)
    return True


def read(path: str | Path) -> dict[str, Any]:
    """Return the results in a file, or in a folder of a comparison.

    Raises FileNotFoundError if there are none, and ValueError for a damaged file.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no results of a comparison are here ({RESULTS}). Make them with: plait "
            "compare FILE"
        )
    results = read_json(file, _SCHEMA, "Make it again with: plait compare FILE")
    try:
        for name in ("results", "arms", "metrics", "cells", "seeds"):
            if not isinstance(results[name], list):
                raise TypeError(f"{name} is no list")
        for row in results["results"]:
            if not {"arm", "runs", "comparison", "curve", "tuned"} <= row.keys():
                raise KeyError("a result without arm, runs, comparison, curve or tuned")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged ({error}). Make it again with: plait compare FILE"
        ) from None
    return results


# ---------------------------------------------------------------------------------- comparisons


def _compared(
    study: Study,
    of_arm: dict[int, tuple[Trial, dict[str, Any]]],
    reference: dict[int, tuple[Trial, dict[str, Any]]],
    tuned: Tuned,
) -> tuple[dict[str, Any] | None, str]:
    """Return the comparison with the reference, or None and why there is none."""
    if tuned.rate is None and tuned.values:
        return None, "diverged at every rate"
    for name, some in (("", of_arm), ("the reference ", reference)):
        failed = sum(result["rows"] is None for _, result in some.values())
        if failed:
            return None, f"{name}diverged in {failed} of {len(some)}"
    seeds = [seed for seed in of_arm if seed in reference]
    if not seeds:
        return None, "not run"
    arm, other = (
        np.stack([_parts(study, study.metric, some[seed]) for seed in seeds])
        for some in (of_arm, reference)
    )
    if arm.size < 2:
        return None, "one seed and one number: the spread is unknown"
    if not (np.isfinite(arm).all() and np.isfinite(other).all()):
        return None, f"{METRICS[study.metric].label} is not defined with every seed"
    difference = paired_difference(arm, other)
    parts = variance_components(arm - other)
    more_seeds, more_rows = needed(difference.mean, parts, difference.seeds, difference.rows)
    spread = {
        "spread": vars(parts),
        "seeds_needed": more_seeds if difference.mean else None,
        "rows_needed": more_rows if difference.mean else None,
    }
    made = _finite(vars(difference)) | spread
    if difference.error == 0:  # the same for every seed and row: nothing is known of the spread
        made["detectable"] = None
    return made, ""


def _others(
    study: Study,
    of_arm: dict[int, tuple[Trial, dict[str, Any]]],
    reference: dict[int, tuple[Trial, dict[str, Any]]],
) -> dict[str, Any]:
    """Return the differences in the metrics that are shown and do not decide."""
    made = {}
    for metric in study.metrics[1:]:
        seeds = [seed for seed in of_arm if seed in reference]
        arm, other = (
            np.stack([_parts(study, metric, some[seed]) for seed in seeds])
            for some in (of_arm, reference)
        )
        if arm.size > 1 and np.isfinite(arm).all() and np.isfinite(other).all():
            made[metric] = _finite(vars(paired_difference(arm, other)))
    return made


def _judge(study: Study, rows: list[dict[str, Any]]) -> None:
    """Add the adjusted p-values and the verdicts: one family for all arms and cells."""
    judged = [row["comparison"] for row in rows if row["comparison"] is not None]
    differences = [_difference(comparison) for comparison in judged]
    adjusted = holm([d.p for d in differences])
    said = verdicts(differences, adjusted, study.higher_is_better)
    for comparison, p, verdict in zip(judged, adjusted, said, strict=True):
        comparison |= {"p_holm": p, "verdict": verdict}


def _difference(comparison: dict[str, Any]) -> Difference:
    """Return the difference that a comparison was made from; None stands for infinity."""
    values: dict[str, Any] = {
        name: math.inf if comparison[name] is None else comparison[name]
        for name in Difference.__dataclass_fields__
    }
    return Difference(**values)


def _parts(study: Study, metric: str, run: tuple[Trial, dict[str, Any]]) -> NDArray[np.float64]:
    return parts_of(run[0].config.model.task, metric, run[1]["rows"])


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


# ---------------------------------------------------------------------------------------- facts


def _run(study: Study, trial: Trial, result: dict[str, Any]) -> dict[str, Any]:
    """Return what the results keep of one run."""
    folder = run_folder(trial, study.folder)
    facts = folder.read_facts()
    rows = result["rows"]
    metrics = {} if rows is None else metrics_of_rows(trial.config.model.task, rows)
    known = {name: facts.get(name) for name in ("trainable", "stored", "steps", "seconds")}
    return {
        "key": trial.key,
        "seed": trial.seed,
        "value": metrics.get(study.metric),
        "metrics": metrics,
        "diverged": result["diverged"],
        **known,
        "peak_memory": result["peak_memory"],
        "wall": result["wall"],
        "serves": result["serves"],
    }


def _pairs(values: dict[float, float | None]) -> list[list[float | None]]:
    return [[rate, values[rate]] for rate in sorted(values)]


def octaves(values: dict[float, float | None], higher_is_better: bool) -> float | None:
    """Return how wide the rates are, in factors of two, that reach 95 % of the best value.

    Between two rates that were tried the value is taken to be straight in the logarithm of the
    rate. None with fewer than two rates, or with values of both signs.
    """
    known = {math.log2(rate): value for rate, value in values.items() if value is not None}
    if len(known) < 2 or min(known.values()) < 0:
        return None
    top = max(known.values()) if higher_is_better else min(known.values())
    limit = _NEAR * top if higher_is_better else top / _NEAR
    sign = 1.0 if higher_is_better else -1.0
    places = sorted(known)
    centre = next(x for x in places if known[x] == top)
    ends = []
    for side in (places[places.index(centre) :], places[: places.index(centre) + 1][::-1]):
        end = side[-1]
        for inner, outer in itertools.pairwise(side):
            if sign * known[outer] < sign * limit:
                share = (known[inner] - limit) / (known[inner] - known[outer])
                end = inner + share * (outer - inner)
                break
        ends.append(end)
    return ends[0] - ends[1]


def _curve(study: Study, of_arm: dict[int, tuple[Trial, dict[str, Any]]]) -> dict[str, Any]:
    """Return the losses of the first seed's run: kind -> [step, loss], at most _POINTS each."""
    for trial, _ in of_arm.values():
        rows = run_folder(trial, study.folder).read_metrics()
        return {
            kind: _thinned([[r["step"], r[key]] for r in rows if r.get(key) is not None])
            for kind, key in (("training", "loss"), ("validation", "eval_loss"))
        }
    return {}


def _thinned(points: list[Any]) -> list[Any]:
    step = max(1, math.ceil(len(points) / _POINTS))
    return points[::-step][::-1]


def mean_of(row: dict[str, Any], name: str) -> float | None:
    """Return the mean of a fact over the runs of an arm that have it."""
    known = [run[name] for run in row["runs"] if run.get(name) is not None]
    return statistics.fmean(known) if known else None
