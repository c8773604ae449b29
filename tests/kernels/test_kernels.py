"""The fast forms: equal to autograd through the naive ones; work and memory as stated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from plait.core.mix import TaskTable, TokenRouter
from plait.core.route import Rows
from plait.kernels import configure
from plait.kernels.dense_tiles import DenseTiles, tile_rows
from plait.kernels.reference import up
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import one_layer, relative, task_ids

T, IN, OUT = 96, 40, 56  # every shape tells which tensor it is

LOW_RANK = [
    Case("cola", {"strategy": "full"}),
    Case("cola", {"strategy": "full", "num_A": 4, "num_B": 5}),
    Case("cola", {"strategy": "full", "init": "kaiming"}),
    Case("cola", {"strategy": "random", "num_A": 4, "num_B": 5}),
    Case("cola", {"strategy": "random_b", "num_A": 4, "num_B": 5}),
    Case("cola", {"strategy": "heuristic", "num_A": 2, "num_B": 5}),
    Case("dual_module", {"total_steps": 10}),
    Case("shared_b", {"routing": "task", "tasks": ["law", "care", "maths"]}),
    Case("shared_b", {"num_A": 3}),
]
DUAL = Case("dual_lora", {"r": 8})


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


class Watch(TorchDispatchMode):
    """What is computed inside: matrix products, and the storages that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.made: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in PRODUCTS
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.made.append((t.shape, t.dtype))
        return out


