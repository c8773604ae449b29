"""Which rows occur several times: in train, and in train and a held-out split."""

from collections.abc import Iterable
from dataclasses import dataclass

from datasets import Dataset

from plait.run.data.bundle import DataBundle
from plait.run.data.reader import Kind, normal


@dataclass(frozen=True)
class Overlap:
    """Rows of a held-out split whose input also occurs among the training rows.

    rows: their number. identical: of these, those with the same answer. total: rows of the
    split. examples: up to three of the inputs.
    """

    split: str
    rows: int
    identical: int
    total: int
    examples: list[str]


@dataclass(frozen=True)
class Repeats:
    """Training rows whose input occurs in an earlier training row.

    rows: their number. identical: of these, those whose answer that input had before, too. inputs:
    different inputs of all training rows.
    """

    rows: int
    identical: int
    inputs: int


def overlap(bundle: DataBundle) -> list[Overlap]:
    """Compare validation and test with train: case, Unicode form and white space are ignored."""
    seen = _answers(bundle.train, bundle.kind)
    overlaps = []
    for name, split in bundle.splits().items():
        if name == "train":
            continue
        shared = [(q, a) for q, a in _questions(split, bundle.kind) if q in seen]
        identical = sum(a in seen[q] for q, a in shared)
        examples = list(dict.fromkeys(q for q, _ in shared))[:3]
        overlaps.append(Overlap(name, len(shared), identical, len(split), examples))
    return overlaps


def repeats(bundle: DataBundle) -> Repeats:
    """Count the rows that occur several times in train, compared as `overlap` does."""
    seen = _answers(bundle.train, bundle.kind)
    rows, different = len(bundle.train), sum(map(len, seen.values()))
    return Repeats(rows - len(seen), rows - different, len(seen))


def _answers(split: Dataset, kind: Kind) -> dict[str, set[str]]:
    """Input -> its answers."""
    seen: dict[str, set[str]] = {}
    for question, answer in _questions(split, kind):
        seen.setdefault(question, set()).add(answer)
    return seen


def _questions(split: Dataset, kind: Kind) -> Iterable[tuple[str, str]]:
    """Yield (normalised input, normalised answer); a plain text is its own input."""
    if kind in ("classification", "regression"):
        pairs = split["text_pair"] if "text_pair" in split.column_names else [""] * len(split)
        questions = [f"{a} {b}" for a, b in zip(split["text"], pairs, strict=True)]
        answers = [str(label) for label in split["label"]]
    elif kind == "text":
        questions, answers = split["completion"], [""] * len(split)
    else:
        questions, answers = split["prompt"], split["completion"]
    return ((normal(q), normal(a)) for q, a in zip(questions, answers, strict=True))
