"""LoRA-RITE against a loop over single pairs, its invariance, and its closed-form first step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from benchmarks.optim.toys import Invariance, OneLayer, adapted, basis, delta
from plait.core import seeded
from plait.optim import collect_pairs
from plait.optim.lora_rite import balanced
from plait.optim.pairs import join, part
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import batch, wrap
from tests.support.pairs import change_basis, lora, train

F64, F32 = torch.float64, torch.float32


def rite(**options: Any) -> Any:
    return lambda model: plait.create_lora_rite_optimizer(model, **{"lr": 1e-2, **options})


# Invariance -------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_unmagnified": 0.02},  # active in each step
    {"clip_unmagnified": 0.0, "escape": False},
    {"weight_decay": 0.1},
    {"balance": True},
    {"weight_decay": 0.1, "balance": True},
    {"cap_rms": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_invariance(options: dict[str, Any]) -> None:
    toy = Invariance()
    assert toy.difference(rite(**options), 10.0) <= 1e-9
    assert toy.difference(rite(**options), 1e3) <= 1e-9


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "balance": True}], ids=str)
def test_invariance_from_zero_B_and_in_fp32(options: dict[str, Any]) -> None:
    for toy in (Invariance(), Invariance(zero_B=True)):
        assert toy.difference(rite(**options), 1e3) <= 1e-9
        assert toy.difference(rite(**options), 10.0, F32) <= 1e-4
        assert toy.difference(rite(**options), 1e3, F32) <= 3e-4


def test_adamw_and_clipped_gradients_are_not_invariant() -> None:
    def adamw(model: nn.Module) -> Any:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    assert Invariance().difference(adamw, 10.0) > 1e-1

    def clipped(model: nn.Module) -> Any:
        optimizer = rite()(model)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer.register_step_pre_hook(
            lambda *_: (
                nn.utils.clip_grad_norm_(params, 0.02)  # type: ignore[arg-type,func-returns-value]
                and None
            )
        )
        return optimizer

    assert Invariance().difference(clipped, 10.0) > 1e-3


def test_size_of_A_does_not_matter_from_zero_B() -> None:
    toy = Invariance(zero_B=True)
    one, _ = toy.run(rite(), steps=40)
    two, _ = toy.run(rite(), steps=40, scale_A=100.0)
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(one, two, strict=True)) < 1e-9


@pytest.mark.filterwarnings("ignore:cola. groups")
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("cola", {}),
        ("cola", {"strategy": "heuristic", "init": "pissa_split"}),
        ("cola", {"strategy": "random"}),
        ("shared_b", {"routing": "task", "tasks": ["a", "b"]}),
        ("shared_b", {}),
    ],
    ids=str,
)
def test_invariance_of_methods(key: str, options: dict[str, Any]) -> None:
    """Parameters of a wrapped Llama are put into another basis; its outputs stay the same."""

    def outputs(change: bool) -> list[Tensor]:
        model = wrap(Case(key, options), tiny.llama().double(), init_weights=False).train()
        if change:
            gen = torch.Generator().manual_seed(1)
            for pair in collect_pairs(model):
                change_basis(pair, basis(10.0, 4, gen))
        optimizer = rite(weight_decay=0.1)(model)
        found = []
        for step in range(10):
            inputs = batch(model, key=step)
            result = model(**inputs)
            found.append(result.logits.detach())
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    one, two = outputs(False), outputs(True)
    assert float((one[0] - one[-1]).abs().max()) > 1e-2  # it trains
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_two_A_with_one_B_are_one_pair() -> None:
    """A layer of two tasks, A_1 and A_2 of shape (3, 7), B of (6, 3)."""
    W, targets = tiny.numbers(6, 7), [tiny.numbers(9, 6, key=k) for k in (1, 2)]
    X = [tiny.numbers(9, 7, key=k) for k in (3, 4)]

    def path(change: bool) -> list[Tensor]:
        options = {"routing": "task", "tasks": ["a", "b"], "r": 3, "lora_alpha": 3}
        case = Case("shared_b", options)
        model = wrap(
            case, OneLayer(W), target_modules=["linear"], task_type=None, init_weights=False
        )
        (pair,) = collect_pairs(model)
        if change:
            change_basis(pair, basis(10.0, 3, seeded(5)))
        optimizer, found = rite()(model), []
        model.train()
        for _ in range(40):
            for task in (0, 1):
                y = model(X[task], task_ids=torch.full((9,), task))
                (y - targets[task]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(torch.cat([pair.B.detach() @ A.detach() for A in pair.A]))
        return found

    for a, b in zip(path(False), path(True), strict=True):
        assert float((a - b).norm() / a.norm()) <= 1e-12


# The formula ------------------------------------------------------------------------------------


def naive(
    pairs: list[tuple[Tensor, Tensor]], grads: list[list[tuple[Tensor, Tensor]]], lr: float
) -> list[tuple[Tensor, Tensor]]:
    """LoRA-RITE with its defaults, one pair and one line of the algorithm at a time."""
    d = (0.9, 0.999)
    old: list[Any] = [None] * len(pairs)
    for t, step in enumerate(grads):
        d1, d2 = (b * (1 - b**t) / (1 - b ** (t + 1)) for b in d)
        frames = []
        for (A, B), (g_A, g_B) in zip(pairs, step, strict=True):
            U_A, R_A = torch.linalg.qr(A.T)
            U_B, R_B = torch.linalg.qr(B)
            frames.append(
                (U_A, R_A, U_B, R_B, g_A.T @ torch.linalg.pinv(R_B), g_B @ torch.linalg.pinv(R_A))
            )
        norm = sum(float(g.square().sum()) for f in frames for g in f[4:]) ** 0.5
        share = min(1.0, 1.0 / norm)
        moved = []
        for i, ((A, B), (U_A, R_A, U_B, R_B, gbar_A, gbar_B)) in enumerate(
            zip(pairs, frames, strict=True)
        ):
            memory, directions = [], []
            bases = [U_B, U_A]
            for side, gbar in enumerate((share * gbar_A, share * gbar_B)):
                r = gbar.shape[1]
                V, rho, M, basis_before = old[i][side] if old[i] else (
                    torch.zeros(r, r).to(gbar), 0.0, torch.zeros_like(gbar), bases[side]
                )  # fmt: skip
                P = bases[side].T @ basis_before
                Vp = P @ V @ P.T
                gap = (torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(Vp)).max()
                escaped = min(max(0.0, float(gap)), max(0.0, float(V.trace() - Vp.trace())))
                rho = d2 * (rho + escaped)
                V = d2 * Vp + (1 - d2) * gbar.T @ gbar / len(gbar)
                lam, Q = torch.linalg.eigh(V)
                S = gbar @ Q @ torch.diag(1 / ((lam.clamp(min=0) + rho).sqrt() + 1e-6)) @ Q.T
                M = d1 * M @ P.T + (1 - d1) * S
                memory.append((V, rho, M, bases[side]))
                directions.append(M)
            old[i] = memory
            M_A, M_B = directions
            moved.append(
                (A - lr * torch.linalg.pinv(R_B) @ M_A.T, B - lr * M_B @ torch.linalg.pinv(R_A).T)
            )
        pairs = moved
    return pairs


def test_batched_is_the_naive_loop() -> None:
    """Pairs of two shapes, several layers; also within one parameter."""
    model = wrap(
        Case("cola", {"strategy": "heuristic", "init": "pissa_split"}),
        tiny.llama().double(),
        init_weights=False,
    )
    found = collect_pairs(model)
    assert len(found) > len({(p.A.shape, p.B.shape) for p in found})
    optimizer = rite(other_lr=0.0)(model)
    start = [
        (join(p.A, p.A_slices, 1).detach().clone(), join(p.B, p.B_slices, 0).detach().clone())
        for p in found
    ]
    grads = []
    for t in range(4):
        step = []
        for i, p in enumerate(found):
            for q in (p.A, p.B):
                if q.grad is None:
                    q.grad = torch.zeros_like(q)
            g_A, g_B = (tiny.numbers(*x.shape, key=100 * t + i) for x in start[i])
            part(p.A.grad, p.A_slices, 1, g_A)  # type: ignore[arg-type]
            part(p.B.grad, p.B_slices, 0, g_B)  # type: ignore[arg-type]
            step.append((g_A, g_B))
        grads.append(step)
        optimizer.step()
        optimizer.zero_grad()
    for p, (A, B) in zip(found, naive(start, grads, 1e-2), strict=True):
        torch.testing.assert_close(join(p.A, p.A_slices, 1).detach(), A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(join(p.B, p.B_slices, 0).detach(), B, rtol=1e-9, atol=1e-12)


def one_pair(A: Tensor, B: Tensor) -> tuple[Any, Any]:
    """A model with one pair, and the pair."""
    model = adapted(OneLayer(torch.zeros(len(B), A.shape[1], dtype=A.dtype)), A, B)
    return model, collect_pairs(model)[0]


@pytest.mark.parametrize("r", [1, 3])
def test_first_step_in_closed_form(r: int) -> None:
    lr, n_in, n_out = 1e-2, 11, 8
    A, B = tiny.numbers(r, n_in), tiny.numbers(n_out, r, key=1)
    model, pair = one_pair(A, B)
    optimizer = rite(eps=1e-12, clip_unmagnified=0.0)(model)
    G = tiny.numbers(n_out, n_in, key=2)
    pair.A.grad, pair.B.grad = B.T @ G, G @ A.T
    optimizer.step()
    dA, dB = pair.A.detach() - A, pair.B.detach() - B
    R_A, R_B = torch.linalg.qr(A.T).R, torch.linalg.qr(B).R
    eye = torch.eye(r, dtype=F64)
    torch.testing.assert_close(R_B @ dA @ dA.T @ R_B.T, lr**2 * n_in * eye, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(R_A @ dB.T @ dB @ R_A.T, lr**2 * n_out * eye, rtol=1e-8, atol=1e-10)
    if r == 1:
        assert float(dA.norm()) == pytest.approx(lr * n_in**0.5 / float(B.norm()))
        assert float(dB.norm()) == pytest.approx(lr * n_out**0.5 / float(A.norm()))


def test_first_step_from_zero_B_leaves_A_bit_for_bit() -> None:
    A, B = tiny.numbers(3, 11), torch.zeros(8, 3, dtype=F64)
    model, pair = one_pair(A, B)
    pair.A.grad, pair.B.grad = torch.zeros_like(A), tiny.numbers(8, 3, key=2)
    rite()(model).step()
    assert torch.equal(pair.A, A)
    assert pair.B.any()


@pytest.mark.parametrize("dtype", [F64, F32])
def test_gradient_of_low_rank_gives_a_finite_step(dtype: torch.dtype) -> None:
    for key in range(20):
        A, B = tiny.numbers(8, 20, key=key).to(dtype), tiny.numbers(16, 8, key=key + 50).to(dtype)
        model, pair = one_pair(A, B)
        optimizer = rite()(model)
        for t in range(3):
            G = tiny.numbers(16, 2, key=key + t).to(dtype) @ tiny.numbers(2, 20, key=t).to(dtype)
            pair.A.grad, pair.B.grad = B.T @ G, G @ A.T
            before = pair.A.detach().clone(), pair.B.detach().clone()
            optimizer.step()
            for p, old in zip((pair.A, pair.B), before, strict=True):
                assert torch.isfinite(p).all()
                assert not torch.equal(p, old)


def test_options_do_what_they_say() -> None:
    A, B = tiny.numbers(3, 11), tiny.numbers(8, 3, key=1)
    grads = tiny.numbers(3, 11, key=2), tiny.numbers(8, 3, key=3)

    def step(**options: Any) -> tuple[Tensor, Tensor]:
        model, pair = one_pair(A, B)
        optimizer = rite(**options)(model)
        pair.A.grad, pair.B.grad = grads[0].clone(), grads[1].clone()
        optimizer.step()
        return pair.A.detach(), pair.B.detach()

    plain = step()
    skipped = step(skip_rms=1e-6)
    assert torch.equal(skipped[0], A)
    assert torch.equal(skipped[1], B)
    decayed = step(weight_decay=0.5)
    torch.testing.assert_close(decayed[0], plain[0] - 1e-2 * 0.5 * A)
    even = step(balance=True)
    assert float(even[0].norm()) == pytest.approx(float(even[1].norm()), rel=1e-5)
    torch.testing.assert_close(even[1] @ even[0], plain[1] @ plain[0])
    capped = step(cap_rms=0.1)
    R_A = torch.linalg.qr(A.T).R  # M_B = (B - B') R_A^T / lr
    rms = ((B - capped[1]) @ R_A.T / 1e-2).square().mean().sqrt()
    assert float(rms) == pytest.approx(0.1, rel=1e-6)
    zero = balanced(torch.ones(1, 2, 3), torch.zeros(1, 4, 2))
    assert all(torch.isfinite(t).all() for t in zero)


def test_rank_above_the_layer_is_refused() -> None:
    text = r"linear: rank 9 is above min\(in, out\) of a layer 11 -> 8\. Give a smaller r"
    with pytest.raises(ValueError, match=text):
        rite()(one_pair(tiny.numbers(9, 11), tiny.numbers(8, 9))[0])


def test_bf16_factors_step_in_fp32() -> None:
    model = lora().to(torch.bfloat16)
    optimizer = rite()(model)
    train(model, optimizer, range(2))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.state[optimizer.pairs[0].A]["momentum"].dtype == F32


def test_layer_without_gradient_stays() -> None:
    model = lora()
    optimizer = rite()(model)
    train(model, optimizer, range(1))
    first = optimizer.pairs[0]
    before = first.A.detach().clone()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    first.A.grad = first.B.grad = None
    optimizer.step()
    assert torch.equal(first.A, before)
    assert [int(optimizer.state[p.A]["step"]) for p in optimizer.pairs] == [1, 2, 2, 2]


def test_delta_is_what_the_toys_read() -> None:
    A, B = tiny.numbers(3, 11), tiny.numbers(8, 3, key=1)
    torch.testing.assert_close(delta(one_pair(A, B)[0]), B @ A)
