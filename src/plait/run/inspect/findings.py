"""What an inspection found: the report, its means over layers, and its JSON.

Every number of the tables and pictures is a number of this report.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

Number = float | None


@dataclass(frozen=True)
class UpdateReport:
    """One update of one layer.

    name: "dW", a task, or "expert i" (the part s B_i A_i of a token-routed method). norm:
    ||dW||_F. relative: norm / ||W||_F. rank: attainable. spectrum: singular values, largest
    first. untouched: share of entries that are exactly 0, dense updates only. left, right,
    cosine: see plait.inspect.direction.
    """

    name: str
    norm: Number
    relative: Number
    rank: int
    stable_rank: Number
    effective_rank: Number
    numerical_rank: int
    untouched: Number
    left: Number
    right: Number
    cosine: Number
    spectrum: list[Number]


@dataclass(frozen=True)
class GateReport:
    """values: of each rank. live: how many are not 0. ranks: how many there are."""

    values: list[Number]
    live: int
    ranks: int


@dataclass(frozen=True)
class LoadReport:
    """A router on some tokens; see plait.inspect.routing. Entropies in nats."""

    tokens: int
    load: list[Number]
    first: list[Number]
    entropy: Number
    load_entropy: Number


@dataclass(frozen=True)
class RoutingReport(LoadReport):
    """The same over all tokens, and for each task that the rows name."""

    tasks: dict[str, LoadReport] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer of one run. block and module: its place; shape: (out, in)."""

    run: str
    name: str
    block: int | None
    module: str
    shape: tuple[int, int]
    weight_norm: Number
    updates: list[UpdateReport]
    gate: GateReport | None
    routing: RoutingReport | None


@dataclass(frozen=True)
class PairReport:
    """Two factors, or two updates, of one layer.

    kind: "A", "B", "C", "D" or "dW". a, b: their names, with the run if there are several. overlap,
    chance, angles (degrees, smallest first): of the spaces that factors span; None for dW.
    """

    layer: str
    block: int | None
    module: str
    kind: str
    a: str
    b: str
    cosine: Number
    overlap: Number
    chance: Number
    angles: list[Number] | None


@dataclass(frozen=True)
class ModuleReport:
    """Means over the layers of one kind of module of one run, and over tasks or experts.

    rank: attainable, (least, most). live: mean of the ranks whose gate is not 0; of ranks.
    """

    run: str
    module: str
    layers: int
    norm: Number
    relative: Number
    rank: tuple[int, int]
    stable_rank: Number
    effective_rank: Number
    numerical_rank: Number
    untouched: Number
    left: Number
    right: Number
    cosine: Number
    live: Number
    ranks: Number


@dataclass(frozen=True)
class SimilarityReport:
    """Means over layers of one pair; smallest, largest: mean of its extreme angles, degrees."""

    kind: str
    a: str
    b: str
    layers: int
    cosine: Number
    overlap: Number
    chance: Number
    smallest: Number
    largest: Number


@dataclass(frozen=True)
class MeanLoad:
    """Means over the routed layers of a run with one number of experts; task None: all tokens."""

    run: str
    task: str | None
    experts: int
    layers: int
    tokens: int
    load: list[Number]
    first: list[Number]
    entropy: Number
    load_entropy: Number


@dataclass(frozen=True)
class RunReport:
    """One run. updates: "single", "tasks" or "experts". notes: what was left out, and why."""

    label: str
    path: str
    method: str
    model: str
    layers: int
    updates: str
    notes: list[str]


@dataclass(frozen=True)
class InspectReport:
    """The whole report. principal: number of W's top directions compared, 0 for none."""

    format: int
    principal: int
    runs: list[RunReport]
    notes: list[str]
    modules: list[ModuleReport]
    similarity: list[SimilarityReport]
    loads: list[MeanLoad]
    layers: list[LayerReport]
    pairs: list[PairReport]

    def text(self) -> str:
        """As JSON: numbers to six digits, null for those that are not finite."""
        text = json.dumps(plain(asdict(self)), indent=1, allow_nan=False)
        # Lists of numbers on one line each: a spectrum can have thousands.
        return re.sub(r'\[\s+([^\[\]{}"]+?)\s+\]', _one_line, text) + "\n"


