"""The report of federated runs: report.md of one run, and several runs side by side.

    worst    the client with the largest loss, or the smallest score
    spread   largest - smallest of the clients' values
    gain over local     local - x for a loss, x - local for a score
    towards central     (local - x) / (local - central): 0 is local, 1 is central

x is the mean over clients of the last measurement on held-out rows, each client with its own model
as it would start the next round; runs that measure it also get tables of x right after local
training. The two references are runs of the methods `local` and `central` with the same model, data
and partition whose last measurement has the same clients, or one model for all rows. Without them,
or if `central` is no better than `local`, the cell is "-".
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Any

from plait.federated.methods import Algorithm
from plait.federated.privacy import PrivacyReport
from plait.run.federated.folder import FederatedFolder, Series, read_rounds
from plait.run.folder import RunFolder, diff_configs, replace_dir, write_atomic
from plait.run.metrics import METRICS

_LOSSES = ("loss", "mse")  # what a held-out evaluation is judged by: the first that is there
_SCORES = ("exact_match", "accuracy", "token_accuracy", "pearson")  # the larger, the better
_SETTING = ("model", "data", "partition")  # of a config: what two runs need in common
_ROWS = 100  # clients in a table of report.md; metrics.jsonl has all
_COLUMNS = 12  # labels of a table of rows
_TRAINED = " after local training"  # of measurements before the server averages

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head, rows
Measurements = list[tuple[int, Mapping[str, Mapping[str, Any]]]]  # (round, client -> metrics)


@dataclass(frozen=True)
class Summary:
    """The figures of a federated run.

    method: its name. path: of the run folder. rounds: completed. clients: those that were selected
    at least once. losses, scores: (round, client -> held-out value) of each evaluation.
    score: the metric's name, "" without one. up, down: bytes of the tensors over all rounds and
    clients; up_formula, down_formula: by formula; frames: with headers. error: largest aggregation
    error of a layer, None if there is none. rejected: (client, reason) -> (round, text) of each.
    failed: (round, client, error) of training and evaluation. privacy: what the run guarantees, ""
    for nothing. config: of the run, to compare runs; {} if unknown. trained_losses, trained_scores:
    as losses and scores, of each round that measured right after local training. votes: client ->
    factors below 1 that the guard put on its weight.
    """

    method: str
    path: Path
    rounds: int
    clients: list[str]
    losses: Series
    scores: Series
    score: str
    up: int
    up_formula: int
    down: int
    down_formula: int
    frames: int
    error: float | None
    rejected: dict[tuple[str, str], list[tuple[int, str]]]
    failed: list[tuple[int, str, str]]
    privacy: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    trained_losses: Series = field(default_factory=list)
    trained_scores: Series = field(default_factory=list)
    votes: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def first(self) -> dict[str, float]:
        """Client -> held-out loss at the first evaluation."""
        return self.losses[0][1] if self.losses else {}

    @property
    def last(self) -> dict[str, float]:
        """Client -> held-out loss at the last evaluation."""
        return self.losses[-1][1] if self.losses else {}


def summary(folder: RunFolder, method: str, config: Mapping[str, Any] | None = None) -> Summary:
    """Add up the rounds of a run.

    Args:
        folder: of the run. method: its name. config: its sections as dicts, to compare runs.

    Raises:
        ValueError: no round is complete.
    """
    lines = read_rounds(folder.metrics)
    rounds = _rounds(lines)
    if not rounds:
        raise ValueError(f"{folder.path}: no round is complete. Go on with --resume.")
    traffic = [bytes_ for row in rounds for bytes_ in row["traffic"].values()]
    total = {key: sum(t[key] for t in traffic) for key in traffic[0]} if traffic else {}
    rejected: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rounds:
        for client, reason, text in row["rejected"]:
            rejected.setdefault((client, reason), []).append((row["round"], text))
    votes: dict[str, list[float]] = {}
    for row in rounds:
        for client, vote in row.get("votes", {}).items():  # plait 0.1 wrote none
            votes.setdefault(client, []).append(vote)
    errors = [x for row in rounds for x in row["aggregation_error"].values()]
    measured, trained = measurements(lines), measurements(lines, after_training=True)
    score = _score([*measured, *trained])
    return Summary(
        method,
        folder.path,
        rounds[-1]["round"],
        sorted({name for row in rounds for name in row["selected"]}),
        _series(measured, _LOSSES),
        _series(measured, (score,)),
        METRICS[score].label if score in METRICS else "",
        total.get("up", 0),
        total.get("up_formula", 0),
        total.get("down", 0),
        total.get("down_formula", 0),
        total.get("up_frame", 0) + total.get("down_frame", 0),
        max(errors) if errors else None,
        rejected,
        _failed(lines),
        _privacy(lines),
        config or {},
        _series(trained, _LOSSES),
        _series(trained, (score,)),
        votes,
    )


def _rounds(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in lines if row["kind"] == "round"]


def measurements(
    lines: Iterable[Mapping[str, Any]], *, after_training: bool = False
) -> Measurements:
    """The measurements of the clients' models on held-out rows.

    after_training: those taken right after local training, of the clients whose update was
    accepted, instead of those of all clients' models as they would start the next round.
    """
    if after_training:
        return [(r["round"], r["held_out"]) for r in _rounds(lines) if r.get("held_out")]
    return [(r["round"], r["clients"]) for r in lines if r["kind"] == "evaluation"]


def _series(measured: Measurements, keys: Sequence[str]) -> Series:
    """(round, client -> value): of each measurement the first of the metrics that it has."""
    series = [(number, _values(clients, keys)) for number, clients in measured]
    return [(number, values) for number, values in series if values]


def _values(clients: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    values = {}
    for name, metrics in clients.items():
        value = next((metrics[key] for key in keys if metrics.get(key) is not None), None)
        if value is not None:
            values[name] = value
    return values


def _score(measured: Measurements) -> str:
    """The score that the measurements have; "" for none."""
    measured_keys = {
        key
        for _, clients in measured
        for metrics in clients.values()
        for key in _SCORES
        if metrics.get(key) is not None
    }
    return next((key for key in _SCORES if key in measured_keys), "")


def _failed(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """(round, client, text) of each error of a client, in training and in evaluation."""
    failures = []
    for row in lines:
        number, training = row["round"], row["kind"] == "round"
        if training:
            failures += [(number, name, text) for name, text in row["failed"].items()]
        when = "evaluation" + training * _TRAINED
        for _, clients in measurements([row], after_training=training):
            failed = {name: m["failed"] for name, m in clients.items() if m.get("failed")}
            failures += [(number, name, f"{when}: {x}") for name, x in failed.items()]
    return failures


def _privacy(lines: Iterable[Mapping[str, Any]]) -> str:
    reports = [row for row in lines if row["kind"] == "privacy"]
    if not reports:
        return ""
    return str(PrivacyReport(**{f.name: reports[-1][f.name] for f in fields(PrivacyReport)}))


# Runs side by side ------------------------------------------------------------------------------


def tables(summaries: Sequence[Summary]) -> list[Table]:
    """The tables of one run or of several side by side."""
    scores = list(dict.fromkeys(s.score for s in summaries if s.score))
    shown = scores[0] if len(scores) == 1 else "score"
    held_out: list[Table] = []
    for what, when, of, sign in (
        ("loss", "", lambda s: s.losses, -1),
        (shown, "", lambda s: s.scores, 1),
        ("loss", _TRAINED, lambda s: s.trained_losses, -1),
        (shown, _TRAINED, lambda s: s.trained_scores, 1),
    ):
        if any(map(of, summaries)):
            title = f"held-out {what}{when}, over the clients"
            held_out.append((title, _results(what), _compared(summaries, of, sign)))
    return [*held_out, ("bytes, over all rounds and clients", _TRAFFIC, traffic_rows(summaries))]


def _results(value: str) -> Sequence[str]:
    return (
        "method", f"{value} first", f"{value} last", "worst client", "spread",
        "gain over local", "towards central",
    )  # fmt: skip


_TRAFFIC = (
    "method", "up", "up by formula", "down", "down by formula", "with headers", "agg. error",
)  # fmt: skip


def labels(summaries: Sequence[Summary]) -> list[str]:
    """A name for each run: its method, followed by the folder's name or path if not unique."""
    methods = [s.method for s in summaries]
    short = [f"{s.method} {s.path.name}" for s in summaries]
    return [
        s.method
        if methods.count(s.method) == 1
        else x
        if short.count(x) == 1
        else f"{s.method} {s.path}"
        for s, x in zip(summaries, short, strict=True)
    ]


