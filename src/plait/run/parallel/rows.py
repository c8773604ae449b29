"""Which rows of an optimizer step each process trains on.

A step of N processes with B rows each takes the rows that one process with N B rows takes, in the
same order. accelerate would fill up the last step of an epoch with rows of its beginning. Here its
rows are shared out evenly, and a process that gets none computes on one row without any weight.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

IDLE = "idle"  # key of a batch that only keeps a process in step with the others


class Shares(BatchSampler):
    """The share of one process of the batches of all: row numbers, none if there are too few.

    Args:
        batches: of one process' size each.
        size: number of processes. rank: of this one.
    """

    def __init__(self, batches: BatchSampler, size: int, rank: int) -> None:
        self.batches, self.size, self.rank = batches, size, rank
        self.drop_last = batches.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row numbers of each micro-batch."""
        batches = iter(self.batches)
        for _ in range(len(self)):
            rows = [row for batch in islice(batches, self.size) for row in batch]
            first, last = (len(rows) * (self.rank + i) // self.size for i in (0, 1))
            yield rows[first:last]

    def __len__(self) -> int:
        """The number of micro-batches, on all processes the same."""
        count = len(self.batches)
        return count // self.size if self.drop_last else -(-count // self.size)


class Idling:
    """A collator that makes an idle batch, of the first of some rows, for a process without any."""

    def __init__(self, collate: Callable[[list[Any]], Any], rows: Any) -> None:
        self.collate, self.rows = collate, rows

    def __call__(self, rows: list[Any]) -> Any:
        """Collate rows, or none."""
        return self.collate(rows) if rows else {**self.collate([self.rows[0]]), IDLE: True}


def share(loader: DataLoader, size: int, rank: int) -> DataLoader:
    """Let a loader that accelerate prepared give a process its share of each step's rows.

    Raises ValueError for a loader whose rows cannot be numbered, such as a stream.
    """
    shard: Any = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or shard.split_batches:
        raise ValueError(
            "data.train: these rows cannot be divided among processes, because they have no "
            "index. Train in one process, or leave out streaming and split_batches."
        )
    batches: Any = shard.batch_sampler
    shard.batch_sampler = Shares(batches, size, rank)
    shard.num_processes, shard.process_index = 1, 0  # it passes on what it gets
    shard.batch_size, shard.even_batches = None, False
    return loader
