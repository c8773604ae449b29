"""Which held-out rows also occur among the training rows."""

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


def overlap(bundle: DataBundle) -> list[Overlap]:
    """Compare validation and test with train: case, Unicode form and white space are ignored."""
    seen: dict[str, set[str]] = {}
    for question, answer in _questions(bundle.train, bundle.kind):
        seen.setdefault(question, set()).add(answer)
    overlaps = []
    for name, split in bundle.splits().items():
        if name == "train":
            continue
        shared = [(q, a) for q, a in _questions(split, bundle.kind) if q in seen]
        identical = sum(a in seen[q] for q, a in shared)
        examples = list(dict.fromkeys(q for q, _ in shared))[:3]
        overlaps.append(Overlap(name, len(shared), identical, len(split), examples))
    return overlaps


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
