"""What the maths of the methods works on: clients, the server's state, the updates of a round.

Sums run over clients in sorted id order with fp32 accumulators (fp64 of fp64), so the order of
arrival changes no bit. Updates may lie on the disk: each is read when it is asked for.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from plait.federated import adapter as adapters
from plait.federated.adapter import Layer, StateDict

Updates = Mapping[str, StateDict]  # client id -> payload; may load each payload when asked for it
# (updates, weights, reference) -> one payload; reference: what the clients started from.
Mean = Callable[[Updates, Mapping[str, float], StateDict], StateDict]

HELD = 2**26  # numbers of uploads in memory, where a method needs those of all clients at once


@dataclass(frozen=True)
class Client:
    """What the server's config declares of a client.

    id: its name. layers: adapted layers, in the order of the model. shapes: key -> shape of all
    that trains, as `adapter.trained` gives it.
    """

    id: str
    layers: Mapping[str, Layer]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, id: str, model: nn.Module, adapter: str = "default") -> "Client":
        """Read a client from a model that is wrapped with its config; a meta model will do."""
        return cls(id, adapters.layers_of(model, adapter), adapters.trained(model, adapter))

    @classmethod
    def lora(cls, id: str, layers: Mapping[str, Layer]) -> "Client":
        """A client with plain LoRA in each layer and nothing else that trains."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, x in layers.items():
            shapes |= {f"{name}/A": (x.r, x.in_features), f"{name}/B": (x.out_features, x.r)}
        return cls(id, layers, shapes)

    @property
    def head(self) -> tuple[str, ...]:
        """Keys of what trains outside the adapted layers."""
        return tuple(k for k in self.shapes if k.rpartition("/")[0] not in self.layers)


@dataclass(frozen=True)
class Change:
    """What an update adds to what its client received.

    tensors: key -> x - x_0. products: layer -> A (k, in), B (out, k), whose product B A is added.
    """

    tensors: StateDict = field(default_factory=dict)
    products: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What the server keeps of the method. round: completed rounds."""

    round: int = 0
    tensors: StateDict = field(default_factory=dict)


def weights_of(counts: Mapping[str, int]) -> dict[str, float]:
    """w_i = n_i / sum n in fp64, by sorted client id.

    Raises:
        ValueError: a count below 1, or no client.
    """
    for client, n in counts.items():
        if n < 1:
            raise ValueError(f"weights: client {client!r} has {n} examples. Leave it out.")
    if not counts:
        raise ValueError("weights: no client is left. Nothing can be averaged.")
    total = sum(counts.values())
    return {client: counts[client] / total for client in sorted(counts)}


def weighted_mean(
    updates: Updates, weights: Mapping[str, float], reference: StateDict
) -> StateDict:
    """sum w_i x_i of each tensor, one client at a time in id order; `reference` is not used."""
    total: StateDict = {}
    for client in sorted(updates):
        _add(total, updates[client], weights[client])
    return total


def _add(total: StateDict, update: StateDict, weight: float) -> None:
    # A function of its own: nothing of an update is held while the next one is read.
    for key, x in update.items():
        x = wide(x)
        if key not in total:
            total[key] = torch.zeros_like(x)
        total[key].add_(x, alpha=weight)


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Mapped(Mapping[str, StateDict]):
    """Updates through a function of (client id, payload), computed when asked for."""

    def __init__(self, updates: Updates, function: Callable[[str, StateDict], StateDict]) -> None:
        self.updates, self.function = updates, function

    def __getitem__(self, client: str) -> StateDict:
        return self.function(client, self.updates[client])

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


@dataclass(frozen=True)
class Accepted:
    """The accepted updates of a round, one or more.

    updates: client id -> upload. weights: w_i of the same clients. clients: id -> what the config
    declares, of all clients. mean: the weighted one, or what replaces it.
    """

    updates: Updates
    weights: Mapping[str, float]
    clients: Mapping[str, Client]
    mean: Mean = weighted_mean

    @property
    def first(self) -> Client:
        """One client, for what is the same on all: names and sizes of the layers, the head."""
        return self.clients[min(self.clients)]

    def average(self, keys: Iterable[str]) -> StateDict:
        """sum w_i x_i of some tensors."""
        keys = tuple(keys)
        if not keys:  # no upload is read for nothing
            return {}
        some = Mapped(self.updates, lambda _, update: _part(update, keys))
        return weighted_mean(some, self.weights, {})

    def layers(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Name, A (R, in), B (out, R), p (R,), R = sum r_i, of each layer: sum w_i D_i = B p A.

        Updates are read once for all layers, or for as many of them as `HELD` numbers are enough.
        """
        clients, names = sorted(self.updates), list(self.first.layers)
        numbers = sum(x.pair for c in clients for x in self.clients[c].layers.values())
        some = max(1, len(names) * HELD // max(numbers, HELD))
        for start in range(0, len(names), some):
            held = names[start : start + some]
            keys = [f"{name}/{factor}" for name in held for factor in "AB"]
            loaded = [_part(self.updates[client], keys) for client in clients]
            for name in held:
                A = wide(torch.cat([update[f"{name}/A"] for update in loaded]))
                B = wide(torch.cat([update[f"{name}/B"] for update in loaded], dim=1))
                scaled = [(self.weights[c], self.clients[c].layers[name]) for c in clients]
                yield (
                    name,
                    A,
                    B,
                    A.new_tensor([w * x.scaling for w, x in scaled for _ in range(x.r)]),
                )
            del loaded  # before the next part is read


def _part(update: StateDict, keys: Iterable[str]) -> StateDict:
    return {key: update[key] for key in keys}


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all tensors together, in fp64."""
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors.values()))


def product_norm(A: Tensor, B: Tensor) -> float:
    """||B A||_F of A (r, in) and B (out, r), from two (r, r) matrices, in fp64."""
    A, B = A.double(), B.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def aggregation_error(
    updates: Updates, weights: Mapping[str, float], clients: Mapping[str, Client]
) -> dict[str, float]:
    """||sum w B A - (sum w B)(sum w A)||_F / ||sum w B A||_F of each layer; 0 where all is zero.

    Args:
        updates: client id -> A and B of each layer, of one rank. weights, clients: as elsewhere.
    """
    accepted = Accepted(updates, weights, clients)
    average, errors = weighted_mean(updates, weights, {}), {}
    for name, A, B, p in accepted.layers():
        A, scaling = p[:, None] * A, accepted.first.layers[name].scaling
        mean_A, mean_B = average[f"{name}/A"], scaling * average[f"{name}/B"]
        # By triangles, not product_norm: the gap may be a small difference of large products.
        sides = torch.cat([A, mean_A]).double().T, torch.cat([B, -mean_B], dim=1).double()
        Ra, Rb = (torch.linalg.qr(side, mode="r").R for side in sides)
        gap, whole = float(torch.linalg.norm(Rb @ Ra.T)), product_norm(A, B)
        errors[name] = gap / whole if whole else 0.0
    return errors