def _compared(
    summaries: Sequence[Summary], of: Callable[[Summary], Series], sign: int
) -> list[tuple[str, ...]]:
    """(method, mean first, last, worst client, spread, gain, towards central) of each run.

    sign: 1 if larger is better, else -1.
    """
    rows = []
    for s, label in zip(summaries, labels(summaries), strict=True):
        series = of(s)
        if not series:
            rows.append((label, *["-"] * 6))
            continue
        after = mean(series[-1][1].values())
        local, central = (
            next((of(o) for o in summaries if _refers(o, s, method, of)), None)
            for method in ("local", "central")
        )
        gain = towards = "-"
        if local is not None:
            low = mean(local[-1][1].values())
            gain = _number(sign * (after - low))
            if central is not None:
                high = mean(central[-1][1].values())
                if sign * (high - low) > 0:
                    towards = f"{round((low - after) / (low - high), 2) + 0:.2f}"
        values = series[-1][1]
        rows.append(
            (
                label,
                _number(mean(series[0][1].values())),
                _number(after),
                _worst(values, sign),
                _spread(values),
                gain,
                towards,
            )
        )
    return rows


def _refers(other: Summary, s: Summary, method: str, of: Callable[[Summary], Series]) -> bool:
    """Whether `other` is a reference for `s`: a run of that method with the same data and model."""
    same = all(other.config.get(key) == s.config.get(key) for key in _SETTING)
    if not (other.method == method and same and other.score == s.score and of(other)):
        return False
    mine, theirs = (of(x)[-1][1].keys() for x in (s, other))
    pooled = any(x.method == "central" and len(of(x)[-1][1]) == 1 for x in (s, other))
    return mine == theirs or pooled


