"""Allocating LoRA (ALoRA, AB-LoRA): ranks move to the layers where leaving them out hurts.

    dW = s B diag(live) A     A: (slots, in)   B: (out, slots)   live: (slots,) 0/1 buffer
    slots = spare * r, the first r live at the start;  s = lora_alpha / r, kept throughout

Importance of a live rank k on one fixed development batch, S = -cross-entropy, evaluation mode:
IS(k) = S(M) - S(M without k) + S(M with only k), "only": all other ranks of all layers off.

Rounds, `rounds` of them, at step `first` and every `every` steps: the n_A ranks of lowest IS
(ties by layer and slot) go off; as many new ones go to the layers that lost none, evenly, the
remainder to those of highest mean IS. If every layer lost one, nothing is added and the budget
shrinks. A new rank takes the lowest dead slot, starts with an update of zero and fresh optimizer
state (ours); where no slot is left it goes to the next layer, or is dropped with a warning.

Give the batch with plait.set_development_batch(model, batch); plait train takes validation rows.
2 forwards for each live rank and round. The paper counts K1 and K2 in epochs, 1 and 0.25 of up to
10; steps by default are ours. arXiv 2403.16187, Algorithm 1. n_A is by default the number of
adapted layers: the paper's "1 x N_mod" is 7 or 224. The gate can be added to other methods with
ranks that start anew: `gates: [alloc]`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import FreeConfig, FreeDelta, Gate, PlaitWarning, option, register, register_gate
from plait.gates.alloc import allocate, development, importance


@dataclass
class AllocOptions:
    """Options of the allocation."""

    first: int | float = option(200, "K1: steps, or share of all, before the first round.", above=0)
    every: int | float = option(50, "K2: steps, or share of all, between rounds.", above=0)
    rounds: int = option(8, "N_A, the number of rounds.", least=0)
    n_A: int | None = option(None, "Ranks moved in a round; None: one a layer.", least=1)
    spare: int = option(2, "Slots of a layer, in multiples of r.", least=1)


@register_gate("alloc")
@dataclass
class AllocGate(AllocOptions, Gate):
    """live, moved between layers."""

    allocates = True

    @property
    def total_steps_needed(self) -> bool:
        """Shares of all steps need their number."""
        return isinstance(self.first, float) or isinstance(self.every, float)

    def check(self, delta_cls: Any) -> None:
        """Only where ranks can start anew."""
        if not delta_cls.rank_axes:
            raise ValueError(
                "gates: no rank can start anew for alloc, the factors are no free matrices with "
                "one row for each rank. Use it on a method whose factors are."
            )

    def slots(self, ranks: int) -> int:
        """Room to grow."""
        return self.spare * ranks

    def prepare(self, delta: Any, ranks: int, gen: torch.Generator) -> None:
        """Declare live."""
        live = torch.zeros(ranks)
        live[: ranks // self.spare] = 1
        delta.live_ranks = nn.Buffer(live)
        delta.count_steps()

    def value(self, delta: Any) -> Tensor:
        """The 0/1 buffer."""
        return delta.live_ranks

    def times(self, delta: Any) -> range:
        """The steps that end with a round."""
        total = delta.total_steps if self.total_steps_needed else 0
        first, every = (
            max(1, int(n * total)) if isinstance(n, float) else n for n in (self.first, self.every)
        )
        return range(first, first + every * self.rounds, every)

    def check_schedule(self, delta: Any) -> None:
        """Refuse rounds that would come after the end, where that is known."""
        times, total = self.times(delta), delta.adapter.total_steps
        if times and total is not None and times[-1] > total:
            raise ValueError(
                f"{delta.adapter.key}: round {self.rounds} is due in step {times[-1]}, training "
                f"has {total}. Lower first = {self.first}, every = {self.every} or rounds, or give "
                "first and every as shares of all steps, such as 0.1 and 0.025."
            )

    def check_first(self, deltas: Sequence[Any], moved: int) -> None:
        """Say in the first step what a round would lack."""
        one, live = deltas[0], sum(int(d.live_ranks.sum()) for d in deltas)
        if moved >= live:
            raise ValueError(
                f"n_A = {moved}: a round would take all of {live} ranks. Give a smaller n_A."
            )
        if development(one) is None:
            text = f"{one.adapter.key}: there is no development batch; step {self.times(one)[0]} "
            text += "needs it. Call plait.set_development_batch(model, batch)."
            warnings.warn(text, PlaitWarning, stacklevel=2)

    def after_all(self, deltas: Sequence[Any]) -> None:
        """A round, where one is due."""
        t, moved = deltas[0].steps, self.n_A or len(deltas)
        if t == 1 and self.rounds:
            self.check_first(deltas, moved)
        if t in self.times(deltas[0]):
            scores = importance(deltas, lambda d: d.live_ranks)
            allocate(deltas, lambda d: d.live_ranks, scores, moved)


@dataclass
class AllocLoraConfig(AllocOptions, FreeConfig):
    """Options of allocating LoRA; `r` is the mean rank of a layer."""


@register(
    "alloc",
    AllocLoraConfig,
    paper="2403.16187",
    formula="dW = s B diag(live) A",
    rank="live ranks",
    names=("ALoRA", "AB-LoRA"),
)
class AllocLora(FreeDelta):
    """See the module."""

    own_gates = (AllocGate,)
    config: AllocLoraConfig
    live_ranks: Tensor

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """spare r (in + out), of which r (in + out) live at the start."""
        return cls.slots_of(config) * (in_features + out_features)
