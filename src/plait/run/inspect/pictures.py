"""Pictures of an inspection, as PNG and SVG: heat maps, spectra, gates, routers.

Layers stand as block x kind of module, so that hundreds of them stay readable; a cell is the mean
over what falls into it. A picture without numbers is not drawn.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from plait.run.inspect.findings import (
    InspectReport,
    LayerReport,
    MeanLoad,
    SimilarityReport,
    mean,
    short_names,
)

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "plait",  # the same numbers give the same file
}
_DPI = 200
_CELL = 0.26  # inches: height of a row of a heat map
_PAGE = 11.0  # inches: what is wider goes below
_WRITE_UP_TO = 8  # columns of a heat map whose cells get their number

Grid = Mapping[tuple[str, int | None], float | None]  # (module, block) -> value


def draw(report: InspectReport) -> dict[str, bytes]:
    """File name -> content, for every picture that has something to show."""
    files: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE):
        figures = {
            "norm": _map(report, "||dW|| / ||W||", lambda r: [u.relative for u in r.updates]),
            "untouched": _map(
                report,
                "share of entries with dW = 0",
                lambda r: [u.untouched for u in r.updates],
                Normalize(0, 1),
            ),
            "spectrum": _spectra(report),
            "gates": _gates(report),
            "routing": _routing(report),
            **{f"similarity_{kind}": _similarity(report, kind) for kind in ("A", "B", "C", "D")},
            "similarity_dW": _similarity(report, "dW"),
        }
        for name, figure in figures.items():
            if figure is None:
                continue
            FigureCanvasAgg(figure)
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=_DPI, metadata=metadata)
                files[f"{name}.{kind}"] = content.getvalue()
    return files


# ----------------------------------------------------------------------------------- heat maps


def _grid(pairs: Iterable[tuple[str, int | None, Sequence[float | None]]]) -> Grid:
    """The mean of what falls into each cell, of (module, block, values)."""
    cells: dict[tuple[str, int | None], list[float | None]] = defaultdict(list)
    for module, block, values in pairs:
        cells[module, block].extend(values)
    return {cell: mean(values) for cell, values in cells.items()}


def _heat(
    axes: Any,
    grid: Grid,
    norm: Normalize,
    cmap: str,
    names: Mapping[str, str],
    cell: Callable[[float], str] | None = None,
) -> Any:
    """Draw module x block; cells without a number stay grey. cell: writes a number."""
    modules = list(dict.fromkeys(module for module, _ in grid))
    blocks = sorted({b for _, b in grid}, key=lambda b: -1 if b is None else b)
    values = np.array([[grid.get((m, b)) for b in blocks] for m in modules], dtype=float)
    image = _image(
        axes, values, norm, cmap, (cell or _cell) if len(blocks) <= _WRITE_UP_TO else None
    )
    axes.set_yticks(range(len(modules)), [names[m] for m in modules])
    step = -(-len(blocks) // 16)
    labels = ["-" if b is None else str(b) for b in blocks]
    axes.set_xticks(range(0, len(blocks), step), labels[::step])
    axes.set_xlabel("block")
    return image


def _image(
    axes: Any,
    values: NDArray[Any],
    norm: Normalize,
    cmap: str,
    cell: Callable[[float], str] | None = None,
) -> Any:
    image = axes.imshow(values, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.85")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True) if cell else ():
        r, g, b, _ = image.cmap(norm(values[i, j]))
        dark = 0.3 * r + 0.6 * g + 0.1 * b < 0.5
        text = cell(float(values[i, j])) if cell else ""  # no loop without cell
        axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color="w" if dark else "k")
    return image


def _cell(value: float) -> str:
    """Two decimals, two digits below 0.1, one below 0.001."""
    if not value or abs(value) >= 0.1:
        return f"{value:.2f}"
    return f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.1g}"


def _map(
    report: InspectReport,
    label: str,
    value: Callable[[LayerReport], Sequence[float | None]],
    norm: Normalize | None = None,
) -> Figure | None:
    """One heat map a run over one colour scale."""
    grids: dict[str, Grid] = {}
    for run in report.runs:
        mine = [r for r in report.layers if r.run == run.label]
        grid = _grid((r.module, r.block, value(r)) for r in mine)
        if any(v is not None for v in grid.values()):
            grids[run.label] = grid
    if not grids:
        return None
    names = short_names(module for grid in grids.values() for module, _ in grid)
    height = max(len({module for module, _ in grid}) for grid in grids.values())
    width = _width(grids.values(), names)
    columns = min(len(grids), max(1, int(9 / width)))
    rows = -(-len(grids) // columns)
    size = (columns * width + 0.6, rows * (height * _CELL + 0.75))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    scale = norm or _scale([v for grid in grids.values() for v in grid.values() if v is not None])
    image: Any = None
    for axes, (run, grid) in zip(panels.flat, grids.items(), strict=False):
        image = _heat(axes, grid, scale, "viridis", names)
        axes.set_title(run, loc="left")
    for axes in panels.flat[len(grids) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=panels, label=label, aspect=20 * rows, fraction=0.06 / columns)
    return figure


def _scale(values: Sequence[float]) -> Normalize:
    """A logarithmic scale if the positive values span more than a factor of 30."""
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 30 * min(positive):
        return LogNorm(min(positive), max(positive))
    return Normalize(0, max(values) or 1)


def _width(grids: Iterable[Grid], names: Mapping[str, str]) -> float:
    """Inches for a heat map with its labels."""
    blocks = max(len({b for _, b in grid}) for grid in grids)
    cell = 0.42 if blocks <= _WRITE_UP_TO else 0.16
    return max(3.6, min(9.0, 1.4 + 0.065 * max(map(len, names.values())) + cell * blocks))


# --------------------------------------------------------------------------------- similarities


def _similarity(report: InspectReport, kind: str) -> Figure | None:
    """Cosine and overlap of all pairs, mean over layers; and the mean over pairs by layer."""
    similar = [s for s in report.similarity if s.kind == kind]
    if all(s.cosine is None and s.overlap is None for s in similar):
        return None
    labels = list(dict.fromkeys(x for s in similar for x in (s.a, s.b)))
    spans = any(s.overlap is not None for s in similar)
    pairs = [p for p in report.pairs if p.kind == kind]
    grid = _grid((p.module, p.block, [p.overlap if spans else p.cosine]) for p in pairs)
    names = short_names(module for module, _ in grid)
    text = 0.06 * max(map(len, labels))  # inches of a label
    side = max(1.5, 0.28 * len(labels))
    matrices = ["cosine", "overlap"] if spans else ["cosine"]
    width, of_pairs = _width([grid], names), len(matrices) * (side + 1.0) + text
    height = len({module for module, _ in grid}) * _CELL + 0.8
    tall = side + 0.8 + 0.75 * text
    if of_pairs + width <= _PAGE:
        figure = Figure(figsize=(of_pairs + width, max(tall, height)), layout="constrained")
        ratios = [*[side + 1.0] * len(matrices), width - 1.0]
        mosaic: Any = [[*matrices, "map"]]
        panels = figure.subplot_mosaic(mosaic, width_ratios=ratios)
    else:
        figure = Figure(figsize=(max(of_pairs, width), tall + height), layout="constrained")
        mosaic: Any = [matrices, ["map"] * len(matrices)]
        panels = figure.subplot_mosaic(mosaic, height_ratios=[tall, height])
    cosines = Normalize(-1, 1), "RdBu_r"
    shares = Normalize(0, 1), "viridis"
    _pairs(figure, panels["cosine"], similar, labels, "cosine", *cosines)
    if spans:
        _pairs(figure, panels["overlap"], similar, labels, "overlap", *shares)
        panels["overlap"].set_yticks([])
        random = mean(s.chance for s in similar)
        panels["overlap"].set_xlabel(f"independent random spaces: {random:.2g}")
    image = _heat(panels["map"], grid, *(shares if spans else cosines), names)
    panels["map"].set_title(f"{matrices[-1]}, mean of pairs", loc="left")
    figure.colorbar(image, ax=panels["map"])
    return figure


def _pairs(
    figure: Figure,
    axes: Any,
    similar: Sequence[SimilarityReport],
    labels: Sequence[str],
    name: str,
    norm: Normalize,
    cmap: str,
) -> None:
    values = np.full((len(labels), len(labels)), np.nan)
    np.fill_diagonal(values, 1.0)
    for s in similar:
        i, j = labels.index(s.a), labels.index(s.b)
        number = getattr(s, name)
        values[i, j] = values[j, i] = np.nan if number is None else number
    image = _image(axes, values, norm, cmap, _cell if len(labels) <= _WRITE_UP_TO else None)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title(f"{similar[0].kind}: {name}", loc="left")
    figure.colorbar(image, ax=axes, shrink=0.8)


# ------------------------------------------------------------------------------ spectra, gates


def _spectra(report: InspectReport) -> Figure | None:
    """Singular values of dW by kind of module: median over layers, band over their middle half."""
    runs = [r for r in report.runs if _curves(report, r.label)]
    if not runs:
        return None
    names = short_names(layer.module for layer in report.layers)
    colours = {m: matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"](i % 20)
               for i, m in enumerate(names)}  # fmt: skip
    columns = 2 if len(runs) in (2, 4) else min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(0.8 + 2.9 * columns + 1.3, 0.4 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axes, run in zip(panels.flat, runs, strict=False):
        curves = _curves(report, run.label)
        longest = max(c.shape[1] for c in curves.values())
        for module, curve in curves.items():
            index = np.arange(1, curve.shape[1] + 1)
            # On a logarithmic axis a value of 0 ends the line, and the band at the axis.
            low, middle, high = np.percentile(curve, [25, 50, 75], axis=0)
            middle[middle == 0] = np.nan
            low = np.where((low == 0) & (high > 0), curve[curve > 0].min(), low)
            marker = "." if longest <= 32 else ""
            (line,) = axes.plot(index, middle, marker=marker, lw=1, color=colours[module])
            axes.fill_between(index, low, high, color=colours[module], alpha=0.15, lw=0)
            handles.setdefault(names[module], line)
        ranks = sorted(
            {u.rank for layer in report.layers if layer.run == run.label for u in layer.updates}
        )
        for rank in ranks if len(ranks) <= 4 else (ranks[0], ranks[-1]):
            line = axes.axvline(rank, color="0.3", ls=":", lw=1)
            handles.setdefault("attainable rank", line)
        axes.set_yscale("log")
        if max(longest, ranks[-1]) > 64:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(run.label, loc="left")
        axes.set_xlabel("index")
        axes.grid(alpha=0.2, lw=0.5)
    for axes in panels.flat[len(runs) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel("singular values of dW")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    return figure


def _curves(report: InspectReport, run: str) -> dict[str, NDArray[Any]]:
    """Module -> spectra of its layers (layers, ranks), 0 behind the shorter ones."""
    by_module: dict[str, list[list[float | None]]] = defaultdict(list)
    for layer in report.layers:
        if layer.run == run:
            by_module[layer.module] += [u.spectrum for u in layer.updates]
    curves = {}
    for module, spectra in by_module.items():
        values = np.zeros((len(spectra), max(map(len, spectra))))
        for row, spectrum in zip(values, spectra, strict=True):
            row[: len(spectrum)] = spectrum
        if values.any():
            curves[module] = values[:, values.any(0)]
    return curves


def _gates(report: InspectReport) -> Figure | None:
    """Ranks whose gate is not 0 by layer, and the size of every gate."""
    gated = {
        run.label: [r for r in report.layers if r.run == run.label and r.gate and r.gate.ranks]
        for run in report.runs
    }
    gated = {run: layers for run, layers in gated.items() if layers}
    if not gated:
        return None
    names = short_names(r.module for layers in gated.values() for r in layers)
    rows = [len({r.module for r in layers}) for layers in gated.values()]
    grids = [_grid((r.module, r.block, [r.gate.live]) for r in g if r.gate) for g in gated.values()]
    width = _width(grids, names)
    height = sum(max(1.5, n * _CELL) + 0.8 for n in rows)
    figure = Figure(figsize=(width + 3.6, height), layout="constrained")
    panels = figure.subplots(
        len(rows), 2, squeeze=False, height_ratios=rows, width_ratios=[width, 3.4]
    )
    for (left, right), (run, layers), grid in zip(panels, gated.items(), grids, strict=True):
        most = max(r.gate.ranks for r in layers if r.gate)
        image = _heat(left, grid, Normalize(0, most), "viridis", names, "{:.3g}".format)
        left.set_title(f"{run}: live ranks of {most}", loc="left")
        figure.colorbar(image, ax=left)
        ordered = sorted(layers, key=lambda r: list(names).index(r.module))
        values = np.full((len(ordered), most), np.nan)
        for row, layer in zip(values, ordered, strict=True):
            gates = [] if layer.gate is None else layer.gate.values
            row[: len(gates)] = np.abs(np.array(gates, dtype=float))
        image = _image(right, values, Normalize(0, np.nanmax(values) or 1), "magma")
        starts = [i for i, r in enumerate(ordered) if not i or ordered[i - 1].module != r.module]
        ends = [*starts[1:], len(ordered)]
        centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        right.set_yticks(centres, [names[ordered[i].module] for i in starts])
        for start in starts[1:]:
            right.axhline(start - 0.5, color="w", lw=0.8)
        step = -(-most // 10)
        right.set_xticks(range(0, most, step), range(1, most + 1, step))
        right.set_xlabel("rank; a row is a layer")
        right.set_title("size of the gate", loc="left")
        figure.colorbar(image, ax=right)
    return figure


# -------------------------------------------------------------------------------------- routers


def _routing(report: InspectReport) -> Figure | None:
    """Load of each expert by task, and how undecided the router is by layer."""
    groups: dict[tuple[str, int], list[MeanLoad]] = defaultdict(list)
    for load in report.loads:
        groups[load.run, load.experts].append(load)
    if not groups:
        return None
    routed = {
        (run, n): [
            r for r in report.layers if r.run == run and r.routing and len(r.routing.load) == n
        ]
        for run, n in groups
    }
    names = short_names(r.module for layers in routed.values() for r in layers)
    grids = {key: _grid(
        (r.module, r.block, [_share(r.routing.entropy, key[1])]) for r in layers if r.routing
    ) for key, layers in routed.items()}  # fmt: skip
    width = _width(grids.values(), names)
    bars = max(3.2, max(0.16 * n * (len(loads) + 1) for (_, n), loads in groups.items()))
    bars = min(bars, 8.0)
    rows = [max(1.7, len({m for m, _ in g}) * _CELL) + 0.8 for g in grids.values()]
    if bars + width <= _PAGE:
        figure = Figure(figsize=(bars + width, sum(rows)), layout="constrained")
        panels = figure.subplots(
            len(rows), 2, squeeze=False, height_ratios=rows, width_ratios=[bars, width]
        )
    else:
        figure = Figure(figsize=(max(bars, width), sum(rows) + 2.2 * len(rows)))
        figure.set_layout_engine("constrained")
        ratios = [ratio for row in rows for ratio in (2.2, row)]
        panels = figure.subplots(2 * len(rows), 1, height_ratios=ratios).reshape(-1, 2)
    for (left, right), ((run, n), loads) in zip(panels, groups.items(), strict=True):
        _bars(left, run, n, loads)
        image = _heat(right, grids[run, n], Normalize(0, 1), "viridis", names)
        right.set_title("entropy of a token's weights / ln n", loc="left")
        figure.colorbar(image, ax=right)
    return figure


def _share(value: float | None, n: int) -> float | None:
    return None if value is None or n < 2 else value / float(np.log(n))


def _bars(axes: Any, run: str, n: int, loads: Sequence[MeanLoad]) -> None:
    of_tasks = [load for load in loads if load.task is not None]
    shown = of_tasks if 0 < len(of_tasks) <= 8 else [x for x in loads if x.task is None]
    width = 0.8 / len(shown)
    for k, load in enumerate(shown):
        places = np.arange(1, n + 1) + (k - (len(shown) - 1) / 2) * width
        name = "all tokens" if load.task is None else load.task
        axes.bar(places, load.load, width * 0.92, label=name)
    axes.axhline(1 / n, color="0.3", ls=":", lw=1, label=f"even load, 1/{n}")
    axes.set_xticks(range(1, n + 1, -(-n // 16)))
    highest = max(1 / n, *(v or 0.0 for load in shown for v in load.load))
    axes.set_ylim(0, (1.12 + 0.13 * -(-(len(shown) + 1) // 3)) * highest)  # room for the legend
    axes.set_xlabel("expert")
    axes.set_ylabel("load, mean over layers")
    axes.set_title(run, loc="left")
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize=7, columnspacing=1)
