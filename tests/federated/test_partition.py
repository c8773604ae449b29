"""Partitions: each row once, the same for the same seed, clear errors."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.federated import partition
from plait.federated.partition import (
    by_column,
    dirichlet,
    files,
    histogram,
    iid,
    select,
    shards,
    split,
)

QUICK = settings(max_examples=50)


def whole(found: dict[str, list[int]], rows: int) -> None:
    """Each row stands exactly once, in order."""
    assert sorted(row for part in found.values() for row in part) == list(range(rows))
    assert all(part == sorted(part) for part in found.values())


@QUICK
@given(rows=st.integers(1, 200), clients=st.integers(1, 12), seed=st.integers(0, 5))
def test_iid(rows: int, clients: int, seed: int) -> None:
    if rows < clients:
        with pytest.raises(ValueError, match=f"{rows} rows are too few for 1 or more on each"):
            iid(rows, clients, seed)
        return
    found = iid(rows, clients, seed)
    whole(found, rows)
    sizes = [len(part) for part in found.values()]
    assert max(sizes) - min(sizes) <= 1
    assert found == iid(rows, clients, seed)


@QUICK
@given(
    labels=st.lists(st.integers(0, 4), min_size=60, max_size=150),
    clients=st.integers(1, 6),
    alpha=st.sampled_from([0.5, 1.0, 10.0]),
    seed=st.integers(0, 3),
)
def test_dirichlet(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    found = dirichlet(labels, clients, alpha, seed)
    whole(found, len(labels))
    assert min(map(len, found.values())) >= 1
    assert found == dirichlet(labels, clients, alpha, seed)
    if clients > 1:
        assert found != dirichlet(labels, clients, alpha, seed + 1)


@QUICK
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=80),
    clients=st.integers(1, 5),
    per_client=st.integers(1, 3),
)
def test_shards(labels: list[str], clients: int, per_client: int) -> None:
    if len(labels) < clients * per_client:
        with pytest.raises(ValueError, match="rows are too few"):
            shards(labels, clients, per_client)
        return
    found = shards(labels, clients, per_client)
    whole(found, len(labels))
    assert found == shards(labels, clients, per_client)


@QUICK
@given(labels=st.lists(st.sampled_from(["law", "care", "tax"]), min_size=1, max_size=50))
def test_by_column(labels: list[str]) -> None:
    found = by_column(labels)
    whole(found, len(labels))
    assert {name: {labels[row] for row in rows} for name, rows in found.items()} == {
        name: {name} for name in labels
    }
    assert list(found) == sorted(found)


def test_alpha_is_the_skew() -> None:
    labels = [row % 5 for row in range(5000)]

    def spread(alpha: float) -> float:
        table = histogram(dirichlet(labels, 10, alpha, seed=1), labels)
        return sum(max(own.values()) / sum(own.values()) for own in table.values()) / len(table)

    assert spread(0.1) > 0.6
    assert spread(1000.0) < 0.25


def test_shards_have_few_labels() -> None:
    labels = [row % 10 for row in range(1000)]
    table = histogram(shards(labels, 10, 2), labels)
    assert all(sum(n > 0 for n in own.values()) <= 4 for own in table.values())
    assert all(list(own) == list(range(10)) for own in table.values())
    assert Counter(labels) == sum((Counter(own) for own in table.values()), Counter())


def test_a_split_does_not_move() -> None:
    """numpy keeps these streams; a new one that does not would split old runs anew."""
    assert iid(10, 3) == {"client-0": [0, 2, 3, 7], "client-1": [1, 5, 9], "client-2": [4, 6, 8]}
    assert select([f"c{i}" for i in range(8)], 0.5, 0, 1) == ["c0", "c4", "c5", "c6"]


def test_files(tmp_path: Path) -> None:
    for name in ("law.jsonl", "care.jsonl"):
        (tmp_path / name).write_text("{}\n")
    paths = [tmp_path / "law.jsonl", tmp_path / "care.jsonl"]
    assert files(paths) == {"law": paths[0], "care": paths[1]}
    with pytest.raises(FileNotFoundError, match=r"tax\.jsonl is missing\. Give one file for each"):
        files([*paths, tmp_path / "tax.jsonl"])
    with pytest.raises(ValueError, match="would both be client 'law'"):
        files([paths[0], paths[0]])
    with pytest.raises(ValueError, match="no files"):
        files([])


def test_names() -> None:
    assert list(iid(3, ["b", "a"])) == ["b", "a"]
    assert list(iid(11, 11))[:2] == ["client-00", "client-01"]
    with pytest.raises(ValueError, match=r"clients = \['a', 'a'\]\. Give each name once"):
        iid(3, ["a", "a"])
    with pytest.raises(ValueError, match=r"client = '\.\./a' cannot name a file"):
        iid(3, ["../a"])
    with pytest.raises(ValueError, match=r"clients = 0\. Give 1 or more\."):
        iid(3, 0)
    with pytest.raises(ValueError, match="two values of the column are written '1'"):
        by_column([1, "1"])
    with pytest.raises(ValueError, match="client = 'a b' cannot name a file"):
        by_column(["a b"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: dirichlet([1, 2], 2, 0.0), r"alpha = 0\.0\. Give a number above 0"),
        (lambda: dirichlet([1, 2], 2, 1.0, min_rows=2), "2 rows are too few for 2 or more on each"),
        (lambda: dirichlet([1] * 20, 10, 0.01), "no Dirichlet split in 100 draws gave each of 10"),
        (lambda: shards([1, 2], 1, 0), r"shards = 0\. Give 1 or more\."),
        (lambda: by_column([]), "by_column of no rows"),
        (lambda: split("dirichlt", 3), r"partition\.kind = 'dirichlt' is not known\. Did you mean"),
        (lambda: split("shards", 3), "needs a column of 3 values; none was given"),
        (lambda: split("shards", 3, [1]), "needs a column of 3 values; one of 1 values was given"),
        (lambda: select(["a"], 0.0, 0, 1), r"sampling\.fraction = 0\.0\. Give a share above 0"),
    ],
)
def test_errors(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_split_by_name() -> None:
    labels = [row % 3 for row in range(30)]
    assert split("iid", 30, clients=3) == iid(30, 3)
    assert split("by_column", 30, labels) == by_column(labels)
    assert split("dirichlet", 30, labels, clients=3, alpha=1.0) == dirichlet(labels, 3, 1.0)
    assert split("shards", 30, labels, clients=3) == shards(labels, 3)
    assert set(partition.KINDS) == {"iid", "dirichlet", "by_column", "shards", "files"}


def test_select() -> None:
    names = [f"c{i}" for i in range(20)]
    rounds = [select(names, 0.25, 7, n) for n in range(1, 40)]
    assert all(len(one) == 5 and one == sorted(set(one)) for one in rounds)
    assert rounds == [select(list(reversed(names)), 0.25, 7, n) for n in range(1, 40)]
    assert len({tuple(one) for one in rounds}) > 30
    assert {name for one in rounds for name in one} == set(names)
    assert select(names, 0.01, 7, 1) != []
    assert select(names, 1.0, 7, 1) == sorted(names)
    drawn = [len(select(names, 0.25, 7, n, poisson=True)) for n in range(1, 400)]
    assert 4.6 < sum(drawn) / len(drawn) < 5.4
    assert len(set(drawn)) > 5
