"""LoRSum: the low-rank form of a step along the full gradient, by proximal sweeps over A and B.

    minimise  1/2 |B A - (B0 A0 - (lr/s) step)|_F^2 + lam/2 (|A - A0|_F^2 + |B - B0|_F^2)
    A <- A0 + (B^T B + lam I)^-1 (B^T (B0 - B) A0 - (lr/s) B^T step)
    B <- B0 + (B0 (A0 - A) A^T - (lr/s) step A^T) (A A^T + lam I)^-1

A: (r, in)   B: (out, r)   dW = s B A   G = S^T X: (out, in), from the inputs X (N, in) of the layer
and the gradients S (N, out) of its output, kept from backward to the step. step = G, or with
momentum (1 - tau) G + mu M_out M_in, the buffer of low rank, which moves by the same primitive.
K sweeps solve B, then A, each from the last value of the other; many sweeps are the truncated SVD
of the full step. K = 0 solves both from the old pair: scaled gradient descent, which reads `.grad`
alone and equals peft's Riemannian SGD with lr/s^2 and reg = lam. The division by s makes the step
of dW independent of s. metric="kfac" (experimental) measures distances by a diagonal Kronecker
metric of the running squares of X and S.

OPLoRA, arXiv 2509.19977; LoRSum and F-LoRSum, arXiv 2602.16456.

Limits: one plain pair a layer, no dropout on its input, no fp16; X and S take N (in + out) numbers
a layer, N the tokens of a step.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plait.core import Pair
from plait.core.bridge import PlaitLayer
from plait.core.init import gaussian, seeded
from plait.optim.pairs import (
    Bucket,
    PairOptimizer,
    at_least,
    gradient,
    itself,
    layer_pairs,
    wide,
)
from plait.upstream.layers import dropout_of

log = logging.getLogger(__name__)

JITTER = 1e-6  # added to lam where there is one
KFAC_LEAST = 1e-5  # the smallest lam under metric="kfac"
ROWS = 1024  # of a block of the N x N products in the norm of G

Product = Callable[[Tensor], Tensor]
Rows = list[tuple[Tensor, Tensor]]  # X (N, in) and S (N, out) of each pair


# The primitive ----------------------------------------------------------------------------------


def lorsum(
    A0: Tensor,
    B0: Tensor,
    left: Product,
    right: Product,
    *,
    lam: float,
    sweeps: int,
    start: Literal["out", "in"] = "out",
    keep: float = 1.0,
    m_in: Tensor | None = None,
    m_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pairs nearest to keep B0 A0 + T, T given by its products.

    Args:
        A0: (n, r, in). B0: (n, out, r). The start, and the centre of the proximal term.
        left: B (n, out, r) -> B^T T (n, r, in). right: A (n, r, in) -> T A^T (n, out, r).
        lam: weight of the proximal term.
        sweeps: K. 0: both sides from the old pair.
        start: the side that is solved first.
        keep: coefficient of the old product.
        m_in: (n, 1, in) and m_out: (n, out, 1), the metric, or None.

    Returns:
        A (n, r, in) and B (n, out, r).
    """

    def solve_A(B: Tensor) -> Tensor:
        Bm = B if m_out is None else B * m_out
        gain = left(B) if m_in is None else left(B) / m_in
        return A0 + solve(Bm.mT @ B, lam, Bm.mT @ (keep * B0 - B) @ A0 + gain)

    def solve_B(A: Tensor) -> Tensor:
        Am = A if m_in is None else A * m_in
        gain = right(A) if m_out is None else right(A) / m_out
        return B0 + solve(Am @ A.mT, lam, (B0 @ ((keep * A0 - A) @ Am.mT) + gain).mT).mT

    if not sweeps:
        return solve_A(B0), solve_B(A0)
    A, B = A0, B0
    for _ in range(sweeps):
        if start == "out":
            B = solve_B(A)
            A = solve_A(B)
        else:
            A = solve_A(B)
            B = solve_B(A)
    return A, B


def solve(gram: Tensor, lam: float, right: Tensor) -> Tensor:
    """(gram + lam I)^-1 right for symmetric gram (n, r, r), right (n, r, m).

    By Cholesky; where that fails or the matrix is singular to rounding, by the pseudo-inverse.
    """
    r = gram.shape[-1]
    matrix = gram + lam * torch.eye(r, dtype=gram.dtype, device=gram.device)
    L, failed = torch.linalg.cholesky_ex(matrix)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    # A pivot lost in rounding may be negative, then the factor is not a number.
    sound = pivots.amin(-1) > r * torch.finfo(gram.dtype).eps * pivots.amax(-1)
    if bool(((failed == 0) & sound).all()):
        return torch.cholesky_solve(right, L)
    return torch.linalg.pinv(matrix, hermitian=True) @ right