def saved_by(forward: Callable[[], Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The output, and each storage that the forward keeps for the backward."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        return forward(), kept


def watched(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Watch, Watch, Any]:
    """Forward and backward of one layer of a case, watched."""
    model, host = one_layer(case, IN, OUT, dtype)
    model.train()
    x = tiny.numbers(T, IN, dtype=torch.float32).to(dtype).requires_grad_()
    ids = task_ids(model, T)
    with Watch() as forward:
        y = model(x, **ids)
    with Watch() as backward:
        y.backward(torch.ones_like(y))
    return forward, backward, host.plait_delta["default"]


# Dense tiles -----------------------------------------------------------------------------------


def dense(A: Tensor, B: Tensor, C: Tensor) -> Callable[[int, int], Tensor]:
    """Rows of some element-wise form that is no low rank."""
    return lambda start, stop: torch.tanh(B[start:stop] @ A) * (1 + C[start:stop])


@settings(max_examples=40)
@given(
    n_in=st.integers(1, 8), n_out=st.integers(1, 12), tokens=st.integers(0, 5),
    height=st.sampled_from([1, 2, 3, 7, 12, 48]), joint=st.booleans(), bias=st.booleans(),
    needs_x=st.booleans(), frozen=st.booleans(),
)  # fmt: skip
def test_tiles_are_naive_autograd(
    n_in: int, n_out: int, tokens: int, height: int, joint: bool, bias: bool, needs_x: bool,
    frozen: bool,
) -> None:  # fmt: skip
    """Outputs, dx, factors and bias; tiles that do not divide the rows; frozen factors."""
    A, B, C = (tiny.numbers(*s, key=i) for i, s in enumerate(((2, n_in), (n_out, 2), (n_out, 1))))
    W = tiny.numbers(n_out, n_in, key=3) if joint else None
    b = tiny.numbers(n_out, key=4).requires_grad_() if joint and bias else None
    x, dy = tiny.numbers(2, tokens, n_in, key=5), tiny.numbers(2, tokens, n_out, key=6)
    x.requires_grad_(needs_x)
    A.requires_grad_()
    B.requires_grad_(not frozen)
    C.requires_grad_()
    rows = dense(A, B, C)
    fast = DenseTiles.apply(rows, n_out, height, x, W, b, A, B, C)
    slow = F.linear(x, rows(0, n_out) + (0 if W is None else W), b)
    assert relative(fast, slow) < 1e-12
    wanted = [t for t in (x, A, B, C, b) if t is not None and t.requires_grad]
    for t, found, expected in zip(
        wanted,
        torch.autograd.grad(fast, wanted, dy),
        torch.autograd.grad(slow, wanted, dy),
        strict=True,
    ):
        assert float((found - expected).abs().max() if t.numel() else 0) < 1e-12 * 100


@pytest.mark.parametrize("height", [1, 2, 8])
@pytest.mark.parametrize("joint", [True, False])
def test_gradcheck_of_tiles(height: int, joint: bool) -> None:
    A, B, C = tiny.numbers(2, 4), tiny.numbers(5, 2, key=1), tiny.numbers(5, 1, key=2)
    W, b = (tiny.numbers(5, 4, key=3), tiny.numbers(5, key=4)) if joint else (None, None)
    x = tiny.numbers(3, 4, key=5)
    inputs = [t.requires_grad_() for t in (x, A, B, C)]

    def apply(x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return DenseTiles.apply(dense(A, B, C), 5, height, x, W, b, A, B, C)

    assert torch.autograd.gradcheck(apply, inputs)


@pytest.mark.parametrize("height", [1, 7, OUT, 4 * OUT])
@pytest.mark.parametrize("joint", [True, False])
def test_dual_lora_in_tiles(height: int, joint: bool) -> None:
    """Against naive autograd, at fp32 accuracy in fp32: dx of many tiles included."""
    model, host = one_layer(DUAL, IN, OUT, torch.float32)
    delta: Any = host.plait_delta["default"]
    delta.tile = height
    model.train()
    x, dy = tiny.numbers(T, IN), tiny.numbers(T, OUT, key=1)
    found_x = x.float().requires_grad_()
    y = model(found_x) if joint else host.base_layer(found_x) + delta(found_x)
    y.backward(dy.float())
    found = [y, found_x.grad, *(p.grad for p in delta.parameters())]

    exact = [p.detach().double().requires_grad_() for p in delta.parameters()]
    A, B, C, D = exact
    with torch.no_grad():
        sign = torch.where(D.float() @ C.float() > 0, 1.0, -1.0).double()
    dW = delta.scaling * torch.relu(B @ A) * (sign + D @ C - (D @ C).detach())
    wide = x.clone().requires_grad_()
    host.base_layer.double()
    slow = host.base_layer(wide) + wide @ dW.T
    # ste="clip": the gradient of the direction, clipped for the whole batch at once
    G = dy.T @ x
    GZ = (delta.scaling * G * torch.relu(B @ A)).clamp(-1, 1).detach()
    grads = torch.autograd.grad(slow, [wide, A, B], dy)
    expected = [slow, *grads, D.T @ GZ, GZ @ C.T]
    for ours, wanted in zip(found, expected, strict=True):
        assert ours is not None
        assert relative(ours.double(), wanted) < 2e-6


def test_joint_and_split_agree() -> None:
    model, host = one_layer(DUAL, IN, OUT, torch.float32)
    delta: Any = host.plait_delta["default"]
    model.train()
    x = tiny.numbers(T, IN, dtype=torch.float32)
    joint = model(x)
    handle = host.base_layer.register_forward_hook(lambda *_: None)  # a wrapped base: split
    assert relative(model(x), joint) < 1e-6
    handle.remove()
    delta.dropout = 1e-12  # dropout: split
    assert relative(model(x), joint) < 1e-6


def test_dx_of_many_tiles_is_summed_in_fp32() -> None:
    """Rounded once for each tile and once at the end: sqrt 2 of one tile's error for any number.

    Summed in bf16, 32 tiles give four times that error.
    """
    errors = {}
    x, dy = tiny.numbers(64, 128).bfloat16(), tiny.numbers(64, 512, key=1).bfloat16()
    W = tiny.numbers(512, 128, key=2).bfloat16()
    zero = torch.zeros(1, requires_grad=True)
    exact = dy.double() @ W.double()
    for height in (512, 16):
        x.grad = None
        x.requires_grad_()
        y = DenseTiles.apply(
            lambda a, b: zero.expand(b - a, 128) * 0.0, 512, height, x, W, None, zero
        )
        y.backward(dy)
        assert x.grad is not None
        errors[height] = float((x.grad.double() - exact).norm() / exact.norm())
    assert errors[16] < 1.5 * errors[512]


def test_tile_height() -> None:
    assert tile_rows(4096, torch.device("cpu")) == 128
    assert tile_rows(10**6, torch.device("cpu")) == 64  # at least
    assert tile_rows(4096, torch.device("cuda")) == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [True, False])
def test_dual_lora_makes_no_weight(dtype: torch.dtype, joint: bool) -> None:
    """Forward and backward make no tensor of out x in numbers where a tile is smaller."""
    model, host = one_layer(DUAL, IN, OUT, dtype)
    delta: Any = host.plait_delta["default"]
    delta.tile = 8
    model.train()
    x = tiny.numbers(T, IN).to(dtype).requires_grad_()
    with Watch() as watch:
        y = model(x) if joint else delta(x)
        y.backward(torch.ones_like(y))
    assert delta.A.grad is not None
    sizes = {shape.numel() for shape, _ in watch.made}
    assert 8 * IN in sizes
    assert not {s for s in sizes if s == OUT * IN}
    delta.tile = OUT  # the control: one tile covers the layer
    with Watch() as watch:
        model(x)
    assert OUT * IN in {shape.numel() for shape, _ in watch.made}


def test_cached_weights_are_those_of_tiles() -> None:
    """dense="cached" gives the same numbers, once a step, and never those of before a step."""
    model, host = one_layer(DUAL, IN, OUT)
    delta: Any = host.plait_delta["default"]
    delta.tile = 8
    model.train()
    x = tiny.numbers(T, IN).requires_grad_()
    for _ in range(2):

        def run() -> list[Tensor]:
            y = model(x)
            return [y, *torch.autograd.grad(y.square().sum(), [x, *delta.parameters()])]

        expected = run()
        configure(dense="cached")
        try:
            first = run()
            made = delta.kept.made
            again = run()
        finally:
            configure(dense="tiles")
        assert delta.kept.made == made
        for one, other, third in zip(expected, first, again, strict=True):
            assert relative(other, one) < 1e-12
            assert torch.equal(other, third)
        with torch.no_grad():
            delta.A.mul_(1.5)
    assert any(key[0] == "whole" for key in delta.kept.values)


def test_dual_lora_saves_its_inputs_only() -> None:
    model, host = one_layer(DUAL, IN, OUT, torch.float32)
    delta: Any = host.plait_delta["default"]
    model.train()
    x = tiny.numbers(T, IN, dtype=torch.float32).requires_grad_()
    _, kept = saved_by(lambda: model(x))
    allowed = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    assert set(kept) <= allowed
    assert x.untyped_storage().data_ptr() in kept
    _, naive = saved_by(lambda: x @ (delta.scaling * delta.weight_rows(0, OUT)).T)
    assert set(naive) - allowed  # the control


# Low rank --------------------------------------------------------------------------------------


MIXES = ["none", "matrix", "router", "table"]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_up(mix: str, gated: bool) -> None:
    z, B = tiny.numbers(3, 4), tiny.numbers(5, 2 if mix != "none" else 4, key=1)
    gate = tiny.numbers(4, key=2) if gated else torch.ones(4, dtype=torch.float64)
    M, G, x = tiny.numbers(2, 4, key=3), tiny.numbers(2, 6, key=4), tiny.numbers(3, 6, key=5)
    ids = torch.tensor([1, 0, 1])
    inputs = [t.requires_grad_() for t in (z, B, gate, M, G, x)]

    def apply(z: Tensor, B: Tensor, gate: Tensor, M: Tensor, G: Tensor, x: Tensor) -> Tensor:
        apply = {
            "none": None,
            "matrix": lambda z: F.linear(z, M),
            "router": lambda z: TokenRouter(G)(z, x),
            "table": lambda z: TaskTable(["law", "care"])(z, x, Rows(task_ids=ids)),
        }[mix]
        return up(z, B, 1.5, gate if gated else None, apply)

    assert torch.autograd.gradcheck(apply, inputs)


@settings(max_examples=25)
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3), n=st.integers(1, 4),
    r=st.integers(1, 3), n_out=st.integers(1, 5),
)  # fmt: skip
def test_up_is_the_product(lead: list[int], n: int, r: int, n_out: int) -> None:
    z, B = tiny.numbers(*lead, n * r), tiny.numbers(n_out, r, key=1)
    gate, M = tiny.numbers(n * r, key=2), tiny.numbers(r, n * r, key=3)
    found = up(z, B, 0.5, gate, lambda z: F.linear(z, M))
    assert found.shape == (*lead, n_out)
    assert relative(found, 0.5 * (z * gate) @ M.T @ B.T) < 1e-12
    ids = torch.arange(lead[0]) % n
    table, rows = TaskTable([str(i) for i in range(n)]), Rows(task_ids=ids)
    found = up(z, B, 0.5, None, lambda z: table(z, z, rows))
    for row, k in enumerate(ids.tolist()):
        assert relative(found[row], 0.5 * z[row][..., k * r : (k + 1) * r] @ B.T) < 1e-12


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_number_of_products(case: Case) -> None:
    """3 forward and 5 backward, the base's and a router's among them."""
    forward, backward, _ = watched(case)
    assert (forward.products, backward.products) == (3, 5)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_number_of_products_does_not_grow(n: int) -> None:
    table = {"routing": "task", "tasks": [f"task {i}" for i in range(n)]}
    for options, counts in (
        ({"num_A": n}, (3, 5)),
        (table, (3, 5)),
    ):
        forward, backward, _ = watched(Case("shared_b", {"r": 1, **options}))
        assert (forward.products, backward.products) == counts
    for strategy in ("full", "random"):
        case = Case("cola", {"r": 1, "strategy": strategy, "num_A": n, "num_B": n + 1})
        forward, backward, _ = watched(case)
        assert (forward.products, backward.products) == (3, 5)