# ---------------------------------------------------------------------------------------- means


def by_module(layers: Iterable[LayerReport]) -> list[ModuleReport]:
    """Means over the layers of each kind of module."""
    groups: dict[tuple[str, str], list[LayerReport]] = defaultdict(list)
    for layer in layers:
        groups[layer.run, layer.module].append(layer)
    order = list(dict.fromkeys(run for run, _ in groups))
    reports = []
    for run, module in sorted(groups, key=lambda key: order.index(key[0])):
        members = groups[run, module]
        updates = [u for layer in members for u in layer.updates]
        gates = [layer.gate for layer in members if layer.gate is not None]
        numbers = {
            name: mean(getattr(u, name) for u in updates)
            for name in (
                "norm", "relative", "stable_rank", "effective_rank", "numerical_rank",
                "untouched", "left", "right", "cosine",
            )
        }  # fmt: skip
        reports.append(
            ModuleReport(
                run=run,
                module=module,
                layers=len(members),
                rank=(min(u.rank for u in updates), max(u.rank for u in updates)),
                live=mean(g.live for g in gates),
                ranks=mean(g.ranks for g in gates),
                **numbers,
            )
        )
    return reports


def by_pair(pairs: Iterable[PairReport]) -> list[SimilarityReport]:
    """Means over the layers of each pair."""
    groups: dict[tuple[str, str, str], list[PairReport]] = defaultdict(list)
    for pair in pairs:
        groups[pair.kind, pair.a, pair.b].append(pair)
    kinds = ["A", "B", "C", "D", "dW"]
    return [
        SimilarityReport(
            kind=kind,
            a=a,
            b=b,
            layers=len(same),
            cosine=mean(p.cosine for p in same),
            overlap=mean(p.overlap for p in same),
            chance=mean(p.chance for p in same),
            smallest=mean(p.angles[0] for p in same if p.angles),
            largest=mean(p.angles[-1] for p in same if p.angles),
        )
        for (kind, a, b), same in sorted(groups.items(), key=lambda item: kinds.index(item[0][0]))
    ]


def by_task(layers: Iterable[LayerReport]) -> list[MeanLoad]:
    """Means over the routed layers of each run, for each task and for all tokens."""
    groups: dict[tuple[str, int, str | None], list[LoadReport]] = defaultdict(list)
    for layer in layers:
        if layer.routing is not None:
            for task, load in {None: layer.routing, **layer.routing.tasks}.items():
                groups[layer.run, len(load.load), task].append(load)
    return [
        MeanLoad(
            run=run,
            task=task,
            experts=experts,
            layers=len(members),
            tokens=max(load.tokens for load in members),
            load=[mean(load.load[i] for load in members) for i in range(experts)],
            first=[mean(load.first[i] for load in members) for i in range(experts)],
            entropy=mean(load.entropy for load in members),
            load_entropy=mean(load.load_entropy for load in members),
        )
        for (run, experts, task), members in groups.items()
    ]


def short_names(modules: Iterable[str]) -> dict[str, str]:
    """Module -> its name without the parts that all share in front."""
    parts = {m: m.split(".") for m in dict.fromkeys(modules)}
    shared = 0
    shortest = min(map(len, parts.values()))
    while shared < shortest - 1 and len({p[shared] for p in parts.values()}) == 1:
        shared += 1
    while shared < shortest - 1 and all(p[shared] == "*" for p in parts.values()):
        shared += 1
    return {m: ".".join(p[shared:]) for m, p in parts.items()}


def mean(values: Iterable[Number | int]) -> Number:
    """Mean of the numbers that are defined; None without any."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"


def plain(value: Any) -> Any:
    """What JSON can hold: floats to six digits, None for those that are not finite."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
