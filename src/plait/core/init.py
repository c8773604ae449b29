"""Start values. Every draw comes from a passed generator, never from the global state."""

import math
import zlib
from typing import Literal

import torch
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 4


def seeded(*key: object) -> torch.Generator:
    """A CPU generator seeded by a key, such as (seed, layer name) or (seed, t, layer name).

    For draws that must agree between processes, recomputation and resumed runs.
    """
    return torch.Generator("cpu").manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def gaussian(gen: torch.Generator, *shape: int, std: float) -> Tensor:
    """N(0, std^2) of the given shape, fp32, on the CPU."""
    return torch.randn(*shape, generator=gen) * std


def kaiming(gen: torch.Generator, *shape: int) -> Tensor:
    """Kaiming-uniform with a = sqrt 5, that is U(-1, 1) / sqrt(fan_in); fan_in is the last axis."""
    return (torch.rand(*shape, generator=gen) * 2 - 1) / math.sqrt(shape[-1])


def svd_start(
    weight: Tensor,
    rank: int,
    scaling: float,
    method: Literal["randomized", "exact"],
    gen: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The principal part of a weight as factors: scaling * B0 @ A0 is its best rank-`rank` part.

    A0 = sqrt(S / s) V^T and B0 = U sqrt(S / s), both fp32 (fp64 for an fp64 weight).
    The randomised form takes `rank + 8` columns and 4 power iterations with its own generator
    (`torch.svd_lowrank` takes none and advances the global one).

    Args:
        weight: (out, in), floating; a meta tensor gives meta factors.
        rank: number of singular triples. Ranks beyond min(out, in) have no triple: they start as
            in LoRA, Kaiming A and zero B, and add nothing to the attainable rank.
        scaling: the method's s.
        method: "randomized" or "exact".
        gen: of the random test matrix; not used by "exact".

    Returns:
        A0 (rank, in) and B0 (out, rank).

    Raises:
        ValueError: an unknown method.
    """
    out_features, in_features = weight.shape
    if method not in ("randomized", "exact"):
        raise ValueError(f'svd = {method!r} is not known. Use "randomized" or "exact".')
    if weight.is_meta:
        return weight.new_empty(rank, in_features), weight.new_empty(out_features, rank)
    if method == "exact":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        q = min(rank + OVERSAMPLING, *weight.shape)
        Q = torch.randn(in_features, q, generator=gen).to(weight)
        Q = torch.linalg.qr(weight @ Q).Q
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(weight.T @ Q).Q
            Q = torch.linalg.qr(weight @ Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
        U = Q @ U
    root = (S[:rank] / scaling).sqrt()
    A0, B0 = root[:, None] * Vh[:rank], U[:, :rank] * root
    spare = rank - len(root)
    if spare:
        A0 = torch.cat([A0, kaiming(gen, spare, in_features).to(A0)])
        B0 = torch.cat([B0, B0.new_zeros(out_features, spare)], dim=1)
    return A0.contiguous(), B0.contiguous()  # as a loaded adapter has them, to the last stride
