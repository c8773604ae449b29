"""The fused form of low rank: equal to plain operations, and never a stale value."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from plait.core.low_rank import LowRankDelta
from plait.core.mix import TokenRouter
from plait.core.route import NOWHERE
from plait.kernels import configure
from plait.kernels.cache import Kept
from plait.kernels.low_rank import Call, Plan, fused
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import one_delta, one_layer, relative, task_ids

CASES = [
    Case("alloc", {"rounds": 0}),
    Case("alloc", {"rounds": 0, "init": "pissa"}),
    Case("cola", {"r": 2, "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "init": "kaiming", "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "strategy": "random", "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "strategy": "random_b", "num_A": 3, "num_B": 4}),
    Case("cola", {"r": 2, "strategy": "heuristic"}),
    Case("cola", {"r": 2, "strategy": "heuristic", "init": "pissa_split"}),
    Case("cola", {"r": 2, "gates": ["sora", {"name": "droplora", "inner_dropout": 0.4}]}),
    Case("droplora", {"scope": "token"}),
    Case("droplora", {"scope": "step"}),
    Case("dual_module", {}),
    Case("dual_module", {"gates": ["droplora"]}),
    Case("fedalora_het", {"common_rank": 3}),
    Case("fedalora_het", {"common_rank": 3, "gates": ["sora"]}),
    Case("fedalora_het", {"common_rank": 3, "gates": [{"name": "droplora", "scope": "step"}]}),
    Case("hydra", {"num_B": 3}),
    Case("hydra", {"num_B": 3, "init": "pissa", "gates": ["sora"]}),
    Case("hydra", {"num_B": 2, "independent_dropout": True}),
    Case("molora", {"r": 2, "num_experts": 3}),
    Case("molora", {"r": 2, "num_experts": 3, "top_k": 2, "init": "pissa"}),
    Case("nola", {"num_basis_A": 5, "num_basis_B": 6}),
    Case("shared_b", {"r": 2, "num_A": 3}),
    Case("shared_b", {"r": 2, "num_A": 3, "init": "pissa", "gates": ["sora"]}),
    Case("shared_b", {"r": 2, "routing": "task", "tasks": ["law", "care"]}),
    Case("sora", {}),
    Case("sora", {"init": "pissa"}),
    Case("tied", {}),
    Case("tied", {"train": ["u", "v"]}),
    Case("dual_lora", {"gate_steps": 8}),
]


@contextmanager
def plain() -> Iterator[None]:
    """Plain operations in place of the fused form."""
    configure(fused=False)
    try:
        yield
    finally:
        configure(fused=True)


def results(model: Any, delta: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and gradients of x and of all parameters, with masks from one seed."""
    x = tiny.numbers(4, 3, 7).to(dtype).requires_grad_()
    dy = tiny.numbers(4, 3, 5, key=1).to(dtype)
    trains = [p for p in delta.parameters() if p.requires_grad]
    with tiny.seed(3):
        y = model(x, **task_ids(model, 4))
        grads = torch.autograd.grad(y, [x, *trains], dy, allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in grads)]


def compare(model: Any, delta: Any, bound: float = 1e-12) -> None:
    """The fused form equals plain operations."""
    found = results(model, delta)
    with plain():
        expected = results(model, delta)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < bound


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_fused_is_plain(case: Case, training: bool, dropout: float) -> None:
    """Outputs and all gradients, in fp64, in training and in evaluation, without gradients too."""
    model, delta = one_delta(case, lora_dropout=dropout)
    model.train(training)
    compare(model, delta)
    compare(model, delta)  # by what is kept
    x, ids = tiny.numbers(4, 7), task_ids(model, 4)
    with torch.no_grad(), tiny.seed(4):
        found = model(x, **ids)
    with torch.no_grad(), tiny.seed(4), plain():
        assert relative(found, model(x, **ids)) < 1e-12


