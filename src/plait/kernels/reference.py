"""The plain forms: the formulas in torch operations that autograd differentiates.

The fast forms are tested against these, and the model runs them where a fast form does not apply.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def up(z: Tensor, B: Tensor, scale: float, gate: Tensor | None, mix: Callable | None) -> Tensor:
    """Rank activations to outputs: y = s mix(g z) B^T.

    Args:
        z: rank activations (.., R_in).
        B: stacked up-projection (out, R_out), any floating dtype.
        scale: the method's s.
        gate: factor on the rank axis (R_in,), or None.
        mix: maps (.., R_in) to (.., R_out), or None for the identity.

    Returns:
        (.., out) in the dtype of z.
    """
    if gate is not None:
        z = z * gate.to(z.dtype)
    if mix is not None:
        z = mix(z)
    return F.linear(z * scale, B.to(z.dtype))  # scaled in rank space: r numbers a token, not out
