"""The support matrix: a row for each method, a column for each feature.

A cell asks the code that refuses the combination in a run, so nothing is stated twice. A test tries
every cell, the refused ones too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plait.chain import chain_support
from plait.chain.recipes import RECIPES
from plait.core import gates
from plait.core.registry import find
from plait.run.config import method_names, method_options
from plait.run.model import quantised_reason
from plait.run.optimizers import OPTIMIZERS, optimizer_support
from plait.upstream.table import BASELINES


@dataclass(frozen=True)
class Feature:
    """One column: its name, its group, and why a method does not have it (None: it has)."""

    key: str
    group: str
    why_not: Callable[[str], str | None]


def why_not(method: str, feature: str) -> str | None:
    """Why a method does not have a feature, in one clause; None where it has.

    Args:
        method: as in `method.name`.
        feature: key of one of FEATURES.
    """
    reason = FEATURES[feature].why_not(method)
    if reason is None:
        return None
    reason = re.sub(rf"\b{method}'s\b", "its", reason)
    name = rf"\b{method}\b( fine-tuning)?"
    return re.sub(name, "it", reason).partition(". ")[0].rstrip(".")


def matrix() -> dict[str, dict[str, str | None]]:
    """why_not of every method and feature."""
    return {m: {f: why_not(m, f) for f in FEATURES} for m in method_names()}


def tables() -> tuple[dict[str, list[list[str]]], list[str]]:
    """The matrix as text: group -> rows of cells, the head first; and the notes.

    A cell is "yes" or the number of a note, which says why not.
    """
    notes: list[str] = []
    groups: dict[str, list[list[str]]] = {}
    for group in dict.fromkeys(f.group for f in FEATURES.values()):
        features = [f for f in FEATURES.values() if f.group == group]
        rows = [["", *(f.key.removeprefix(f"{group} ") for f in features)]]
        for method in method_names():
            row = [method]
            for feature in features:
                reason = why_not(method, feature.key)
                if reason is not None and reason not in notes:
                    notes.append(reason)
                row.append("yes" if reason is None else f"no {notes.index(reason) + 1}")
            rows.append(row)
        groups[group] = rows
    return groups, notes


def _entry(method: str) -> Any:
    return BASELINES[method] if method in BASELINES else find(method)


def _merge(method: str) -> str | None:
    return None if _entry(method).mergeable else "its update depends on the input"


def _export(method: str) -> str | None:
    if method in BASELINES:
        return BASELINES[method].no_export
    entry = find(method)
    if entry.exact_export:
        return None
    return "approximate" if entry.mergeable else "its update depends on the input"


def _start(method: str) -> str | None:
    """Why a method cannot start at the main directions of the weight."""
    if method in BASELINES:
        pissa = BASELINES[method].start == "pissa"
        return None if pissa else "of upstream only pissa starts there"
    if "init" in method_options(method):
        return None
    return "its factors are not free, or have a start of their own"


def _gate(key: str) -> Callable[[str], str | None]:
    def why(method: str) -> str | None:
        if method in BASELINES:
            return "gates act on plait's methods"
        try:
            find(method).config(gates=[key])
        except ValueError as error:
            return str(error).partition(": ")[2]
        return None

    return why


def _chain(plan: str) -> Callable[[str], str | None]:
    def why(method: str) -> str | None:
        reason = chain_support(plan, method)
        return None if reason is None else reason.partition(": ")[2]

    return why


def _features() -> dict[str, Feature]:
    features = [
        Feature("merge", "method", _merge),
        Feature("init pissa", "method", _start),
        *(Feature(f"gate {g.key}", "method", _gate(g.key)) for g in gates()),
        *(
            Feature(f"optimizer {key}", "optimizer", lambda m, key=key: optimizer_support(key, m))
            for key in OPTIMIZERS
        ),
        *(Feature(f"chain {plan}", "chain", _chain(plan)) for plan in RECIPES),
        *(Feature(b, "base", lambda m, b=b: quantised_reason(m, b)) for b in ("8bit", "4bit")),
        Feature("export lora", "export", _export),
        Feature("export merged", "export", _merge),
    ]
    return {f.key: f for f in features}


FEATURES: dict[str, Feature] = _features()
