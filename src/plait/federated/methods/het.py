"""Fed-ALoRA for unequal ranks: B_bar (out, q) is common, A_i (r_i, in) and M_i (q, r_i) private.

    y = W0 x + s (B_bar + B2_i B1_i) M_i A_i x      B1 (r_i, q), B2 (out, r_i): of one round
    B_bar += sum w_i P_i,  P_i = B2_i B1_i          exact in B_bar

q is `common_rank`. A round begins with B2 = 0 and a new B1, which changes nothing: what they had is
in B_bar. Source: 2509.25414.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from plait.core.events import PlaitWarning
from plait.federated.adapter import Layer, StateDict
from plait.federated.methods.base import Algorithm
from plait.federated.methods.updates import Accepted, Change, Client, Mapped, Updates, wide


@dataclass(frozen=True, kw_only=True)
class FedALoraHet(Algorithm):
    """Fed-ALoRA for unequal ranks, on the adapter `fedalora_het`.

    payload: "product" sends P = B2 B1 (out, q), one shape for all clients; "auto" sends B2, B1
    where that is smaller.
    """

    key: ClassVar[str] = "fedalora_het"
    exact: ClassVar[str] = "in B_bar"
    uses: ClassVar[str] = "fedalora_het"
    ranks: ClassVar[bool] = True
    common_rank: int = 16
    payload: Literal["product", "auto"] = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.payload not in ("product", "auto"):
            raise ValueError(
                f"fedalora_het: payload = {self.payload!r} is not known. Use 'product' or 'auto'."
            )

    def _check_layer(
        self, name: str, layer: Layer, other: Layer, client: Client, first: Client
    ) -> None:
        super()._check_layer(name, layer, other, client, first)
        if layer.scaling != other.scaling:
            raise ValueError(
                f"fedalora_het: {name} has s = {layer.scaling:g} on client {client.id!r} and "
                f"{other.scaling:g} on {first.id!r}, and one B_bar is read with both. Give "
                "lora_alpha = 2 r on all, or leave it out."
            )
        width = client.shapes[f"{name}/M"][0]
        if width != self.common_rank:
            raise ValueError(
                f"fedalora_het: {name} of client {client.id!r} has common_rank = {width}, the "
                f"server {self.common_rank}. Give one common_rank."
            )

    def check(self, clients: Mapping[str, Client]) -> None:
        """Also warn of ranks that are of no use."""
        super().check(clients)
        if above := self.wider(clients):
            warnings.warn(
                f"fedalora_het: the rank of {', '.join(above)} is above common_rank = "
                f"{self.common_rank}, which adds nothing to the rank of their updates. Raise "
                "common_rank, or lower theirs.",
                PlaitWarning,
                stacklevel=2,
            )

    def wider(self, clients: Mapping[str, Client]) -> list[str]:
        """Clients whose rank is above common_rank, which gains them no rank."""
        q = self.common_rank
        return sorted(c.id for c in clients.values() if any(x.r > q for x in c.layers.values()))

    def factored(self, layer: Layer) -> bool:
        """Whether a layer's update is sent as B2, B1."""
        q, out = self.common_rank, layer.out_features
        return self.payload == "auto" and layer.r * (out + q) < q * out

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """P (out, q), or B1 (r, q) and B2 (out, r)."""
        q, shapes = self.common_rank, {}
        for name, layer in client.layers.items():
            if self.factored(layer):
                shapes[f"{name}/B1"] = (layer.r, q)
                shapes[f"{name}/B2"] = (layer.out_features, layer.r)
            else:
                shapes[f"{name}/P"] = (layer.out_features, q)
        return shapes | self.heads(client)

    def up(self, layer: Layer) -> int:
        """Q out, or r (out + q)."""
        q, out = self.common_rank, layer.out_features
        return layer.r * (out + q) if self.factored(layer) else q * out

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """Q out."""
        return self.common_rank * layer.out_features

    def shared(self, state: StateDict, client: Client) -> StateDict:
        """B_bar of each layer, and the head."""
        return {k: state[k] for k in (*(f"{n}/B_bar" for n in client.layers), *self.heads(client))}

    def private(self, state: StateDict, client: Client) -> StateDict:
        """A and M; B1 and B2 start every round anew."""
        received = {f"{name}/{x}" for name in client.layers for x in ("B_bar", "B1", "B2")}
        received |= set(self.heads(client))
        return {key: x for key, x in state.items() if key not in received}

    def payload_up(self, state: StateDict, client: Client) -> StateDict:
        """P = B2 B1, or the two."""
        found = {}
        for key in self.share(client):
            name, _, last = key.rpartition("/")
            product = last == "P" and name in client.layers
            found[key] = _product(state, name) if product else state[key]
        return found

    def products(self, updates: Updates, clients: Mapping[str, Client]) -> Mapped:
        """The updates with every P formed, so that all have one shape."""

        def formed(client: str, update: StateDict) -> StateDict:
            names = clients[client].layers
            found = {
                f"{n}/P": update[f"{n}/P"] if f"{n}/P" in update else _product(update, n)
                for n in names
            }
            return found | {key: update[key] for key in self.heads(clients[client])}

        return Mapped(updates, formed)

    def combine(self, accepted: Accepted, old: StateDict) -> StateDict:
        """B_bar + the mean of P."""
        heads = {key: old[key] for key in self.heads(accepted.first)}
        bars = {name: old[f"{name}/B_bar"] for name in accepted.first.layers}
        start = {f"{name}/P": x.new_zeros(()).expand_as(x) for name, x in bars.items()}
        updates = self.products(accepted.updates, accepted.clients)
        step = accepted.mean(updates, accepted.weights, start | heads)
        new = {f"{name}/B_bar": x + step.pop(f"{name}/P") for name, x in bars.items()}
        return new | {key: step[key] for key in heads}

    def pairs(self, client: Client) -> list[tuple[str, str, float]]:
        """B1, B2 of the layers whose P is not formed."""
        layers = client.layers.items()
        return [(f"{name}/B1", f"{name}/B2", 1.0) for name, x in layers if self.factored(x)]

    def change(self, update: StateDict, client: Client, down: StateDict) -> Change:
        """With every P formed: it is what a client adds to B_bar."""
        formed = self.products({client.id: update}, {client.id: client})[client.id]
        tensors = {key: wide(x) for key, x in formed.items()}
        heads = {key: tensors[key] - down[key] for key in self.heads(client)}
        return Change(tensors | heads)

    def renewed(self, round: int, kept: bool) -> tuple[str, ...]:
        """B1, where the client does not begin at its start."""
        anew = self.private_policy == "redraw" or (self.private_policy == "keep" and kept)
        return ("B1",) if anew else ()


def _product(state: StateDict, name: str) -> Tensor:
    return wide(state[f"{name}/B2"]) @ wide(state[f"{name}/B1"])
