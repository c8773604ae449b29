"""LoRSum against dense loops, SVDLoRA and peft's Riemannian SGD; its taps leave nothing behind."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import plait
from benchmarks.optim.toys import (
    Invariance,
    LinearTask,
    OneLayer,
    adapted,
    delta,
    lora_layer,
)
from plait import LowRankDelta
from plait.core import Pair, gaussian, seeded
from plait.optim.lorsum import JITTER, lorsum, squared_norm, strength
from plait.optim.svd_lora import svd_lora, truncated
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import layers, wrap
from tests.support import ROOT
from tests.support import optim_ddp as ddp
from tests.support.pairs import lora, train, values

F64, F32 = torch.float64, torch.float32


def make(**options: Any) -> Any:
    """A factory; no momentum and lr 0.2 unless given."""
    defaults = {"lr": 0.2, "momentum": 0.0}
    return lambda model: plait.create_lorsum_optimizer(model, **{**defaults, **options})


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference of two trajectories."""
    return max(float((x - y).norm() / x.norm()) for x, y in zip(a, b, strict=True))


def problem(**changes: Any) -> tuple[Any, Tensor, Tensor]:
    """A model of one layer (7 -> 6, r = 3, B not zero), inputs and targets of 10 rows."""
    options = {"A": tiny.numbers(3, 7, key=1), "B": tiny.numbers(6, 3, key=2), **changes}
    model = adapted(OneLayer(tiny.numbers(6, 7)), **options)
    return model, tiny.numbers(10, 7, key=3), tiny.numbers(10, 6, key=4)


def backward(model: Any, X: Tensor, Y: Tensor) -> None:
    (model(X) - Y).square().sum().backward()


def dense_gradient(model: Any, X: Tensor, Y: Tensor) -> Tensor:
    """G (out, in) of the summed squares."""
    layer = lora_layer(model)
    return 2 * (X @ (layer.base_layer.weight + delta(model)).T - Y).T @ X


# The primitive ----------------------------------------------------------------------------------


