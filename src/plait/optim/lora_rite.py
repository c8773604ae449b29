"""LoRA-RITE: an Adam-like optimizer whose steps do not depend on the basis of the rank space.

    A^T = U_A R_A,  B = U_B R_B  (QR)            gbar_A = g_A^T R_B^+ = s G^T U_B : (in, r)
                                                 gbar_B = g_B R_A^+   = s G U_A   : (out, r)
    P_A = U_B(t)^T U_B(t-1),  P_B = U_A(t)^T U_A(t-1)                               (r, r)
    V'   = P V P^T                               rho' = d2 (rho + what V lost in V')
    V    = d2 V' + (1 - d2) gbar^T gbar / rows   S = gbar (V + rho' I)^(-1/2)
    M    = d1 M P^T + (1 - d1) S                 d_i = beta_i (1 - beta_i^t) / (1 - beta_i^(t+1))
    A <- (1 - lr wd) A - lr R_B^+ M_A^T          B <- (1 - lr wd) B - lr M_B (R_A^+)^T

A: (r, in)   B: (out, r)   dW = s B A   g_A, g_B their gradients   G: (out, in) that of dW.
The trajectory of dW is the same from (A, B) and from (R A, B R^-1). LoRA-RITE, arXiv 2410.20625,
ICLR 2025. Eigenvalues are clamped at 0, so a gradient of low rank gives a finite, non-zero step.

Limits: gradients must not be clipped before the step, which breaks the invariance; the step is
clipped here, by the norm of all gbar. A pair needs r <= min(in, out).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plait.optim.pairs import (
    Bucket,
    Pair,
    PairOptimizer,
    at_least,
    collect_pairs,
    gradient,
    itself,
    wide,
)


class Frames(NamedTuple):
    """The bases of n pairs and the gradients in them.

    U_A: (n, in, r), U_B: (n, out, r). inv_A, inv_B: R_A^+ and R_B^+, (n, r, r). gbar_A: (n, in, r),
    gbar_B: (n, out, r).
    """

    U_A: Tensor
    U_B: Tensor
    inv_A: Tensor
    inv_B: Tensor
    gbar_A: Tensor
    gbar_B: Tensor


def unmagnified(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> Frames:
    """Bases and unmagnified gradients of A (n, r, in), B (n, out, r)."""
    U_A, R_A = torch.linalg.qr(A.mT)
    U_B, R_B = torch.linalg.qr(B)
    inv_A, inv_B = torch.linalg.pinv(torch.stack([R_A, R_B]))
    return Frames(U_A, U_B, inv_A, inv_B, grad_A.mT @ inv_B, grad_B @ inv_A)


class Memory(NamedTuple):
    """What n pairs carry from step to step; zeros at the start.

    M_A, U_A: (n, in, r). M_B, U_B: (n, out, r). The sides A and B in one tensor: V (2, n, r, r),
    spectrum (2, n, r), its eigenvalues in ascending order, and rho (2, n).
    """

    M_A: Tensor
    M_B: Tensor
    U_A: Tensor
    U_B: Tensor
    V: Tensor
    spectrum: Tensor
    rho: Tensor


def update(
    frames: Frames,
    old: Memory,
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
    escape: bool,
    cap_rms: float,
) -> tuple[Tensor, Tensor, Memory]:
    """The directions of A (n, r, in) and B (n, out, r), to be subtracted lr times; the new memory.

    Args:
        frames: of this step, the gradients clipped. old: of the last step.
        step: completed steps, t.
        betas, eps, escape, cap_rms: as in LoraRite.
    """
    d1, d2 = (beta * (1 - beta**step) / (1 - beta ** (step + 1)) for beta in betas)
    P = torch.stack([frames.U_B.mT @ old.U_B, frames.U_A.mT @ old.U_A])
    gram = torch.stack(
        [g.mT @ g / g.shape[-2] for g in (frames.gbar_A, frames.gbar_B)]  # rows: in, out
    )
    moved = symmetric(P @ old.V @ P.mT)
    rho = d2 * (old.rho + lost(old, moved)) if escape else old.rho
    V = symmetric(d2 * moved + (1 - d2) * gram)
    spectrum, Q = torch.linalg.eigh(V)
    scale = 1 / ((spectrum.clamp_min(0) + rho[..., None]).sqrt_() + eps)
    root = (Q * scale[..., None, :]) @ Q.mT  # (V + rho I)^(-1/2)
    M_A = torch.baddbmm(frames.gbar_A @ root[0], old.M_A, P[0].mT, beta=1 - d1, alpha=d1)
    M_B = torch.baddbmm(frames.gbar_B @ root[1], old.M_B, P[1].mT, beta=1 - d1, alpha=d1)
    if cap_rms:
        M_A, M_B = (M / (rms(M) / cap_rms).clamp_min(1) for M in (M_A, M_B))
    memory = Memory(M_A, M_B, frames.U_A, frames.U_B, V, spectrum, rho)
    return frames.inv_B @ M_A.mT, M_B @ frames.inv_A.mT, memory


def lost(old: Memory, moved: Tensor) -> Tensor:
    """What V (.., r, r) lost when its basis moved: the escape mass, (..)."""
    values = (old.spectrum - torch.linalg.eigvalsh(moved)).amax(-1)
    traces = old.V.diagonal(dim1=-2, dim2=-1).sum(-1) - moved.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(values.clamp_min(0), traces.clamp_min(0))


def symmetric(X: Tensor) -> Tensor:
    """X without the rounding that makes it not symmetric."""
    return 0.5 * (X + X.mT)


def rms(X: Tensor) -> Tensor:
    """Root of the mean square of each matrix, (n, 1, 1)."""
    return X.square().mean((-2, -1), keepdim=True).sqrt()


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of one Frobenius norm, their product unchanged."""
    a = torch.linalg.matrix_norm(A, keepdim=True) + 1e-6
    b = torch.linalg.matrix_norm(B, keepdim=True) + 1e-6
    return A * (b / a).sqrt(), B * (a / b).sqrt()


