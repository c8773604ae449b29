"""Helpers of the checks: wrap a tiny model, train it, read it, compare tensors."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn

from plait import DenseDelta, LowRankDelta
from plait.core.bridge import PlaitLayer
from plait.core.mix import TaskTable, TokenRouter
from plait.testing import tiny
from plait.testing.case import Case


def wrap(case: Case, base: nn.Module | None = None, **changes: Any) -> Any:
    """A base model with a fresh adapter of the case, in evaluation mode."""
    return get_peft_model(base or tiny.llama(), case.config(**changes)).eval()  # type: ignore[arg-type]


def one_layer(
    case: Case, n_in: int, n_out: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Any, PlaitLayer]:
    """A model of one linear layer with the case's adapter, and its layer."""
    options = {"target_modules": ["linear"], "task_type": None, "init_weights": False, **changes}
    model = wrap(case, tiny.OneLinear(n_in, n_out, dtype), **options)
    return model, layers(model)[0]


def one_delta(case: Case, n_in: int = 7, n_out: int = 5, **changes: Any) -> tuple[nn.Module, Any]:
    """A model of one fp64 linear layer with random factors, in training mode, and its Delta."""
    model, layer = one_layer(case, n_in, n_out, **changes)
    return model.train(), layer.plait_delta["default"]


def update(model: Any, x: Tensor, **inputs: Any) -> Tensor:
    """What the adapter of a model of one layer adds to the layer's output."""
    return model(x, **inputs) - layers(model)[0].base_layer(x)


def layers(model: nn.Module) -> list[PlaitLayer]:
    """The adapted layers."""
    return [m for m in model.modules() if isinstance(m, PlaitLayer)]


def deltas(model: nn.Module, adapter: str = "default") -> list[Any]:
    """The Deltas of an adapter."""
    return [layer.plait_delta[adapter] for layer in layers(model)]


def tasks(model: nn.Module) -> list[str] | None:
    """Names of the tasks if the first Delta has a task table, else None."""
    first = next(iter(layers(model)[0].plait_delta.values()))
    mix = first.mix() if isinstance(first, LowRankDelta) else None
    return list(mix.tasks) if isinstance(mix, TaskTable) else None


def batch(model: nn.Module, rows: int = 4, length: int = 8, key: int = 0) -> dict[str, Any]:
    """Inputs of the tiny Llama, with task ids if the method needs them."""
    ids = tiny.tokens(rows, length, key)
    return {"input_ids": ids, "labels": ids, **task_ids(model, rows)}


def task_ids(model: nn.Module, rows: int) -> dict[str, Tensor]:
    """`task_ids` 0, 1, .., 0, 1, .. if the method needs them, else nothing."""
    names = tasks(model)
    return {} if names is None else {"task_ids": torch.arange(rows) % len(names)}


@torch.no_grad()
def logits(model: Any, **changes: Any) -> Tensor:
    """Logits of the batch in the model's current mode; changes replace inputs."""
    return model(**{**batch(model), **changes}).logits


@torch.no_grad()
def base_logits(base: Any) -> Tensor:
    """Logits of a model without adapters."""
    return base(input_ids=tiny.tokens()).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module, lr: float, **kwargs: Any) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, without weight decay."""
    return torch.optim.AdamW(trained(model).values(), lr=lr, weight_decay=0.0, **kwargs)


def steps(
    model: Any, optimizer: torch.optim.Optimizer, count: int, key: int | None = 0
) -> list[float]:
    """Train `count` steps and return the losses; with key None each step has another batch."""
    model.train()
    losses = []
    for step in range(count):
        loss = model(**batch(model, key=step if key is None else key)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute number expected."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-30))


def naive(delta: Any, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """The update of x (.., in), one term at a time, in the dtype of x."""
    if isinstance(delta, DenseDelta):
        rows = delta.weight_rows(0, delta.base.out_features)
        return x @ (delta.scaling * rows).T.to(x.dtype)
    A, B = (p.to(x.dtype) for p in delta.factors())
    gate, mix = delta.gate(), delta.mix()
    if gate is not None:
        A = gate[:, None].to(x.dtype) * A
    if mix is None:
        return x @ (delta.scaling * B @ A).T
    if isinstance(mix, Tensor):
        return x @ (delta.scaling * B @ mix.to(x.dtype) @ A).T
    n = len(mix.tasks) if isinstance(mix, TaskTable) else len(mix.G)
    parts = [A] * n if A.shape[0] * n == B.shape[1] else A.unflatten(0, (n, -1))
    ups = [B] * n if B.shape[1] == len(parts[0]) else B.unflatten(1, (n, -1)).unbind(1)
    terms = [x @ (delta.scaling * up @ part).T for part, up in zip(parts, ups, strict=True)]
    if isinstance(mix, TaskTable):
        assert ids is not None
        return torch.stack([terms[int(k)][row] for row, k in enumerate(ids)])
    weights = torch.softmax(x @ mix.G.to(x.dtype).T, -1)
    if mix.top_k is not None:
        least = weights.sort(-1, descending=True).values[..., mix.top_k - 1 : mix.top_k]
        weights = weights.where(weights >= least, torch.zeros((), dtype=x.dtype))
        weights = weights / weights.sum(-1, keepdim=True)
    return sum((weights[..., i : i + 1] * term for i, term in enumerate(terms)), torch.zeros(()))


def choices(model: nn.Module) -> list[Any]:
    """Arguments of merge and export, once for each weight that the adapter holds."""
    names = tasks(model)
    return [{}] if names is None else [{"task": name} for name in names]


def depends_on_input(delta: Any) -> bool:
    """Whether the update depends on the input, so that no weight holds it."""
    return isinstance(delta, LowRankDelta) and isinstance(delta.mix(), TokenRouter | TaskTable)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Assert that no global generator moved inside."""
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    yield
    assert torch.equal(torch.get_rng_state(), before[0]), "torch's global generator moved"
    assert random.getstate() == before[1], "Python's global generator moved"
    assert repr(np.random.get_state()) == before[2], "numpy's global generator moved"
