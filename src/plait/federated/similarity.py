"""How similar the clients' factors are: the A's, the B's, or what a method has in their place.

    cosine    mean of <X_i, X_j>_F / (||X_i||_F ||X_j||_F)   over pairs i < j of one shape
    overlap   mean of ||Q_i^T Q_j||_F^2 / min(k_i, k_j)      over pairs, Q an orthonormal basis
    chance    mean of max(r_i, r_j) / n, the overlap that independent random spans have on average

The means also run over the layers. A stands for the span of its rows in R^in, B for that of its
columns in R^out. The overlap, in [0, 1], is independent of the basis of the r ranks (R A and B R^-1
are the same update) and allows unequal ranks; the cosine depends on the basis. Numbers are fp64.
The spans are those of `plait.inspect`, where zero matrices span nothing: their pairs are left out.

    lora, fedavg    A, A_s, ..: (r, in)     B, B_s, ..: (out, r)
    fedalora_het    A, M A: (q, in)         P = B2 B1: (out, q)

Limits: stacks of experts (three axes) are left out. All pairs are compared with all factors in
memory, so large federations are measured on `most` clients, evenly spaced in the order of their
names.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from plait.federated.adapter import Layer, StateDict
from plait.federated.methods import Client
from plait.inspect.similarity import basis, chance

_INSIDE = ("B1", "B2", "B_bar")  # of fedalora_het: parts of a product, and what is common
Similarity = dict[str, dict[str, float]]  # kind of factor -> cosine, overlap, chance


def factor_similarity(
    states: Mapping[str, StateDict], clients: Mapping[str, Client], most: int = 16
) -> Similarity:
    """Similarity over all pairs of clients, for each kind of factor that two clients have.

    Args:
        states: client -> its factors, `<layer>/<name>`: a whole local state, or what a server
            sees of it, which gives fewer kinds. Each is read once.
        clients: what the config declares of them.
        most: largest number of clients to measure.

    Returns:
        Kind -> "cosine", "overlap", "chance"; a number that no pair has is absent.

    Raises:
        ValueError: most below 2.
    """
    if most < 2:
        raise ValueError(f"similarity: most = {most}. Give 2 clients or more.")
    names = sorted(states)
    if len(names) > most:
        names = [names[k * len(names) // most] for k in range(most)]
    columns_of: dict[tuple[str, str], dict[str, Tensor]] = {}  # (kind, layer) -> client -> (n, k)
    for name in names:
        for kind, layer, columns in _factors(states[name], clients[name].layers):
            columns_of.setdefault((kind, layer), {})[name] = columns
    sums: dict[str, dict[str, list[float]]] = {}
    for (kind, _), factors in columns_of.items():
        of_kind = sums.setdefault(kind, {"cosine": [], "overlap": [], "chance": []})
        for measure, values in _pairs(list(factors.values())).items():
            of_kind[measure] += values
    means = {
        kind: {measure: sum(v) / len(v) for measure, v in values.items() if v}
        for kind, values in sums.items()
    }
    return {kind: values for kind, values in sorted(means.items()) if values}


def _factors(state: StateDict, layers: Mapping[str, Layer]) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, layer, matrix (n, k) in fp64 whose columns span what the factor spans)."""
    for key, x in state.items():
        layer, _, name = key.rpartition("/")
        if layer not in layers or x.dim() != 2:
            continue
        x, sizes = x.detach().double(), layers[layer]
        M, B2 = (state.get(f"{layer}/{other}") for other in ("M", "B2"))
        if name == "B1" and B2 is not None:
            yield "P", layer, B2.double() @ x
        elif name.startswith("A") and x.shape[1] == sizes.in_features:
            yield name, layer, x.T
            if name == "A" and M is not None:
                yield "M A", layer, (M.double() @ x).T
        elif name.startswith(("B", "P")) and name not in _INSIDE and len(x) == sizes.out_features:
            yield name, layer, x


def _pairs(factors: list[Tensor]) -> dict[str, list[float]]:
    """The three measures of each pair of factors (n, k_i) of one layer that has them."""
    alive = [x for x in factors if torch.linalg.norm(x)]
    units = [x / torch.linalg.norm(x) for x in alive]
    spans = [basis(x) for x in alive]
    found: dict[str, list[float]] = {"cosine": [], "overlap": [], "chance": []}
    for i, j in combinations(range(len(alive)), 2):
        if units[i].shape == units[j].shape:
            found["cosine"].append(float((units[i] * units[j]).sum()))
        across, smaller = spans[i].T @ spans[j], min(spans[i].shape[1], spans[j].shape[1])
        found["overlap"].append(min(1.0, float(across.square().sum()) / smaller))
        found["chance"].append(chance(alive[i], alive[j]))
    return found
