"""Many adapters in one batch: equal to each adapter's rows by themselves, in as many products."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from plait.kernels import configure, grouped
from plait.kernels.grouped import Segments
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import layers, one_layer, relative

CASES = [
    Case("alloc", {"rounds": 0}),
    Case("cola", {"r": 2, "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "init": "kaiming", "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "strategy": "random", "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "strategy": "heuristic", "init": "pissa_split"}),
    Case("droplora", {"scope": "token"}),
    Case("droplora", {"scope": "step"}),
    Case("dual_module", {}),
    Case("fedalora_het", {"common_rank": 3}),
    Case("hydra", {"num_B": 3}),
    Case("hydra", {"num_B": 3, "init": "pissa", "gates": ["sora"]}),
    Case("molora", {"r": 2, "num_experts": 3}),
    Case("nola", {"num_basis_A": 5, "num_basis_B": 6}),
    Case("shared_b", {"r": 2, "num_A": 3}),
    Case("sora", {}),
    Case("sora", {"init": "pissa"}),
    Case("tied", {}),
]
BASE = "__base__"
NAMES = ["one", "two", "three"]
ORDERS = [
    NAMES,
    ["one", "one", "two", "two", "three", "three"],
    ["two", BASE, "one", "two", "three", "one", BASE],
]
RANKED = ("alloc", "cola", "droplora", "dual_module", "fedalora_het", "nola", "sora", "tied")


def model_of(
    case: Case, dtype: torch.dtype = torch.float64, base: nn.Module | None = None, **options: Any
) -> Any:
    """A layer 7 -> 5 with three random adapters, of unlike ranks and scales where that can be."""
    ranks = [{}, {"r": 6, "lora_alpha": 3.0}, {}] if case.key in RANKED else [{}] * 3
    model: Any = None
    for seed, (name, own) in enumerate(zip(NAMES, ranks, strict=True)):
        shared = {"target_modules": ["linear"], "task_type": None, "init_weights": False}
        config = case.config(**shared, **{"seed": seed, **own, **options})
        if model is None:
            net: Any = base or tiny.OneLinear(7, 5, dtype)
            model = get_peft_model(net, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(NAMES)
    deltas: Any = layers(model)[0].plait_delta.values()
    for delta in deltas:
        delta.state_from = "file"  # as if they came from files, so that none is another's copy
    return model.train()


def results(model: Any, names: list[str], axes: int = 3) -> list[Tensor]:
    """Output and gradients of x and of all parameters, with masks from one seed."""
    dtype: Any = layers(model)[0].get_base_layer().weight.dtype
    lead = [len(names), 3, 2][: axes - 1]
    x = tiny.numbers(*lead, 7).to(dtype).requires_grad_()
    with tiny.seed(3):
        y = model(x, adapter_names=names)
    trains = [p for p in model.parameters() if p.requires_grad]
    dy = tiny.numbers(*lead, 5, key=1).to(dtype)
    grads = torch.autograd.grad(y, [x, *trains], dy, allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in grads)]


def by_rows(model: Any, names: list[str], axes: int = 3) -> list[Tensor]:
    """The same by plain operations, adapter after adapter."""
    configure(fused=False)
    try:
        return results(model, names, axes)
    finally:
        configure(fused=True)


def compare(model: Any, names: list[str], axes: int = 3, bound: float = 1e-12) -> None:
    pairs = zip(results(model, names, axes), by_rows(model, names, axes), strict=True)
    assert max(relative(one, other) for one, other in pairs) < bound


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the grouped form."""
    found: list[Any] = []
    product = grouped.product
    watched = lambda call, *args: (found.append(call), product(call, *args))[1]  # noqa: E731
    monkeypatch.setattr(grouped, "product", watched)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_together_is_one_by_one(case: Case, dropout: float, calls: list[Any]) -> None:
    """Outputs and all gradients, in training and in evaluation, for rows in any order."""
    model = model_of(case, lora_dropout=dropout)
    for training in (True, False):
        model.train(training)
        for names in ORDERS:
            compare(model, names)
            compare(model, names)  # by what is kept
    assert len(calls) == 4 * len(ORDERS)


@pytest.mark.parametrize("case", CASES[:8], ids=lambda c: f"{c}{len(c.options)}")
def test_without_gradients(case: Case, calls: list[Any]) -> None:
    model = model_of(case).eval()
    for axes in (2, 3, 4):
        for names in ORDERS:
            compare(model, names, axes)
            x = tiny.numbers(len(names), 3, 7)
            with torch.no_grad():
                found = model(x, adapter_names=names)
            configure(fused=False)
            try:
                assert relative(found, model(x, adapter_names=names)) < 1e-12
            finally:
                configure(fused=True)


