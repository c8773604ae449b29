"""Reading and comparing the private states of a federated run folder."""

from collections.abc import Mapping

import torch

from plait.federated.payload import unpack_tensors
from plait.run.folder import RunFolder


def states(folder: RunFolder) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint."""
    path = sorted((folder.path / "server").glob("round-*"))[-1]
    return unpack_tensors(path.read_bytes())[1]


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())