def _number(x: float) -> str:
    return f"{x + 0:.4g}"  # a zero without a sign


def _worst(values: Mapping[str, float], sign: int) -> str:
    worst = min(values, key=lambda c: (sign * values[c], c))
    return f"{worst} {_number(values[worst])}"


def _spread(values: Mapping[str, float]) -> str:
    return _number(max(values.values()) - min(values.values()))


def traffic_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Bytes of each run, measured and by formula, and its largest aggregation error."""
    return [
        (
            label,
            *(f"{n:,}" for n in (s.up, s.up_formula, s.down, s.down_formula, s.frames)),
            "-" if s.error is None else f"{s.error:.3g}",
        )
        for s, label in zip(summaries, labels(summaries), strict=True)
    ]


def client_rows(rounds: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Name, round of the last update and last answer, rejections, failures, bytes up and down.

    A rejected update counts as an answer, a failure does not.

    Args:
        rounds: the lines of metrics.jsonl of the kind "round".
    """
    clients: dict[str, list[Any]] = {}
    for row in rounds:
        rejected = [client for client, _, _ in row["rejected"]]
        for name in row["selected"]:
            cells = clients.setdefault(name, ["-", "-", 0, 0, 0, 0])
            if name in row["accepted"]:
                cells[0] = row["round"]
            if name not in row["failed"]:
                cells[1] = row["round"]
            cells[2] += rejected.count(name)
            cells[3] += name in row["failed"]
            traffic = row["traffic"].get(name, {})
            cells[4] += traffic.get("up_frame", 0)
            cells[5] += traffic.get("down_frame", 0)
    return [(name, *cells) for name, cells in sorted(clients.items())]


def fault_lines(s: Summary) -> list[str]:
    """One line for each client and reason of rejected updates, and for each error of a client."""
    lines = []
    for (client, reason), times in sorted(s.rejected.items()):
        number, text = times[-1]
        text = text.removeprefix(f"client {client!r}: {reason}: ")
        lines.append(f"{client}: {reason}, {len(times)} x, last in round {number}: {text}")
    for client, votes in sorted(s.votes.items()):
        least = min(votes)
        lines.append(
            f"{client}: less weight in {len(votes)} rounds, down to {least:.2g} of its rows"
        )
    return lines + [f"{client}: failed in round {n}: {text}" for n, client, text in s.failed]


def differences(summaries: Sequence[Summary]) -> list[str]:
    """How the configs of the other runs differ from the first, outside `federated` and `output`."""
    first, *others = summaries
    names = labels(summaries)[1:]
    different = []
    for s, name in zip(others, names, strict=True):
        for line in diff_configs({**first.config}, {**s.config}):
            if not line.startswith(("output.", "federated.")):
                different.append(f"{name}: {line}")
    return different


