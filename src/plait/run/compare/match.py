"""Give all arms about the same size: the choice of each arm's rank.

Every arm is prepared once, so that what training would refuse is refused before the first run.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plait.core.files import write_atomic
from plait.run.compare.study import Study, Trial
from plait.run.config import RunConfig, method_options

RANK = "r"
_FILE, _VERSION = "arms.json", 1
_MOST_RANK = 4096


@dataclass(frozen=True)
class Arm:
    """What was chosen for an arm.

    rank: the value of its option r; None for a method without one. parameters: trained. gap: of
    these to the reference's, as a share of them.
    """

    name: str
    rank: int | None
    parameters: int
    gap: float

    def __str__(self) -> str:
        rank = "no rank to choose" if self.rank is None else f"r = {self.rank}"
        gap = "" if self.gap == 0 else f", {self.gap:+.1%} against the reference"
        return f"{self.name}: {rank}, {self.parameters:,} trained parameters{gap}"


@dataclass(frozen=True)
class Sizes:
    """What is known of a study before its first run.

    arms: in the study's order. steps: cell -> optimizer steps of a whole run. rows: cell -> split
    -> its rows.
    """

    arms: list[Arm]
    steps: dict[str, int]
    rows: dict[str, dict[str, int]]


def match_arms(study: Study) -> tuple[Study, Sizes]:
    """Return the study with the ranks that `match` asks for, and the sizes that it has then.

    What was found is kept in the folder of the comparison for the next call.

    Raises what `plait.run.prepare.prepare` raises, and ValueError for `match: rank` with a
    reference without one.
    """
    file, digest = study.folder / _FILE, _digest(study)
    sizes = _read(file, digest)
    if sizes is None:
        sizes = _look(study)
        study.folder.mkdir(parents=True, exist_ok=True)
        content = {"schema": "plait.arms", "version": _VERSION, "digest": digest}
        content |= dataclasses.asdict(sizes)
        write_atomic(file, json.dumps(content, indent=1) + "\n")
    return with_ranks(study, {arm.name: arm.rank for arm in sizes.arms}), sizes


def _look(study: Study) -> Sizes:
    """Prepare every arm, and the reference with each cell's rows."""
    from plait.run.compare.warm import Warm
    from plait.run.model import parameter_counts
    from plait.run.prepare import prepare

    warm, steps, rows = Warm(), dict[str, int](), dict[str, dict[str, int]]()
    for cell in study.cells:
        prepared = prepare(study.config(study.reference, cell), place=False, loader=warm)
        steps[cell] = prepared.steps
        rows[cell] = {name: len(split) for name, split in prepared.data.splits().items()}

    def count(config: RunConfig) -> int:
        return parameter_counts(prepare(config, place=False, loader=warm).model)[0]

    return Sizes(choose(study, count), steps, rows)


def choose(study: Study, count: Callable[[RunConfig], int]) -> list[Arm]:
    """Choose each arm's rank; count: of trained parameters of a run.

    Raises ValueError for `match: rank` with a reference without one.
    """
    counts: dict[tuple[str, int | None], int] = {}

    def parameters(arm: str, rank: int | None) -> int:
        if (arm, rank) not in counts:
            changed = with_ranks(study, {arm: rank})
            first = next(iter(study.cells))
            counts[arm, rank] = count(changed.config(arm, first, tuning=True))
        return counts[arm, rank]

    reference, kind = study.reference, study.options.match
    of_reference = rank_of(study, reference)
    if kind == "rank" and of_reference is None:
        raise ValueError(
            f"{study.file}: match is rank, and the reference {reference} has none. Use parameters."
        )
    target, arms = parameters(reference, of_reference), []
    for arm in study.arms:
        rank = rank_of(study, arm)
        if rank is not None and arm != reference:
            if kind == "rank":
                rank = of_reference
            elif kind == "parameters":
                rank = _nearest(lambda r, arm=arm: parameters(arm, r), target, rank)
        made = parameters(arm, rank)
        arms.append(Arm(arm, rank, made, made / target - 1))
    return arms


def rank_of(study: Study, arm: str) -> int | None:
    """Return the rank of an arm, given or the method's default; None if it has no option r."""
    section = study.arms[arm]
    options = method_options(str(section.get("name", "lora")))
    if RANK not in options:
        return None
    rank = section.get(RANK, options[RANK].default)
    return rank if isinstance(rank, int) and rank > 0 else None


def with_ranks(study: Study, ranks: dict[str, int | None]) -> Study:
    """Return the study with these ranks; None leaves an arm as it is."""
    arms = {
        name: section if ranks.get(name) is None else {**section, RANK: ranks[name]}
        for name, section in study.arms.items()
    }
    return dataclasses.replace(study, arms=arms)


def _nearest(count: Callable[[int], int], target: int, start: int) -> int:
    """Return the rank whose count is nearest to the target; count does not fall with the rank.

    A method may refuse ranks, such as odd ones, or those above a layer's: it raises ValueError for
    them. start: a rank that it takes.
    """

    def size(rank: int) -> float:
        try:
            return count(rank)
        except ValueError:
            return math.inf

    count(start)  # raises what is wrong with the arm itself
    unit = next(u for u in (1, 2, 4, 8, start) if math.isfinite(size(u)))
    low, high = 1, max(1, start // unit)  # in units
    while size(high * unit) < target and high * unit < _MOST_RANK:
        low, high = high, 2 * high
    while high - low > 1:
        below, above = size(low * unit), size(high * unit)
        if below >= target or below == above:
            break
        share = (target - below) / (above - below) if math.isfinite(above) else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        if size(middle * unit) < target:
            low = middle
            if size((low + 1) * unit) >= target:
                high = low + 1
        else:
            high = middle
            if size((high - 1) * unit) < target:
                low = high - 1
    return unit * min((low, high), key=lambda rank: (abs(size(rank * unit) - target), rank))


def _digest(study: Study) -> str:
    """Return a digest of what decides the choice: the file, its rows, the versions."""
    config = study.config(study.reference, next(iter(study.cells)), tuning=True)
    key = Trial(study.reference, "", 0.0, 0, config).key
    parts = [key, study.arms, study.reference, study.options.match]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _read(file: Path, digest: str) -> Sizes | None:
    """Return what an earlier call chose; None if there is none for this study."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["digest"] != digest:
            return None
        arms = [Arm(**arm) for arm in content["arms"]]
        return Sizes(arms, content["steps"], content["rows"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: damaged ({error}). Remove it.") from None
