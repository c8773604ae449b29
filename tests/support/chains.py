"""Small models, adapters and loops for the tests of chains."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import plait
from plait.testing import tiny

SIZES = (10, 8, 12)  # of the layers: every layer differs from its transpose


class Blocks(nn.Module):
    """Blocks of one linear layer with tanh, then a second layer: names as transformers has them."""

    def __init__(self, dtype: torch.dtype = torch.float32, blocks: int = 3) -> None:
        super().__init__()
        n, m, _ = SIZES
        with tiny.seed():
            self.layers = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(n, m, bias=False), "down": nn.Linear(m, n)})
                for _ in range(blocks)
            ).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The last block's output."""
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))  # type: ignore[index]
        return x


def wrap(base: nn.Module | None = None, r: int = 2, **options: Any) -> Any:
    """A model with a LoRA adapter, whose start is seeded."""
    options = {"lora_alpha": 2 * r, "target_modules": ["up", "down"], **options}
    with tiny.seed():
        return get_peft_model(base or Blocks(), LoraConfig(r=r, **options))  # type: ignore[arg-type]


def data(model: Any, key: int = 0, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and targets in the model's type."""
    dtype = next(model.parameters()).dtype
    x = tiny.numbers(rows, SIZES[0], key=key).to(dtype)
    return x, torch.sin(2 * x)


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, schedule: Any = None
) -> list[float]:
    """Steps of mean squared error, another batch in each; returns the losses."""
    losses = []
    for step in range(first, first + steps):
        x, y = data(model, key=step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: Any, lr: float = 1e-2, **options: Any) -> torch.optim.AdamW:
    """AdamW over what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, **options)


@torch.no_grad()
def output(model: Any) -> Tensor:
    """The model's output on the first batch."""
    return model(data(model)[0])


def layer(model: Any) -> Any:
    """The first adapted layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.layers[0]["up"]


def dense(model: Any, name: str = "layers.0.up") -> Tensor:
    """dW of a layer by the records of the ledger and the live factors, in fp64."""
    chain = plait.chain.chain_of(model)
    assert chain is not None
    live = layer(model) if name == "layers.0.up" else model.get_base_model().get_submodule(name)
    A, B = (f["default"].weight.detach().double() for f in (live.lora_A, live.lora_B))
    total = live.scaling["default"] * B @ A
    for r in chain.ledger.records:
        if r.module == name:
            total = total + r.scaling * r.B.double() @ r.A.double()
    return total
