"""The metrics of a run and of its export on the run's held-out rows, and whether they moved.

The noise of a metric is what another draw of as many rows would change: its standard error by the
bootstrap over the rows of the run's own predictions, at least one row of a share, or 1 % of any
other metric, so that a handful of rows, or a metric that is 0, does not count as free of noise.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from plait.run.config import RunConfig
from plait.run.data.bundle import DataBundle, Split
from plait.run.evaluate import Progress, measure_rows
from plait.run.metrics import METRICS, Rows, measures, metrics_of_rows

_DRAWS = 200  # of the bootstrap
_LEAST = 0.01  # noise of a metric that is no share, relative to it


@dataclass(frozen=True)
class HeldOut:
    """Metrics of a run and of its export on the same rows.

    split, rows: measured on. before: of the run. after: of the export. noise: of `before`. Metrics
    that are not defined on these rows are left out.
    """

    split: str
    rows: int
    before: dict[str, float]
    after: dict[str, float]
    noise: dict[str, float]

    @property
    def moved(self) -> list[str]:
        """Names of the metrics that moved by more than their noise."""
        return [n for n, noise in self.noise.items() if abs(self.after[n] - self.before[n]) > noise]

    def said(self, names: list[str] | None = None) -> list[str]:
        """Each metric as text: `exact match 0.610 -> 0.260 (noise 0.034)`."""
        return [
            f"{METRICS[n].label} {self.before[n]:.4g} -> {self.after[n]:.4g} "
            f"(noise {self.noise[n]:.2g})"
            for n in (self.noise if names is None else names)
        ]


class HeldOutRows:
    """The held-out rows of a run as a model without plait reads them, and the run's own values.

    The run is measured when this is made, because merging changes its model.

    Args:
        model: of the run, with its task set. data: of the run. split: to measure on. cfg: of the
            run. task: rows of this task alone. progress: called with (rows done, rows in all).
    """

    def __init__(
        self,
        model: Any,
        data: DataBundle,
        split: Split,
        cfg: RunConfig,
        task: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        collator = copy.copy(data.collator)
        collator.task_ids = collator.sample_types = False  # the model has its task, or has none
        rows = getattr(data, split)
        if task is not None and data.tasks is not None:
            rows = rows.select([i for i, name in enumerate(rows["task"]) if name == task])
        self.data: DataBundle = replace(data, collator=collator, **{split: rows})
        self.cfg, self.progress = cfg, progress
        self.split: Split = split
        self.values = self._measure(model)

    def _measure(self, model: Any) -> Rows:
        return measure_rows(model, self.data, self.split, self.cfg, progress=self.progress)

    def compare(self, exported: Any) -> HeldOut:
        """Measure the export on the same rows."""
        measure = partial(metrics_of_rows, measures(self.cfg))
        before, after = measure(self.values), measure(self._measure(exported))
        noise = noise_of(self.values, measure)
        names = [n for n, x in before.items() if x is not None and after[n] is not None]
        return HeldOut(
            self.split,
            len(getattr(self.data, self.split)),
            {n: float(before[n]) for n in names},  # type: ignore[arg-type]
            {n: float(after[n]) for n in names},  # type: ignore[arg-type]
            {n: noise[n] for n in names},
        )


def noise_of(
    values: Rows, measure: Callable[[Rows], Mapping[str, float | None]]
) -> dict[str, float]:
    """The noise of each metric that is defined on these rows.

    Args:
        values: name -> one value for each row. measure: rows -> metrics.
    """
    rows = len(next(iter(values.values())))
    draws = np.random.default_rng(0).integers(rows, size=(_DRAWS, rows))
    drawn = [measure({n: v[chosen] for n, v in values.items()}) for chosen in draws]
    noise = {}
    for name, value in measure(values).items():
        if value is None:
            continue
        several = [metrics[name] for metrics in drawn if metrics[name] is not None]
        spread = float(np.std(several)) if several else 0.0  # type: ignore[arg-type]
        share = METRICS[name].higher_is_better  # accuracies and correlations
        noise[name] = max(spread, 1 / rows if share else _LEAST * abs(value))
    return noise
