"""The tables of a comparison, from its results: for the console, Markdown and HTML."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from plait.run.compare.outcome import mean_of
from plait.run.metrics import METRICS

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows

_NOTHING = 1e-12  # a difference that is rounding
_FAR = 4  # times that a rate is off what was carried over, from which on it is said
_SIZES = ("B", "kB", "MB", "GB", "TB")


def verdict_table(results: dict[str, Any]) -> Table:
    """Return each arm's metric, its difference to the reference and what can be said of it."""
    metric = METRICS[results["metrics"][0]]
    head = ["arm", "rate", metric.label, "difference", "95 % interval", "p (Holm)", "verdict"]
    head.append("detectable")
    rows = [[*_cell(results, row), *_verdict(results, row)] for row in results["results"]]
    title = f"{capital(metric.label)}, compared with {results['reference']}"
    return title, _with_cell(results, head), rows


def _verdict(results: dict[str, Any], row: dict[str, Any]) -> list[str]:
    value = mean_of(row, "value")
    cells = [row["arm"], _rate(row), number(value)]
    made = row["comparison"]
    if made is None:
        if row["arm"] == results["reference"]:
            failed = sum(run["diverged"] is not None for run in row["runs"])
            said = f"diverged in {failed} of {len(row['runs'])}" if failed else "reference"
        else:
            said = row["why"] or "not run"
        return [*cells, "", "", "", said, ""]
    p = "< 0.001" if made["p_holm"] < 0.001 else f"{made['p_holm']:.3f}"
    interval = f"{signed(made['low'])} to {signed(made['high'])}"
    detectable = number(made["detectable"], 3)
    return [*cells, signed(made["mean"]), interval, p, made["verdict"], detectable]


def facts_table(results: dict[str, Any]) -> Table:
    """Return what each arm costs: measured in its runs, as means."""
    head = ["arm", "r", "trained", "file", "step", "training", "peak memory", "served as"]
    arms = {arm["name"]: arm for arm in results["arms"]}
    rows = []
    for row in results["results"]:
        arm, seconds, steps = arms[row["arm"]], mean_of(row, "seconds"), mean_of(row, "steps")
        rank = arm["rank"]
        rows.append(
            [
                *_cell(results, row),
                row["arm"],
                "" if rank is None else str(rank),
                f"{arm['parameters']:,}",
                size(mean_of(row, "stored")),
                "" if not seconds or not steps else f"{1000 * seconds / steps:.3g} ms",
                "" if seconds is None else f"{seconds:.3g} s",
                size(mean_of(row, "peak_memory")),
                next((run["serves"] for run in row["runs"] if run["serves"]), ""),
            ]
        )
    return "Facts of each arm", _with_cell(results, head), rows


def others_table(results: dict[str, Any]) -> Table | None:
    """Return the differences in the other metrics; None without any."""
    names = results["metrics"][1:]
    if not names:
        return None
    head = ["arm"]
    for name in names:
        head += [METRICS[name].label, "difference", "95 % interval"]
    rows = []
    for row in results["results"]:
        cells = [*_cell(results, row), row["arm"]]
        for name in names:
            known = [m for run in row["runs"] if (m := run["metrics"].get(name)) is not None]
            made = row["others"].get(name)
            cells.append(number(sum(known) / len(known)) if known else "")
            cells += (
                ["", ""]
                if made is None
                else [signed(made["mean"]), f"{signed(made['low'])} to {signed(made['high'])}"]
            )
        rows.append(cells)
    return "Other metrics, which decide nothing", _with_cell(results, head), rows


def rates_table(results: dict[str, Any]) -> Table | None:
    """Return the metric on validation rows at each rate that an arm tried; None without tuning."""
    if not any(row["tuned"] for row in results["results"]):
        return None
    head = ["arm", "best rate", "trials", "width in octaves", "rate: value on validation rows"]
    rows = []
    for row in results["results"]:
        tried = [f"{rate:g}: {_value(value)}" for rate, value in row["tuned"]]
        short = len(row["first"])
        best = _rate(row) + (" (at an end)" if row["at_an_end"] else "")
        carried = row.get("carried")
        best += "" if carried is None else f" (carried over: {carried:.3g})"
        trials = f"{len(tried)}" if not short else f"{short} short, {len(tried)} whole"
        width = "" if row["octaves"] is None else f"{row['octaves']:.1f}"
        rows.append([*_cell(results, row), row["arm"], best, trials, width, ", ".join(tried)])
    return "Learning rates", _with_cell(results, head), rows