class LoraRite(PairOptimizer):
    """See the module and create_lora_rite_optimizer."""

    key = "lora_rite"

    def init_pair(self, pair: Pair, count: int) -> None:
        """Zeros: like the parameter for M and U, one of each kind a pair for V, spectrum, rho."""
        r = pair.A.shape[-2]
        for p in (pair.A, pair.B):
            if not self.state[p]:
                zero = torch.zeros_like(wide(p))
                self.state[p].update(momentum=zero, basis=zero.clone())
        zero = torch.zeros_like(wide(pair.A.flatten()[:0]))
        self.state[pair.A].update(
            step=torch.zeros(()),
            second=zero.new_zeros(count, 2, r, r),
            spectrum=zero.new_zeros(count, 2, r),
            escape=zero.new_zeros(count, 2),
        )

    def step_pairs(self, buckets: list[Bucket]) -> None:
        """Unmagnified gradients of all, one norm for the clip, then the update of each bucket."""
        work = []
        for bucket in buckets:
            A, B = bucket.A(itself), bucket.B(itself)
            frames = unmagnified(A, B, bucket.A(gradient), bucket.B(gradient))
            if limit := bucket.group_A["skip_rms"]:
                kept = [torch.where(rms(g) > limit, 0, g) for g in frames[4:]]
                frames = Frames(*frames[:4], *kept)
            work.append((bucket, A, B, frames))
        if not work:
            return
        squares = [g.square().sum() for *_, frames in work for g in frames[4:]]
        norm = torch.stack([s.to(squares[0]) for s in squares]).sum().sqrt()
        for bucket, A, B, frames in work:
            self._update(bucket, A, B, frames, norm)

    def _update(self, bucket: Bucket, A: Tensor, B: Tensor, frames: Frames, norm: Tensor) -> None:
        a, b = bucket.group_A, bucket.group_B
        if clip := a["clip_unmagnified"]:
            share = (clip / norm).clamp(max=1).to(A)
            frames.gbar_A.mul_(share)
            frames.gbar_B.mul_(share)
        move_A, move_B, memory = update(
            frames,
            self._recall(bucket),
            bucket.step,
            betas=a["betas"],
            eps=a["eps"],
            escape=a["escape"],
            cap_rms=a["cap_rms"],
        )
        A.mul_(1 - a["lr"] * a["weight_decay"]).sub_(move_A, alpha=a["lr"])
        B.mul_(1 - b["lr"] * b["weight_decay"]).sub_(move_B, alpha=b["lr"])
        if a["balance"]:
            A, B = balanced(A, B)
        bucket.put_A(itself, A)
        bucket.put_B(itself, B)
        self._remember(bucket, memory)

    def _recall(self, bucket: Bucket) -> Memory:
        def like(name: str) -> tuple[Tensor, Tensor]:  # stored as A and B are
            def of(p: nn.Parameter) -> Tensor:
                return self.state[p][name]

            return bucket.A(of).mT, bucket.B(of)

        def small(name: str) -> Tensor:
            each = zip(bucket.pairs, bucket.slots, strict=True)
            return torch.stack([self.state[p.A][name][slot] for p, slot in each], dim=1)

        M, U = like("momentum"), like("basis")
        return Memory(*M, *U, small("second"), small("spectrum"), small("escape"))

    def _remember(self, bucket: Bucket, memory: Memory) -> None:
        M_A, M_B, U_A, U_B, *small = memory
        for name, of_A, of_B in (("momentum", M_A, M_B), ("basis", U_A, U_B)):
            bucket.put_A(lambda p, name=name: self.state[p][name], of_A.mT)
            bucket.put_B(lambda p, name=name: self.state[p][name], of_B)
        for i, (pair, slot) in enumerate(zip(bucket.pairs, bucket.slots, strict=True)):
            for name, value in zip(("second", "spectrum", "escape"), small, strict=True):
                self.state[pair.A][name][slot] = value[:, i]