def naive(
    A0: Tensor, B0: Tensor, T: Tensor, lam: float, sweeps: int, start: str, keep: float = 1.0,
    m_in: Tensor | None = None, m_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formulas as they are published, with a dense T (out, in) and one matrix inverse each."""
    eye = torch.eye(len(A0)).to(A0)
    Mi = torch.eye(A0.shape[1]).to(A0) if m_in is None else torch.diag(m_in)
    Mo = torch.eye(B0.shape[0]).to(A0) if m_out is None else torch.diag(m_out)

    def solve_A(B: Tensor) -> Tensor:
        right = lam * A0 + keep * B.T @ Mo @ B0 @ A0 + B.T @ T @ Mi.inverse()
        return (B.T @ Mo @ B + lam * eye).inverse() @ right

    def solve_B(A: Tensor) -> Tensor:
        right = lam * B0 + keep * B0 @ A0 @ Mi @ A.T + Mo.inverse() @ T @ A.T
        return right @ (A @ Mi @ A.T + lam * eye).inverse()

    if sweeps == 0:
        return solve_A(B0), solve_B(A0)
    A, B = A0, B0
    for _ in range(sweeps):
        for side in "BA" if start == "out" else "AB":
            if side == "A":
                A = solve_A(B)
            else:
                B = solve_B(A)
    return A, B


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(3, 6), st.integers(3, 6), st.integers(0, 3),
    st.sampled_from(["out", "in"]), st.booleans(), st.sampled_from([1.0, 0.7]),
)  # fmt: skip
def test_primitive_is_the_published_formula(
    r: int, n_in: int, n_out: int, sweeps: int, start: Any, metric: bool, keep: float
) -> None:
    A, B = tiny.numbers(2, r, n_in, key=1), tiny.numbers(2, n_out, r, key=2)
    T = tiny.numbers(2, n_out, n_in, key=3)
    m_in = tiny.numbers(2, 1, n_in, key=4).abs() + 0.5 if metric else None
    m_out = tiny.numbers(2, n_out, 1, key=5).abs() + 0.5 if metric else None
    found = lorsum(
        A, B, lambda B: B.mT @ T, lambda A: T @ A.mT,
        lam=0.3, sweeps=sweeps, start=start, keep=keep, m_in=m_in, m_out=m_out,
    )  # fmt: skip
    for i in range(2):
        wanted = naive(
            A[i], B[i], T[i], 0.3, sweeps, start, keep,
            None if m_in is None else m_in[i, 0], None if m_out is None else m_out[i, :, 0],
        )  # fmt: skip
        torch.testing.assert_close(found[0][i], wanted[0], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found[1][i], wanted[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_singular_systems_are_solved_by_the_pseudo_inverse(dtype: torch.dtype) -> None:
    A, B = tiny.numbers(1, 4, 7).to(dtype), torch.zeros(1, 6, 4, dtype=dtype)
    T = (tiny.numbers(1, 6, 2, key=1) @ tiny.numbers(1, 2, 7, key=2)).to(dtype)  # rank 2 below r
    new_A, new_B = lorsum(A, B, lambda B: B.mT @ T, lambda A: T @ A.mT, lam=0.0, sweeps=2)
    tolerance = 1e-9 if dtype == F64 else 1e-4
    torch.testing.assert_close(new_B @ new_A, T, rtol=tolerance, atol=tolerance)


def test_many_sweeps_are_the_truncated_svd() -> None:
    """Many sweeps are the truncated SVD of the step; the error falls with each."""
    task = LinearTask()
    gaps = []
    for sweeps in (1, 2, 4, 8, 16, 32, 64):
        model = adapted(OneLayer(-task.W), task.A, task.B)
        optimizer = make(lr=0.5, lmbd=1e-3, sweeps=sweeps)(model)
        model(torch.eye(60, dtype=F64)).square().sum().backward()
        optimizer.step()
        gaps.append(task.gap(delta(model)))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] <= 1e-3


def test_svd_lora_is_the_projected_dense_step() -> None:
    A, B, G, M = (tiny.numbers(*s, key=k) for k, s in enumerate([(2, 7), (6, 2), (6, 7), (6, 7)]))
    new_A, new_B, new_M = svd_lora(A, B, G, lr=0.3, scaling=2.0, M=M, momentum=0.5, dampening=0.1)
    torch.testing.assert_close(new_M, 0.5 * M + 0.9 * G)
    U, S, Vh = truncated(2 * B @ A - 0.3 * new_M, 2)
    torch.testing.assert_close(2 * new_B @ new_A, (U * S) @ Vh)
    torch.testing.assert_close(new_B.T @ new_B, new_A @ new_A.T)  # sqrt(S) on both sides


# The optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sweeps": 2, "start": "in"},
        {"momentum": 0.8},
        {"momentum": 0.8, "dampening": 0.3, "momentum_rank": 2.0, "lmbd_times_lr": False},
        {"metric": "kfac", "momentum": 0.8},
        {"metric": "kfac", "start": "in", "beta2": 0.5, "gamma": 0.25, "damping": 0.1},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_steps_are_the_dense_algorithm(options: dict[str, Any]) -> None:
    model, X, Y = problem(alpha=6.0)  # s = 2
    optimizer = make(lr=0.05, **options)(model)
    (group,) = optimizer.param_groups
    (pair,) = optimizer.pairs
    A, B, s, lr = pair.A.detach().clone(), pair.B.detach().clone(), 2.0, 0.05
    lam, sweeps, start = strength(lr, group), group["sweeps"], group["start"]
    mu, tau = group["momentum"], group["dampening"]
    D_in, D_out = torch.ones(7, dtype=F64), torch.ones(6, dtype=F64)
    M_in = M_out = None
    for t in range(4):
        rows = slice(2 * t, 2 * t + 3)
        with torch.no_grad():
            S = 2 * (X[rows] @ (lora_layer(model).base_layer.weight + s * B @ A).T - Y[rows])
        G = S.T @ X[rows]
        backward(model, X[rows], Y[rows])
        optimizer.step()
        optimizer.zero_grad()
        metric = {}
        if group["metric"]:
            keep = group["beta2"]
            D_in = keep * D_in + (1 - keep) * X[rows].square().mean(0)
            D_out = keep * D_out + (1 - keep) * 3 * S.square().sum(0)
            metric = {
                "m_in": (D_in + group["damping"]) ** group["gamma"],
                "m_out": (D_out + group["damping"]) ** group["gamma"],
            }
        T = -lr * (1 - tau) / s * G
        if mu:
            if M_in is None:
                r = round(3 * group["momentum_rank"])
                M_in = gaussian(seeded(0, "linear"), r, 7, std=1.0).double()
                M_out = torch.zeros(6, r, dtype=F64)
            T = T - lr * mu / s * M_out @ M_in
        new_A, new_B = naive(A, B, T, lam, sweeps, start, **metric)
        if mu:
            M_in, M_out = naive(M_in, M_out, (1 - tau) * G, lam, sweeps, start, keep=mu)  # type: ignore[arg-type]
        decay = lr * group["weight_decay"]
        A, B = new_A - decay * A, new_B - decay * B
        torch.testing.assert_close(pair.A.detach(), A, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(pair.B.detach(), B, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("zero_B", [False, True])
def test_no_sweep_is_peft_riemannian_sgd(dtype: torch.dtype, zero_B: bool) -> None:
    """On a Llama with s = 2."""
    one, two = (lora(tiny.llama().to(dtype)) for _ in range(2))
    if zero_B:
        with torch.no_grad():
            for model in (one, two):
                for name, p in model.named_parameters():
                    p.mul_(0) if "lora_B" in name else None
    lr, lmbd = 0.05, 0.2
    ours = make(lr=lr, sweeps=0, lmbd=lmbd)(one)
    theirs = create_riemannian_optimizer(
        two, torch.optim.SGD, lr=lr / 2**2, reg=strength(lr, ours.param_groups[0])
    )
    before = values(one)
    train(one, ours, range(4))
    train(two, theirs, range(4))
    assert any(not torch.equal(p, q) for p, q in zip(values(one), before, strict=True))
    tolerance = 1e-12 if dtype == F64 else 1e-6
    for p, q in zip(values(one), values(two), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_strength_of_the_proximal_term() -> None:
    group = {"lmbd": 0.1, "lmbd_times_lr": True, "metric": None}
    assert strength(0.5, group) == pytest.approx(0.05 + JITTER)
    assert strength(0.5, {**group, "lmbd_times_lr": False}) == pytest.approx(0.1 + JITTER)
    assert strength(0.5, {**group, "lmbd": 0.0}) == 0.0
    assert strength(1e-9, {**group, "metric": "kfac"}) == 1e-5


def test_invariance_from_zero_B() -> None:
    """Without damping the trajectory of dW knows no basis."""
    toy = Invariance(zero_B=True)
    for options in ({}, {"momentum": 0.9}, {"sweeps": 2}):
        for cond in (10.0, 1e3):
            assert toy.difference(make(lmbd=0.0, **options), cond) <= 1e-8


def test_damping_and_sgd_depend_on_the_basis() -> None:
    toy = Invariance()
    assert toy.difference(make(), 10.0) > 1e-2
    assert toy.difference(make(lmbd=0.0), 10.0) <= 1e-12
    assert toy.difference(make(lmbd=0.0, sweeps=0), 10.0) <= 1e-12


def test_start_in_from_zero_B_without_damping_is_refused() -> None:
    zero = problem(B=torch.zeros(6, 3, dtype=F64))[0]
    text = r'linear has B = 0, and with start="in" and lmbd = 0 .* Use start="out", or lmbd above 0'
    with pytest.raises(ValueError, match=text):
        make(start="in", lmbd=0.0)(zero)
    make(start="in")(zero)
    make(start="in", lmbd=0.0)(problem()[0])


def test_step_does_not_depend_on_s_without_damping() -> None:
    """alpha = 3 and 12 from the same dW."""
    paths = []
    for s in (1.0, 4.0):
        model, X, Y = problem(alpha=3 * s, B=tiny.numbers(6, 3, key=2) / s)
        optimizer = make(lr=0.02, lmbd=0.0)(model)
        path = []
        for _ in range(5):
            backward(model, X, Y)
            optimizer.step()
            optimizer.zero_grad()
            path.append(delta(model))
        paths.append(path)
    assert relative(*paths) < 1e-10


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"metric": "kfac", "momentum": 0.9}])
def test_accumulated_micro_batches_are_one_batch(options: dict[str, Any]) -> None:
    paths = []
    for parts in (1, 2, 5):
        model, X, Y = problem()
        optimizer = make(lr=0.02, **options)(model)
        path = []
        for _ in range(3):
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                backward(model, x, y)
            optimizer.step()
            optimizer.zero_grad()
            path.append(delta(model))
        paths.append(path)
    assert relative(paths[0], paths[1]) < 1e-12
    assert relative(paths[0], paths[2]) < 1e-12


def test_metric_of_ones_changes_nothing() -> None:
    """beta2 = 1 leaves the running squares at their start."""
    paths = []
    for options in ({"lmbd": 1.0}, {"metric": "kfac", "beta2": 1.0, "damping": 0.0, "lmbd": 1.0}):
        model, X, Y = problem()
        optimizer = make(lr=0.02, **options)(model)
        backward(model, X, Y)
        optimizer.step()
        paths.append([delta(model)])
    assert relative(*paths) < 1e-4  # the jitter, 1e-6 beside 2e-2


def test_momentum_is_there_after_the_first_step() -> None:
    """mu is 0.9 by default."""
    model, X, Y = problem()
    optimizer = plait.create_lorsum_optimizer(model)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    backward(model, X, Y)
    G = dense_gradient(model, X, Y)
    optimizer.step()
    (pair,) = optimizer.pairs
    M = optimizer.state[pair.B]["momentum"] @ optimizer.state[pair.A]["momentum"]
    assert float((M - G).norm() / G.norm()) < 1
    assert make(sweeps=0, momentum=None)(model).param_groups[0]["momentum"] == 0.0


def test_no_sweep_refuses_what_needs_the_full_gradient() -> None:
    text = r"sweeps = 0 reads \.grad alone .* momentum = 0\.9, metric = None, clip_norm = 0\.0"
    with pytest.raises(ValueError, match=text):
        make(sweeps=0, momentum=0.9)(problem()[0])


def test_clip_is_that_of_the_full_gradient() -> None:
    model, X, Y = problem()
    G = dense_gradient(model, X, Y)
    S = 2 * (X @ (lora_layer(model).base_layer.weight + delta(model)).T - Y)
    assert float(squared_norm(X, S).sqrt()) == pytest.approx(float(G.norm()))
    start = delta(model)
    moves = []
    for clip, lr in ((0.0, 0.01), (float(G.norm()) / 2, 0.02), (float(G.norm()) * 2, 0.01)):
        model = problem()[0]
        optimizer = make(lr=lr, clip_norm=clip, lmbd=0.0)(model)
        backward(model, X, Y)
        optimizer.step()
        moves.append(delta(model) - start)
    torch.testing.assert_close(moves[0], moves[1])
    torch.testing.assert_close(moves[0], moves[2])


@pytest.mark.parametrize(("sweeps", "epochs"), [(1, 10), (2, 10)])
def test_one_and_two_sweeps_follow_the_svd_reference(sweeps: int, epochs: int) -> None:
    """Batches of 16, momentum 0.75: the gap stays near that of SVDLoRA on the same batches."""
    tasks = range(5)
    options = {"lr": 0.1, "momentum": 0.75, "lmbd": 1e-3, "start": "in", "sweeps": sweeps}
    ours = torch.tensor([LinearTask(s).run(make(**options), epochs, 16) for s in tasks]).mean(0)
    dense = torch.tensor(
        [LinearTask(s).reference(0.1, epochs, 16, momentum=0.75) for s in tasks]
    ).mean(0)
    published = {1: (0.218, 0.0913), 2: (0.169, 0.0576)}[sweeps]
    assert ours[:2].tolist() == pytest.approx(published, rel=0.2)
    assert dense[:2].tolist() == pytest.approx((0.136, 0.0504), rel=0.25)
    alone = torch.tensor(
        [LinearTask(s).run(make(**{**options, "momentum": 0.0}), epochs, 16) for s in tasks]
    ).mean(0)
    assert float(ours[-1]) < 3 * float(dense[-1])
    assert float(alone[-1]) > 2 * float(ours[-1])  # without momentum it does not follow


# Taps -------------------------------------------------------------------------------------------


def kept(optimizer: Any) -> int:
    """Rows kept in all layers."""
    return sum(len(X) for tap in optimizer.taps.values() for X in tap.X)


def loss(model: Any, key: int = 0) -> Tensor:
    ids = tiny.tokens(key=key)
    return model(input_ids=ids, labels=ids).loss


def test_taps_keep_what_meets_a_backward_and_nothing_else() -> None:
    model = lora().train()
    optimizer = make()(model)
    with torch.no_grad():
        loss(model)
    loss(model.eval())
    loss(model.train())  # no backward
    with model.disable_adapter():
        loss(model)
    assert kept(optimizer) == 0
    loss(model).backward()
    assert kept(optimizer) == 4 * 32
    loss(model.eval())
    assert kept(optimizer) == 4 * 32
    optimizer.step()
    assert kept(optimizer) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain, model = lora().train(), lora().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizers = [make()(m) for m in (plain, model)]
    for key in range(2):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            loss(m, key).backward()
            assert kept(optimizer) == 4 * 32
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(values(plain), values(model), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("drop", ["optimizer", "model"])
def test_taps_of_a_skipped_step_are_dropped(drop: str) -> None:
    one, two = lora(), lora()
    train(one, make()(one), range(1))
    optimizer = make()(two)
    loss(two.train(), key=7).backward()  # and no step
    (optimizer if drop == "optimizer" else two).zero_grad()
    train(two, optimizer, range(1))
    assert all(map(torch.equal, values(one), values(two)))


class Twice(nn.Module):
    """One layer called two times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False, dtype=F64)
        self.linear.weight = nn.Parameter(tiny.numbers(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


def test_module_called_twice_keeps_both_inputs() -> None:
    model = adapted(Twice(), tiny.numbers(2, 6, key=1), tiny.numbers(6, 2, key=2))
    optimizer = make(lr=0.01)(model)
    x = tiny.numbers(5, 6, key=3)
    layer = lora_layer(model)
    weight = (layer.base_layer.weight + delta(model)).requires_grad_()
    (torch.tanh(x @ weight.T) @ weight.T).square().sum().backward()
    model(x).square().sum().backward()
    (tap,) = optimizer.taps.values()
    X, S = tap.rows(6, 6, x)
    assert len(X) == 10
    torch.testing.assert_close(S.T @ X, weight.grad)
    optimizer.step()


def test_remove_and_garbage_collection_leave_no_hook() -> None:
    model = lora().train()

    def hooks() -> int:
        return sum(len(m._forward_hooks) for m in model.modules())

    before = hooks()
    optimizer = make()(model)
    assert hooks() == before + 4
    loss(model).backward()
    optimizer.remove()
    optimizer.remove()
    assert hooks() == before
    assert kept(optimizer) == 0
    again = make()(model)
    assert hooks() == before + 4
    del again
    gc.collect()
    assert hooks() == before
    make(sweeps=0)(model)
    assert hooks() == before


def test_more_rows_than_max_rows_is_an_error() -> None:
    model = lora().train()
    optimizer = make(max_rows=40)(model)
    loss(model).backward()
    with pytest.raises(
        ValueError, match=r"v_proj saw 64 rows in one step, max_rows = 40\. Use smaller batches"
    ):
        loss(model).backward()
    assert optimizer.bytes_per_row == 4 * 2 * ((24 + 24) + (24 + 12))


def test_memory_is_said_at_construction(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="plait.optim.lorsum"):
        make()(lora())
    assert "0.6 MiB for each 1000 tokens in fp32, up to max_rows = 16384" in caplog.text


def test_gradients_that_do_not_follow_from_the_taps_are_refused() -> None:
    model, X, Y = problem()
    optimizer = make()(model)
    backward(model, X, Y)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-3)
    with pytest.raises(
        ValueError, match=r"linear: its gradient has norm .* set max_grad_norm to 0"
    ):
        optimizer.step()
    model, X, Y = problem()
    optimizer = make()(model)
    lora_layer(model).eval()
    backward(model, X, Y)
    with pytest.raises(ValueError, match=r"linear has a gradient and its inputs were not seen"):
        optimizer.step()


def test_fp16_is_refused_and_bf16_trains() -> None:
    model = lora().train()
    optimizer = make()(model)
    with torch.autocast("cpu", dtype=torch.float16):
        value = loss(model)
    with pytest.raises(TypeError, match=r"v_proj computes in fp16, .* Train in bf16 or fp32"):
        value.backward()
    optimizer.zero_grad()
    before = values(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(model).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in values(model))
    assert any(not torch.equal(p, q) for p, q in zip(values(model), before, strict=True))


def test_dropout_stacks_and_attention_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj has lora_dropout = 0\.1: .* Set it to 0"):
        make()(lora(lora_dropout=0.1))
    for key in ("cola", "shared_b"):
        with pytest.raises(ValueError, match=r"q_proj has 1 pairs of factors in stacks.*lora_rite"):
            make()(wrap(Case(key)))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.config: dict[str, Any] = {}

    attention = get_peft_model(Attention(), LoraConfig(target_modules=["attention"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"(is an nn\.MultiheadAttention|no free pair)"):
        make()(attention)


class Plain(LowRankDelta):
    """A method of one plain pair."""

    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(tiny.numbers(4, base.in_features).float())
        self.B = nn.Parameter(torch.zeros(base.out_features, 4))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def pairs(self) -> list[Pair]:
        return [Pair(self.base.name, self.A, self.B, self.scaling)]


def test_plait_method_of_one_plain_pair() -> None:
    model = wrap(Case("shared_b"))
    for layer in layers(model):
        old: Any = layer.plait_delta["default"]
        layer.plait_delta["default"] = Plain(old.base, old.config, torch.Generator())
    optimizer = make()(model.train())
    losses = []
    for _ in range(10):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.03
    for layer in layers(model):
        layer.plait_delta["default"].dropout = 0.2  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"q_proj has lora_dropout = 0\.2"):
        make()(model)


def test_layers_that_store_their_weight_the_other_way_round() -> None:
    """GPT-2's Conv1D; that the rows give the gradients is checked in each step."""
    model = get_peft_model(
        tiny.gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    optimizer = plait.create_lorsum_optimizer(model, lr=0.05)
    before = values(model)
    train(model, optimizer, range(3))
    assert all(not torch.equal(p, q) for p, q in zip(values(model), before, strict=True))


def test_checkpoint_helper_of_torch_keeps_single_inputs() -> None:
    model, X, Y = problem()
    optimizer = make(lr=0.01)(model)
    (checkpoint(model, X, use_reentrant=False) - Y).square().sum().backward()
    assert kept(optimizer) == 10
    G = dense_gradient(model, X, Y)
    (tap,) = optimizer.taps.values()
    x, s = tap.rows(7, 6, X)
    torch.testing.assert_close(s.T @ x, G)


# Two processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Half of the batch each; ranks stay equal."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(Path(ddp.__file__)), str(tmp_path),
        ],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**ddp.environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, options in ddp.CASES.items():
        assert torch.equal(first[name], second[name]), name
        alone = ddp.run(options, rank=0, world=1)
        assert float((first[name] - alone).norm() / alone.norm()) <= 1e-6, name
