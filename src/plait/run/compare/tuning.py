"""Each arm's learning rate, chosen on validation rows with as many trials as any other arm's.

    full      every rate trains with all steps
    halving   every rate trains with a quarter of the steps, then the best third with all

While the best rate of some arm is at an end of what it tried, every arm tries one more: an arm
whose best is at an end the next one beyond it, the others one between their best rate and the
better neighbour.

With `learning_rate: transfer` the reference is tuned first. Each other arm then tries three rates
around the one that is carried over from it (see transfer), and they grow likewise.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from plait.run.compare.runner import value_of
from plait.run.compare.study import Study, Trial

SHARE = 0.25  # of the steps, of a first trial of halving
KEPT = 3  # one of so many rates trains to the end
AROUND = 3  # rates that are tried around one that was carried over
_STEP = 3.0  # to the next rate of an arm that tried one alone

Run = Callable[[Sequence[Trial]], None]
# (study, cell, best rate of the reference) -> the rate of each other arm.
Carry = Callable[[Study, str, float], dict[str, float]]
Values = dict[float, float | None]  # rate -> mean of the metric on validation rows; None: diverged


@dataclass
class Tuned:
    """The rates of one arm.

    first: of short runs, if there were any. values: of whole runs. rate: the best one; None while
    it is not known, and if no rate trains.
    """

    first: Values = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    rate: float | None = None
    carried: float | None = None

    def at_an_end(self) -> bool:
        """Whether the best rate is the smallest or the largest that was tried."""
        tried = sorted({*self.first, *self.values})
        return self.rate is not None and len(tried) > 1 and self.rate in (tried[0], tried[-1])


def tune(
    study: Study, run: Run, whole_steps: Mapping[str, int], carry: Carry | None = None
) -> dict[tuple[str, str], Tuned]:
    """Choose the rate of each (arm, cell).

    Args:
        study: with its arms' ranks.
        run: runs trials that have not finished.
        whole_steps: cell -> optimizer steps of a whole run, for halving.
        carry: carries rates over, with `learning_rate: transfer`; None: `transfer.predicted`.

    Raises what `run` and `carry` raise.
    """
    tuned = {(arm, cell): Tuned() for cell in study.cells for arm in study.arms}
    if len(study.rates) < 2:
        for one in tuned.values():
            one.rate = study.rates[0]
        return tuned
    carry = _predicted if carry is None else carry
    halving = study.options.tune.budget == "halving"
    sign = 1.0 if study.higher_is_better else -1.0

    def measure(rates: Mapping[tuple[str, str], Sequence[float]], share: float) -> None:
        steps = {
            cell: None if share == 1 else max(1, math.ceil(share * whole))
            for cell, whole in whole_steps.items()
        }
        trials = {
            (arm, cell, rate): study.tuning(arm, cell, rate, steps.get(cell))
            for (arm, cell), some in rates.items()
            for rate in some
        }
        run([trial for some in trials.values() for trial in some])
        for (arm, cell, rate), some in trials.items():
            one = tuned[arm, cell]
            into = one.values if share == 1 else one.first
            into[rate] = _mean([value_of(t, study.folder, study.metric) for t in some])

    def sweep(first: Mapping[tuple[str, str], Sequence[float]]) -> None:
        """Tune these arms together, each from its first rates."""
        share = SHARE if halving else 1.0
        measure(first, share)
        for _ in range(study.options.tune.grow):
            tried = {key: tuned[key].first if halving else tuned[key].values for key in first}
            if not any(_edge(values, sign) for values in tried.values()):
                break
            measure({key: [next_rate(values, sign)] for key, values in tried.items()}, share)
        if halving:
            measure({key: _best_third(tuned[key].first, sign) for key in first}, 1.0)
        for key in first:
            tuned[key].rate = best(tuned[key].values, sign)

    for cell in study.cells:
        if not study.transfers:
            sweep({(arm, cell): study.rates for arm in study.arms})
            continue
        sweep({(study.reference, cell): study.rates})
        anchor = tuned[study.reference, cell].rate
        rates = {} if anchor is None else carry(study, cell, anchor)
        for arm, rate in rates.items():
            tuned[arm, cell].carried = rate
        sweep(
            {
                (arm, cell): around(rates[arm]) if arm in rates else study.rates
                for arm in study.others
            }
        )
    return tuned


def around(rate: float) -> list[float]:
    """Return the rates that are tried around a predicted one: a third of it, itself, three times.

    They have three digits.
    """
    return [_plain(rate / _STEP), _plain(rate), _plain(rate * _STEP)]


def _predicted(study: Study, cell: str, rate: float) -> dict[str, float]:
    from plait.run.compare.transfer import predicted  # loads torch

    return predicted(study, cell, rate)


def best(values: Values, sign: float) -> float | None:
    """Return the rate with the best value, of equal ones the lowest; None if all diverged."""
    known = {rate: sign * value for rate, value in values.items() if value is not None}
    return max(known, key=lambda rate: (known[rate], -rate)) if known else None


def next_rate(values: Values, sign: float) -> float:
    """Return the rate to be tried next: beyond the best one at an end, else beside it."""
    rates, chosen = sorted(values), best(values, sign)
    place = 0 if chosen is None else rates.index(chosen)
    if len(rates) == 1:
        return _plain(rates[0] / _STEP)
    if place == 0:
        return _plain(rates[0] ** 2 / rates[1])
    if place == len(rates) - 1:
        return _plain(rates[-1] ** 2 / rates[-2])

    def worth(rate: float) -> float:
        value = values[rate]
        return -math.inf if value is None else sign * value

    beside = max(rates[place - 1], rates[place + 1], key=worth)
    return _plain(math.sqrt(rates[place] * beside))


def _edge(values: Values, sign: float) -> bool:
    """Whether the best rate is at an end; also if none trains, for then a lower one may."""
    chosen = best(values, sign)
    return chosen is None or chosen in (min(values), max(values))


def _best_third(values: Values, sign: float) -> list[float]:
    known = {rate: value for rate, value in values.items() if value is not None}
    order = sorted(known, key=lambda rate: (-sign * (known[rate] or 0.0), rate))
    return order[: math.ceil(len(values) / KEPT)]


def _plain(rate: float) -> float:
    return float(f"{rate:.3g}")


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, None if one diverged or is not defined."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
