"""Federated fine-tuning: methods, payloads, guard, partitions, state, privacy, and a simulation.

All but `local` are functions of tensors or of files. `local` runs rounds and clients in one
process. Nothing here opens a connection.
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
