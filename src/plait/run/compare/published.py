"""Published results in the format of peft's method_comparison, with intervals and verdicts.

A file holds one run, or a run on each line: run_info (train_config, peft_config), train_info
(num_trainable_params, train_time, accelerator_memory_max, file_size, metrics) and meta_info. The
last entry of metrics has the test accuracy. There is one seed for each run and no answer to a
single row, so the intervals are those of two shares (see statistics.share_difference).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.options import did_you_mean
from plait.run.compare.statistics import (
    Difference,
    Verdict,
    holm,
    share_difference,
    share_interval,
    verdicts,
)

_MOST_ROWS = 100_000  # of a test that are tried as the denominator of all accuracies
_NEAR = 1e-6  # of a whole number, relative to nothing: accuracies are written with 16 digits


@dataclass(frozen=True)
class PublishedRun:
    """One published run.

    name: of the experiment. method: peft's type; FULL for full fine-tuning. accuracy: on the test
    rows, 0 to 1. rate: the learning rate. parameters: trained. seconds: of training. memory: most
    bytes on the accelerator. stored: bytes of the file. forgetting: as the suite defines it. None:
    not published.
    """

    name: str
    method: str
    seed: int
    accuracy: float
    rate: float | None
    parameters: int | None
    seconds: float | None
    memory: int | None
    stored: int | None
    forgetting: float | None


@dataclass(frozen=True)
class Row:
    """A run in the table: its accuracy's interval, its difference to the reference, the verdict.

    adjusted: the p-value after Holm. difference, adjusted, verdict: None for the reference.
    """

    run: PublishedRun
    low: float
    high: float
    difference: Difference | None
    adjusted: float | None
    verdict: Verdict | None


@dataclass(frozen=True)
class PublishedStudy:
    """Published runs, compared with one of them.

    rows: the best accuracy first. test_rows: of the test; inferred: whether they were worked out
    from the accuracies. seen: the difference beyond which two runs differ at the level, before
    Holm's adjustment; detectable: with 80 % power. correlation, seed_spread, level: as assumed.
    """

    reference: PublishedRun
    rows: list[Row]
    test_rows: int
    inferred: bool
    seen: float
    detectable: float
    correlation: float
    seed_spread: float
    level: float

    @property
    def counts(self) -> dict[Verdict, int]:
        """Verdict -> number of runs."""
        kinds: tuple[Verdict, ...] = ("wins", "loses", "undecided")
        return {kind: sum(row.verdict == kind for row in self.rows) for kind in kinds}

    @property
    def alone(self) -> int:
        """Runs that exceed the reference if each is looked at alone, without Holm's adjustment."""
        return sum(row.difference is not None and row.difference.low > 0 for row in self.rows)


# Reading ------------------------------------------------------------------------------------------


def read_published(paths: Sequence[str | Path]) -> list[PublishedRun]:
    """Read files of published runs: .json with one run, or .jsonl with one on each line.

    Runs that did not succeed are left out.

    Raises FileNotFoundError for a missing file, and ValueError for one that is no such file, with
    file, line and key; for two runs of one name and seed; and if no run succeeded.
    """
    runs: dict[tuple[str, int], PublishedRun] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: is no file. Give files in peft's result format.")
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}" if path.suffix == ".jsonl" else str(path)
            run = _read_run(line, where)
            if run is None:
                continue
            if runs.setdefault((run.name, run.seed), run) is not run:
                raise ValueError(
                    f"{where}: {run.name} with seed {run.seed} was read before. Remove one."
                )
    if not runs:
        raise ValueError(f"{', '.join(map(str, paths))}: no run succeeded. Give other files.")
    return list(runs.values())


def _read_run(text: str, where: str) -> PublishedRun | None:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON ({error}). Copy the file again.") from None
    train = _part(raw, where, "train_info")
    if train.get("status", "success") != "success":
        return None
    info = _part(raw, where, "run_info")
    settings = _part(info, where, "run_info.train_config")
    metrics = train.get("metrics")
    last = metrics[-1] if isinstance(metrics, list) and metrics else None
    if not isinstance(last, dict) or "test accuracy" not in last:
        raise ValueError(
            f"{where}: train_info.metrics ends without a test accuracy. Give a finished run."
        )
    optimizer, peft_config = settings.get("optimizer_kwargs") or {}, info.get("peft_config") or {}
    return PublishedRun(
        name=str(info.get("experiment_name")),
        method=str(peft_config.get("peft_type", "FULL")),
        seed=int(settings.get("seed", 0)),
        accuracy=_number(last, "test accuracy", where, most=1.0),
        rate=_optional(optimizer, "lr", where),
        parameters=_whole(train, "num_trainable_params", where),
        seconds=_optional(train, "train_time", where),
        memory=_whole(train, "accelerator_memory_max", where),
        stored=_whole(train, "file_size", where),
        forgetting=_optional(last, "forgetting", where),
    )