def test_no_stale_stack() -> None:
    """Factors are stacked once in evaluation, and again after any change of their numbers."""
    model = model_of(Case("sora", {})).eval()
    x, names = tiny.numbers(3, 7), ORDERS[0]
    delta: Any = layers(model)[0].plait_delta["two"]

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            found = model(x, adapter_names=names)
        configure(fused=False)
        try:
            with torch.no_grad():
                return found, model(x, adapter_names=names)
        finally:
            configure(fused=True)

    assert relative(*outputs()) < 1e-12
    delta.A.detach().numpy()[...] *= 1.5  # raises no version and calls no hook
    assert relative(*outputs()) < 1e-12
    delta.scaling *= 2
    assert relative(*outputs()) < 1e-12
    compare(model.train(), names)  # what inference kept does not enter a graph


def test_rows_of_the_base_alone_keep_its_output() -> None:
    model = model_of(Case("sora", {}))
    x = tiny.numbers(3, 7)
    found = model(x, adapter_names=[BASE, "one", BASE])
    expected = layers(model)[0].base_layer(x)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not torch.equal(found[1], expected[1])
    assert torch.equal(model(x, adapter_names=[BASE] * 3), expected)


def test_a_base_of_another_layout_or_with_hooks(calls: list[Any]) -> None:
    """The frozen layer computes its own product, and whoever holds its output keeps it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Conv1D(5, 7)

    case, held = Case("cola", {"r": 2}), []
    net = Net().double()
    net.forward = lambda x: net.linear(x)  # type: ignore[method-assign]
    compare(model_of(case, base=net), ORDERS[2])
    model = model_of(case)
    base = layers(model)[0].base_layer
    base.register_forward_hook(lambda module, args, out: held.append((out, out.clone())))
    compare(model, ORDERS[2])
    assert held
    assert all(torch.equal(one, other) for one, other in held)
    assert len(calls) == 2


def test_half_precision() -> None:
    """In bf16 the grouped form errs no more than the plain one; under autocast they agree."""
    for case in (CASES[1], CASES[9], CASES[14]):
        model = model_of(case, torch.bfloat16)
        for one, other in zip(results(model, ORDERS[2]), by_rows(model, ORDERS[2]), strict=True):
            assert one.dtype == other.dtype
            assert float((one - other).float().norm()) <= 5e-2 * float(other.float().norm()) + 1e-3
        model = model_of(case, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = results(model, ORDERS[2]), by_rows(model, ORDERS[2])
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert float((one - other).float().norm()) <= 5e-2 * float(other.float().norm()) + 1e-3


@pytest.mark.parametrize("case", [CASES[1], CASES[9], CASES[14]], ids=str)
def test_frozen_adapters_among_trained_ones(case: Case) -> None:
    model = model_of(case)
    layers(model)[0].plait_delta["two"].requires_grad_(False)
    next(layers(model)[0].plait_delta["one"].parameters()).requires_grad_(False)
    compare(model, ORDERS[2])


def test_what_cannot_be_computed_together_is_computed_one_by_one(calls: list[Any]) -> None:
    """Tasks, top-k, experts of unlike number, and a full-rank update."""
    for case in (
        Case("molora", {"r": 2, "num_experts": 3, "top_k": 2}),
        Case("dual_lora", {"gate_steps": 8}),
    ):
        compare(model_of(case), ORDERS[2])
    model = model_of(Case("hydra", {"num_B": 3}))
    config = Case("hydra", {"num_B": 2}).config(
        target_modules=["linear"], task_type=None, init_weights=False
    )
    model.add_adapter("four", config)
    compare(model, ["one", "four", "two"])
    assert not calls


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("many", [2, 12])
def test_number_of_products(many: int) -> None:
    """3 forward and 5 backward, however many adapters there are."""
    model = one_layer(Case("cola", {"r": 2}), 7, 5)[0]
    for i in range(1, many):
        options: Any = {"target_modules": ["linear"], "task_type": None, "init_weights": False}
        model.add_adapter(f"number {i}", Case("cola", {"r": 2}).config(seed=i, **options))
    names = list(layers(model)[0].plait_delta)
    model.base_model.set_adapter(names)
    model.train()
    x = tiny.numbers(many, 4, 7).requires_grad_()
    with Products() as forward:
        y = model(x, adapter_names=names)
    with Products() as backward:
        y.sum().backward()
    assert (forward.count, backward.count) == (3, 5)


def test_segments() -> None:
    known = frozenset("abc")
    each = Segments(list("abc"), known)
    assert (each.groups, each.order, each.idle, each.sorted) == (3, None, False, True)
    pairs = Segments(list("bbaabb"), known)
    assert (pairs.groups, pairs.order, pairs.adapters) == (3, [0, 1, 0], ["b", "a"])
    assert (pairs.rows, pairs.sorted) == ([[0, 1, 4, 5], [2, 3]], False)
    mixed = Segments([*"aab", BASE], known)
    assert (mixed.groups, mixed.order, mixed.idle) == (4, [0, 0, 1, 2], True)
