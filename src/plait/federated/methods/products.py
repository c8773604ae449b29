"""Methods for unequal ranks that send both factors and give each client r_i of the server's ranks.

    zeropad    A = sum w_i [A_i; 0],  s B = sum w_i [s_i B_i, 0]                        not exact
    hetlora    the same with p_i = ||D_i||_F / sum_j ||D_j||_F for w_i, per layer       not exact
    flexlora   U S V^T = sum w_i D_i;  A = V^T, s_i B = U S              up to truncation to r_i

A_i (r_i, in), B_i (out, r_i), D_i = s_i B_i A_i. Sources: hetlora 2401.06432, flexlora 2402.11505;
HetLoRA is without its rank pruning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from plait.core.init import kaiming, seeded
from plait.federated.adapter import StateDict
from plait.federated.methods.base import Algorithm
from plait.federated.methods.updates import Accepted, Client, State, product_norm
from plait.upstream.export import product_svd


@dataclass(frozen=True, kw_only=True)
class Factors(Algorithm):
    """Methods that send A and B and treat their product; no other mean can replace theirs."""

    robust: ClassVar[bool] = False

    def pairs(self, client: Client) -> list[tuple[str, str, float]]:
        """A, B and s of each layer."""
        return [(f"{name}/A", f"{name}/B", x.scaling) for name, x in client.layers.items()]


@dataclass(frozen=True, kw_only=True)
class ZeroPad(Factors):
    """Factors padded with zeros to the largest rank and averaged by w.

    Ranks that no accepted client has keep their last values: zeros on both sides would never learn
    again. The server keeps s B, so that clients of unequal scalings read one matrix.
    """

    key: ClassVar[str] = "zeropad"
    exact: ClassVar[str] = "no"
    ranks: ClassVar[bool] = True

    def start(self, first: StateDict, client: Client) -> State:
        """A and s B of the largest rank, and the head."""
        tensors = self.shared(first, client)
        for name, x in client.layers.items():
            tensors[f"{name}/B"] = x.scaling * tensors[f"{name}/B"]
        return State(0, tensors)

    def weights(self, accepted: Accepted) -> Mapping[str, Mapping[str, float]]:
        """Layer -> client -> p_i."""
        return dict.fromkeys(accepted.first.layers, accepted.weights)

    def combine(self, accepted: Accepted, old: StateDict) -> StateDict:
        """sum p_i A_i and sum p_i s_i B_i, padded."""
        clients, heads = accepted.clients, accepted.average(self.heads(accepted.first))
        weights = self.weights(accepted)
        tensors = {key: x.clone() for key, x in old.items() if key not in heads}
        for name in accepted.first.layers:
            known = max(clients[client].layers[name].r for client in accepted.updates)
            tensors[f"{name}/A"][:known] = 0
            tensors[f"{name}/B"][:, :known] = 0
        for client in sorted(accepted.updates):
            update = accepted.updates[client]
            for name, layer in clients[client].layers.items():
                p, A, B = weights[name][client], tensors[f"{name}/A"], tensors[f"{name}/B"]
                A[: layer.r].add_(update[f"{name}/A"].to(A), alpha=p)
                B[:, : layer.r].add_(update[f"{name}/B"].to(B), alpha=p * layer.scaling)
            del update  # before the next one is read
        return tensors | heads

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """The first r_i ranks, B for the client's own scaling, and the head."""
        s = state.tensors
        down = {key: s[key] for key in self.heads(client)}
        for name, x in client.layers.items():
            down[f"{name}/A"] = s[f"{name}/A"][: x.r].contiguous()
            down[f"{name}/B"] = (s[f"{name}/B"][:, : x.r] / x.scaling).contiguous()
        return down


@dataclass(frozen=True, kw_only=True)
class HetLora(ZeroPad):
    """HetLoRA: as zeropad, weighted by the norm of each client's product, layer by layer."""

    key: ClassVar[str] = "hetlora"

    def weights(self, accepted: Accepted) -> Mapping[str, Mapping[str, float]]:
        """||D_i||_F / sum_j ||D_j||_F; w where all are zero."""
        norms: dict[str, dict[str, float]] = {name: {} for name in accepted.first.layers}
        for client in sorted(accepted.updates):
            update = accepted.updates[client]
            for name, layer in accepted.clients[client].layers.items():
                size = product_norm(update[f"{name}/A"], update[f"{name}/B"])
                norms[name][client] = layer.scaling * size
            del update
        shares = {}
        for name, sizes in norms.items():
            total = sum(sizes.values())
            shares[name] = {c: n / total for c, n in sizes.items()} if total else accepted.weights
        return shares


@dataclass(frozen=True, kw_only=True)
class FlexLora(Factors):
    """FlexLoRA: each client gets the best part of its rank of D = sum w_i D_i."""

    key: ClassVar[str] = "flexlora"
    exact: ClassVar[str] = "up to truncation"
    ranks: ClassVar[bool] = True

    def start(self, first: StateDict, client: Client) -> State:
        """D = 0: nothing but the head."""
        return State(0, {key: first[key] for key in self.heads(client)})

    def combine(self, accepted: Accepted, old: StateDict) -> StateDict:
        """U S (out, k) and V^T (k, in) of D, k up to the largest rank."""
        tensors = accepted.average(self.heads(accepted.first))
        for name, A, B, p in accepted.layers():
            widest = max(client.layers[name].r for client in accepted.clients.values())
            U, S, Vh = product_svd(p[:, None] * A, B)
            tensors[f"{name}/US"] = U[:, :widest] * S[:widest]
            tensors[f"{name}/Vh"] = Vh[:widest].clone()  # no view, which would hold all of Vh
        return tensors

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """A = V^T, B = U S / s_i, r_i ranks; where D has fewer, LoRA's start for the others."""
        s = state.tensors
        down = {key: s[key] for key in self.heads(client)}
        for name, x in client.layers.items() if f"{next(iter(client.layers))}/Vh" in s else ():
            A, B = s[f"{name}/Vh"][: x.r], s[f"{name}/US"][:, : x.r] / x.scaling
            if len(A) < x.r:
                gen = seeded(self.seed, self.key, state.round, name)
                A = torch.cat([A, kaiming(gen, x.r - len(A), x.in_features).to(A)])
                B = torch.cat([B, B.new_zeros(len(B), x.r - B.shape[1])], dim=1)
            down |= {f"{name}/A": A.contiguous(), f"{name}/B": B.contiguous()}
        return down