def _part(raw: Any, where: str, key: str) -> dict[str, Any]:
    value = raw.get(key.rpartition(".")[2]) if isinstance(raw, dict) else None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} is missing. Give a file in peft's result format.")
    return value


def _number(values: Mapping[str, Any], key: str, where: str, most: float = math.inf) -> float:
    value = values[key]
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not 0 <= value <= most or math.isinf(value):
        bound = "0 or more" if math.isinf(most) else f"0 to {most:g}"
        raise ValueError(f"{where}: {key} is {value!r:.60}. It should be {bound}.")
    return float(value)


def _optional(values: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if values.get(key) is None else _number(values, key, where)


def _whole(values: Mapping[str, Any], key: str, where: str) -> int | None:
    value = _optional(values, key, where)
    return None if value is None else round(value)


# Comparing ----------------------------------------------------------------------------------------


def compare_published(
    runs: Sequence[PublishedRun],
    reference: str,
    test_rows: int | None = None,
    correlation: float = 0.0,
    seed_spread: float = 0.0,
    level: float = 0.95,
) -> PublishedStudy:
    """Compare published runs with one of them.

    Args:
        runs: at least two. reference: the name of one, or the end of it that no other has.
        test_rows: of the test; None: the smallest number of which every accuracy is a whole share.
        correlation, seed_spread, level: as in statistics.share_difference.

    Raises ValueError for an unknown reference, for accuracies that are whole shares of no number up
    to 100,000 rows or not of `test_rows`, and for a correlation or a spread out of range.
    """
    if not -1 < correlation < 1:
        raise ValueError(f"the correlation is {correlation:g}. Give more than -1 and less than 1.")
    if not 0 <= seed_spread < 1:
        raise ValueError(f"the spread over seeds is {seed_spread:g}. Give 0 or more, below 1.")
    chosen = _find(runs, reference)
    count = _denominator([run.accuracy for run in runs], test_rows)
    others = [run for run in runs if run is not chosen]
    options = {"correlation": correlation, "seed_spread": seed_spread, "level": level}
    differences = [
        share_difference(run.accuracy, chosen.accuracy, count, **options) for run in others
    ]
    adjusted = holm([d.p for d in differences])
    said = verdicts(differences, adjusted, level=level)
    rows = [
        Row(run, *share_interval(run.accuracy, count, level), difference, p, verdict)
        for run, difference, p, verdict in zip(others, differences, adjusted, said, strict=True)
    ]
    rows.append(Row(chosen, *share_interval(chosen.accuracy, count, level), None, None, None))
    rows.sort(key=lambda row: (-row.run.accuracy, row.run.name))
    same = share_difference(chosen.accuracy, chosen.accuracy, count, **options)
    return PublishedStudy(
        reference=chosen,
        rows=rows,
        test_rows=count,
        inferred=test_rows is None,
        seen=(same.high - same.low) / 2,
        detectable=same.detectable,
        correlation=correlation,
        seed_spread=seed_spread,
        level=level,
    )


def _find(runs: Sequence[PublishedRun], reference: str) -> PublishedRun:
    exact = [run for run in runs if run.name == reference]
    near = exact or [run for run in runs if run.name.endswith(reference)]
    names = [run.name for run in runs]
    if not near:
        raise ValueError(f"there is no run {reference!r}. {did_you_mean(reference, names)}")
    if len(near) > 1:
        raise ValueError(
            f"{len(near)} runs are called {reference!r}, among them {near[0].name} and "
            f"{near[1].name}. Give the whole name of one, with one seed."
        )
    return near[0]


def _denominator(accuracies: Sequence[float], rows: int | None) -> int:
    """Return the number of test rows, checked against the accuracies or worked out from them."""
    for count in range(1, _MOST_ROWS + 1) if rows is None else (rows,):
        if all(abs(a * count - round(a * count)) < _NEAR for a in accuracies):
            return count
    if rows is None:
        raise ValueError(
            f"the accuracies are shares of no number of test rows up to {_MOST_ROWS:,}. Give the "
            "number with --test-rows."
        )
    odd = next(a for a in accuracies if abs(a * rows - round(a * rows)) >= _NEAR)
    raise ValueError(
        f"the accuracy {odd:g} is no share of {rows:,} test rows. Give the number that was tested."
    )
