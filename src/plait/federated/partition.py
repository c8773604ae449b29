"""Which client holds which rows, and which clients take part in a round.

    iid         rows shuffled, dealt out evenly
    dirichlet   each value of a column is split by p ~ Dirichlet(alpha, .., alpha) over the clients
    by_column   one client for each value of a column, such as a user or a task
    shards      rows sorted by a column and cut into shards; each client draws some of them
    files       one client for each file, named by its stem

A partition maps client names to sorted row indices; each row occurs exactly once. It depends only
on its arguments and the seed: it is the same on every machine and for any number of workers, as
long as numpy keeps its random streams. Save it with a run that must be reproducible for years.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.config import did_you_mean
from plait.core.init import seeded
from plait.federated.payload import check_name

Partition = dict[str, list[int]]
KINDS = ("iid", "dirichlet", "by_column", "shards", "files")
_TRIES = 100  # draws of a Dirichlet split until every client has its least number of rows


def names_of(clients: int | Sequence[str]) -> list[str]:
    """Client names: the names themselves, or client-0, client-1, .. with leading zeros.

    Raises:
        ValueError: no client, a duplicate name, or one that cannot name a file.
    """
    if isinstance(clients, int):
        if clients < 1:
            raise ValueError(f"partition: clients = {clients}. Give 1 or more.")
        width = len(str(clients - 1))
        return [f"client-{i:0{width}}" for i in range(clients)]
    names = [check_name("client", name) for name in clients]
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice or not names:
        raise ValueError(f"partition: clients = {names}. Give each name once, and at least one.")
    return names


def iid(rows: int, clients: int | Sequence[str], seed: int = 0) -> Partition:
    """Shuffled rows, dealt out so that sizes differ by one at most.

    Raises:
        ValueError: fewer rows than clients.
    """
    names = names_of(clients)
    _enough(rows, len(names))
    order = _random("iid", seed).permutation(rows)
    return {name: sorted(map(int, order[i :: len(names)])) for i, name in enumerate(names)}


def dirichlet(
    labels: Sequence[Hashable],
    clients: int | Sequence[str],
    alpha: float,
    seed: int = 0,
    min_rows: int = 1,
) -> Partition:
    """Label skew: small alpha gives each client few labels, large alpha approaches iid.

    Args:
        labels: the column, one value a row. clients: number or names. alpha: above 0; 0.1 to 1 is
            usual. seed: of the draws.
        min_rows: least rows of a client; the split is redrawn up to 100 times until all have them.

    Raises:
        ValueError: alpha is not positive, or no draw gave every client min_rows.
    """
    names = names_of(clients)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"partition: alpha = {alpha}. Give a number above 0, such as 0.3.")
    _enough(len(labels), len(names) * min_rows, min_rows)
    random, groups = _random("dirichlet", seed), _groups(labels)
    for _ in range(_TRIES):
        partition: Partition = {name: [] for name in names}
        for rows in groups.values():
            order = random.permutation(rows)
            shares = random.dirichlet([alpha] * len(names))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).round().astype(int)
            for name, part in zip(names, np.split(order, cuts), strict=True):
                partition[name] += map(int, part)
        if min(map(len, partition.values())) >= min_rows:
            return {name: sorted(rows) for name, rows in partition.items()}
    raise ValueError(
        f"partition: no Dirichlet split in {_TRIES} draws gave each of {len(names)} clients "
        f"{min_rows} of {len(labels)} rows with alpha = {alpha}. Raise alpha, lower min_rows or "
        "the number of clients."
    )


def by_column(values: Sequence[Hashable]) -> Partition:
    """One client for each value, named by it.

    Raises:
        ValueError: no row, or a value that cannot be a name, or two values of one name.
    """
    partition: Partition = {}
    for value, rows in _groups(values).items():
        name = check_name("partition.by_column: client", str(value))
        if name in partition:
            raise ValueError(
                f"partition: two values of the column are written {name!r}. Make them one type."
            )
        partition[name] = rows
    if not partition:
        raise ValueError("partition: by_column of no rows. Give a data set.")
    return partition


def shards(
    labels: Sequence[Hashable], clients: int | Sequence[str], per_client: int = 2, seed: int = 0
) -> Partition:
    """Rows sorted by label, cut into clients x per_client shards, drawn without replacement.

    Raises:
        ValueError: per_client below 1, or fewer rows than shards.
    """
    names = names_of(clients)
    if per_client < 1:
        raise ValueError(f"partition: shards = {per_client}. Give 1 or more.")
    count = len(names) * per_client
    _enough(len(labels), count, per_client)
    rows = [row for group in _groups(labels).values() for row in group]
    parts = np.array_split(np.array(rows), count)
    order = _random("shards", seed).permutation(count)
    return {
        name: sorted(
            int(row) for k in order[i * per_client : (i + 1) * per_client] for row in parts[k]
        )
        for i, name in enumerate(names)
    }


def files(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Client name -> its file, by the stem.

    Raises:
        ValueError: no file, or two of one stem.
        FileNotFoundError: a file is missing.
    """
    paths_of: dict[str, Path] = {}
    for path in map(Path, paths):
        name = check_name("partition.files: client", path.stem)
        if name in paths_of:
            raise ValueError(
                f"partition: {paths_of[name]} and {path} would both be client {name!r}. Rename one."
            )
        if not path.is_file():
            raise FileNotFoundError(f"partition: {path} is missing. Give one file for each client.")
        paths_of[name] = path
    if not paths_of:
        raise ValueError("partition: no files. Give one for each client.")
    return paths_of


