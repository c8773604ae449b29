"""What the adapted layers see: second moments of their inputs, for a truncation that minds them.

The rank-k part of dW that is best in the Frobenius norm takes every input direction as equally
likely. With C = E[x x^T] over real inputs, the best rank-k map for the layer's output is that which
minimises E |(dW - B A) x|^2 = ||(dW - B A) C^1/2||_F^2: U_k U_k^T dW, with U_k the leading left
singular vectors of dW C^1/2 (Eckart-Young for the weighted norm; C^1/2 need not be invertible).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from plait.upstream.layers import is_tuner_layer


@torch.no_grad()
def second_moments(model: PeftModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """C = mean of x x^T (in, in) over all tokens of some batches, fp64, by layer of the base model.

    Args:
        model: with the adapter active, so that later layers see what it makes of the input.
        batches: inputs of the model; tokens outside `attention_mask` do not count.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor | None = None

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            rows = x.flatten(0, -2)
            if mask is not None and x.shape[:-1] == mask.shape:
                rows = x[mask]
            rows = rows.double()
            sums[name] = sums.get(name, 0) + rows.T @ rows  # type: ignore[operator]
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    layers = [(n, m) for n, m in model.get_base_model().named_modules() if is_tuner_layer(m)]
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            attended = batch.get("attention_mask")
            mask = None if attended is None else attended.bool().to(model.device)
            model(**{name: value.to(model.device) for name, value in batch.items()})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).cpu() for name, total in sums.items()}


def square_root(C: Tensor) -> Tensor:
    """C^1/2 (in, in) of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
