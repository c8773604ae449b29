"""LowRankDelta: an update of low rank, dW = s B_cat mix(gate A_cat).

A method declares stacked factors, gates on the rank axis and a mix; forward, weight, folding for
merge and export, and rank follow here.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.core import events
from plait.core.config import DeltaConfig
from plait.core.delta import Delta, FrozenLinear, NotMergeable, Pair, mode
from plait.core.gate import Gate, gates_of
from plait.core.init import kaiming, seeded
from plait.core.mix import Mix, as_mix
from plait.core.route import NOWHERE, Rows
from plait.core.sharding import put, refuse_sharded
from plait.kernels.low_rank import up


class LowRankDelta(Delta):
    """dW = s B_cat mix(gate A_cat): a sum of products, mixed in rank space.

    The rank axis is a row of groups of `ranks` ranks; a gate acts on rank k of every group.

    Attributes:
        gates: the gates of the method and those that the config adds.
        ranks: ranks of a group, slots without a live rank included.
    """

    own_gates: ClassVar[tuple[type[Gate], ...]] = ()  # gates that are part of the method
    # Parameters and buffers with a rank axis -> that axis; needed by gates that restart ranks.
    rank_axes: ClassVar[dict[str, int]] = {}

    def __init__(self, base: FrozenLinear, config: DeltaConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.gates = gates_of(config, type(self))
        self.ranks = type(self).slots_of(config)
        for gate in self.gates:
            gate.prepare(self, self.ranks, seeded(config.seed, base.name, gate.key))

    @classmethod
    def check_gates(cls, config: Any) -> None:
        """Raise ValueError for unknown gates or options and gates that cannot act on the method."""
        gates_of(config, cls)

    @classmethod
    def count_gates(cls, config: Any) -> int:
        """Those of the gates that the config adds; the formula has the gates of the method."""
        added = gates_of(config, cls)[len(cls.own_gates) :]
        ranks = cls.slots_of(config)
        return sum(gate.count(ranks) for gate in added)

    @classmethod
    def allocates(cls, config: Any) -> bool:
        """Whether one of its gates moves ranks."""
        return any(gate.allocates for gate in gates_of(config, cls))

    @classmethod
    def gated(cls, config: Any) -> int:
        """Ranks of a layer that gates act on."""
        return config.r

    @classmethod
    def slots_of(cls, config: Any) -> int:
        """Ranks that the factors have room for: `gated`, or more if a gate needs spare ones."""
        ranks = cls.gated(config)
        return max([ranks, *(gate.slots(ranks) for gate in gates_of(config, cls))])

    @property
    def all_rank_axes(self) -> dict[str, int]:
        """rank_axes, those of the gates included."""
        return {**self.rank_axes, **{n: a for g in self.gates for n, a in g.rank_axes.items()}}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_cat (R_in, in) and B_cat (out, R_out)."""
        raise NotImplementedError

    def pairs(self) -> list[Pair]:
        """As in Delta; a gate ties the basis to single ranks, so with one there are no pairs."""
        if self.gates:
            keys = ", ".join(gate.key or "its own" for gate in self.gates)
            raise self.pairless(f"a gate ({keys}) belongs to single ranks")
        return self.free_pairs()

    def free_pairs(self) -> list[Pair]:
        """The pairs of the method without gates."""
        return super().pairs()

    def live(self) -> Tensor | None:
        """The product of the gates, (ranks,), or None."""
        values = [v for v in (gate.value(self) for gate in self.gates) if v is not None]
        return torch.stack(values).prod(0) if len(values) > 1 else next(iter(values), None)

    @property
    def rank_groups(self) -> int:
        """Number of groups on the rank axis; overridden if computing the factors is expensive."""
        return len(self.factors()[0]) // self.ranks

    def spread(self, g: Tensor) -> Tensor:
        """Repeat a gate (.., ranks) over the whole rank axis, (.., R_in)."""
        return g.repeat(*[1] * (g.ndim - 1), self.rank_groups)

    def gate(self) -> Tensor | None:
        """Factor on the rank axis (R_in,), or None."""
        g = self.live()
        return None if g is None else self.spread(g)

    def mix(self) -> Mix | Tensor | None:
        """None (R_in == R_out), a constant matrix (R_out, R_in), a token router or a task table."""
        return None

    @property
    def mixer(self) -> Mix:
        """What `mix` declares, to be called."""
        return as_mix(self.mix())

    @property
    def depends_on(self) -> Literal["token", "task"] | None:
        """As the mix does."""
        return self.mixer.depends_on

    @property
    def tasks(self) -> Sequence[str]:
        """Those of a task table."""
        return self.mixer.tasks

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Rank activations (.., R_in) of x (.., in); input dropout acts here, one mask a call."""
        return F.linear(F.dropout(x, self.dropout, self.training), A)

    @torch.no_grad()
    def revive(self, index: Tensor, gen: torch.Generator) -> None:
        """Restart ranks with an update of zero and no state in the stepping optimizer.

        Args:
            index: of the ranks (k,).
            gen: generator of the draws.
        """
        fresh = self.start_of(index, gen)
        for gate in self.gates:
            fresh |= gate.start_of(index, gen)
        for name, value in fresh.items():
            p = self.get_parameter(name)
            axis = self.all_rank_axes[name] % p.ndim
            entries = (*(slice(None) for _ in range(axis)), index)
            put(p, entries, value.to(p.device, p.dtype))
            events.forget(p, entries)

    def start_of(self, index: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Start values of some ranks by parameter: LoRA's, or those that are subtracted."""
        fresh = {}
        for name in ("A", "B"):
            p, start = self.get_parameter(name), self._buffers.get(f"{name}0")
            axis = self.rank_axes[name]
            shape = list(p.shape)
            shape[axis] = len(index)
            if start is not None:
                fresh[name] = start.index_select(axis, index).expand(shape)
            else:
                fresh[name] = kaiming(gen, *shape) if name == "A" else torch.zeros(shape)
        return fresh

    def forward(self, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        """s mix(gate x A^T) B^T: (.., in) to (.., out), computed in the dtype of x."""
        if self.training:
            self.check_training()
        A, B = self.factors()
        mix = self.mixer
        z = self.down(x, A.to(x.dtype))
        for gate in self.gates if self.training else ():
            mask = gate.mask(self, z, self.ranks)
            z = z if mask is None else z * self.spread(mask)
        return up(z, B, self.scaling, self.gate(), lambda z: mix(z, x, rows))

    @torch.no_grad()
    def folded(
        self, task: str | None = None, approx: Literal["mean"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate and mix folded in: dW = s B A with A (k, in), B (out, k), zero ranks left out.

        Args:
            task: which task of a task table.
            approx: "mean" takes a router as uniform; exact only where it is.

        Raises:
            NotMergeable: a token router without approx, a task table without a task.
            ValueError: an unknown task, or the adapter is sharded (FSDP2).
        """
        refuse_sharded(self, f"dW of {self.base.name}")
        with mode(self, training=False):
            A, B = self.factors()
            gate, mix = self.gate(), self.mixer
        if gate is not None:
            A = gate[:, None] * A
        try:
            M = mix.constant(len(A), task, approx)
        except NotMergeable as error:
            raise NotMergeable(f"{self.adapter.key} cannot be merged: {error}") from None
        if M is not None:
            M = M.to(A)
            rho = int(torch.linalg.matrix_rank(M))
            if rho == len(M):
                A = M @ A
            elif rho == M.shape[1]:
                B = B @ M
            else:  # M = L R of rank rho; never wider than its rank
                U, S, Vh = torch.linalg.svd(M, full_matrices=False)
                A, B = Vh[:rho] @ A, B @ (U[:, :rho] * S[:rho])
        alive = (A != 0).any(1) & (B != 0).any(0)
        return A[alive], B[:, alive]

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in); `choice` as in folded."""
        A, B = self.folded(**choice)
        return self.scaling * (B @ A)

    def rank(self) -> int:
        """Attainable rank of dW: rows of A after the mix, for routers those of one token."""
        with mode(self, training=False):
            mix = self.mixer
            A, B = self.factors()
        inner = min(A.shape[0], B.shape[1])
        M = mix.constant(len(A)) if mix.depends_on is None else None
        if M is not None:
            inner = int(torch.linalg.matrix_rank(M.float()))
        return min(inner, self.base.in_features, self.base.out_features)


def less_start(
    a: Tensor,
    b: Tensor,
    A0: Tensor,
    B0: Tensor,
    share_a: Tensor | float = 1.0,
    share_b: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """sum_i b_i a_i minus its start, as stacked factors.

    The start of term i is (share_b B0)(share_a A0), from one block for all terms or a block for
    each. It is computed as b (a - a0) + (b - b0) a0: both parts are exactly zero at the start, so a
    bf16 forward sees the small difference and not the rounding of two large products.

    Args:
        a: (k, r, in). b: (k, out, r).
        A0: (r, in) or (k r, in). B0: (out, r) or (out, k r).
        share_a, share_b: (k, 1, 1) or a number.

    Returns:
        A_cat (k r + r0, in) and B_cat (out, k r + r0), r0 = rows of A0.
    """
    r = a.shape[1]
    a0 = A0.unflatten(0, (-1, r))  # (blocks, r, in)
    b0 = B0.unflatten(1, (-1, r)).movedim(1, 0)  # (blocks, out, r)
    extra = share_a * (b - share_b * b0)
    if len(a0) == 1:
        extra = extra.sum(0, keepdim=True)
    columns = torch.cat([b, extra])  # (k + blocks, out, r)
    return (
        torch.cat([(a - share_a * a0).flatten(0, 1), A0]),
        columns.movedim(0, 1).flatten(1),
    )
