"""Pictures of federated runs, as PNG: loss, score, similarity of the factors, bytes; several runs.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; each line
also has a marker of its own. A picture without numbers is not drawn.
"""

import io
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from plait.run.federated.folder import Series

Stages = tuple[Series, Series]  # as the next round starts, and right after local training

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*X"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


def draw(
    lines: Sequence[Mapping[str, Any]],
    losses: Mapping[str, Series],
    scores: Mapping[str, Series],
    score: str,
    title: str,
) -> dict[str, bytes]:
    """File name -> PNG of one run.

    Args:
        lines: of metrics.jsonl. losses, scores: a line's name -> held-out values. score: the
            metric's name. title: the method.
    """
    rounds = [row for row in lines if row["kind"] == "round"]
    training = [
        (row["round"], {c: m["loss"] for c, m in row["metrics"].items() if "loss" in m})
        for row in rounds
    ]
    with matplotlib.rc_context(_STYLE):
        figures = {
            "loss.png": _curves(
                {"training": [x for x in training if x[1]], **losses}, "loss", title
            ),
            "score.png": _curves(scores, score, title, first=1),
            "similarity.png": _similarity(rounds, title),
            "bytes.png": _bytes(rounds, title),
        }
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _look(k: int, count: int = 0) -> dict[str, Any]:
    """Colour and marker of the k-th line; count: its number of points, which spaces the markers."""
    return {
        "color": _COLORS[k % len(_COLORS)],
        "marker": _MARKERS[k % len(_MARKERS)],
        "ls": ("-", "--", ":")[k // len(_COLORS) % 3],
        "ms": 4.5,
        "markevery": max(1, count // 20),
    }


def _rounds_axis(axes: Any) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _curves(parts: Mapping[str, Series], what: str, title: str, first: int = 0) -> Figure | None:
    """The mean over clients of each series, and the range."""
    if not any(parts.values()):
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for k, (name, series) in enumerate(parts.items(), first):
        if series:
            _band(axes, series, k, name)
    _rounds_axis(axes)
    axes.set_ylabel(f"{what}: mean and range over clients")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    return figure


def _band(axes: Any, series: Series, k: int, label: str) -> None:
    rounds = [n for n, _ in series]
    values = [list(clients.values()) for _, clients in series]
    look = _look(k, len(rounds))
    axes.plot(rounds, [mean(v) for v in values], label=label, **look)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(rounds, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _similarity(rounds: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Cosine and overlap of each kind of factor over the rounds, in a panel each."""
    similar = [(row["round"], row["similarity"]) for row in rounds if row.get("similarity")]
    kinds = sorted({kind for _, values in similar for kind in values})
    if not kinds:
        return None
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, measure, name in zip(
        panels, ("cosine", "overlap"), ("cosine", "overlap of the spans"), strict=True
    ):
        for k, kind in enumerate(kinds):
            points = [
                (n, values[kind][measure])
                for n, values in similar
                if measure in values.get(kind, {})
            ]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), label=kind, **_look(k, len(points)))
            if measure == "overlap":
                level = mean(values[kind]["chance"] for _, values in similar if kind in values)
                axes.axhline(level, color=_COLORS[k % len(_COLORS)], ls=":", lw=1)
        axes.set_title(f"{title}: {name}", loc="left")
        axes.set_ylabel("mean over pairs of clients")
        _rounds_axis(axes)
    lowest = min(0.0, panels[0].get_ylim()[0])
    panels[0].set_ylim(lowest, 1.04)
    panels[1].set_ylim(0, 1.04)
    panels[1].plot([], [], color="0.3", ls=":", lw=1, label="random spans")
    figure.legend(
        *panels[1].get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
    )
    return figure


def _bytes(rounds: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Bytes of all clients so far, up and down, measured and by formula."""
    total = dict.fromkeys(("up", "down", "up_formula", "down_formula"), 0)
    points: dict[str, list[int]] = {key: [0] for key in total}
    for row in rounds:
        for key in total:
            total[key] += sum(t[key] for t in row["traffic"].values())
            points[key].append(total[key])
    largest = max(total.values())
    if not largest:
        return None
    unit, size = next((name, size) for name, size in _UNITS if largest >= size)
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    numbers = [0, *(row["round"] for row in rounds)]
    panels = figure.subplots(1, 2, sharey=True)
    for k, (axes, key) in enumerate(zip(panels, ("up", "down"), strict=True)):
        look = _look(k, len(numbers))
        axes.plot(numbers, points[key], label="measured", **look)
        # A ring around each marker: seen beside a line that lies on it.
        ring = look | {"ls": "none", "ms": 10, "mfc": "none"}
        axes.plot(numbers, points[f"{key}_formula"], label="by formula", **ring)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:g}"))
        axes.set_title(f"{title}: {key}", loc="left")
        axes.legend(frameon=False, loc="upper left")
        _rounds_axis(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(f"{unit} of all clients so far")
    return figure


def comparison(runs: Sequence[tuple[str, Stages, Stages]], score: str) -> bytes | None:
    """Compare runs: means over the rounds, and the mean and range over the clients at the end.

    Args:
        runs: (name, held-out losses, held-out scores). score: the metric's name.
    """
    parts: list[tuple[str, list[tuple[str, Stages]]]] = [
        ("loss", [(run, losses) for run, losses, _ in runs if losses[0]]),
        (score, [(run, scores) for run, _, scores in runs if scores[0]]),
    ]
    drawn = [(name, series) for name, series in parts if series]
    if not drawn:
        return None
    order = {run[0]: k for k, run in enumerate(runs)}
    height = max(3.0, 0.34 * len(runs) + 1.4)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, height * len(drawn)), layout="constrained")
        panels = figure.subplots(len(drawn), 2, squeeze=False, width_ratios=(1, 1))
        for (left, right), (name, measured) in zip(panels, drawn, strict=True):
            for run, (series, trained) in measured:
                look, rounds = _look(order[run], len(series)), [n for n, _ in series]
                left.plot(rounds, [mean(v.values()) for _, v in series], **look)
                values, place = (
                    series[-1][1].values(),
                    len(measured) - 1 - list(dict(measured)).index(run),
                )
                right.plot([min(values), max(values)], [place] * 2, color=look["color"], lw=1.5)
                right.plot(mean(values), place, **(look | {"ls": "none", "ms": 7}))
                if trained:  # below: where both are equal, the filled marker is seen
                    hollow = look | {"mfc": "white", "zorder": 1.9}
                    rounds, means = [n for n, _ in trained], [mean(v.values()) for _, v in trained]
                    left.plot(rounds, means, **(hollow | {"ls": (0, (2, 2)), "lw": 0.9}))
                    right.plot(means[-1], place, **(hollow | {"ls": "none", "ms": 7}))
            left.set_ylabel(f"held-out {name}, mean")
            _rounds_axis(left)
            right.set_yticks(range(len(measured)), [run for run, _ in reversed(measured)])
            right.set_ylim(-0.6, len(measured) - 0.4)
            right.set_xlabel(f"{name} at the end: mean and range")
        if any(trained for _, measured in drawn for _, (_, trained) in measured):
            for text, face in (("as a round starts", "0.3"), ("after local training", "white")):
                panels[0][0].plot([], [], "o", color="0.3", mfc=face, label=text)
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return _png(figure)