def conclusions(results: dict[str, Any]) -> Iterator[str]:
    """Yield sentences: what was found, what could not be concluded, and what it would take."""
    made = [row for row in results["results"] if row["comparison"] is not None]
    label, seeds = capital(METRICS[results["metrics"][0]].label), len(results["seeds"])
    better = "higher" if METRICS[results["metrics"][0]].higher_is_better else "lower"
    if not results["complete"]:
        what = "the compared runs" if results["tuning_complete"] else "the choice of the rates"
        yield (
            f"The study is not finished: time was up amid {what}. Run the same command again to go "
            "on with it."
        )
    if made:
        counts = {
            kind: sum(row["comparison"]["verdict"] == kind for row in made)
            for kind in ("wins", "loses", "undecided")
        }
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        first = made[0]["comparison"]
        rows = f", {first['rows']:,} test rows" if first["rows"] > 1 else ""
        yield (
            f"{len(made)} comparisons with {results['reference']}: {said}. {label} decides "
            f"({better} is better), with up to {seeds} seeds{rows}; differences are paired by seed "
            "and test row. An arm is undecided if its 95 % interval holds zero, or if its p-value "
            "is above 0.05 after Holm's adjustment for all comparisons."
        )
        yield (
            "The smallest detectable difference is the one that such a study sees in 80 % of the "
            "cases. What is smaller may be there all the same."
        )
    for row in made:
        if row["comparison"]["verdict"] == "undecided":
            yield _would_take(results, row)
    for row in results["results"]:
        name = _name(results, row)
        if row["at_an_end"]:
            yield (
                f"{name}: the best rate is at an end of what was tried, so a better one may lie "
                "beyond. Raise tune.grow, or give other rates."
            )
        carried, rate = row.get("carried"), row["rate"]
        if carried is not None and rate is not None and not 1 / _FAR <= rate / carried <= _FAR:
            yield (
                f"{name}: the best rate, {rate:g}, is more than {_FAR} times off the one that was "
                f"carried over, {carried:.3g}."
            )
        failed = sum(value is None for _, value in (*row["first"], *row["tuned"]))
        if failed:
            tried = len(row["first"]) + len(row["tuned"])
            yield f"{name}: {failed} of {tried} trials of rates diverged."
        if row["arm"] != results["reference"] and row["comparison"] is None and results["complete"]:
            yield f"{name}: not compared, for it {row['why'] or 'was not run'}."


def _would_take(results: dict[str, Any], row: dict[str, Any]) -> str:
    made, name = row["comparison"], _name(results, row)
    if not made["mean"] and made["detectable"] is None:
        return (
            f"{name}: undecided. It gave the same values as the reference for every seed and row, "
            "which does not tell how far other rows would differ."
        )
    text = f"{name}: undecided, {signed(made['mean'])} measured"
    if made["detectable"] is not None:
        text += f", {number(made['detectable'], 3)} detectable"
    ways = []
    if made["seeds_needed"] is not None:
        ways.append(f"{made['seeds_needed']:,} seeds")
    if made["rows_needed"] is not None:
        ways.append(f"{made['rows_needed']:,} test rows")
    if not made["mean"]:
        return f"{text}. There is no difference to be seen."
    if not ways:
        return f"{text}. More than 1,000 times as many seeds would be needed to see as much."
    return f"{text}. To see as much in 80 % of the cases would take {' or '.join(ways)}."


# ------------------------------------------------------------------------------------- markdown


def as_markdown(table: Table, left: Sequence[str] = ()) -> str:
    """Return a table as Markdown; left: heads of columns of words, besides the first."""
    _, head, rows = table
    words = {head[0], *left}
    lines = ["| " + " | ".join(map(escaped, head)) + " |"]
    lines.append("|" + "|".join("---" if name in words else "---:" for name in head) + "|")
    lines += ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return a cell that ends no cell, line or paragraph and holds no markup."""
    text = " ".join(text.split())
    for sign, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("[", "\\[")):
        text = text.replace(sign, safe)
    return text


# ----------------------------------------------------------------------------------------- cells


def _cell(results: dict[str, Any], row: dict[str, Any]) -> list[str]:
    return [row["cell"]] if results["cells"] != [""] else []


def _with_cell(results: dict[str, Any], head: list[str]) -> list[str]:
    return ["factors", *head] if results["cells"] != [""] else head


def _name(results: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{row['arm']} ({row['cell']})" if results["cells"] != [""] else row["arm"]


def _rate(row: dict[str, Any]) -> str:
    return "" if row["rate"] is None else f"{row['rate']:g}"


def _value(value: float | None) -> str:
    return "diverged" if value is None else number(value)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with few digits; nothing for None."""
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def signed(value: float) -> str:
    """Return a difference."""
    return "0" if abs(value) < _NOTHING else f"{value:+.3g}"


def capital(text: str) -> str:
    """Return a text with a capital letter; the other letters stay."""
    return text[:1].upper() + text[1:]


def size(count: float | None) -> str:
    """Return bytes with their unit; nothing for None."""
    if count is None:
        return ""
    for unit in _SIZES:
        if count < 1000 or unit == _SIZES[-1]:
            return f"{count:.3g} {unit}"
        count /= 1000
    return ""
