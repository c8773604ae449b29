"""Clients with random factors, in one or two layers of unlike shapes, and naive sums over them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.federated import Client, State, algorithm
from plait.federated.adapter import Layer, StateDict
from plait.federated.methods import Algorithm

SHAPES = {"one": (7, 5), "two": (6, 6)}


def clients_of(
    ranks: Sequence[int],
    scalings: Sequence[float] | float = 2.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> dict[str, Client]:
    """Plain LoRA clients c0, c1, .. of these ranks and scalings; shapes: layer -> (in, out)."""
    s = [scalings] * len(ranks) if isinstance(scalings, float) else list(scalings)
    return {
        f"c{i}": Client.lora(f"c{i}", {n: Layer(a, b, r, s[i]) for n, (a, b) in shapes.items()})
        for i, r in enumerate(ranks)
    }


def het_clients(
    ranks: Sequence[int], q: int, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> dict[str, Client]:
    """fedalora_het clients with s = 2."""
    found = {}
    for i, r in enumerate(ranks):
        layers = {n: Layer(a, b, r, 2.0) for n, (a, b) in shapes.items()}
        sizes: dict[str, tuple[int, ...]] = {}
        for n, (a, b) in shapes.items():
            sizes |= {f"{n}/A": (r, a), f"{n}/M": (q, r), f"{n}/B1": (r, q), f"{n}/B2": (b, r)}
        found[f"c{i}"] = Client(f"c{i}", layers, sizes)
    return found


def states_of(
    clients: Mapping[str, Client], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, StateDict]:
    """A random local state of each client."""
    gen = torch.Generator().manual_seed(seed)
    return {
        c.id: {key: torch.randn(shape, generator=gen).to(dtype) for key, shape in c.shapes.items()}
        for c in clients.values()
    }


def uploads_of(
    method: Algorithm, clients: Mapping[str, Client], states: Mapping[str, StateDict]
) -> dict[str, StateDict]:
    """What the clients send."""
    return {name: method.payload_up(states[name], clients[name]) for name in clients}


def begun(method: Algorithm, clients: Mapping[str, Client], states: Any, q: int = 0) -> State:
    """The server's state before round 1; the client of the largest rank gives it."""
    widest = max(clients.values(), key=lambda c: (max(x.r for x in c.layers.values()), c.id))
    first = dict(states[widest.id])
    if method.key == "fedalora_het":
        dtype = next(iter(first.values())).dtype
        for name, x in widest.layers.items():
            first[f"{name}/B_bar"] = torch.zeros(x.out_features, q, dtype=dtype)
    return method.start(first, widest)


def exact(
    clients: Mapping[str, Client],
    states: Mapping[str, StateDict],
    weights: Mapping[str, float],
    layer: str,
) -> Tensor:
    """sum w_i s_i B_i A_i of a layer, in fp64, one client at a time."""
    total = torch.zeros(())
    for name, w in weights.items():
        A, B = (states[name][f"{layer}/{x}"].double() for x in "AB")
        total = total + w * clients[name].layers[layer].scaling * (B @ A)
    return total


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def every() -> list[Algorithm]:
    """One object of each method that exchanges something between LoRA clients."""
    keys = ("fedit", "ffa", "fedsa", "fedalora", "zeropad", "hetlora", "flexlora", "flora", "fedex")
    return [*map(algorithm, keys), algorithm("fedavg", private_names=("A",))]
