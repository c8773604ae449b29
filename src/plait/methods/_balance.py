"""Balance losses of routers: they enter through the gradient of the router's weights.

A loss that a tuner's forward adds to the main loss is skipped without a task_type and counts once
per micro-batch. Here an identity on the weights adds (1 / k) d(loss)/dw in the backward, with k
micro-batches in an optimizer step: the mean over them, whatever the main loss is divided by.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.core.events import PlaitWarning
from plait.core.route import Rows

# weights (batch, tokens, N), kept (batch, tokens), rows, options -> a scalar
Loss = Callable[[Tensor, Tensor, Rows, Any], Tensor]


@dataclass
class Balance:
    """The balance loss of one layer.

    Attributes:
        loss: of the weights. weight: its factor. count: micro-batches since the last step.
        last: the loss of the last micro-batch, unweighted, a scalar.
    """

    loss: Loss
    weight: float
    count: int = 0
    last: Tensor | None = None

    @torch.compiler.disable  # one break of a compiled graph: it differentiates the loss by itself
    def into(self, w: Tensor, rows: Rows, delta: Any) -> Tensor:
        """Return the weights w (batch, .., N); their gradient gets that of this loss added."""
        if not w.numel():
            return w
        flat = w.detach().reshape(len(w) if w.ndim > 1 else 1, -1, w.shape[-1])
        kept = flat.new_ones(flat.shape[:2])
        if rows.mask is not None and rows.mask.shape == kept.shape:
            kept = rows.mask.to(kept)
        with torch.enable_grad():
            leaf = flat.requires_grad_()
            loss = self.loss(leaf, kept, rows, delta.config)
            (grad,) = torch.autograd.grad(loss, leaf)
        self.last = loss.detach()
        share = self.weight / (delta.adapter.micro_batches or 1)
        return _Inject.apply(w, (share * grad).view_as(w), self)

    def check_scale(self, delta: Any) -> None:
        """Raise ValueError under fp16 autocast."""
        if delta.autocast() == torch.float16:
            raise ValueError(
                f"{delta.adapter.key}: a balance loss does not pass through the loss scale of "
                'fp16. Use bf16, or balance="none".'
            )

    def check_count(self, delta: Any) -> None:
        """Raise ValueError if gradients were accumulated and `set_micro_batches` was not called."""
        if delta.adapter.micro_batches is None and self.count > 1:
            raise ValueError(self._untold(delta))

    def restart(self, delta: Any) -> None:
        """Reset the count; warn after a step fired by hand, which check_count does not precede."""
        if delta.adapter.micro_batches is None and self.count > 1:
            warnings.warn(self._untold(delta), PlaitWarning, stacklevel=2)
        self.count = 0

    def _untold(self, delta: Any) -> str:
        return (
            f"{delta.adapter.key}: this optimizer step had {self.count} micro-batches and the "
            "balance loss took each for a step of its own. Call "
            f"plait.set_micro_batches(model, {self.count}) before training, or add "
            "plait.PlaitCallback() to the Trainer."
        )


class _Inject(torch.autograd.Function):
    """Identity whose backward adds a gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, grad: Tensor, balance: Balance) -> Tensor:
        """Return w."""
        ctx.save_for_backward(grad)
        ctx.balance = balance
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Add the gradient and count a micro-batch."""
        ctx.balance.count += 1
        return grads[0] + ctx.saved_tensors[0].to(grads[0].dtype), None, None


def loramoe(w: Tensor, kept: Tensor, rows: Rows, config: Any) -> Tensor:
    """var(z) / (mean(z)^2 + 1e-10), z the load of each expert in each row, shifted by its type.

    Args:
        w: (batch, tokens, N), N even. kept: (batch, tokens), 0 at padding.
        rows: with sample_types (batch,) of 0 and 1, needed where config.delta is not 0.
        config: with delta.
    """
    q = (w * kept[..., None]).sum(1)  # (batch, N)
    if config.delta:
        types = rows.sample_types
        if types is None or len(types) != len(q):
            raise ValueError(
                f"{config.key}: delta = {config.delta} needs the type of each row, 0 or 1. Pass "
                "model(..., sample_types=...), or set delta = 0."
            )
        if not bool(((types == 0) | (types == 1)).all()):
            raise ValueError(
                f"{config.key}: sample_types holds {types.tolist()}. Give 0 or 1 for each row."
            )
        half = q.shape[1] // 2
        group = torch.cat([q.new_ones(half), q.new_zeros(half)])  # the first half favours type 1
        agrees = (group[None] == types.to(q)[:, None]).to(q)
        q = q * (1 + config.delta * (2 * agrees - 1))
    return q.var() / (q.mean().square() + 1e-10)


def switch(w: Tensor, kept: Tensor, rows: Rows, config: Any) -> Tensor:
    """N sum_e f_e p_e, f_e the share of selected slots, p_e the mean weight; 1 where uniform.

    Args:
        w: softmax over all experts (batch, tokens, N). kept: (batch, tokens), 0 at padding.
        rows: not used. config: with top_k; None: all are selected.
    """
    n = w.shape[-1]
    chosen = torch.zeros_like(w).scatter(-1, w.topk(config.top_k or n, dim=-1).indices, 1.0)
    total = kept.sum().clamp_min(1)
    f = (chosen * kept[..., None]).sum((0, 1)) / (total * (config.top_k or n))
    p = (w * kept[..., None]).sum((0, 1)) / total
    return n * (f * p).sum()
