"""Federated fine-tuning as pure functions on state dicts: what is shared, how it is averaged.

Client i of the accepted set holds A_i (r_i, in), B_i (out, r_i), D_i = s_i B_i A_i in each layer;
w_i = n_i / sum n, normalised in fp64.

    fedit, ffa, fedsa, fedalora, fedavg, local, central   averages of what is shared    `average`
    fedalora_het                                          a common B_bar                `het`
    zeropad, hetlora, flexlora                            ranks r_i of the server's     `products`
    flora, fedex                                          exact, by a trunk             `trunk`

Exact: the new common function is W0 + sum w_i D_i. Each module has its formulas and sources; `base`
has what all methods do, `updates` what they compute on.

Limits: ranks and scalings are those declared by the server's config, never guessed from a shape.
Tensors outside the adapted layers (a new head) are averaged by w in every method, unless
`head="private"`.
"""

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from plait.core.config import did_you_mean
from plait.federated.methods.average import (
    Central,
    FedALora,
    FedAvg,
    FedIt,
    FedSaLora,
    FfaLora,
    Local,
    fedavg_for,
)
from plait.federated.methods.base import ALGORITHMS, Algorithm, Private, refusal
from plait.federated.methods.het import FedALoraHet
from plait.federated.methods.products import FlexLora, HetLora, ZeroPad
from plait.federated.methods.trunk import FedEx, Flora, Trunked
from plait.federated.methods.updates import (
    Accepted,
    Change,
    Client,
    Mapped,
    Mean,
    State,
    Updates,
    aggregation_error,
    norm,
    product_norm,
    weighted_mean,
    weights_of,
)

for _module in iter_modules(__path__):  # each registers its methods
    import_module(f"{__name__}.{_module.name}")


def algorithm(key: str, **options: Any) -> Algorithm:
    """A federated method by its key.

    Example:
        >>> from plait.federated import algorithm
        >>> algorithm("fedalora_het", common_rank=8).exact
        'in B_bar'

    Args:
        key: of the table above. options: of its class.

    Raises:
        ValueError: unknown key or option, or a value that is not allowed.
    """
    if key not in ALGORITHMS:
        raise ValueError(
            f"federated.method = {key!r} is not known. {did_you_mean(key, ALGORITHMS)}"
        )
    known = [f.name for f in fields(ALGORITHMS[key])]
    for name in options:
        if name not in known:
            raise ValueError(f"{key}: {name} is not known. {did_you_mean(name, known)}")
    return ALGORITHMS[key](**options)


__all__ = [
    "ALGORITHMS", "Accepted", "Algorithm", "Central", "Change", "Client", "FedALora",
    "FedALoraHet", "FedAvg", "FedEx", "FedIt", "FedSaLora", "FfaLora", "FlexLora", "Flora",
    "HetLora", "Local", "Mapped", "Mean", "Private", "State", "Trunked", "Updates", "ZeroPad",
    "aggregation_error", "algorithm", "fedavg_for", "norm", "product_norm", "refusal",
    "weighted_mean", "weights_of",
]  # fmt: skip
