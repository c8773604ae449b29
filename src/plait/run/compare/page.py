"""Published results as a page: Markdown, and one HTML file that needs nothing else.

The HTML file asks for no other file, follows the reader's light or dark setting, and can be read
by keyboard and screen reader; its pictures are SVG whose numbers stand in the table, too.
"""

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from plait.run.compare.published import PublishedRun, PublishedStudy, Row

_WORDS = {"wins": "better", "loses": "worse", "undecided": "undecided"}
# Cost of a run -> (attribute, unit, units in one of the attribute's).
_COSTS = {
    "trained parameters": ("parameters", "million", 1e-6),
    "training time": ("seconds", "minutes", 1 / 60),
    "accelerator memory": ("memory", "GiB", 2.0**-30),
}
_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 300, 46, 34  # of a picture, in its own units


def markdown(study: PublishedStudy) -> str:
    """Return the page as Markdown."""
    head = ["run", "accuracy, %", "interval", "difference, points", "interval", "p (Holm)"]
    head += ["verdict", "rate", "parameters, M", "minutes"]
    lines = [f"# {_title(study)}", ""]
    for paragraph in summary(study):
        lines += [paragraph, ""]
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * 5 + "|---" + "|---:" * 3 + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in study.rows]
    return "\n".join(lines) + "\n"


def html(study: PublishedStudy) -> str:
    """Return the page as one HTML file."""
    from jinja2 import Environment, StrictUndefined

    source = files("plait.run.compare").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        title=_title(study),
        paragraphs=list(summary(study)),
        rows=[
            {"cells": _cells(row), "kind": row.verdict or "reference", "bar": _bar(row, study)}
            for row in study.rows
        ],
        zero=_place(0.0, study),
        seen=[_place(-study.seen, study), _place(study.seen, study)],
        fronts=[front for front in (_front(study, cost) for cost in _COSTS) if front is not None],
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        below=_BELOW,
    )


def as_json(study: PublishedStudy) -> dict[str, Any]:
    """Return the study as JSON can hold it; accuracies and differences are shares, 0 to 1."""
    return {
        "schema": "plait.published",
        "version": 1,
        "reference": study.reference.name,
        "test_rows": study.test_rows,
        "level": study.level,
        "correlation": study.correlation,
        "seed_spread": study.seed_spread,
        "seen": study.seen,
        "detectable": study.detectable,
        "runs": [
            {
                **vars(row.run),
                "interval": [row.low, row.high],
                "difference": None
                if row.difference is None
                else {
                    "mean": row.difference.mean,
                    "interval": [row.difference.low, row.difference.high],
                    "p": row.difference.p,
                    "p_holm": row.adjusted,
                    "verdict": row.verdict,
                },
            }
            for row in study.rows
        ],
    }


def summary(study: PublishedStudy) -> Iterator[str]:
    """Yield the paragraphs above the table."""
    counts, number = study.counts, len(study.rows)
    percent, points = f"{100 * study.level:g} %", 100 * study.seen
    yield (
        f"{number} runs, compared with {study.reference.name}: {counts['wins']} better, "
        f"{counts['loses']} worse, {counts['undecided']} undecided. A run is called better or "
        f"worse if the {percent} interval of its difference is without zero and its p-value stays "
        f"below {1 - study.level:g} after Holm's adjustment for {number - 1} comparisons. Looked "
        f"at alone, {study.alone} would exceed the reference."
    )
    rows = f"{study.test_rows:,} test rows"
    if study.inferred:
        rows += " (the smallest number of which all accuracies are whole shares)"
    yield (
        f"With {rows}, two runs near the reference differ visibly from {points:.1f} points on, "
        f"and a true difference has to be {100 * study.detectable:.1f} points to be seen in "
        "80 % of the cases."
    )
    assumed = [
        f"The answers of two runs to a row are taken to have the correlation {study.correlation:g}"
        + ("; 0 overstates the error if both find the same rows hard." if not study.correlation
           else "."),
        f"The spread over seeds is taken to be {100 * study.seed_spread:g} points"
        + ("; 0 compares these runs, and not the methods with other seeds."
           if not study.seed_spread else "."),
    ]  # fmt: skip
    yield " ".join(assumed)
    rates = [row.run.rate for row in study.rows if row.run.rate is not None]
    if rates:
        usual = max(set(rates), key=lambda rate: (rates.count(rate), -rate))
        yield (
            f"{rates.count(usual)} of {len(rates)} runs have the learning rate {usual:g}. A method "
            "whose rate was not tuned may be undervalued, so a verdict is on the run, and not on "
            "the method."
        )


