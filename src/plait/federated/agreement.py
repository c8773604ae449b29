"""Norms of the changes that the clients of a round make, and cosines between them.

A change is what an update adds to what the client received: x - x_0 of each tensor, and
s (B A - B_0 A_0) of each layer whose product a method combines. Inner products of products come
from the factors, <B A, B' A'> = sum((A A'^T) * (B^T B')), so ranks may differ and nothing of the
size of W is formed. Sums are fp64.

Each update is compared with up to `PEERS` others. The changes of the peers are held for as many
tensors at a time as `HELD` numbers are enough for; all others are read one after the other.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.federated.methods import Algorithm, Change, Client, State, Updates
from plait.federated.methods.updates import HELD

PEERS = 256
_DIGITS = 9  # the last digits of a sum depend on where a tensor lies in memory


@dataclass(frozen=True)
class Agreement:
    """How far the updates of a round agree.

    names: of the clients, sorted. norms: of their changes. peers: index of each client that the
    others are compared with. cosines: (clients, peers), 0 where a change is 0.
    """

    names: Sequence[str]
    norms: Sequence[float]
    peers: Sequence[int]
    cosines: Tensor

    def of(self, i: int) -> list[float]:
        """The cosines of client number i with its peers."""
        row = self.cosines[i].tolist()
        return [x for x, peer in zip(row, self.peers, strict=True) if peer != i]

    def medians(self) -> list[float]:
        """The median of these for each client: a minority of peers cannot decide it."""
        return [statistics.median(self.of(i)) for i in range(len(self.names))]


def agreement(
    updates: Updates, method: Algorithm, state: State, clients: Mapping[str, Client]
) -> Agreement:
    """Compare the updates of a round.

    Args:
        updates: client -> upload, of two clients or more. method: theirs. state: the server's, that
            the round started from. clients: id -> what the config declares.
    """
    names = sorted(updates)
    peers = range(0, len(names), math.ceil(len(names) / PEERS))

    def change(i: int) -> Change:
        client = clients[names[i]]
        down = method.payload_down(state, client)
        return method.change(updates[names[i]], client, down)

    inner = torch.zeros(len(names), len(peers), dtype=torch.float64)
    squares = torch.zeros(len(names), dtype=torch.float64)
    for part in _parts(change(0), HELD // (2 * len(peers))):
        held = _Held([change(i) for i in peers], part)
        for i in range(len(names)):
            products, square = held.times(change(i))
            inner[i] += products
            squares[i] += square
    norms = squares.clamp(min=0).sqrt()
    scale = torch.outer(norms, norms[list(peers)])
    cosines = torch.where(scale > 0, inner / scale, 0.0)
    short = [float(f"{x:.{_DIGITS}g}") for x in norms.tolist()]
    return Agreement(names, short, list(peers), cosines.mul(10**_DIGITS).round() / 10**_DIGITS)


@dataclass(frozen=True)
class _Part:
    """Slices of some tensors (key, first, last), and the names of some products."""

    tensors: tuple[tuple[str, int, int], ...] = ()
    products: tuple[str, ...] = ()

    def vector(self, change: Change) -> Tensor:
        """The slices of the tensors of a change, one after the other, in fp64."""
        cut = [change.tensors[key].reshape(-1)[a:b] for key, a, b in self.tensors]
        return torch.cat(cut).double() if cut else torch.zeros(0, dtype=torch.float64)


def _parts(like: Change, most: int) -> Iterator[_Part]:
    """Divide a change into parts of up to `most` numbers; a product is never divided."""
    tensors, products, count = list[tuple[str, int, int]](), list[str](), 0
    for key, x in like.tensors.items():
        start = 0
        while start < x.numel():
            stop = min(x.numel(), start + max(1, most - count))
            tensors.append((key, start, stop))
            count, start = count + stop - start, stop
            if count >= most:
                yield _Part(tuple(tensors))
                tensors, count = [], 0
    for name, (A, B) in like.products.items():
        products.append(name)
        count += A.numel() + B.numel()
        if count >= most:
            yield _Part(tuple(tensors), tuple(products))
            tensors, products, count = [], [], 0
    if tensors or products:
        yield _Part(tuple(tensors), tuple(products))


class _Held:
    """A part of the changes of all peers."""

    def __init__(self, changes: Sequence[Change], part: _Part) -> None:
        self.part, self.count = part, len(changes)
        self.matrix = torch.stack([part.vector(change) for change in changes])
        self.pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name in part.products:
            pairs = [change.products[name] for change in changes]
            A = torch.cat([A for A, _ in pairs]).double()
            B = torch.cat([B for _, B in pairs], dim=1).double()
            owner = torch.arange(len(pairs)).repeat_interleave(
                torch.tensor([len(A) for A, _ in pairs])
            )
            self.pairs[name] = A, B, owner

    def times(self, change: Change) -> tuple[Tensor, float]:
        """Inner products of this part of a change with those of the peers, and with itself."""
        vector = self.part.vector(change)
        products, square = self.matrix @ vector, float(vector @ vector)
        for name, (A, B, owner) in self.pairs.items():
            a, b = (x.double() for x in change.products[name])
            products.index_add_(0, owner, ((A @ a.T) * (B.T @ b)).sum(1))
            square += float(((a @ a.T) * (b.T @ b)).sum())
        return products, square