def split(
    kind: str, rows: int, column: Sequence[Hashable] | None = None, **options: Any
) -> Partition:
    """A partition by the name of its kind, but for files.

    Args:
        kind: one of KINDS. rows: number of rows. column: its values, where the kind needs one.
        options: of the function of that name.

    Raises:
        ValueError: an unknown kind, or a column that is missing or of another length.
    """
    if kind not in KINDS or kind == "files":
        raise ValueError(
            f"partition.kind = {kind!r} is not known. {did_you_mean(kind, KINDS[:-1])}"
        )
    if kind == "iid":
        return iid(rows, **options)
    if column is None or len(column) != rows:
        given = "none" if column is None else f"one of {len(column)} values"
        raise ValueError(
            f"partition.kind = {kind!r} needs a column of {rows} values; {given} was given. Name "
            "it in partition.by."
        )
    if kind == "by_column":
        return by_column(column, **options)
    return {"dirichlet": dirichlet, "shards": shards}[kind](column, **options)


def histogram(
    partition: Mapping[str, Sequence[int]], labels: Sequence[Hashable]
) -> dict[str, dict[Hashable, int]]:
    """Client -> label -> rows, labels in one order for all, for a table."""
    known = list(_groups(labels))
    counts = {name: Counter(labels[row] for row in rows) for name, rows in partition.items()}
    return {name: {label: counted[label] for label in known} for name, counted in counts.items()}


def select(
    clients: Sequence[str], fraction: float, seed: object, round: int, *, poisson: bool = False
) -> list[str]:
    """The clients that take part in a round, sorted; from the seed and the round alone.

    Args:
        clients: all of them. fraction: share of them, above 0 and up to 1. seed: of the draws.
        round: 1, 2, ...
        poisson: each client by itself with this probability, as the privacy accountant takes it;
            else max(int(fraction n), 1) of them without replacement.

    Raises:
        ValueError: fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sampling.fraction = {fraction}. Give a share above 0 and up to 1.")
    names = sorted(clients)
    if fraction == 1:
        return names
    random = _random("select", f"{seed}/{round}")
    if poisson:
        drawn = random.random(len(names)) < fraction
        return [name for name, taken in zip(names, drawn, strict=True) if taken]
    count = max(int(fraction * len(names)), 1)
    return [names[i] for i in sorted(random.permutation(len(names))[:count])]


def _random(kind: str, seed: object) -> np.random.Generator:
    """A generator keyed by what it is for and the seed."""
    return np.random.Generator(np.random.PCG64(seeded("partition", kind, seed).initial_seed()))


def _groups(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Value -> its rows, values in the order of their text."""
    groups: dict[Hashable, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    return {value: groups[value] for value in sorted(groups, key=lambda v: (str(v), str(type(v))))}


def _enough(rows: int, least: int, each: int = 1) -> None:
    if rows < least:
        raise ValueError(
            f"partition: {rows} rows are too few for {each} or more on each client; {least} are "
            "needed. Lower the number of clients."
        )