# Method -> products forward and backward once the factors are kept, and the numbers of a token that
# are saved beside x: R_in of z, and of a router its n logits and n weights. A matrix between the
# factors takes one small product forward and, with those that make the matrix, five backward.
COUNTS = [
    (Case("cola", {"r": 4, "init": "kaiming", "num_A": 5, "num_B": 7}), 3, 5, 4),
    (Case("cola", {"r": 4, "num_A": 5, "num_B": 7}), 3, 5, 8),
    (Case("droplora", {"r": 4, "inner_dropout": 0.0}), 3, 5, 4),
    (Case("dual_module", {"r": 8, "shared_r": 2, "total_steps": 10}), 3, 5, 10),
    (Case("fedalora_het", {"r": 4, "common_rank": 6}), 4, 10, 4),
    (Case("hydra", {"r": 4, "num_B": 3}), 3, 5, 4 + 2 * 3),
    (Case("hydra", {"r": 4, "num_B": 8}), 3, 5, 4 + 2 * 8),
    (Case("molora", {"r": 4, "num_experts": 3}), 3, 5, 3 * 4 + 2 * 3),
    (Case("shared_b", {"r": 4, "num_A": 3}), 3, 5, 3 * 4 + 2 * 3),
    (Case("sora", {"r": 4}), 3, 5, 4),
    (Case("sora", {"r": 4, "init": "pissa"}), 3, 5, 8),
    (Case("tied", {"r": 4}), 3, 5, 4),
]