# ---------------------------------------------------------------------------------------- cells


def _title(study: PublishedStudy) -> str:
    return f"Published runs against {study.reference.name}"


def _cells(row: Row) -> list[str]:
    run, difference = row.run, row.difference
    cells = [run.name, f"{100 * run.accuracy:.1f}", _interval(row.low, row.high)]
    if difference is None:
        cells += ["", "", "", "reference"]
    else:
        assert row.adjusted is not None
        assert row.verdict is not None
        cells += [
            _signed(difference.mean),
            _interval(difference.low, difference.high, signed=True),
            "< 0.001" if row.adjusted < 0.001 else f"{row.adjusted:.3f}",
            _WORDS[row.verdict],
        ]
    cells.append("" if run.rate is None else f"{run.rate:g}")
    cells.append("" if run.parameters is None else f"{run.parameters / 1e6:.3g}")
    cells.append("" if run.seconds is None else f"{run.seconds / 60:.0f}")
    return cells


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(low: float, high: float, signed: bool = False) -> str:
    show = _signed if signed else (lambda share: f"{100 * share:.1f}")
    return f"{show(low)} to {show(high)}"


# -------------------------------------------------------------------------------------- pictures


def _place(difference: float, study: PublishedStudy) -> float:
    """Where a difference stands in its bar, 0 to 100."""
    ends = [0.0]
    for row in study.rows:
        if row.difference is not None:
            ends += [row.difference.low, row.difference.high]
    low, high = min(ends), max(ends)
    return 100 * (difference - low) / (high - low or 1.0)


def _bar(row: Row, study: PublishedStudy) -> dict[str, float] | None:
    if row.difference is None:
        return None
    difference = row.difference
    values = {"low": difference.low, "mean": difference.mean, "high": difference.high}
    return {name: round(_place(value, study), 2) for name, value in values.items()}


def _front(study: PublishedStudy, cost: str) -> dict[str, Any] | None:
    """A picture of accuracy against a cost, logarithmic; None if fewer than two runs have it."""
    attribute, unit, factor = _COSTS[cost]
    points = [
        (getattr(row.run, attribute) * factor, row)
        for row in study.rows
        if getattr(row.run, attribute)
    ]
    if len(points) < 2:
        return None
    logs = [math.log10(x) for x, _ in points]
    low, high = min(logs) - 0.05, max(logs) + 0.05
    top = max(row.high for _, row in points)

    def across(x: float) -> float:
        return round(_LEFT + (math.log10(x) - low) / (high - low) * (_WIDTH - _LEFT - 10), 1)

    def up(y: float) -> float:
        return round((_HEIGHT - _BELOW) * (1 - y / top) + 6, 1)

    best = _best([(x, row.run) for x, row in points])
    return {
        "cost": cost,
        "unit": unit,
        "dots": [
            {
                "x": across(x), "y": up(row.run.accuracy), "low": up(row.low), "high": up(row.high),
                "kind": row.verdict or "reference", "front": row.run in best,
                "label": f"{row.run.name}: {100 * row.run.accuracy:.1f} %, {x:.3g} {unit}",
            }
            for x, row in points
        ],
        "line": " ".join(
            f"{across(x)},{up(row.run.accuracy)}"
            for x, row in sorted(points, key=lambda point: point[0])
            if row.run in best
        ),
        "across": [(across(10.0**n), f"{10.0**n:g}") for n in _whole_between(low, high)],
        "up": [(up(n / 10), f"{10 * n} %") for n in range(int(10 * top) + 1)],
        "names": [run.name for run in best],
    }  # fmt: skip


def _best(points: Sequence[tuple[float, PublishedRun]]) -> list[PublishedRun]:
    """Return the runs that no other run beats in both accuracy and cost, the cheapest first."""
    best: list[PublishedRun] = []
    for _, run in sorted(points, key=lambda point: (point[0], -point[1].accuracy)):
        if not best or run.accuracy > best[-1].accuracy:
            best.append(run)
    return best


def _whole_between(low: float, high: float) -> range:
    return range(math.ceil(low), math.floor(high) + 1)
