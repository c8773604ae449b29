"""Checks of the update dW itself: against its weight, its naive form, its shapes and counts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plait import DenseDelta, LowRankDelta
from plait.core.delta import planned
from plait.core.mix import TokenRouter
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    batch,
    choices,
    depends_on_input,
    layers,
    naive,
    one_layer,
    relative,
    task_ids,
    tasks,
    trained,
    wrap,
)


def forward_is_weight(case: Case, n_in: int = 7, n_out: int = 5) -> None:
    """In fp64 the forward applies weight(), and equals a loop over the terms of a router."""
    model, layer = one_layer(case, n_in, n_out)
    delta: Any = layer.plait_delta["default"]
    x = tiny.numbers(6, n_in)
    base = layer.base_layer(x)
    with torch.no_grad():
        update = model(x, **task_ids(model, 6)) - base
        if not depends_on_input(delta):
            assert relative(update, x @ delta.weight().T) < 1e-12, "forward is not weight()"
            assert torch.equal(layer.get_delta_weight("default"), delta.weight())
        for index, choice in enumerate(choices(model) if tasks(model) else []):
            ids = torch.full((6,), index)
            one = model(x, task_ids=ids) - base
            assert relative(one, x @ delta.weight(**choice).T) < 1e-12, f"{choice}: not weight()"
        ids = task_ids(model, 6).get("task_ids")
        assert relative(update, naive(delta, x, ids)) < 1e-12, "forward is not the loop over terms"


def fast_is_naive(
    case: Case, n_in: int = 7, n_out: int = 5, rows: int = 3, tiles: Sequence[int] = (1, 2, 7, 20)
) -> None:
    """In fp64 outputs and gradients of the fast form equal autograd through the naive form."""
    model, layer = one_layer(case, n_in, n_out)
    delta: Any = layer.plait_delta["default"]
    model.train()
    x0, dy = tiny.numbers(rows, 2, n_in), tiny.numbers(rows, 2, n_out, key=1)
    ids = task_ids(model, rows)

    def run(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = x0.clone().requires_grad_()
        y = forward(x)
        grads = torch.autograd.grad(y, [x, *delta.parameters()], dy, allow_unused=True)
        return [y, *(torch.zeros(()) if g is None else g for g in grads)]

    names = ["output", "x", *(n for n, _ in delta.named_parameters())]
    expected = run(lambda x: layer.base_layer(x) + naive(delta, x, ids.get("task_ids")))
    forms = {"as it is": lambda x: model(x, **ids)}
    if isinstance(delta, DenseDelta):
        forms["split"] = lambda x: layer.base_layer(x) + delta(x)
    for height in tiles if isinstance(delta, DenseDelta) else (None,):
        delta.tile = height
        for form, forward in forms.items():
            for name, fast, slow in zip(names, run(forward), expected, strict=True):
                assert relative(fast, slow) < 1e-12, f"{form}, tile {height}: {name} differs"


def shapes_are_free(case: Case) -> None:
    """Inputs may have 2, 3 or 4 axes, one token, or no row at all."""
    model, _ = one_layer(case, 7, 5)
    model.train()
    x = tiny.numbers(4, 3, 2, 7)
    with torch.no_grad():
        whole = model(x, **task_ids(model, 4))
        for row in range(4):
            ids = {k: v[row : row + 1] for k, v in task_ids(model, 4).items()}
            for i in range(3):
                for j in range(2):
                    one = model(x[row : row + 1, i, j], **ids)
                    assert relative(one[0], whole[row, i, j]) < 1e-12, "4 axes differ from 2"
            three = model(x[row : row + 1, 0], **ids)
            assert relative(three[0], whole[row, 0]) < 1e-12, "3 axes differ from 4"
    for empty in (tiny.numbers(0, 3, 7), tiny.numbers(2, 0, 7)):
        y = model(empty.requires_grad_(), **task_ids(model, len(empty)))
        assert y.shape == (*empty.shape[:-1], 5), "a batch without tokens has another shape"
        y.sum().backward()
        assert empty.grad is not None
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained(model).values())


def rows_are_independent(case: Case) -> None:
    """A row does not depend on its batch, a position not on later tokens."""
    model, _ = one_layer(case, 7, 5)
    x = tiny.numbers(4, 3, 7)
    ids = task_ids(model, 4)
    with torch.no_grad():
        whole = model(x, **ids)
        for row in range(4):
            alone = model(x[row : row + 1], **{k: v[row : row + 1] for k, v in ids.items()})
            assert relative(alone[0], whole[row]) < 1e-12, "a row depends on its batch"
        changed = x.clone()
        changed[:, 2] += 1
        assert relative(model(changed, **ids)[:, :2], whole[:, :2]) < 1e-12, "later tokens are seen"
    llama = wrap(case, init_weights=False)
    inputs = batch(llama)
    with torch.no_grad():
        whole = llama(**inputs).logits
        one = llama(**{k: v[1:2] for k, v in inputs.items()}).logits
        assert relative(one[0], whole[1]) < 1e-5, "a row of the model depends on its batch"
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][:, -1] = 3
        assert relative(llama(**inputs).logits[:, :-1], whole[:, :-1]) < 1e-5, "not causal"


def counts_are_the_formula(case: Case) -> None:
    """The number of trainable parameters is the formula's; the rank of dW is at most rank()."""
    model = wrap(case)
    delta_cls = case.method.delta
    expected = planned(
        (delta_cls, layer.plait_delta["default"].config, layer.in_features, layer.out_features)
        for layer in layers(model)
    )
    trainable = sum(p.numel() for p in trained(model).values())
    assert trainable == expected, f"{trainable} parameters train, the formula says {expected}"
    narrow, layer = one_layer(case, 20, 17, r=2)
    delta: Any = layer.plait_delta["default"]
    for choice in choices(narrow):
        if not isinstance(delta, LowRankDelta) or not isinstance(delta.mix(), TokenRouter):
            rank = int(torch.linalg.matrix_rank(delta.weight(**choice)))
            assert rank <= delta.rank(), f"rank {rank} of dW is above the stated {delta.rank()}"
