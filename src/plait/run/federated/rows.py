"""Which client of a federated run trains and is measured on which rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from plait.federated.partition import Partition, files, split
from plait.run.config import did_you_mean
from plait.run.data import DataBundle
from plait.run.data.rows import read_rows
from plait.run.federated.config import FederateConfig

POOLED = "pooled"  # the one client of `central`


@dataclass(frozen=True)
class ClientRows:
    """The rows of a federated run.

    data: all of them; None on a server whose clients have rows of their own. partition: client of
    the config -> indices of its training rows. train, held_out: client that trains -> its rows;
    `central` has the one client `pooled`, and held_out also has those whose rows it is measured on.
    """

    data: DataBundle | None
    partition: Partition
    train: Mapping[str, Any]
    held_out: Mapping[str, Dataset | None]


def divide_rows(
    config: FederateConfig, data: DataBundle | None, client: str | None = None
) -> ClientRows:
    """Divide the rows of a run among its clients.

    Args:
        config: of the run. data: its rows; None on a server whose clients have their own.
        client: the one client of this machine; None: all, or the server.

    Raises:
        ValueError: a column that the rows do not have, or too few rows for the clients.
    """
    partition = _partition(config, data, client)
    if data is None:
        return ClientRows(None, partition, {}, {})
    train = {name: data.train.select(chosen) for name, chosen in partition.items()}
    rows = None if data.held_out_split is None else getattr(data, data.held_out_split)
    held_out: dict[str, Dataset | None] = dict.fromkeys(partition, rows)
    by, by_column = config.partition.by, config.partition.kind == "by_column"
    if rows is not None and by_column and by in rows.column_names:
        values = list(map(str, rows[by]))
        for name in partition:  # its own value
            chosen = [i for i, value in enumerate(values) if value == name]
            held_out[name] = rows.select(chosen) if chosen else None
    if config.federated.method == "central":
        train, held_out = {POOLED: data.train}, {**(held_out if by_column else {}), POOLED: rows}
    return ClientRows(data, partition, train, held_out)


def _partition(config: FederateConfig, data: DataBundle | None, client: str | None) -> Partition:
    part = config.partition
    if part.kind == "own" or data is None:
        partition: Partition = {str(name): [] for name in part.clients or ()}  # type: ignore[union-attr]
        if data is not None and client is not None:
            partition[client] = list(range(len(data.train)))
        return partition
    if part.kind != "files":
        options = {
            name: getattr(part, name)
            for name in ("clients", "alpha", "per_client", "min_rows")
            if getattr(part, name) is not None
        }
        if part.kind != "by_column":
            options["seed"] = part.seed
        known = [c for c in ("task", "label", "sample_type") if c in data.train.column_names]
        if part.by is not None and part.by not in known:
            raise ValueError(
                f"partition.by is {part.by!r}, and the rows have "
                f"{', '.join(known) or 'no such column'}. "
                f"{did_you_mean(part.by, known) if known else ''} Map a column with "
                "data.columns.task."
            )
        column = None if part.by is None else list(data.train[part.by])
        return split(part.kind, len(data.train), column, **options)
    partition, start = {}, 0
    for name, path in files(config.data.train).items():
        count = len(read_rows(str(path), config.data, "train"))
        partition[name] = list(range(start, start + count))
        start += count
    return partition
