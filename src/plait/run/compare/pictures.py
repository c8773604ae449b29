"""The pictures of a comparison as SVG that stands in a page and follows its colours.

matplotlib draws them with stand-in colours, which become the page's CSS variables; so they are
light on a dark page without being drawn twice. Lines differ in marker and dash, not in colour
alone.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from plait.run.compare.outcome import mean_of
from plait.run.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-in colour -> CSS variable of the page. c0 to c7: of Okabe and Ito, safe for colour-blind.
_COLOURS = {
    "#010101": "ink",
    "#020202": "soft",
    "#030303": "line",
    "#040404": "wins",
    "#050505": "loses",
    "#060606": "undecided",
    "#070707": "reference",
    **{f"#0{n}0{n}1{n}": f"c{n}" for n in range(8)},
}
_NAMED = {name: colour for colour, name in _COLOURS.items()}
_LINES = [_NAMED[f"c{n}"] for n in range(8)]
_MARKS, _DASHES = "osD^vP*X", ["-", "--", "-.", ":"]
_STYLE: dict[Any, Any] = {  # text that can be read, and the same ids each time
    "svg.fonttype": "none",
    "svg.hashsalt": "plait",
    "font.family": "sans-serif",
}
MOST = 8  # lines of a panel; more arms get more panels
_SAME = 1.05  # below this ratio of the largest to the smallest, costs are equal
_WIDTH = 7.2  # inches
_COSTS = {  # of a run: (name of the fact, title, factor)
    "trainable": ("trained parameters", 1.0),
    "seconds": ("seconds of training", 1.0),
    "peak_memory": ("peak memory of the process, MB", 1e-6),
}


def forest(results: dict[str, Any]) -> str | None:
    """Draw the differences with their intervals; None without a comparison."""
    rows = [row for row in results["results"] if row["comparison"] is not None]
    if not rows:
        return None
    figure = _figure(0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        made, colour = row["comparison"], _NAMED[row["comparison"]["verdict"]]
        axes.plot([made["low"], made["high"]], [place, place], color=colour, lw=2.2, zorder=3)
        axes.plot(made["mean"], place, "o", color=colour, ms=6, zorder=4)
        if made["detectable"] is not None:
            for side in (-1, 1):
                axes.plot(side * made["detectable"], place, "|", color=_NAMED["soft"], ms=9)
    axes.axvline(0, color=_NAMED["ink"], lw=1)
    axes.set_yticks(range(len(rows)), [_label(results, row) for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"difference of {_metric(results)} to {_cut(results['reference'])}")
    return _svg(figure, axes)


def rates(results: dict[str, Any]) -> str | None:
    """Draw the metric on validation rows over the rates of each arm; None without tuning."""

    def draw(axes: "Axes", row: dict[str, Any], style: dict[str, Any]) -> None:
        points = [(rate, value) for rate, value in row["tuned"] if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
        best = [value for rate, value in points if rate == row["rate"]]
        if best:
            axes.plot(row["rate"], best[0], "o", ms=11, mfc="none", mec=style["color"])

    rows = [row for row in results["results"] if row["tuned"]]

    def finish(axes: "Axes") -> None:
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"{_metric(results)}, validation")

    return _panels(results, rows, draw, finish)


def curves(results: dict[str, Any]) -> str | None:
    """Draw the training losses of the first seed; None if no run noted one."""

    def draw(axes: "Axes", row: dict[str, Any], style: dict[str, Any]) -> None:
        points = [p for p in row["curve"]["training"] if p[1] > 0]
        if points:
            lines: dict[str, Any] = style | {"marker": ""}
            axes.plot(*zip(*points, strict=True), **lines)
        held_out = [p for p in row["curve"].get("validation", ()) if p[1] > 0]
        if held_out:
            marks: dict[str, Any] = style | {"ls": "", "label": None}
            axes.plot(*zip(*held_out, strict=True), **marks)

    rows = [row for row in results["results"] if row["curve"].get("training")]

    def finish(axes: "Axes") -> None:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")

    return _panels(results, rows, draw, finish)


def pareto(results: dict[str, Any], cost: str) -> str | None:
    """Draw the metric against a cost, a panel for each cell.

    None with fewer than two arms in each cell, or if all cost as much.

    cost: trainable, seconds or peak_memory.
    """
    title, factor = _COSTS[cost]
    cells: dict[str, list[tuple[float, float, dict[str, Any]]]] = {}
    for row in results["results"]:
        x, y = mean_of(row, cost), mean_of(row, "value")
        if x and y is not None:
            cells.setdefault(row["cell"], []).append((x * factor, y, row))
    cells = {
        cell: points
        for cell, points in cells.items()
        if max(x for x, *_ in points) > _SAME * min(x for x, *_ in points)
    }
    if not cells:
        return None
    figure = _figure(3.2 * len(cells))
    every = figure.subplots(len(cells), 1, squeeze=False)[:, 0]
    for axes, (cell, points) in zip(every, cells.items(), strict=True):
        _costs(axes, results, points)
        axes.set_xlabel(title)
        axes.set_ylabel(f"{_metric(results)}, test")
        _title(axes, cell)
    return _svg(figure, *every)


def _costs(
    axes: "Axes", results: dict[str, Any], points: list[tuple[float, float, dict[str, Any]]]
) -> None:
    """Draw arms at their cost and metric, and the line of those that no other beats in both."""
    higher = METRICS[results["metrics"][0]].higher_is_better
    front = _front([(x, y) for x, y, _ in points], higher)
    axes.plot(*zip(*front, strict=True), color=_NAMED["soft"], lw=1.2, zorder=1)
    for x, y, row in points:
        made = row["comparison"]
        kind = "reference" if made is None else made["verdict"]
        axes.plot(x, y, "o", color=_NAMED[kind], ms=7, zorder=3)
        axes.annotate(
            _cut(row["arm"], 24), (x, y), (6, 5), textcoords="offset points",
            color=_NAMED["ink"], fontsize=8,
        )  # fmt: skip
    axes.margins(0.14, 0.16)
    if max(x for x, *_ in points) > 3 * min(x for x, *_ in points):
        axes.set_xscale("log")


def _front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Return the points that no other beats in both, the cheapest first."""
    made: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1] if higher else point[1])):
        if not made or (y > made[-1][1] if higher else y < made[-1][1]):
            made.append((x, y))
    return made


