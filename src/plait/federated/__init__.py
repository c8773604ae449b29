"""Federated fine-tuning without an engine: methods, payloads, guard, partitions, state, privacy.

Everything here is a function of tensors or of files; it starts no client and opens no connection.
"""

from plait.federated.methods import (
    ALGORITHMS,
    Algorithm,
    Client,
    State,
    algorithm,
    fedavg_for,
    refusal,
    weighted_mean,
    weights_of,
)

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Client",
    "State",
    "algorithm",
    "fedavg_for",
    "refusal",
    "weighted_mean",
    "weights_of",
]