def write_comparison(out: str | Path, summaries: Sequence[Summary]) -> Path:
    """Write comparison.md and comparison.png of several runs into a new folder.

    Raises:
        FileExistsError: `out` exists.
    """
    from plait.run.federated import pictures  # matplotlib

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out}: exists. Give a new folder, or remove it.")
    names = labels(summaries)
    faults = [
        f"{name}: {line}"
        for s, name in zip(summaries, names, strict=True)
        for line in fault_lines(s)
    ]
    private = [
        f"{name}: {s.privacy}" for s, name in zip(summaries, names, strict=True) if s.privacy
    ]
    text = "# Federated runs side by side\n\n" + _sections(tables(summaries))
    text += (
        f"Means over the clients, each with its own model, on held-out rows{_when(summaries)} "
        "*Gain over local* and *towards central* are measured against the runs of `local` and "
        '`central` with the same model, data, partition and clients; "-": there is none.\n\n'
    )
    text += _list("What differs from the first", differences(summaries)) if len(names) > 1 else ""
    text += _list("Privacy", private) if private else ""
    text += _list("Rejected and failed", list(map(_escaped, faults)))
    picture = pictures.comparison(
        [
            (n, (s.losses, s.trained_losses), (s.scores, s.trained_scores))
            for n, s in zip(names, summaries, strict=True)
        ],
        next((s.score for s in summaries if s.score), ""),
    )
    if picture:
        text += "![comparison](comparison.png)\n"

    def write(folder: Path) -> None:
        write_atomic(folder / "comparison.md", text)
        if picture:
            write_atomic(folder / "comparison.png", picture)

    replace_dir(out, write)
    return out


# One run ----------------------------------------------------------------------------------------


def write_report(folder: FederatedFolder, method: Algorithm, name: str) -> None:
    """Write report.md and its pictures into a run folder."""
    from plait.run.federated import pictures  # matplotlib

    s, lines = summary(folder, name), read_rounds(folder.metrics)
    text = (
        f"# {name}, {s.rounds} rounds, {len(s.clients)} clients\n\n"
        f"Exact: {method.exact}. Private factors: {method.private_policy}. Losses are the means "
        f"over the clients, each with its own model, on held-out rows{_when([s])}\n\n"
        f"Privacy: {s.privacy or 'none.'}\n\n"
    )
    text += _sections([*tables([s]), *_round_tables(s, lines), *_client_tables(s, lines)])
    text += _sections(_row_tables(folder.read_row_counts()))
    text += _list("Rejected and failed", list(map(_escaped, fault_lines(s))))
    losses, scores = (
        {"held out": x, f"held out,{_TRAINED}": trained}
        for x, trained in ((s.losses, s.trained_losses), (s.scores, s.trained_scores))
    )
    for file, picture in pictures.draw(lines, losses, scores, s.score, name).items():
        write_atomic(folder.path / file, picture)
        text += f"![{Path(file).stem}]({file})\n"
    write_atomic(folder.path / "report.md", text)


def _when(summaries: Sequence[Summary]) -> str:
    """The end of a sentence on the held-out values: when they are measured."""
    if not any(s.trained_losses or s.trained_scores for s in summaries):
        return "."
    return (
        ", as it would start the next round. *After local training*: right after its own training "
        "in that round, before the server averages, of the clients whose update was accepted."
    )


