"""What a study can detect, and what it will take, before it runs: `plait compare FILE --plan`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.run.compare.match import Sizes
from plait.run.compare.runner import Pool, Stopped, has_finished, parts_of, read_result, run_folder
from plait.run.compare.statistics import (
    Components,
    assumed_components,
    detectable_difference,
    variance_components,
)
from plait.run.compare.study import Study, Trial
from plait.run.compare.tables import number, size
from plait.run.compare.tuning import AROUND, KEPT, SHARE, tune
from plait.run.metrics import METRICS

CORRELATION = 0.6  # of two arms' answers to a row, if nothing is known
_STEPS = 8  # of a pilot
_SHARES = ("accuracy", "exact_match", "token_accuracy")  # with a known spread: right or wrong
_MOST = 2**20


@dataclass(frozen=True)
class ArmPlan:
    """What an arm takes. step: seconds. run: seconds of a whole run. memory: bytes."""

    arm: str
    step: float
    run: float
    memory: int | None


@dataclass(frozen=True)
class Plan:
    """What a study can detect and what it takes.

    parts: variances of a paired difference; None if nothing is known of the metric. source: where
    they are from. tuning, seed: seconds of all trials of rates, and of the runs of one seed.
    """

    study: Study
    rows: int
    parts: Components | None
    source: str
    arms: list[ArmPlan]
    tuning: float
    seed: float
    workers: int

    @property
    def total(self) -> float:
        """Seconds of the study."""
        return self.tuning + self.seed * len(self.study.seeds)

    def detectable(self, seeds: int, rows: int, comparisons: int = 1) -> float:
        """Return the smallest difference that is detected with 80 % power.

        comparisons: of which Holm's adjustment allows for, at worst.
        """
        assert self.parts is not None
        return detectable_difference(self.parts, seeds, rows, 1 - 0.05 / comparisons)

    def lines(self) -> Iterator[str]:
        """Yield what is printed."""
        study, seeds = self.study, len(self.study.seeds)
        label, number_of = METRICS[study.metric].label, len(study.others) * len(study.cells)
        if self.parts is None:
            yield (
                f"{label} has no value for each row, so what the study can detect is not known "
                f"before two seeds of each arm are done. {self.source}"
            )
        else:
            alone, among = (self.detectable(seeds, self.rows, n) for n in (1, number_of))
            yield (
                f"smallest detectable difference of {label} (80 % power, {seeds} seeds, "
                f"{self.rows:,} test rows): {number(alone, 3)}; if it is the least clear one of "
                f"{number_of} comparisons (Holm): {number(among, 3)}"
            )
            yield f"from: {self.source}"
            yield f"to halve it: {self._halving(seeds)}"
        for arm in self.arms:
            yield (
                f"{arm.arm}: {1000 * arm.step:.3g} ms a step, {_time(arm.run)} a run, peak memory "
                f"{size(arm.memory) or 'unknown'}"
            )
        yield (
            f"time with {self.workers} workers: {_time(self.total)}, of which {_time(self.tuning)} "
            f"for the rates and {_time(self.seed)} for each seed of the compared runs"
        )
        if study.options.budget is not None:
            yield self._covered()

    def _covered(self) -> str:
        seeds, budget = len(self.study.seeds), self.study.seconds
        text = f"the budget of {self.study.options.budget}"
        if self.total <= budget:
            return f"{text} covers all of it"
        if self.tuning >= budget:
            return (
                f"{text} does not cover the choice of the rates: nothing will be compared in this "
                "call. The next call goes on"
            )
        done = min(seeds, int((budget - self.tuning) / self.seed))
        return (
            f"{text} covers the rates and {done} of {seeds} seeds; the other {seeds - done} will "
            "be skipped in this call. The next call goes on"
        )

    def _halving(self, seeds: int) -> str:
        assert self.parts is not None
        half = self.detectable(seeds, self.rows) / 2
        ways = []
        rows = _least(lambda n: self.detectable(seeds, n) <= half, self.rows)
        if rows is not None:
            ways.append(f"{rows:,} test rows")
        more = _least(lambda n: self.detectable(n, self.rows) <= half, seeds)
        if more is not None:
            ways.append(f"{more:,} seeds")
        both = _least(
            lambda n: (
                self.detectable(math.ceil(seeds * n / 8), math.ceil(self.rows * n / 8)) <= half
            ),
            8,
        )
        if both is not None:
            ways.append(f"{both / 8:.2g} times as many of both")
        if self.source.startswith("assumed"):
            close = 1 - (1 - CORRELATION) / 4
            ways.append(f"arms whose answers to a row have a correlation of {close:g}")
        return ", or ".join(ways) or "not by more rows or seeds"


def make_plan(study: Study, sizes: Sizes, pool: Pool) -> Plan:
    """Time a short run of each arm, and see what the finished runs of the study say of spreads.

    study: with the ranks of `sizes`.

    Raises what `Pool.run` raises.
    """
    first = next(iter(study.cells))
    rate = study.rates[0]  # the least likely to diverge
    held_out = study.config(study.reference).data.validation is not None
    pilots = [
        Trial(
            arm, first, rate, study.seeds[0],
            study.config(arm, first, rate, study.seeds[0], tuning=held_out, steps=_STEPS),
        )
        for arm in study.arms
    ]  # fmt: skip
    until, pool.until = pool.until, math.inf  # the plan says what the budget covers
    pool.run(pilots)
    pool.until = until
    results = {trial.arm: read_result(trial, study.folder) for trial in pilots}
    rows = sizes.rows[first]
    split = "validation" if held_out else "test"
    start = min(r["wall"] - r["trained"] - (r["measured"] or 0.0) for r in results.values())
    arms, tuning, per_seed = [], 0.0, 0.0
    for trial in pilots:
        result = results[trial.arm]
        facts = run_folder(trial, study.folder).read_facts()
        step = result["trained"] / max(1, facts.get("steps", _STEPS))
        row = (result["measured"] or 0.0) / max(1, rows[split])
        for cell in study.cells:
            whole, on = step * sizes.steps[cell], sizes.rows[cell]
            rates = AROUND if study.transfers and trial.arm != study.reference else len(study.rates)
            tuning += _tuning_seconds(study, rates, start + row * on[split], whole)
            per_seed += start + row * on["test"] + whole
        run = start + row * rows["test"] + step * sizes.steps[first]
        arms.append(ArmPlan(trial.arm, step, run, result["peak_memory"]))
    parts, source = _spread(study, sizes, results[study.reference])
    return Plan(
        study=study,
        rows=rows["test"],
        parts=parts,
        source=source,
        arms=arms,
        tuning=tuning / pool.count,
        seed=per_seed / pool.count,
        workers=pool.count,
    )


def _tuning_seconds(study: Study, rates: int, around: float, training: float) -> float:
    """Seconds of the trials of one arm's rates, without those of a grid that grows.

    rates: how many the arm tries first. around: of a trial without training. training: of a whole
    run.
    """
    if rates < 2:
        return 0.0
    made = rates * (around + training)
    if study.options.tune.budget == "halving":
        made = rates * (around + SHARE * training)
        made += math.ceil(rates / KEPT) * (around + training)
    return made * study.options.tune.seeds


def _spread(study: Study, sizes: Sizes, pilot: dict[str, Any]) -> tuple[Components | None, str]:
    """Return the variances of a paired difference, and where they are from."""
    known = _of_finished(study, sizes)
    if known is not None:
        return known
    if study.metric in _SHARES:
        return assumed_components(0.5, CORRELATION), (
            "assumed: two arms that are right on half of the rows (the worst case), whose answers "
            f"to a row have a correlation of {CORRELATION:g}, half of it the same for all seeds, "
            "and no spread over seeds. Two seeds of each arm are a better pilot"
        )
    rows = pilot["rows"]
    parts = None if rows is None else parts_of(study.task, study.metric, rows)
    if parts is None or len(parts) < 2:
        return None, "Run it with seeds: 2 and plan again."
    spread = 2 * float(np.var(parts, ddof=1)) * (1 - CORRELATION)
    return Components(0.0, spread / 2, spread / 2), (
        f"assumed: the spread over rows after {_STEPS} steps, a correlation of {CORRELATION:g} of "
        "two arms' values of a row, half of it the same for all seeds, and no spread over seeds. "
        "Two seeds of each arm are a better pilot"
    )


def _of_finished(study: Study, sizes: Sizes) -> tuple[Components, str] | None:
    """Return the largest spread among the arms with two seeds or more; None without any."""

    def only(trials: Any) -> None:
        if not all(has_finished(trial, study.folder) for trial in trials):
            raise Stopped

    try:
        tuned = tune(study, only, sizes.steps)
    except Stopped:
        return None
    found: list[tuple[float, Components, int]] = []
    rates = {key: one.rate for key, one in tuned.items()}
    trials = [t for t in study.compared(rates) if has_finished(t, study.folder)]
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for trial in trials:
        rows = read_result(trial, study.folder)["rows"]
        if rows is not None:
            parts = parts_of(study.task, study.metric, rows)
            values.setdefault((trial.arm, trial.cell), {})[trial.seed] = parts
    for (arm, cell), of_arm in values.items():
        reference = values.get((study.reference, cell), {})
        seeds = [seed for seed in of_arm if seed in reference]
        if arm != study.reference and len(seeds) > 1:
            differences = np.stack([of_arm[seed] - reference[seed] for seed in seeds])
            parts = variance_components(differences)
            wide = detectable_difference(parts, len(study.seeds), differences.shape[1])
            found.append((wide, parts, len(seeds)))
    if not found:
        return None
    _, parts, seeds = max(found, key=lambda item: item[0])
    return parts, f"the finished runs: the widest of {len(found)} comparisons, {seeds} seeds"


def _least(enough: Callable[[int], bool], start: int) -> int | None:
    """Return the smallest number from `start` on that is enough; None up to 1,000 times as many."""
    high = start
    while not enough(high):
        high *= 2
        if high > min(1000 * start, _MOST):
            return None
    low = max(start, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
