"""Methods that are exact by a trunk: a frozen pair beside each layer that grows by a step a round.

    flora   trunk += [B_1 | .. | B_K] [w_1 s_1 A_1; ..];  adapters start anew
    fedex   A = sum w_i A_i, B = sum w_i B_i;  trunk += s sum w_i (B_i - B)(A_i - A)

A_i (r_i, in), B_i (out, r_i); trunk_A (R, in), trunk_B (out, R), scaling 1. W0 is never edited.
The residual of fedex is sum w_i D_i - s B A, in the form whose rank is K r and not (K + 1) r.
Sources: flora 2409.05976, fedex 2410.09432.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.federated import adapter as adapters
from plait.federated.adapter import Layer, StateDict
from plait.federated.methods.products import Factors
from plait.federated.methods.updates import Accepted, Client, State, weighted_mean
from plait.upstream.export import PlainUpdate, plain_factors


@dataclass(frozen=True, kw_only=True)
class Trunked(Factors):
    """Methods that add to a frozen pair beside W0 in each round.

    tolerance: largest part of the trunk that a round may leave out to keep its rank low (relative
    Frobenius norm); 0: none, it is compressed where its rank passes min(in, out), which is exact.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"{self.key}: tolerance = {self.tolerance}. Give 0 or more, below 1.")

    def grow(self, trunk: StateDict, step: StateDict) -> StateDict:
        """The trunk after one more step, by the same operations on the server and on a client.

        Args:
            trunk: `<layer>/trunk_A` (R, in), `<layer>/trunk_B` (out, R); empty at the start.
            step: `<layer>/step_A`, `<layer>/step_B`, or `<layer>/step` (out, in).
        """
        new: StateDict = {}
        for name in dict.fromkeys(key.rpartition("/")[0] for key in step):
            A, B = _pair(step, name)
            if f"{name}/trunk_A" in trunk:
                A = torch.cat([trunk[f"{name}/trunk_A"], A])
                B = torch.cat([trunk[f"{name}/trunk_B"], B], dim=1)
            most = min(A.shape[1], len(B))
            energy = 1 - self.tolerance**2 if self.tolerance else None
            if len(A) > most or energy is not None:
                A, B, _, _ = plain_factors(PlainUpdate(A, B, 1.0), min(most, len(A)), energy)
            new |= {f"{name}/trunk_A": A.contiguous(), f"{name}/trunk_B": B.contiguous()}
        return new

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """What is averaged; the last step for a client that holds all before, or the trunk."""
        wanted = {state.round: (), state.round - 1: _STEP}.get(held, _TRUNK)
        own = {*self.share(client), *(f"{name}/{x}" for name in client.layers for x in wanted)}
        return {key: x for key, x in state.tensors.items() if key in own}

    def unchanged(self, old: StateDict) -> StateDict:
        """No step."""
        return {k: x for k, x in old.items() if k.rpartition("/")[2] not in _STEP}

    def next_trunk(self, trunk: StateDict, down: StateDict) -> StateDict:
        """What a client holds after a payload, from what it held."""
        whole = {k: x for k, x in down.items() if k.rpartition("/")[2] in _TRUNK}
        step = {k: x for k, x in down.items() if k.rpartition("/")[2] in _STEP}
        return whole or (self.grow(trunk, step) if step else trunk)

    def set_trunk(
        self, model: nn.Module, trunk: StateDict, down: StateDict, adapter: str
    ) -> StateDict:
        """Beside each layer, scaling 1."""
        trunk = self.next_trunk(trunk, down)
        names = dict.fromkeys(key.rpartition("/")[0] for key in trunk)
        pairs = {n: (trunk[f"{n}/trunk_A"], trunk[f"{n}/trunk_B"]) for n in names}
        adapters.set_trunk(model, pairs, adapter)
        return trunk

    def added(self, old: StateDict, averaged: StateDict, step: StateDict) -> StateDict:
        """The server's next tensors: what is averaged, the step, and the trunk with it."""
        trunk = {k: x for k, x in old.items() if k.rpartition("/")[2] in _TRUNK}
        return averaged | step | self.grow(trunk, step)


_TRUNK = ("trunk_A", "trunk_B")
_STEP = ("step_A", "step_B", "step")


def _pair(step: StateDict, name: str) -> tuple[Tensor, Tensor]:
    """A step as factors; a dense one as the identity and itself."""
    if f"{name}/step" not in step:
        return step[f"{name}/step_A"], step[f"{name}/step_B"]
    D = step[f"{name}/step"]
    if D.shape[1] <= len(D):
        return torch.eye(D.shape[1]).to(D), D
    return D, torch.eye(len(D)).to(D)


def _step(name: str, A: Tensor, B: Tensor) -> StateDict:
    """A step as it is sent: as factors, or dense where that is smaller."""
    if A.numel() + B.numel() > A.shape[1] * len(B):
        return {f"{name}/step": B @ A}
    return {f"{name}/step_A": A, f"{name}/step_B": B}


@dataclass(frozen=True, kw_only=True)
class Flora(Trunked):
    """FLoRA: the clients' factors are stacked and added to the trunk, the adapters start anew."""

    key: ClassVar[str] = "flora"
    exact: ClassVar[str] = "yes"
    ranks: ClassVar[bool] = True

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """sum_j r_j (in + out), or in out where that is smaller."""
        return min(sum(other.pair for other in cohort), layer.dense)

    def start(self, first: StateDict, client: Client) -> State:
        """No trunk: nothing but the head."""
        return State(0, {key: first[key] for key in self.heads(client)})

    def combine(self, accepted: Accepted, old: StateDict) -> StateDict:
        """The trunk with sum w_i D_i added."""
        step: StateDict = {}
        for name, A, B, p in accepted.layers():
            step |= _step(name, p[:, None] * A, B)
        return self.added(old, accepted.average(self.heads(accepted.first)), step)

    def renewed(self, round: int, kept: bool) -> tuple[str, ...]:
        """From the second round on a new A, and B = 0."""
        return self.names if round > 1 else ()


@dataclass(frozen=True, kw_only=True)
class FedEx(Trunked):
    """FedEx-LoRA: FedIT, and what its averages miss goes to the trunk."""

    key: ClassVar[str] = "fedex"
    exact: ClassVar[str] = "yes"
    mean_of_factors: ClassVar[bool] = True

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """R (in + out), and K r (in + out) for the residual or in out where that is smaller."""
        return layer.pair + min(sum(other.pair for other in cohort), layer.dense)

    def combine(self, accepted: Accepted, old: StateDict) -> StateDict:
        """A, B averaged; s sum w_i (B_i - B)(A_i - A) added to the trunk."""
        average = weighted_mean(accepted.updates, accepted.weights, {})
        step: StateDict = {}
        for name, A, B, p in accepted.layers():
            mean_A, mean_B = average[f"{name}/A"], average[f"{name}/B"]
            clients = (-1, len(mean_A))  # ranks, client by client
            A = (A.unflatten(0, clients) - mean_A).flatten(0, 1)
            B = (B.unflatten(1, clients) - mean_B[:, None]).flatten(1)
            step |= _step(name, A, p * B)
        return self.added(old, average, step)