def _round_tables(s: Summary, lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What happened round by round: held-out values, updates and bytes, similarity."""
    rounds = {row["round"]: row for row in _rounds(lines)}
    round_tables = [
        *_held_table("By round: held out", s.losses, s.scores, s.score),
        *_held_table(f"By round: held out,{_TRAINED}", s.trained_losses, s.trained_scores, s.score),
    ]
    traffic = []
    for n, row in rounds.items():
        total = row["traffic"].values()
        sums = [sum(t[k] for t in total) for k in ("up", "up_formula", "down", "down_formula")]
        errors = row["aggregation_error"].values()
        traffic.append(
            (
                str(n),
                f"{len(row['accepted'])} of {len(row['selected'])}",
                str(len(row["rejected"])),
                str(len(row["failed"])),
                *(f"{x:,}" for x in sums),
                f"{max(errors):.3g}" if errors else "-",
            )
        )
    round_tables.append(
        (
            "By round: updates and bytes",
            ("round", "accepted", "rejected", "failed", *_TRAFFIC[1:5], "agg. error"),
            traffic,
        )
    )
    similar = {n: row["similarity"] for n, row in rounds.items() if row.get("similarity")}
    if similar:
        kinds = sorted({kind for values in similar.values() for kind in values})
        columns = [(k, m) for k in kinds for m in ("cosine", "overlap", "chance")]
        rows = [
            (str(n), *(_cell(values.get(kind, {}).get(m)) for kind, m in columns))
            for n, values in similar.items()
        ]
        title = "By round: similarity of the clients' factors"
        round_tables.append((title, ("round", *(f"{k} {m}" for k, m in columns)), rows))
    return round_tables


def _held_table(title: str, losses: Series, scores: Series, score: str) -> list[Table]:
    """Held-out values round by round; no table if there are none."""
    loss_of, score_of = dict(losses), dict(scores)
    head = ["round", "clients", "loss", "worst client", "spread"]
    head += [score, "worst client", "spread"] if scores else []
    rows = []
    for n in sorted({*loss_of, *score_of}):
        lost, scored = loss_of.get(n, {}), score_of.get(n, {})
        row = [str(n), str(len(lost or scored)), *_cells(lost, -1)]
        rows.append(row + _cells(scored, 1) if scores else row)
    return [(title, head, rows)] if rows else []


def _row_tables(counts: Mapping[str, Mapping[str, int]]) -> list[Table]:
    """How many training rows each client has, by label or task if these are few."""
    if not counts:
        return []
    values = list(next(iter(counts.values())))
    values = values if 1 < len(values) <= _COLUMNS else []
    title = "By client: training rows"
    if len(counts) > _ROWS:
        title += f", the {_ROWS} with the most"
        counts = dict(sorted(counts.items(), key=lambda x: -sum(x[1].values()))[:_ROWS])
    rows = [
        (name, str(sum(by_value.values())), *(str(by_value[v]) for v in values))
        for name, by_value in counts.items()
    ]
    return [(title, ("client", "rows", *values), rows)]


def _cells(values: Mapping[str, float], sign: int) -> list[str]:
    """Mean, worst client and spread."""
    if not values:
        return ["-"] * 3
    return [_number(mean(values.values())), _worst(values, sign), _spread(values)]


def _cell(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def _client_tables(s: Summary, lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What each client had: held-out values first and last, updates, bytes."""
    rounds = _rounds(lines)
    names = sorted({*s.clients, *s.first, *s.last})
    last, shown = s.last, "By client"
    if len(names) > _ROWS:
        names = sorted(names, key=lambda c: (-last.get(c, float("-inf")), c))[:_ROWS]
        shown = f"By client, the {_ROWS} of the largest loss"
    keys = ("up", "up_formula", "down", "down_formula")
    traffic = []
    for name in names:
        sent = [row["traffic"][name] for row in rounds if name in row["traffic"]]
        taken = [x for row in rounds if (x := row.get("seconds", {}).get(name)) is not None]
        traffic.append(
            (
                name,
                f"{sum(name in r['accepted'] for r in rounds)} of "
                f"{sum(name in r['selected'] for r in rounds)}",
                str(sum(len(times) for (c, _), times in s.rejected.items() if c == name)),
                str(sum(c == name for _, c, _ in s.failed)),
                *(f"{sum(t[key] for t in sent):,}" for key in keys),
                f"{sum(taken):.1f}" if taken else "-",
            )
        )
    titles = ("client", "accepted", "rejected", "failed", *_TRAFFIC[1:5], "seconds")
    trained = f"{shown}: held out,{_TRAINED}"
    return [
        *_measured_table(f"{shown}: held out", names, s.losses, s.scores, s.score),
        *_measured_table(trained, names, s.trained_losses, s.trained_scores, s.score),
        (f"{shown}: updates and bytes", titles, traffic),
    ]


def _measured_table(
    title: str, names: Sequence[str], losses: Series, scores: Series, score: str
) -> list[Table]:
    """How often each client was measured, and its first and last values; no table if never."""
    parts = [(series, name) for series, name in ((losses, "loss"), (scores, score)) if series]
    if not parts:
        return []
    head = [f"{name} {when}" for _, name in parts for when in ("first", "last")]
    rows = []
    for name in names:
        taken = [[values[name] for _, values in series if name in values] for series, _ in parts]
        ends = [_number(x[i]) if x else "-" for x in taken for i in (0, -1)]
        rows.append((name, str(max(map(len, taken))), *ends))
    return [(title, ("client", "times", *head), rows)]


# Markdown ---------------------------------------------------------------------------------------


def _sections(tables: Iterable[Table]) -> str:
    return "".join(f"## {title[0].upper()}{title[1:]}\n\n{_table(head, rows)}\n"
                   for title, head, rows in tables)  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in x)} |\n" for x in lines)


def _escaped(line: str) -> str:
    """Return text from elsewhere so that Markdown shows it as it is: no links, tags, code."""
    return re.sub(r"([\\\\`*<>\[\]])", r"\\\1", line)


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"- {' '.join(line.split())}\n" for line in lines) or "None.\n"
    return f"## {title}\n\n{items}\n"