OVERRIDES: dict[str, dict[str, Any]] = {
    "forward": {"forward": lambda self, x, rows=NOWHERE: 2 * LowRankDelta.forward(self, x, rows)},
    "down": {"down": lambda self, x, A: 2 * LowRankDelta.down(self, x, A)},
    "factors": {"factors": lambda self: (2 * self.A, self.B)},
    "gate": {"gate": lambda self: self.A.detach()[:, 0]},
    "mix": {"mix": lambda self: 2 * torch.eye(len(self.A), dtype=self.A.dtype)},
    "rank_mask": {"rank_mask": lambda self, z: z.new_full((*z.shape[:-1], len(self.A)), 2.0)},
    "input_dropout": {"input_dropout": property(lambda self: 0.5)},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_subclass_overrides_is_used(name: str, training: bool) -> None:
    """A subclass that changes one part and states nothing computes what it says, twice in a row."""
    outputs = []
    for changes in ({}, OVERRIDES[name]):
        model, delta = one_delta(Case("droplora", {"inner_dropout": 0.0, "lora_dropout": 0.0}))
        delta.gates = []
        delta.__class__ = type("Changed", (type(delta),), changes)
        model.train(training)
        for _ in range(2):
            compare(model, delta)
        outputs.append(results(model, delta)[0])
    in_training = name in ("rank_mask", "input_dropout")
    assert torch.equal(*outputs) == (in_training and not training)


def test_a_frozen_adapter_passes_gradients_to_its_input() -> None:
    for case in CASES[:4]:
        model, delta = one_delta(case)
        delta.requires_grad_(False)
        for training in (True, False):
            model.train(training)
            compare(model, delta)


def test_parts_of_an_adapter_may_be_frozen() -> None:
    for case in CASES:
        model, delta = one_delta(case)
        next(delta.parameters()).requires_grad_(False)
        compare(model, delta)


def test_several_active_adapters_are_added_in_place() -> None:
    model = one_layer(Case("cola", {"r": 2}), 7, 5)[0]
    options: Any = {"target_modules": ["linear"], "task_type": None, "init_weights": False}
    model.add_adapter("two", Case("cola", {"r": 3}).config(lora_dropout=0.2, **options))
    model.base_model.set_adapter(["default", "two"])
    model.train()
    compare(model, model.base_model.model.linear.plait_delta)


@pytest.mark.parametrize("key", ["sora", "dual_lora"])
def test_the_output_may_be_changed_in_place(key: str) -> None:
    """As that of nn.Linear, whatever the number of axes."""
    model, _ = one_delta(Case(key, {}))
    for shape in ((4, 7), (4, 3, 7), (2, 2, 3, 7)):
        x = tiny.numbers(*shape).requires_grad_()
        y = model(x)
        expected = torch.autograd.grad((3 * y).sum(), x, retain_graph=True)[0]
        y.mul_(3)
        assert relative(torch.autograd.grad(y.sum(), x)[0], expected) < 1e-12


def test_a_transposed_base() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Conv1D(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    from peft import get_peft_model

    case = Case("sora", {})
    config = case.config(target_modules=["linear"], task_type=None, init_weights=False)
    model: Any = get_peft_model(Net().double(), config).train()  # type: ignore[arg-type]
    compare(model, model.base_model.model.linear.plait_delta["default"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_bf16_is_as_exact_as_plain(case: Case) -> None:
    """error(fused) <= 1.5 error(plain) + 1e-3 of the norm, for outputs and all gradients."""
    exact, delta = one_delta(case)
    half, host = one_layer(case, 7, 5, torch.bfloat16)
    half.train()
    other: Any = host.plait_delta["default"]
    layer = exact.base_model.model.linear  # type: ignore[union-attr]
    layer.base_layer.load_state_dict(host.base_layer.state_dict())
    delta.load_state_dict(other.state_dict())
    truth = results(exact, delta)
    found = results(half, other, torch.bfloat16)
    with plain():
        slow = results(half, other, torch.bfloat16)
    for a, b, c in zip(truth, found, slow, strict=True):
        size = float(a.double().norm()) + 1e-30
        error, allowed = (float((t.double() - a).norm()) / size for t in (b, c))
        assert error <= 1.5 * allowed + 2e-2  # few numbers: one rounding is more than 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_autocast_is_plain(case: Case) -> None:
    model, host = one_layer(case, 7, 5, torch.float32)
    model.train()
    delta: Any = host.plait_delta["default"]
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model, delta, torch.float32)
        with plain():
            expected = results(model, delta, torch.float32)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).float().norm()) <= 5e-2 * float(other.float().norm()) + 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_recomputation_saves_what_the_forward_saved(case: Case) -> None:
    """Gradient checkpointing refuses another number of tensors; the first call fills plans."""
    model, _ = one_delta(case)
    ids = task_ids(model, 4)
    x = tiny.numbers(4, 7).requires_grad_()
    y = checkpoint(lambda x: model(x, **ids), x, use_reentrant=False)
    y.sum().backward()


# The Function by itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["base", "add", "alone"])
@pytest.mark.parametrize("kind", ["none", "matrix", "reduce", "expand", "pair", "table"])
def test_gradcheck(kind: Any, form: str) -> None:
    """Each mix with gate, random mask and dropped inputs; with the base's product or without."""
    n, r, tokens, n_in, n_out = 2, 2, 3, 4, 3
    R = r if kind == "expand" else n * r
    out = {"matrix": 3, "reduce": r, "table": r, "expand": n * r}.get(kind, R)
    A, B = tiny.numbers(R, n_in), tiny.numbers(n_out, out, key=1)
    gate, x = tiny.numbers(R, key=2), tiny.numbers(tokens, n_in, key=3)
    M = tiny.numbers(3, R, key=4) if kind == "matrix" else tiny.numbers(n, n_in, key=4)
    W, b = tiny.numbers(n_out, n_in, key=5), tiny.numbers(n_out, key=6)
    before = tiny.numbers(tokens, n_out, key=7)
    kept = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]).view(tokens, n_in).bool()
    plan = Plan(1.5, kind, gated=True)
    plan.groups = n
    mask, index = tiny.numbers(tokens, R, key=8), torch.tensor([1, 0, 1])
    call = Call(plan, torch.float64, kept, 1.25, mask, index, None)
    mixes = kind not in ("none", "table")

    def naive(x: Tensor, A: Tensor, B: Tensor, gate: Tensor, M: Tensor, y: Tensor) -> Tensor:
        z = (x * kept * 1.25) @ A.T * mask * gate
        if kind == "matrix":
            z = z @ M.T
        elif kind == "table":
            z = z.view(tokens, n, r)[torch.arange(tokens), index]
        elif kind != "none":
            z = TokenRouter(M, kind)(z, x)
        update = 1.5 * z @ B.T
        if form == "alone":
            return update
        return update + (F.linear(x, W, b) if form == "base" else 2 * y)

    def fast(x: Tensor, A: Tensor, B: Tensor, gate: Tensor, M: Tensor, y: Tensor) -> Tensor:
        leaves = (A, B, gate, *([M] if mixes else []))
        own = (W, b, None) if form == "base" else (None, None, 2 * y if form == "add" else None)
        return fused(call, x, *own, *leaves)

    inputs = [t.requires_grad_() for t in (x, A, B, gate, M, before)]
    assert relative(fast(*inputs), naive(*inputs)) < 1e-12
    assert torch.autograd.gradcheck(fast, inputs)