@pytest.mark.parametrize(("case", "ahead", "back", "saved"), COUNTS, ids=str)
def test_products_and_saved_bytes_as_integers(
    case: Case, ahead: int, back: int, saved: int
) -> None:
    """What a call costs is known to the number, and does not grow with M, N or experts."""
    model = one_layer(case, IN, OUT, torch.float32)[0].train()
    x = tiny.numbers(T, IN, dtype=torch.float32).requires_grad_()
    model(x).sum().backward()
    with Watch() as forward:
        y, kept = saved_by(lambda: model(x))
    with Watch() as backward:
        y.backward(torch.ones_like(y))
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    extra = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in own]
    assert (forward.products, backward.products, sum(extra)) == (ahead, back, 4 * T * saved)


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_low_rank_makes_no_weight(case: Case) -> None:
    """No tensor of out x in numbers beside those of the base: dW is never formed."""
    forward, backward, _ = watched(case)
    made = {shape.numel() for shape, _ in (*forward.made, *backward.made)}
    assert IN * OUT not in made
    assert T * OUT in made


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_low_rank_saves_rank_activations(case: Case) -> None:
    """Beside x, parameters and stacked factors, at most a few numbers a token and rank."""
    model, host = one_layer(case, IN, OUT, torch.float32)
    delta: Any = host.plait_delta["default"]
    model.train()
    x = tiny.numbers(T, IN, dtype=torch.float32).requires_grad_()
    ids = task_ids(model, T)
    _, kept = saved_by(lambda: model(x, **ids))
    A, B = delta.factors()
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    extra = [t for place, t in kept.items() if place not in own]
    assert all(t.numel() not in (T * IN, T * OUT) for t in extra)
    numbers = sum(t.numel() for t in extra)
    router = 4 * T * len(delta.G) if isinstance(delta.mix(), TokenRouter) else 0
    table = 3 * T * A.shape[0] if isinstance(delta.mix(), TaskTable) else 0
    assert numbers <= 3 * T * A.shape[0] + 3 * (A.numel() + B.numel()) + router + table


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_low_rank_never_widens_the_tokens(case: Case) -> None:
    """In bf16 no fp32 tensor of tokens x in or tokens x out is made: factors are cast, x is not."""
    forward, backward, delta = watched(case, torch.bfloat16)
    for shape, dtype in (*forward.made, *backward.made):
        assert dtype == torch.bfloat16 or shape.numel() not in (T * IN, T * OUT), shape
    assert all(p.grad.dtype == torch.float32 for p in delta.parameters() if p.grad is not None)