# Taps -------------------------------------------------------------------------------------------


@dataclass
class Tap:
    """Rows of a layer since the last step: X (N_i, in) and S (N_i, out) of each backward."""

    name: str
    factor: weakref.ref[nn.Parameter]
    max_rows: int
    X: list[Tensor] = field(default_factory=list)
    S: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Drop all rows."""
        self.X.clear()
        self.S.clear()

    def attach(self, layer: Any) -> Any:
        """Watch a layer; returns the handle that stops it.

        A hook on each output holds the input that belongs to it and keeps both when a gradient
        reaches the output. So recomputation under checkpointing, a module called twice and forwards
        without a backward need no bookkeeping.
        """

        def forward(layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
            if not (layer.training and y.requires_grad) or layer.disable_adapters or layer.merged:
                return
            factor = self.factor()
            if factor is not None and factor.grad is None:
                self.clear()  # gradients were dropped, as after a step that was skipped
            x = (args[0] if args else kwargs["x"]).detach()
            y.register_hook(lambda grad: self.keep(x, grad.detach()))

        return layer.register_forward_hook(forward, with_kwargs=True)

    def keep(self, x: Tensor, grad: Tensor) -> None:
        """Keep the rows of one backward."""
        if grad.dtype == torch.float16:
            raise TypeError(
                f"lorsum: {self.name} computes in fp16, whose gradients carry a loss scale. Train "
                "in bf16 or fp32."
            )
        self.X.append(x.flatten(0, -2))
        self.S.append(grad.flatten(0, -2))
        rows = sum(len(X) for X in self.X)
        if rows > self.max_rows:
            raise ValueError(
                f"lorsum: {self.name} saw {rows} rows in one step, max_rows = {self.max_rows}. "
                "Use smaller batches or fewer accumulated ones, or raise max_rows: each row takes "
                "in + out numbers in every layer."
            )

    def rows(self, width_in: int, width_out: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """X (N, in) and S (N, out) in the dtype of `like`."""
        if not self.X:
            return like.new_zeros(0, width_in), like.new_zeros(0, width_out)
        return torch.cat(self.X).to(like), torch.cat(self.S).to(like)


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(t: Tensor) -> Tensor:
    """Mean over the processes, as DDP takes it of gradients."""
    if processes() > 1:
        dist.all_reduce(t)
        t = t / processes()
    return t


def squared_norm(X: Tensor, S: Tensor) -> Tensor:
    """|S^T X|_F^2 = sum (X X^T) * (S S^T), element-wise, in blocks of rows."""
    blocks = zip(X.split(ROWS), S.split(ROWS), strict=True)
    total = sum((((x @ X.T) * (s @ S.T)).sum() for x, s in blocks), X.new_zeros(()))
    return total.clamp_min(0)  # rounding may leave a small negative number


# The optimizer ----------------------------------------------------------------------------------


class LorSum(PairOptimizer):
    """See the module and create_lorsum_optimizer.

    Attributes:
        bytes_per_row: what one more token in a step costs, over all layers, in fp32.
    """

    key = "lorsum"

    def __init__(
        self, model: nn.Module, layers: Sequence[tuple[Any, Pair]], max_rows: int, **kwargs: Any
    ) -> None:
        super().__init__(model, [pair for _, pair in layers], **kwargs)
        self.max_rows = max_rows
        self.taps: dict[nn.Parameter, Tap] = {}
        group = self.param_groups[0]
        if group["sweeps"] == 0:
            self.bytes_per_row = 0
            return
        handles = []
        for layer, pair in layers:
            tap = self.taps[pair.A] = Tap(pair.name, weakref.ref(pair.A), max_rows)
            handles.append(tap.attach(layer))
        self._stop = weakref.finalize(self, _remove, handles)
        self._stop.atexit = False
        self.bytes_per_row = 4 * sum(p.A.shape[1] + p.B.shape[0] for p in self.pairs)
        log.info(
            "lorsum keeps inputs and output gradients until the step: %.1f MiB for each 1000 "
            "tokens in fp32, up to max_rows = %d.", self.bytes_per_row * 1000 / 2**20, max_rows
        )  # fmt: skip

    def remove(self) -> None:
        """Remove all hooks from the model and drop their rows; the optimizer cannot step again."""
        if self.taps:
            self._stop()
        for tap in self.taps.values():
            tap.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch; also drops the rows that belong to these gradients."""
        super().zero_grad(set_to_none)
        for tap in self.taps.values():
            tap.clear()

    def init_pair(self, pair: Pair, count: int) -> None:
        """Momentum: M_in Gaussian by the layer's name, M_out zero. Metric: ones."""
        group = self.param_groups[0]
        a, b = self.state[pair.A], self.state[pair.B]
        a["step"] = torch.zeros(())
        if group["momentum"]:
            r = max(1, round(group["momentum_rank"] * len(pair.A)))
            like = wide(pair.A)
            M_in = gaussian(seeded(0, pair.name), r, pair.A.shape[1], std=1.0)
            a["momentum"] = M_in.to(like)
            b["momentum"] = like.new_zeros(pair.B.shape[0], r)
        if group["metric"] == "kfac":
            a["metric"] = wide(pair.A).new_ones(pair.A.shape[1])
            b["metric"] = wide(pair.B).new_ones(pair.B.shape[0])

    def step_pairs(self, buckets: list[Bucket]) -> None:
        """Update all pairs, then drop the kept rows."""
        work = []
        for bucket in buckets:
            if bucket.group_A["lr"] != bucket.group_B["lr"]:
                raise ValueError(
                    f"lorsum: {bucket.pairs[0].name} has lr {bucket.group_A['lr']:g} for A and "
                    f"{bucket.group_B['lr']:g} for B. It steps dW as a whole; give them one lr."
                )
            work.append((bucket, self._rows(bucket) if self.taps else None))
        share = self._share(work)
        for bucket, rows in work:
            self._update(bucket, rows, share)
        for tap in self.taps.values():
            tap.clear()

    def _rows(self, bucket: Bucket) -> Rows:
        """X and S of each pair."""
        rows = []
        for p in bucket.pairs:
            X, S = self.taps[p.A].rows(p.A.shape[1], p.B.shape[0], wide(p.A))
            if not len(X) and processes() == 1:
                raise ValueError(
                    f"lorsum: {p.name} has a gradient and its inputs were not seen. It has to run "
                    "in training mode in this process, through module(x)."
                )
            rows.append((X, S))
        return rows

    def _share(self, work: list[tuple[Bucket, Rows | None]]) -> float:
        """The factor that brings the norm of all G together to clip_norm."""
        limit = self.param_groups[0]["clip_norm"]
        if not limit:
            return 1.0
        if processes() > 1:
            raise ValueError(
                "lorsum: clip_norm needs the full gradient, which no process of several holds. "
                "Set clip_norm to 0."
            )
        squares = [float(squared_norm(X, S)) for _, rows in work for X, S in rows or ()]
        norm = sum(squares) ** 0.5
        return min(1.0, limit / norm) if norm else 1.0

    def _update(self, bucket: Bucket, rows: Rows | None, share: float) -> None:
        group = bucket.group_A
        lr, mu, tau = group["lr"], group["momentum"], group["dampening"]
        A, B = bucket.A(itself), bucket.B(itself)
        s = A.new_tensor([pair.scaling for pair in bucket.pairs])[:, None, None]
        left, right = self._products(bucket, rows, A, B, s)
        how: dict[str, Any] = {
            "lam": strength(lr, group),
            "sweeps": group["sweeps"],
            "start": group["start"],
        }
        metric: dict[str, Any] = {}
        if rows is not None and group["metric"]:
            metric = self._metric(bucket, rows)
        c, c_M = -lr * (1 - tau) * share / s, -lr * mu / s
        if mu:
            M_in, M_out = bucket.A(self._momentum), bucket.B(self._momentum)
            new_A, new_B = lorsum(
                A, B,
                lambda B: c * left(B) + c_M * (B.mT @ M_out) @ M_in,
                lambda A: c * right(A) + c_M * M_out @ (M_in @ A.mT),
                **how, **metric,
            )  # fmt: skip
            M_in, M_out = lorsum(
                M_in, M_out,
                lambda B: (1 - tau) * share * left(B),
                lambda A: (1 - tau) * share * right(A),
                keep=mu, **how,
            )  # fmt: skip
            bucket.put_A(self._momentum, M_in)
            bucket.put_B(self._momentum, M_out)
        else:
            new_A, new_B = lorsum(
                A, B, lambda B: c * left(B), lambda A: c * right(A), **how, **metric
            )
        bucket.put_A(itself, new_A - lr * group["weight_decay"] * A)
        bucket.put_B(itself, new_B - lr * bucket.group_B["weight_decay"] * B)

    def _products(
        self, bucket: Bucket, rows: Rows | None, A: Tensor, B: Tensor, s: Tensor
    ) -> tuple[Product, Product]:
        """B -> B^T G and A -> G A^T, means over the processes.

        Several processes never exchange X and S, only these thin products.
        """
        if rows is None:  # sweeps = 0 asks for those of the old pair, which are the gradients
            g_A, g_B = bucket.A(gradient) / s, bucket.B(gradient) / s
            return lambda _: g_A, lambda _: g_B

        def left(B: Tensor) -> Tensor:
            each = [(S @ b).T @ X for (X, S), b in zip(rows, B, strict=True)]
            return mean_over_processes(torch.stack(each))

        def right(A: Tensor) -> Tensor:
            each = [S.T @ (X @ a.T) for (X, S), a in zip(rows, A, strict=True)]
            return mean_over_processes(torch.stack(each))

        if bucket.group_A["start"] == "out":  # the first product of the first sweep
            g = right(A)
            self._compare(bucket, s * g, bucket.B(gradient))
            return left, lambda X: g if X is A else right(X)
        g = left(B)
        self._compare(bucket, s * g, bucket.A(gradient))
        return lambda X: g if X is B else left(X), right

    def _compare(self, bucket: Bucket, kept: Tensor, grad: Tensor) -> None:
        """Raise ValueError if a .grad (n, ..) does not follow from the rows.

        It was then scaled, clipped or is incomplete. Compares the norm of each pair within a
        quarter, since bf16 rounds the two in different ways.
        """
        norms = torch.stack([t.flatten(1).norm(dim=1) for t in (kept, grad)], dim=1)
        for pair, (k, g) in zip(bucket.pairs, norms.tolist(), strict=True):
            if not 0.8 * k <= g <= 1.25 * k:
                raise ValueError(
                    f"lorsum: {pair.name}: its gradient has norm {g:.3g}, the inputs and output "
                    f"gradients seen give {k:.3g}. Something changed it between backward and step "
                    "(clipping: set max_grad_norm to 0; a loss scale), or the layer does not "
                    "compute W x + s B A x."
                )

    def _momentum(self, p: nn.Parameter) -> Tensor:
        return self.state[p]["momentum"]

    def _metric(self, bucket: Bucket, rows: Rows) -> dict[str, Tensor]:
        """Update the running squares; returns m_in (n, 1, in) and m_out (n, out, 1)."""
        group = bucket.group_A
        # S of a mean loss carries 1/N.
        now_in = torch.stack([X.square().sum(0) / max(1, len(X)) for X, _ in rows])
        now_out = torch.stack([S.square().sum(0) * len(S) for _, S in rows])
        metrics = []
        for factors, now in (
            ([p.A for p in bucket.pairs], now_in),
            ([p.B for p in bucket.pairs], now_out),
        ):
            for p, value in zip(factors, mean_over_processes(now), strict=True):
                self.state[p]["metric"].lerp_(value, 1 - group["beta2"])
            D = torch.stack([self.state[p]["metric"] for p in factors])
            metrics.append((D + group["damping"]) ** group["gamma"])
        return {"m_in": metrics[0][:, None, :], "m_out": metrics[1][:, :, None]}