def test_a_wrong_softmax_gradient_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: the gradient of the logits without the mean that softmax subtracts."""
    model, delta = one_delta(Case("hydra", {"num_B": 3}))
    wrong = lambda dw, w, *_: w * dw  # noqa: E731
    monkeypatch.setattr(torch, "_softmax_backward_data", wrong)
    with pytest.raises(AssertionError):
        compare(model, delta)


def test_a_second_derivative_needs_plain_operations() -> None:
    model = one_delta(Case("sora", {}))[0]
    x = tiny.numbers(4, 7).requires_grad_()

    def twice() -> None:
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.sum().backward()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice()
    with plain():
        twice()


def test_compiled_without_a_break() -> None:
    for case in (Case("cola", {"r": 2}), Case("sora", {})):
        torch._dynamo.reset()
        host = one_layer(case, 7, 5)[1]
        compiled = torch.compile(host, backend="eager", fullgraph=True)
        x = tiny.numbers(4, 7)
        assert relative(compiled(x), host(x)) < 1e-12


@pytest.mark.parametrize(
    ("case", "breaks"),
    [
        (Case("nola", {"num_basis_A": 5, "num_basis_B": 6}), 0),
        (Case("droplora", {}), 0),
        (Case("dual_lora", {"gate_steps": 8}), 1),
    ],
    ids=str,
)
def test_breaks_of_a_compiled_graph(case: Case, breaks: int) -> None:
    """And the same numbers, gradients too, where nothing is drawn."""
    torch._dynamo.reset()
    host = one_layer(case, 7, 5)[1].train()
    x = tiny.numbers(4, 7)
    host(x)
    assert torch._dynamo.explain(host)(x).graph_break_count <= breaks
    if case.key == "droplora":
        return
    torch._dynamo.reset()
    delta: Any = host.plait_delta["default"]
    trains = [p for p in delta.parameters() if p.requires_grad]
    expected = torch.autograd.grad(host(x).square().sum(), trains)
    compiled = torch.compile(host, backend="eager")
    found = torch.autograd.grad(compiled(x).square().sum(), trains)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-12


# What is kept -------------------------------------------------------------------------------------


def by_data(p: Any) -> None:
    p.data.mul_(1.5)  # raises no version and calls no hook


def by_assignment(p: Any) -> None:
    p.data = p.data * 1.5


def by_numpy(p: Any) -> None:
    p.detach().numpy()[...] *= 1.5


def by_copy(p: Any) -> None:
    with torch.no_grad():
        p.copy_(p * 1.5)


def by_entry(p: Any) -> None:
    with torch.no_grad():
        p.view(-1)[-1] += 0.5


def by_fused_step(p: Any) -> None:
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.3, fused=True).step()
    p.grad = None


@pytest.mark.parametrize(
    "change", [by_data, by_assignment, by_numpy, by_copy, by_entry, by_fused_step]
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_no_stale_value(case: Case, change: Callable[[Any], None]) -> None:
    """However a parameter changes, the next call sees it, in training and in evaluation."""
    model, delta = one_delta(case)
    x, ids = tiny.numbers(4, 7), task_ids(model, 4)
    for p in delta.parameters():
        for training in (True, False):
            model.train(training)
            with torch.no_grad(), tiny.seed(1):
                model(x, **ids)
            results(model, delta)
        for other in delta.parameters():  # what events of a step may look at
            other.grad = torch.zeros_like(other)
        change(p)
        for training in (True, False):
            model.train(training)
            compare(model, delta)
            with torch.no_grad(), tiny.seed(1):
                found = model(x, **ids)
            with torch.no_grad(), tiny.seed(1), plain():
                assert relative(found, model(x, **ids)) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}{len(c.options)}")
def test_no_stale_value_in_copies_loads_and_casts(case: Case) -> None:
    model = one_delta(case)[0].eval()
    x, ids = tiny.numbers(4, 7), task_ids(model, 4)

    def check(model: Any, bound: float = 1e-12) -> Tensor:
        with torch.no_grad():
            found = model(x.to(next(model.parameters()).dtype), **ids)
            with plain():
                expected = model(x.to(next(model.parameters()).dtype), **ids)
        assert relative(found.double(), expected.double()) < bound
        return found

    before = check(model)
    saved = copy.deepcopy(model.state_dict())
    twin: Any = copy.deepcopy(model)
    for p in twin.parameters():
        by_data(p)
    assert relative(check(twin), before) > 1e-6
    assert torch.equal(check(model), before)  # the copy shares nothing with the original
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)
    model.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert relative(check(model), before) > 1e-6
    model.load_state_dict(saved, assign=True)
    assert relative(check(model), before) < 1e-12
    check(model.float(), 1e-5)
    check(model.double(), 1e-12)
    check(model.to(torch.bfloat16), 0.1)


def test_merging_and_switching_adapters_leave_nothing_behind() -> None:
    model, host = one_layer(Case("cola", {"r": 2}), 7, 5)
    model.add_adapter("two", Case("cola", {"r": 2, "seed": 1}).config(
        target_modules=["linear"], task_type=None, init_weights=False))  # fmt: skip
    x = tiny.numbers(4, 7)
    with torch.no_grad():
        one = model(x)
        model.set_adapter("two")
        two = model(x)
        assert relative(two, one) > 1e-3
        model.merge_adapter()
        assert relative(model(x), two) < 1e-12
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), host.base_layer(x))
        model.set_adapter("default")
        assert torch.equal(model(x), one)


def test_once_a_step() -> None:
    """Sums are computed once for 8 micro-batches, and again after each step, a fused one too."""
    model, delta = one_delta(Case("cola", {"r": 2, "num_A": 3, "num_B": 4}))
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, fused=True)
    x = tiny.numbers(4, 7)
    for step in range(1, 4):
        for _ in range(8):
            model(x).sum().backward()
        assert delta.kept.made == step + 1  # and once how gradients go back
        optimizer.step()
        optimizer.zero_grad()


def test_what_is_not_in_memory_is_not_kept() -> None:
    kept, source = Kept(), torch.zeros(2, device="meta")
    for made in (1, 2):
        assert kept.get("key", [source], lambda: 1) == 1
        assert kept.made == made
    kept = Kept()
    for made in (1, 2):
        kept.get("key", None, lambda: 1)
        assert kept.made == made
    source = torch.ones(2, 2)
    kept.get("key", [source], lambda: 1)
    kept.get("key", [source], lambda: 1)
    assert kept.made == 3
    kept.get("key", [source.t()], lambda: 1)  # another view of the same memory
    assert kept.made == 4


def test_a_method_of_ones_own_is_never_kept() -> None:
    """A subclass with factors of its own states no reads and no closed form: autograd does it."""
    from plait.methods.cola import Cola

    model, delta = one_delta(Case("cola", {"r": 2}))

    class Mine(Cola):
        factor = 2.0

        def factors(self) -> tuple[Tensor, Tensor]:
            A, B = super().factors()
            return self.factor * A, B

    delta.__class__ = Mine
    for training in (True, False):
        model.train(training)
        for factor in (2.0, 3.0):
            delta.factor = factor
            compare(model, delta)


# Tracers ---------------------------------------------------------------------------------------

# Ids of tasks are checked by their numbers; a mask of the step has a generator of its own.
RECORDABLE = [c for c in CASES if "tasks" not in c.options and "step" not in str(c.options)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", RECORDABLE, ids=lambda c: f"{c}{len(c.options)}")
def test_fake_tensors_leave_nothing(case: Case, training: bool) -> None:
    """A step on fake tensors, before the first real one or after it, changes no later result."""
    x = tiny.numbers(6, 7)
    for warm in (False, True):
        model, fresh = (one_layer(case, 7, 5)[0].train(training) for _ in range(2))
        with tiny.seed(1):
            expected = fresh(x)
        if warm:
            model(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            y = model(fake.from_tensor(x))
            assert type(y) is FakeTensor
            leaves = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        for p, grad in zip(leaves, grads, strict=True):
            assert grad is None or grad.shape == p.shape
        for _ in range(2):
            with tiny.seed(1):
                assert torch.equal(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", RECORDABLE, ids=lambda c: f"{c}{len(c.options)}")
def test_a_recorded_graph_reads_the_weights(case: Case, training: bool) -> None:
    """Whatever was kept before, it is no constant of a graph of make_fx."""
    model, x = one_layer(case, 7, 5)[0].train(training), tiny.numbers(6, 7)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(model, named, (x,))

    with torch.no_grad():
        for _ in range(2):  # fills plans and notes with these very tensors
            call(x, *weights.values())
        graph = make_fx(call)(x, *weights.values())
        for factor in (1.0, 1.5):
            values = [factor * w for w in weights.values()]
            with tiny.seed(1):
                found = graph(x, *values)
            with tiny.seed(1):
                assert relative(found, call(x, *values)) < 1e-12


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("key", ["alloc", "cola", "hydra", "nola", "sora"])
def test_a_trace_of_jit_reads_the_weights(key: str) -> None:
    """It shares the parameters with the layer, so it follows when they change."""
    case = next(c for c in CASES if c.key == key)
    host, x = one_layer(case, 7, 5)[1].eval(), tiny.numbers(6, 7)
    delta: Any = host.plait_delta["default"]
    with torch.no_grad():
        for _ in range(2):
            host(x)
        trace: Any = torch.jit.trace(host, (x,), check_trace=False)
        before = host(x)
        for p in delta.parameters():
            p.mul_(1.5)
        assert relative(before, host(x)) > 1e-3
        assert relative(trace(x), host(x)) < 1e-12
