"""A LoRA whose pairs are optimised, and changes of its basis."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from plait.core import Pair
from plait.optim.pairs import join, part
from plait.testing import tiny

TARGETS = ["q_proj", "v_proj"]


def lora(base: nn.Module | None = None, **changes: Any) -> Any:
    """A tiny Llama with upstream LoRA whose B is not zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **changes}
    with tiny.seed():
        model = get_peft_model(base or tiny.llama(), LoraConfig(**options))  # type: ignore[arg-type]
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=gen))
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, keys: range) -> None:
    model.train()
    for key in keys:
        model(**batch_of(key)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def batch_of(key: int) -> dict[str, Tensor]:
    ids = tiny.tokens(key=key)
    return {"input_ids": ids, "labels": ids}


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def change_basis(pair: Pair, R: Tensor) -> None:
    """(A, B) -> (R A, B R^-1)."""
    part(pair.A, pair.A_slices, 1, R @ join(pair.A, pair.A_slices, 1))
    part(pair.B, pair.B_slices, 0, join(pair.B, pair.B_slices, 0) @ torch.linalg.inv(R))