# ---------------------------------------------------------------------------------------- drawing


def _panels(
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    draw: Callable[["Axes", dict[str, Any], dict[str, Any]], None],
    finish: Callable[["Axes"], None],
) -> str | None:
    """Draw a line for each row, in a panel for each cell and for each MOST arms.

    An arm looks the same in all panels of a study with up to MOST arms.
    """
    if not rows:
        return None
    arms = list(dict.fromkeys(row["arm"] for row in results["results"]))
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], arms.index(row["arm"]) // MOST), []).append(row)
    figure = _figure(3.2 * len(groups))
    every = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, ((cell, _), group) in zip(every, groups.items(), strict=True):
        for row in group:
            n = arms.index(row["arm"]) % MOST
            style = {
                "color": _LINES[n], "marker": _MARKS[n], "ls": _DASHES[n % len(_DASHES)],
                "ms": 5, "lw": 1.7, "label": _cut(row["arm"]),
            }  # fmt: skip
            draw(axes, row, style)
        finish(axes)
        _title(axes, cell)
        axes.legend(
            frameon=False, fontsize=8, labelcolor=_NAMED["ink"], loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
    return _svg(figure, *every)


def _title(axes: "Axes", cell: str) -> None:
    if cell:
        axes.set_title(cell, fontsize=10, color=_NAMED["ink"], loc="left")


def _figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def _svg(figure: "Figure", *every: "Axes") -> str:
    """Return a figure as an svg element without size, ids of its own or colours of its own."""
    from matplotlib import rc_context

    for axes in every:
        axes.patch.set_alpha(0)
        axes.grid(color=_NAMED["line"], lw=0.6, zorder=0)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", colors=_NAMED["soft"], labelcolor=_NAMED["ink"])
        axes.xaxis.label.set_color(_NAMED["ink"])
        axes.yaxis.label.set_color(_NAMED["ink"])
        for side, spine in axes.spines.items():
            spine.set_color(_NAMED["line"])
            spine.set_visible(side in ("left", "bottom"))
    made = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    text = made.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    for colour, name in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    number = _digest(text)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{number}-", text)


def _digest(text: str) -> str:
    """Return a name that makes the ids of one picture differ from those of another."""
    import hashlib

    return f"p{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _metric(results: dict[str, Any]) -> str:
    return METRICS[results["metrics"][0]].label


def _label(results: dict[str, Any], row: dict[str, Any]) -> str:
    name = row["arm"] if results["cells"] == [""] else f"{row['arm']}, {row['cell']}"
    return _cut(name)


def _cut(name: str, most: int = 40) -> str:
    """Return a name that fits a picture and is no formula to matplotlib."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")