def create_lora_rite_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    escape: bool = True,
    clip_unmagnified: float = 1.0,
    skip_rms: float = 0.0,
    cap_rms: float = 0.0,
    balance: bool = False,
    adapter: str | None = None,
    other_lr: float | None = None,
) -> LoraRite:
    """LoRA-RITE for the adapter of a model; set Trainer's `max_grad_norm` to 0 with it.

    Args:
        model: with upstream LoRA layers or a plait method made of free pairs.
        lr: of A and B. The change of dW is proportional to it and to the scaling s.
        betas: decay of the first and the second moment, bias-corrected.
        eps: added to the root of the second moment's eigenvalues.
        weight_decay: decoupled; shrinks dW by (1 - lr weight_decay)^2 a step.
        escape: keep the second moment that leaves the basis as a scalar, as in the paper.
        clip_unmagnified: largest norm of all unmagnified gradients together. 0: no clipping.
        skip_rms: a factor whose unmagnified gradient has a larger root mean square does not move.
            0: none is skipped.
        cap_rms: largest root mean square of a momentum. 0: no cap.
        balance: give A and B one norm after each step.
        adapter: its name. None: the active one.
        other_lr: of AdamW on what else trains. None: lr.

    Raises:
        ValueError: a layer whose factors are no free pair, a rank above min(in, out), or an option
            out of range.
    """
    key = LoraRite.key
    options: dict[str, Any] = {
        "eps": eps,
        "clip_unmagnified": clip_unmagnified,
        "skip_rms": skip_rms,
        "cap_rms": cap_rms,
    }
    for name, value in options.items():
        at_least(key, name, value, 0)
    for i, beta in enumerate(betas):
        at_least(key, f"betas[{i}]", beta, 0, below=1)
    pairs = collect_pairs(model, adapter)
    for pair in pairs:
        r = pair.A.shape[-2]
        n_in = pair.A.shape[-1] * len(pair.A_slices or (0,))
        n_out = pair.B.shape[-2] * len(pair.B_slices or (0,))
        if r > min(n_in, n_out):
            raise ValueError(
                f"{pair.name}: rank {r} is above min(in, out) of a layer {n_in} -> {n_out}. Give "
                "a smaller r, by rank_pattern for this layer alone."
            )
    return LoraRite(
        model,
        pairs,
        lr=lr,
        weight_decay=weight_decay,
        other_lr=lr if other_lr is None else other_lr,
        betas=tuple(betas),
        escape=escape,
        balance=balance,
        **options,
    )
