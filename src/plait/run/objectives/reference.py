"""The reference of DPO, KTO and GRPO: the model at the start of training, exactly.

TRL adds a second adapter `ref`, a copy of the parameters. Where training starts from the base model
that copy is dropped: the base with the adapter off is the reference. Where it goes on from a
trained adapter the copy stays, and gets what else decides the output, such as buffers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

REF = "ref"  # TRL's name of the copy


def settle_reference(model: PeftModel, batch: Mapping[str, Tensor]) -> None:
    """Make TRL's reference equal to the policy.

    Args:
        model: with the adapters `default` and, if TRL made one, `ref`.
        batch: some rows that both are compared on.

    Raises:
        ValueError: a method whose copy computes something else.
    """
    if REF not in model.peft_config:
        return
    if is_base(model, batch):
        drop_reference(model)
        return
    _copy_all(model)
    policy = _logits(model, batch)
    model.set_adapter(REF)
    try:
        reference = _logits(model, batch)
    finally:
        model.set_adapter("default")
    # Equal but for the last digit, where the two are computed in another order.
    slack = 64 * torch.finfo(policy.dtype).eps * max(1.0, float(policy.abs().max()))
    if float((policy - reference).abs().max()) > slack:
        kind = str(model.peft_config["default"].peft_type).removeprefix("PeftType.")
        raise ValueError(
            f"objective: a copy of this {kind} adapter computes other logits, so the reference "
            "would not be the model at the start. Start from a new adapter, or use another method."
        )


def rest_reference(model: nn.Module) -> None:
    """Put TRL's copy in evaluation mode: it drops nothing at random, whatever the policy does."""
    for name, module in model.named_modules():
        if REF in name.split("."):
            module.eval()


def drop_reference(model: Any) -> None:
    """Remove TRL's copy, if there is one."""
    if isinstance(model, PeftModel) and REF in model.peft_config:
        model.delete_adapter(REF)
        model.set_adapter("default")


def is_base(model: PeftModel, batch: Mapping[str, Tensor]) -> bool:
    """Whether a model computes the same as with its adapter off, bit for bit."""
    policy = _logits(model, batch)
    with model.disable_adapter():
        return torch.equal(policy, _logits(model, batch))


@torch.no_grad()
def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
        return model(**inputs).logits
    finally:
        model.train(was_training)


@torch.no_grad()
def _copy_all(model: Any) -> None:
    """Copy all tensors of `default` to `ref`; TRL leaves out buffers and some parameters."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        parts = name.split(".")
        if "default" in parts:
            other = named.get(".".join(REF if part == "default" else part for part in parts))
            if other is not None and other.shape == tensor.shape:
                other.copy_(tensor)
