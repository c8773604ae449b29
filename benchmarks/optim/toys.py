"""The small problems on which the optimizers are measured and tested; all draws are seeded.

Invariance toy: tanh of one adapted layer under a fixed head. Linear task: the best rank-r
approximation of a matrix, where the optimum is known.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from plait.core.init import seeded
from plait.optim import svd_lora

Make = Callable[[nn.Module], torch.optim.Optimizer]


class OneLayer(nn.Module):
    """y = activation(x W^T) H^T, W to be adapted, H fixed."""

    def __init__(self, W: Tensor, H: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
        self.linear.weight = nn.Parameter(W.clone())
        self.H = H

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (N, ..)."""
        y = self.linear(x)
        return y if self.H is None else torch.tanh(y) @ self.H.T


def adapted(base: nn.Module, A: Tensor, B: Tensor, alpha: float | None = None) -> Any:
    """The model with a plain LoRA on its layer that starts from A (r, in) and B (out, r)."""
    r = len(A)
    config = LoraConfig(r=r, lora_alpha=alpha or r, target_modules=["linear"])  # type: ignore[arg-type]
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    layer = lora_layer(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    return model.train()


def lora_layer(model: Any) -> Any:
    """The adapted layer."""
    return model.base_model.model.linear


def delta(model: Any) -> Tensor:
    """dW (out, in), scaled."""
    return lora_layer(model).get_delta_weight("default").detach()


def basis(cond: float, r: int, gen: torch.Generator) -> Tensor:
    """R (r, r) of a condition number, its singular values spaced evenly on a log scale."""
    Q1, Q2 = (
        torch.linalg.qr(torch.randn(r, r, generator=gen, dtype=torch.float64)).Q for _ in "12"
    )
    values = torch.logspace(0, torch.log10(torch.tensor(cond)).item(), r, dtype=torch.float64)
    return Q1 @ torch.diag(values / cond**0.5) @ Q2


class Invariance:
    """A (4, 20), B (12, 4), 64 inputs; `run` trains on drawn batches of 16."""

    def __init__(self, seed: int = 0, zero_B: bool = False) -> None:
        gen = seeded(seed, "invariance")

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        self.W, self.H = normal(12, 20) / 20**0.5, normal(6, 12) / 12**0.5
        self.X = normal(64, 20)
        D = normal(12, 5) @ normal(5, 20) / 8
        self.Y = torch.tanh(self.X @ (self.W + D).T) @ self.H.T + 0.05 * normal(64, 6)
        self.A, self.B = 0.3 * normal(4, 20), 0.1 * normal(12, 4)
        if zero_B:
            self.B = torch.zeros_like(self.B)

    def run(
        self,
        make: Make,
        R: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        steps: int = 60,
        scale_A: float = 1.0,
    ) -> tuple[list[Tensor], list[float]]:
        """Train; returns dW and the loss on all inputs after each step."""
        A, B = scale_A * self.A, self.B
        if R is not None:
            A, B = R @ A, B @ torch.linalg.inv(R)
        model = adapted(OneLayer(self.W.to(dtype), self.H.to(dtype)), A, B)
        optimizer = make(model)
        X, Y, gen = self.X.to(dtype), self.Y.to(dtype), seeded("batches")
        path, losses = [], []
        for _ in range(steps):
            rows = torch.randperm(64, generator=gen)[:16]
            optimizer.zero_grad()
            (model(X[rows]) - Y[rows]).square().mean().backward()
            optimizer.step()
            path.append(delta(model))
            with torch.no_grad():
                losses.append(float((model(X) - Y).square().mean()))
        return path, losses

    def difference(
        self, make: Make, cond: float, dtype: torch.dtype = torch.float64, steps: int = 60
    ) -> float:
        """Largest relative difference of the trajectories of dW from (A, B) and (R A, B R^-1)."""
        one, _ = self.run(make, dtype=dtype, steps=steps)
        two, _ = self.run(make, basis(cond, 4, seeded("basis")), dtype, steps)
        return max(float((a - b).norm() / a.norm()) for a, b in zip(one, two, strict=True))


class LinearTask:
    """|B A - W|_F^2 for W (120, 60), rank 6; rows of X = I in batches, or all at once."""

    r = 6

    def __init__(self, seed: int = 0, ill: bool = False) -> None:
        gen = seeded(seed, "linear")
        self.W = torch.randn(120, 60, generator=gen, dtype=torch.float64)
        if ill:
            U, _, Vh = torch.linalg.svd(self.W, full_matrices=False)
            self.W = U * 20 * torch.logspace(0, -3, 60, dtype=torch.float64) @ Vh
        S = torch.linalg.svdvals(self.W)
        self.best = float(S[self.r :].square().sum())
        self.A = (torch.rand(self.r, 60, generator=gen, dtype=torch.float64) * 2 - 1) / 60**0.5
        self.B = torch.zeros(120, self.r, dtype=torch.float64)
        self.order = seeded(seed, "order")

    def gap(self, BA: Tensor) -> float:
        """(f - f*) / f*."""
        return float((BA - self.W).square().sum()) / self.best - 1

    def batches(self, size: int | None) -> list[Tensor]:
        """Row indices of one epoch; None: one batch of all."""
        if size is None:
            return [torch.arange(60)]
        return list(torch.randperm(60, generator=self.order).split(size))

    def run(self, make: Make, epochs: int, size: int | None = None) -> list[float]:
        """Train; returns the gap after each epoch."""
        model = adapted(OneLayer(-self.W), self.A, self.B)
        optimizer, eye, gaps = make(model), torch.eye(60, dtype=torch.float64), []
        for _ in range(epochs):
            for rows in self.batches(size):
                optimizer.zero_grad()
                model(eye[rows]).square().sum().backward()
                optimizer.step()
            gaps.append(self.gap(delta(model)))
        return gaps

    def reference(
        self, lr: float, epochs: int, size: int | None = None, momentum: float = 0.0
    ) -> list[float]:
        """SVDLoRA on the same batches."""
        A, B, M, gaps = self.A, self.B, None, []
        for _ in range(epochs):
            for rows in self.batches(size):
                G = torch.zeros_like(self.W)
                G[:, rows] = 2 * (B @ A - self.W)[:, rows]
                A, B, M = svd_lora(A, B, G, lr=lr, M=M, momentum=momentum)
            gaps.append(self.gap(B @ A))
        return gaps
