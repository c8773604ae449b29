"""Screening: a trained gate whose ranks are kept or cut by their importance, on a schedule.

    gate = E keep     E: (ranks,) trained, starts at 0     keep: (ranks,) 0/1 buffer

Each step averages |p grad| of E and of the factors. Every deltaT steps after tinit the best b(t)
ranks of all layers keep their E, the others get 0 and may regrow; tfinal steps before the end the
choice goes to `keep`. b(t) falls quadratically from all ranks to the sum of target_r.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.config import option
from plait.core.gate import Gate
from plait.core.sharding import put, whole


@dataclass
class ScreeningOptions:
    """Options of the schedule and of the importance."""

    target_r: int | None = option(None, "Mean ranks kept; None: 5/6 of them.", least=1)
    tinit: int | float = option(0.15, "Steps, or share of them, before screening.", least=0)
    tfinal: int | float = option(0.5, "Steps, or share, after the final choice.", least=0)
    deltaT: int = option(10, "Steps between two screenings.", least=1)
    beta1: float = option(0.85, "Decay of the mean importance.", least=0)
    beta2: float = option(0.85, "Decay of its mean deviation.", least=0)


@dataclass
class Screening(ScreeningOptions, Gate):
    """The gate; its Delta names the scored factors, A first, in `screened`."""

    key = "screening"
    reads = ("E", "keep")
    leaf = "E"

    @property
    def total_steps_needed(self) -> bool:
        """Always: its schedule ends tfinal steps before training does."""
        return True

    def target(self, ranks: int) -> int:
        """Ranks of a layer that are kept on average."""
        return ranks - ranks // 6 if self.target_r is None else self.target_r

    def count(self, ranks: int) -> int:
        """One number a rank."""
        return ranks

    def prepare(self, delta: Any, ranks: int, gen: torch.Generator) -> None:
        """Declare E and keep; the averages come with the factors, see `average`."""
        delta.E = nn.Parameter(torch.zeros(ranks))
        delta.keep = nn.Buffer(torch.ones(ranks))
        delta.count_steps()

    def value(self, delta: Any) -> Tensor:
        """E keep."""
        return delta.E * delta.keep

    def factor(self, delta: Any) -> Tensor:
        """keep."""
        return delta.keep

    def check_schedule(self, delta: Any) -> None:
        """Raise ValueError if no step is left to screen in."""
        window(delta)

    def after_step(self, delta: Any) -> None:
        """Average the importance, until the final choice."""
        if delta.steps <= window(delta)[1]:
            observe(delta, names_of(delta))

    def scores(self, delta: Any) -> Tensor:
        """Importance of each rank: of its E, and the means of its rows of A and columns of B."""
        A, B, E = (score(delta, name) for name in names_of(delta))
        return E + A.mean(1) + B.mean(0)

    def after_all(self, deltas: Sequence[Any]) -> None:
        """Keep the best ranks over all layers, as many as the budget allows."""
        one = deltas[0]
        if any(gate.allocates for gate in one.gates):  # that gate decides how many there are
            return
        t, (first, last) = one.steps, window(one)
        if not due(t, first, last, self.deltaT):
            return
        scores = [self.scores(d) for d in deltas]
        target = sum(self.target(len(s)) for s in scores)
        alive = budget(t, first, last, sum(map(len, scores)), target, power=2)
        for d, mask in zip(deltas, best(scores, alive), strict=True):
            put(d.E, ..., whole(d.E) * mask)
            if t == last:
                d.keep.copy_(mask)
                for buffer in buffer_names(names_of(d)):
                    d.set_optional(buffer, None)


def average(delta: Any) -> None:
    """Declare the averages of importance of a Delta that has its factors, zero."""
    for name in names_of(delta):
        for buffer in buffer_names([name]):
            delta.register_buffer(buffer, torch.zeros_like(delta.get_parameter(name)))


def names_of(delta: Any) -> tuple[str, ...]:
    """The scored parameters."""
    return (*delta.screened, "E")


def buffer_names(names: Sequence[str]) -> tuple[str, ...]:
    """The optional buffers that `observe` keeps for parameters of these names."""
    return tuple(f"{mean}_{name}" for name in names for mean in ("Ibar", "Ubar"))


@torch.no_grad()
def observe(delta: Any, names: Sequence[str]) -> None:
    """Average the importance I = |p grad| of each named parameter and its deviation, entry-wise.

    Ibar = beta1 Ibar + (1 - beta1) I;  Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|, new Ibar.
    p is the value after the step, grad that of the step, as in AdaLoRA (arXiv 2303.10512); the
    decays are the config's beta1 and beta2.

    Raises:
        RuntimeError: a parameter without a gradient; its importance would silently be zero.
    """
    beta1, beta2 = delta.config.beta1, delta.config.beta2
    for name in names:
        p = delta.get_parameter(name)
        if p.grad is None:
            raise RuntimeError(
                f"{delta.base.name}.{name} has no gradient after the step, so its importance is "
                "unknown. Clear gradients after optimizer.step() and its hooks, not before."
            )
        importance = whole((p * p.grad).abs())
        mean, deviation = (getattr(delta, b) for b in buffer_names([name]))
        mean = (1 - beta1) * importance + (0 if mean is None else beta1 * mean)
        deviation = (1 - beta2) * (importance - mean).abs() + (
            0 if deviation is None else beta2 * deviation
        )
        setattr(delta, f"Ibar_{name}", mean)
        setattr(delta, f"Ubar_{name}", deviation)


def score(delta: Any, name: str) -> Tensor:
    """Ibar * Ubar of a parameter, in its shape."""
    return getattr(delta, f"Ibar_{name}") * getattr(delta, f"Ubar_{name}")


def window(delta: Any) -> tuple[int, int]:
    """First and last step of a Delta's screening, by its config's tinit, tfinal and total_steps.

    tinit: steps before it starts, or their share of the total if a float; tfinal: steps after its
    end, likewise.

    Raises:
        ValueError: total_steps is unknown, or no step is left.
    """
    total, ends = delta.total_steps, (delta.config.tinit, delta.config.tfinal)
    before, after = (int(n * total) if isinstance(n, float) else n for n in ends)
    if before >= total - after:
        raise ValueError(
            f"{delta.adapter.key}: tinit = {before} and tfinal = {after} leave no step to screen "
            f"in total_steps = {total}. Lower them."
        )
    return before, total - after


def due(t: int, first: int, last: int, every: int) -> bool:
    """Whether step t screens: every so often between first and last, and at last."""
    return t == last or (first < t < last and t % every == 0)


def budget(t: int, first: int, last: int, start: int, end: int, power: int) -> int:
    """Ranks alive after step t: `start` until `first`, `end` from `last`, a power law between."""
    if t <= first:
        return start
    if t >= last:
        return end
    return int(end + (start - end) * (1 - (t - first) / (last - first)) ** power)


def best(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """0/1 masks of the `count` best ranks over all layers; ties go to the lower (layer, rank)."""
    joined = torch.cat(list(scores))
    order = torch.sort(joined, descending=True, stable=True).indices
    mask = torch.zeros_like(joined)
    mask[order[:count]] = 1
    return list(mask.split([len(s) for s in scores]))