def strength(lr: float, group: dict[str, Any]) -> float:
    """lam, the weight of the proximal term."""
    lam = group["lmbd"] * (lr if group["lmbd_times_lr"] else 1.0)
    if group["metric"]:
        return max(lam, KFAC_LEAST)
    return lam + JITTER if group["lmbd"] else 0.0


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def create_lorsum_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-2,
    sweeps: int = 1,
    momentum: float | None = None,
    dampening: float = 0.0,
    momentum_rank: float = 1.0,
    lmbd: float = 1e-2,
    lmbd_times_lr: bool = True,
    start: Literal["out", "in"] = "out",
    metric: Literal["kfac"] | None = None,
    beta2: float = 0.99,
    gamma: float = 0.5,
    damping: float = 1e-5,
    max_rows: int = 16384,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    adapter: str | None = None,
    other_lr: float | None = None,
) -> LorSum:
    """LoRSum for the adapter of a model; set Trainer's `max_grad_norm` to 0 with it.

    Args:
        model: with upstream LoRA layers, or a plait method of one plain pair a layer.
        lr: of the step of dW along its own gradient, as in SGD.
        sweeps: K. 0: scaled gradient descent, from `.grad` alone.
        momentum: mu. None: 0.9, and 0 for sweeps = 0, which has none.
        dampening: tau. With metric="kfac" the buffer is an average: tau is mu.
        momentum_rank: rank of the momentum, in ranks of the layer.
        lmbd: weight of the proximal term; 0: none.
        lmbd_times_lr: multiply it by lr.
        start: the side that a sweep solves first, "out" (B) or "in" (A).
        metric: None, or "kfac" (experimental).
        beta2: decay of the running squares of the metric.
        gamma: power of the metric.
        damping: added to the running squares.
        max_rows: most rows (tokens) kept in one layer in one step.
        weight_decay: decoupled, on A and B.
        clip_norm: largest norm of the full gradients of all layers together. 0: no clipping.
        adapter: its name. None: the active one.
        other_lr: of AdamW on what else trains. None: 1e-3, for lr is not one of AdamW.

    Raises:
        ValueError: a layer without one plain pair, dropout on its input, or options that exclude
            each other or are out of range.
    """
    key = LorSum.key
    if sweeps == 0 and (momentum or metric or clip_norm):
        raise ValueError(
            f"lorsum: sweeps = 0 reads .grad alone and has no momentum, metric or clip_norm; "
            f"given: momentum = {momentum}, metric = {metric!r}, clip_norm = {clip_norm}. Give "
            "sweeps of 1 or more, or leave them out."
        )
    if momentum is None:
        momentum = 0.9 if sweeps else 0.0
    if metric not in (None, "kfac") or start not in ("out", "in"):
        raise ValueError(
            f'lorsum: start = {start!r}, metric = {metric!r}. start is "out" or "in", metric is '
            'None or "kfac".'
        )
    if metric:
        if dampening not in (0.0, momentum):
            raise ValueError(
                f'lorsum: dampening = {dampening} with metric="kfac", whose momentum is an '
                "average. Leave dampening out."
            )
        dampening = momentum
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        at_least(key, name, value, 0, below=1)
    for name, value in (
        ("sweeps", sweeps), ("lmbd", lmbd), ("gamma", gamma), ("damping", damping),
        ("clip_norm", clip_norm), ("beta2", beta2), ("momentum_rank", momentum_rank),
    ):  # fmt: skip
        at_least(key, name, value, 0)
    at_least(key, "max_rows", max_rows, 1)
    layers = [_plain(layer, pairs) for layer, pairs in layer_pairs(model, adapter)]
    for _, pair in layers:
        if sweeps and start == "in" and not lmbd and not bool(pair.B.any()):
            raise ValueError(
                f'lorsum: {pair.name} has B = 0, and with start="in" and lmbd = 0 the first half '
                'sweep solves for A in the span of B. Use start="out", or lmbd above 0.'
            )
    return LorSum(
        model,
        layers,
        max_rows,
        lr=lr,
        weight_decay=weight_decay,
        other_lr=1e-3 if other_lr is None else other_lr,
        sweeps=sweeps,
        momentum=momentum,
        dampening=dampening,
        momentum_rank=momentum_rank,
        lmbd=lmbd,
        lmbd_times_lr=lmbd_times_lr,
        start=start,
        metric=metric,
        beta2=beta2,
        gamma=gamma,
        damping=damping,
        clip_norm=clip_norm,
    )


def _plain(layer: Any, pairs: list[Pair]) -> tuple[Any, Pair]:
    """The layer with its one plain pair."""
    pair = pairs[0]
    if len(pairs) > 1 or pair.A_slices is not None or pair.B_slices is not None:
        raise ValueError(
            f"lorsum: {pair.name} has {len(pairs)} pairs of factors in stacks, and one step along "
            "the full gradient does not say how they share it. Use lora_rite, or AdamW."
        )
    if isinstance(layer, PlaitLayer):
        deltas: Any = layer.plait_delta.values()
        delta = next(d for d in deltas if any(p is pair.A for p in d.parameters()))
        dropout: float = delta.dropout
    else:
        dropout = dropout_of(layer, pair.A)
    if dropout:
        raise ValueError(
            f"lorsum: {pair.name} has lora_dropout = {dropout}: the step would be computed from "
            "inputs that A did not see. Set it to 0."
        )
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        raise ValueError(
            f"lorsum: {pair.name} is an nn.MultiheadAttention, whose inputs are not those of a "
            "linear layer. Leave it out of target_modules."
        )
    return layer, pair
