"""What a comparison found: each arm's rate, chosen on validation rows, and its verdict."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.run.compare.runner import Finished, parts_of, read_trial, run_trials, value_of
from plait.run.compare.statistics import Difference, Verdict, holm, paired_difference, verdicts
from plait.run.compare.study import Study, Trial
from plait.run.metrics import METRICS


@dataclass(frozen=True)
class ArmOutcome:
    """One arm. rate: the chosen learning rate; tuned: rate -> mean of the metric on the validation
    rows, None if it diverged with every seed. values: of the metric on the test rows, by seed; None
    where it diverged. difference, adjusted, verdict: against the reference; None for it, and for an
    arm that diverged.
    """

    arm: str
    rate: float
    tuned: dict[float, float | None]
    values: list[float | None]
    difference: Difference | None
    adjusted: float | None
    verdict: Verdict | None

    @property
    def diverged(self) -> int:
        """Seeds with which the compared run diverged."""
        return sum(value is None for value in self.values)


@dataclass(frozen=True)
class Outcome:
    """The arms of a study, the reference first."""

    study: Study
    arms: list[ArmOutcome]


def run_study(study: Study, finished: Finished | None = None) -> Outcome:
    """Run what is missing of a study and return its outcome.

    The rates are chosen on validation rows, with runs that do not see the test rows; these are
    measured once for each arm and seed.

    Raises what `run_trials` raises, and ValueError if no rate of an arm trains.
    """
    folder, workers = Path(study.compare.dir), study.compare.workers
    tuning = study.tuning()
    run_trials(tuning, folder, workers, finished)
    tuned = {arm: _tuned(study, arm, tuning, folder) for arm in study.arms}
    rates = {arm: _best(study, arm, tuned[arm]) for arm in study.arms}
    compared = study.compared(rates)
    run_trials(compared, folder, workers, finished)
    return outcome(study, rates, tuned, compared, folder)


def outcome(
    study: Study,
    rates: dict[str, float],
    tuned: dict[str, dict[float, float | None]],
    compared: Sequence[Trial],
    folder: Path,
) -> Outcome:
    """Compare finished runs.

    An arm that diverged with some seed is not compared: its other seeds alone would flatter it.
    """
    of_arm = {arm: [t for t in compared if t.arm == arm] for arm in study.arms}
    values = {
        arm: [value_of(trial, folder, study.metric) for trial in trials]
        for arm, trials in of_arm.items()
    }
    others = [arm for arm in study.arms if arm != study.reference]
    whole = [arm for arm in others if None not in values[arm]]
    if None in values[study.reference]:
        whole = []
    numbers = {
        arm: np.stack([_parts(study, trial, folder) for trial in of_arm[arm]])
        for arm in (*whole, *([study.reference] if whole else []))
    }
    differences = [paired_difference(numbers[arm], numbers[study.reference]) for arm in whole]
    adjusted = holm([d.p for d in differences])
    higher = METRICS[study.metric].higher_is_better
    said = dict(
        zip(
            whole,
            zip(differences, adjusted, verdicts(differences, adjusted, higher), strict=True),
            strict=True,
        )
    )
    return Outcome(
        study,
        [
            ArmOutcome(arm, rates[arm], tuned[arm], values[arm], *said.get(arm, (None, None, None)))
            for arm in (study.reference, *others)
        ],
    )


def _parts(study: Study, trial: Trial, folder: Path) -> np.ndarray:
    rows = read_trial(trial, folder)
    assert rows is not None
    return parts_of(trial.config.model.task, study.metric, rows)


def _tuned(
    study: Study, arm: str, trials: Sequence[Trial], folder: Path
) -> dict[float, float | None]:
    """Return the mean of the metric over tuning seeds for each rate, None if one diverged."""
    made: dict[float, float | None] = {}
    for rate in study.rates if trials else ():
        values = [
            value_of(t, folder, study.metric) for t in trials if (t.arm, t.rate) == (arm, rate)
        ]
        whole = [value for value in values if value is not None]
        made[rate] = statistics.fmean(whole) if len(whole) == len(values) else None
    return made


def _best(study: Study, arm: str, tuned: dict[float, float | None]) -> float:
    if not tuned:
        return study.rates[0]
    sign = 1 if METRICS[study.metric].higher_is_better else -1
    known = {rate: sign * value for rate, value in tuned.items() if value is not None}
    if not known:
        raise ValueError(
            f"{study.file}: arms.{arm} diverged at every rate of compare.learning_rates. Give "
            "lower ones."
        )
    return max(known, key=lambda rate: (known[rate], -rate))


# ------------------------------------------------------------------------------------ Markdown


def markdown(made: Outcome) -> str:
    """Return the verdict table and the learning rates as Markdown."""
    study = made.study
    label = METRICS[study.metric].label
    head = ["arm", "rate", label, "difference", "95 % interval", "p (Holm)", "verdict"]
    head.append("smallest detectable")
    lines = [
        f"# {label}, compared with {study.reference}",
        "",
        f"{len(study.seeds)} seeds; differences are paired by seed and test row. An arm is "
        "undecided if its interval holds zero, or if its p-value, adjusted for the number of arms, "
        "is above 0.05. The last column is the difference that this study would have seen in 80 % "
        "of the cases.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * 5 + "|---|---:|",
    ]
    lines += ["| " + " | ".join(_cells(arm, study)) + " |" for arm in made.arms]
    if made.arms[0].tuned:
        rates = study.rates
        lines += ["", f"## {label} on the validation rows, by learning rate", ""]
        lines.append("| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
        lines.append("|---" + "|---:" * len(rates) + "|")
        for arm in made.arms:
            cells = ["diverged" if v is None else f"{v:.4g}" for v in arm.tuned.values()]
            lines.append(f"| {arm.arm} | " + " | ".join(cells) + " |")
        ends = [arm.arm for arm in made.arms if arm.rate in (min(rates), max(rates))]
        if ends:
            lines += [
                "",
                f"At an end of the grid, so a better rate may lie beyond: {', '.join(ends)}.",
            ]
    return "\n".join(lines) + "\n"


def _cells(arm: ArmOutcome, study: Study) -> list[str]:
    whole = [value for value in arm.values if value is not None]
    mean = f"{statistics.fmean(whole):.4g}" if whole else ""
    cells = [arm.arm, f"{arm.rate:g}", mean]
    if arm.difference is None:
        said = "reference" if arm.arm == study.reference else "not compared"
        if arm.diverged:
            said = f"diverged in {arm.diverged} of {len(arm.values)}"
        return [*cells, "", "", "", said, ""]
    d = arm.difference
    assert arm.adjusted is not None
    assert arm.verdict is not None
    p = "< 0.001" if arm.adjusted < 0.001 else f"{arm.adjusted:.3f}"
    detectable = "" if math.isnan(d.detectable) else f"{d.detectable:.3g}"
    return [
        *cells, f"{d.mean:+.3g}", f"{d.low:+.3g} to {d.high:+.3g}", p, arm.verdict, detectable,
    ]  # fmt: skip
