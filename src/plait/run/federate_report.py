"""The report of federated runs: the held-out metric, bytes, rejections, and a picture of the loss.

spread = largest - smallest of the clients' values; worst: the client with the largest loss
gain over local = loss(local) - loss(run), of the mean over clients, where a run is `local`
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plait.federated.methods import Algorithm
from plait.run.folder import RunFolder, write_atomic

_LOSSES = ("loss", "mse")  # what a held-out evaluation is judged by


@dataclass(frozen=True)
class Summary:
    """A federated run in figures.

    method: its name. rounds: completed. clients: those that were selected at least once. before,
    after: client -> held-out loss, at the start and after the last evaluated round. up, down: bytes
    of the tensors over all rounds and clients, up_formula, down_formula: by formula, frames: with
    headers. error: largest aggregation error of a layer, None where there is none.
    rejected: (client, reason) -> how often. failed: (round, client, what was raised).
    """

    method: str
    rounds: int
    clients: list[str]
    before: dict[str, float]
    after: dict[str, float]
    up: int
    up_formula: int
    down: int
    down_formula: int
    frames: int
    error: float | None
    rejected: dict[tuple[str, str], int]
    failed: list[tuple[int, str, str]]


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off is left out.

    Raises ValueError for another line that is no JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: no JSON. Remove the line.") from None
    return found


def summary(folder: RunFolder, method: str) -> Summary:
    """Add up the rounds of a run.

    Raises ValueError for a run without a completed round.
    """
    lines = read_rounds(folder.metrics)
    rounds = [row for row in lines if row["kind"] == "round"]
    if not rounds:
        raise ValueError(f"{folder.path}: no round is complete. Go on with --resume.")
    measured = [_losses(row["clients"]) for row in lines if row["kind"] == "evaluation"]
    traffic = [bytes_ for row in rounds for bytes_ in row["traffic"].values()]
    total = {key: sum(t[key] for t in traffic) for key in traffic[0]} if traffic else {}
    rejected: dict[tuple[str, str], int] = {}
    for row in rounds:
        for client, reason, _ in row["rejected"]:
            rejected[client, reason] = rejected.get((client, reason), 0) + 1
    errors = [x for row in rounds for x in row["aggregation_error"].values()]
    return Summary(
        method,
        rounds[-1]["round"],
        sorted({name for row in rounds for name in row["selected"]}),
        measured[0] if measured else {},
        measured[-1] if measured else {},
        total.get("up", 0),
        total.get("up_formula", 0),
        total.get("down", 0),
        total.get("down_formula", 0),
        total.get("up_frame", 0) + total.get("down_frame", 0),
        max(errors) if errors else None,
        rejected,
        [(row["round"], name, text) for row in rounds for name, text in row["failed"].items()],
    )


def _losses(clients: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for name, metrics in clients.items():
        loss = next((metrics[key] for key in _LOSSES if metrics.get(key) is not None), None)
        if loss is not None:
            found[name] = loss
    return found


def result_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """(method, mean before, mean after, worst client, spread, gain over local) of each run."""
    local = next(
        (mean(s.after.values()) for s in summaries if s.method == "local" and s.after), None
    )
    found = []
    for s in summaries:
        if not s.after:
            found.append((s.method, *["-"] * 5))
            continue
        after, worst = mean(s.after.values()), max(s.after, key=lambda c: (s.after[c], c))
        gain = "-" if local is None else f"{local - after:.4g}"
        found.append(
            (
                s.method,
                f"{mean(s.before.values()):.4g}",
                f"{after:.4g}",
                f"{worst} {s.after[worst]:.4g}",
                f"{max(s.after.values()) - min(s.after.values()):.4g}",
                gain,
            )
        )
    return found


RESULTS = ("method", "loss before", "loss after", "worst client", "spread", "gain over local")
TRAFFIC = ("method", "up", "up by formula", "down", "down by formula", "with headers", "agg. error")


def traffic_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Bytes of each run, measured and by formula, and the largest aggregation error."""
    return [
        (
            s.method,
            *(f"{n:,}" for n in (s.up, s.up_formula, s.down, s.down_formula, s.frames)),
            "-" if s.error is None else f"{s.error:.3g}",
        )
        for s in summaries
    ]


def fault_lines(s: Summary) -> list[str]:
    """Rejected updates with their reasons, and what clients raised."""
    lines = [f"{client}: {reason}, {n} x" for (client, reason), n in sorted(s.rejected.items())]
    return lines + [f"{client}: failed in round {n}: {text}" for n, client, text in s.failed]


def write_report(folder: RunFolder, method: Algorithm, name: str) -> None:
    """Write report.md and loss.png of a run."""
    s = summary(folder, name)
    tables = [_table(RESULTS, result_rows([s])), _table(TRAFFIC, traffic_rows([s]))]
    faults = "".join(f"- {line}\n" for line in fault_lines(s)) or "None.\n"
    text = (
        f"# {name}, {s.rounds} rounds, {len(s.clients)} clients\n\n"
        f"Exact: {method.exact}. Private factors: {method.private_policy}. Losses are the means "
        "over the clients, each with its own model, on held-out rows.\n\n"
        f"{tables[0]}\nBytes over all rounds and clients:\n\n{tables[1]}\n"
        f"## Rejected and failed\n\n{faults}\n![loss](loss.png)\n"
    )
    write_atomic(folder.path / "report.md", text)
    write_atomic(folder.loss_curve, _picture(read_rounds(folder.metrics), name))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _picture(lines: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Training and held-out loss over the rounds: the mean, and the range over the clients."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, key, label, color in (
        ("round", "metrics", "training", "C0"),
        ("evaluation", "clients", "held out", "C1"),
    ):
        found = [(row["round"], _losses(row[key])) for row in lines if row["kind"] == kind]
        points = [(n, list(losses.values())) for n, losses in found if losses]
        if points:
            rounds = [n for n, _ in points]
            axes.plot(rounds, [mean(v) for _, v in points], marker="o", color=color, label=label)
            low, high = [min(v) for _, v in points], [max(v) for _, v in points]
            axes.fill_between(rounds, low, high, color=color, alpha=0.2, linewidth=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.set_xlabel("round")
    axes.set_ylabel("loss, mean and range over clients")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
