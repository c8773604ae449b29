"""CoLA (collaborative): pairings, starts, draws, and what full collaboration amounts to."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import plait
from plait.testing import helpers, tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    deltas,
    layers,
    logits,
    one_delta,
    relative,
    steps,
)
from plait.upstream.export import to_lora

STRATEGIES = ["full", "random", "random_b", "heuristic"]
CASE = Case("cola", {"r": 2})
STARTS = [(s, i) for s in STRATEGIES for i in ("pissa", "kaiming")] + [("heuristic", "pissa_split")]


def layer(n_in: int = 8, n_out: int = 6, **options: Any) -> tuple[Any, Any]:
    """`one_delta` of CASE."""
    return one_delta(CASE, n_in, n_out, **options)


def pairing(delta: Any, training: bool) -> Tensor:
    """P (N, M): which B meets which A, written out from the definition."""
    config = delta.config
    M, N = config.num_A, config.num_B
    P = torch.zeros(N, M, dtype=torch.float64)
    for j, i in itertools.product(range(N), range(M)):
        if config.strategy == "full":
            P[j, i] = 1
        elif config.strategy == "heuristic":
            P[j, i] = float(i == min(j, M - 1))
        elif not training:
            P[j, i] = 1 / (N if config.strategy == "random" else M)
        elif config.strategy == "random":
            P[j, i] = float(delta.draw[i] == j)
        else:
            P[j, i] = float(delta.draw[j] == i)
    return P


def loop(delta: Any, training: bool) -> Tensor:
    """dW pair by pair, less the start."""
    P = pairing(delta, training)
    total = torch.zeros(())
    for j, i in itertools.product(range(len(delta.B)), range(len(delta.A))):
        total = total + P[j, i] * delta.B[j] @ delta.A[i]
    if delta.A0 is not None:
        k = 1.0 if delta.config.init == "pissa_split" else P.sum() / P.numel()
        total = total - k * delta.B0 @ delta.A0
    return delta.scaling * total


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("full", 333), ("random", 111), ("random_b", 166.5), ("heuristic", 221)],
)
def test_worked_example(strategy: str, expected: float) -> None:
    # By hand, A = (1, 2), B = (1, 10, 100): heuristic 1 * 1 + 110 * 2.
    _, delta = layer(1, 1, r=1, lora_alpha=1, init="kaiming", strategy=strategy)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([1.0, 2]).view(2, 1, 1))
        delta.B.copy_(torch.tensor([1.0, 10, 100]).view(3, 1, 1))
    assert float(delta.weight()) == expected


@settings(max_examples=30)
@given(
    n_in=st.integers(1, 7), n_out=st.integers(1, 7), r=st.integers(1, 3), M=st.integers(1, 4),
    N=st.integers(1, 5), start=st.sampled_from(STARTS), training=st.booleans(),
)  # fmt: skip
def test_folded_is_the_loop_over_pairs(
    n_in: int, n_out: int, r: int, M: int, N: int, start: tuple[str, str], training: bool
) -> None:
    """Outputs and all gradients, with a start that is not zero."""
    strategy, init = start
    if strategy == "heuristic":
        N = max(M, N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", plait.PlaitWarning)
        model, delta = layer(n_in, n_out, r=r, num_A=M, num_B=N, strategy=strategy, init=init)
    if delta.A0 is not None:
        delta.A0.copy_(tiny.numbers(*delta.A0.shape))
        delta.B0.copy_(tiny.numbers(*delta.B0.shape, key=1))
    model.train(training)
    x, dy = tiny.numbers(5, n_in), tiny.numbers(5, n_out, key=2)
    fast = model(x) - layers(model)[0].base_layer(x)
    slow = x @ loop(delta, training).T
    assert relative(fast, slow) < 1e-10
    params = [delta.A, delta.B]
    for found, wanted in zip(
        torch.autograd.grad(fast, params, dy),
        torch.autograd.grad(slow, params, dy),
        strict=True,
    ):
        assert float((found - wanted).abs().max()) < 1e-10 * max(float(wanted.abs().max()), 1.0)


@pytest.mark.parametrize(("strategy", "init"), STARTS)
def test_start_is_the_identity_for_every_draw(strategy: str, init: str) -> None:
    options = {"strategy": strategy, "init": init, "init_weights": True}
    model, delta = layer(30, 20, **options)
    x = tiny.numbers(4, 30)
    base = layers(model)[0].base_layer(x)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.0)
    seen = set()
    for _ in range(20):
        model.train()
        assert relative(model(x), base) < 1e-6
        seen.add(None if delta.draw is None else tuple(delta.draw.tolist()))
        model(x).sum().backward()
        optimizer.step()
    model.eval()
    assert relative(model(x), base) < 1e-6
    assert (len(seen) > 1) == (strategy in ("random", "random_b"))


def test_start_values() -> None:
    _, delta = layer(30, 20, init_weights=True, svd="exact")
    W = tiny.OneLinear(30, 20).linear.weight
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    assert relative(delta.scaling * delta.B0 @ delta.A0, best) < 1e-6
    assert all(relative(A, delta.A0 / 2) < 1e-6 for A in delta.A)
    assert all(relative(B, delta.B0 / 3) < 1e-6 for B in delta.B)
    _, delta = layer(30, 20, init_weights=True, init="kaiming")
    assert not delta.B.any()
    assert delta.A0 is None
    assert not torch.equal(delta.A[0], delta.A[1])
    options = {"strategy": "heuristic", "init": "pissa_split", "svd": "exact"}
    _, delta = layer(30, 20, init_weights=True, **options)
    for i, size in ((0, 1), (1, 2)):  # groups {1}, {2, 3}; block i of the singular triples
        block = slice(2 * i, 2 * i + 2)
        part = (U[:, block] * S[block]) @ Vh[block]
        assert relative(delta.scaling * size * delta.B[2 * i] @ delta.A[i], part) < 1e-6


@pytest.mark.parametrize(
    ("M", "N", "paper", "released"),
    [
        (2, 3, [0, 1, 1], [0, 1, 0]),
        (2, 4, [0, 1, 1, 1], [0, 0, 1, 1]),
        (2, 5, [0, 1, 1, 1, 1], [0, 0, 1, 1, 0]),
        (3, 5, [0, 1, 2, 2, 2], [0, 1, 2, 0, 1]),
    ],
)
def test_groups_of_the_heuristic(M: int, N: int, paper: list[int], released: list[int]) -> None:
    for grouping, expected in (("paper", paper), ("released", released)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", plait.PlaitWarning)
            config = plait.ColaConfig(num_A=M, num_B=N, strategy="heuristic", grouping=grouping)  # type: ignore[arg-type]
        assert config.groups().tolist() == expected


@pytest.mark.parametrize(("strategy", "init"), STARTS)
def test_export_ranks_and_stock_peft(strategy: str, init: str, tmp_path: Any) -> None:
    """full, random, random_b: r + r; heuristic: M r + r0; without A0: r and M r. Exact."""
    model = helpers.wrap(CASE, strategy=strategy, init=init, r=2)
    steps(model, adamw(model, 1e-2), 4, key=None)
    export = to_lora(model)
    terms = 2 if strategy == "heuristic" else 1
    start = {"pissa": 2, "kaiming": 0, "pissa_split": 4}[init]
    assert {layer.rank for layer in export.layers} == {2 * terms + start}
    assert {delta.rank() for delta in deltas(model)} == {2 * terms + start}
    assert export.error == 0
    expected = logits(model)
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        assert float((stock(input_ids=tiny.tokens()).logits - expected).abs().max()) < 1e-6
    model.merge_adapter()
    assert float((logits(model) - expected).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"strategy": "full"}, 8),
        ({"strategy": "random"}, 8),
        ({"strategy": "random_b"}, 8),
        ({"strategy": "heuristic"}, 12),
        ({"strategy": "heuristic", "init": "pissa_split"}, 16),
    ],
)
def test_rank_of_a_trained_update(options: dict[str, Any], rank: int) -> None:
    """(M, N) = (2, 3), r = 4: the ranks of the method's page."""
    model, delta = layer(40, 30, r=4, init_weights=True, **options)
    fit(model, delta, adam=False, count=20, lr_A=100, lr_B=100)
    S = torch.linalg.svdvals(delta.weight())
    assert int((1e-7 * S[0] < S).sum()) == rank == delta.rank()


# What full collaboration is --------------------------------------------------------------------


def fit(
    model: Any, delta: Any, *, adam: bool, count: int, lr_B: float = 1.0, lr_A: float = 1.0
) -> None:
    """Train on a linear target; learning rates scaled for A and B."""
    n_in, n_out = delta.base.in_features, delta.base.out_features
    target = tiny.numbers(n_out, n_in, key=9)
    lr = 1e-3
    groups = [
        {"params": [p], "lr": lr * (lr_A if n.startswith("A") else lr_B)}
        for n, p in delta.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0) if adam else torch.optim.SGD(groups)
    model.train()
    for step in range(count):
        x = tiny.numbers(16, n_in, key=step)
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("adam", [True, False], ids=["adamw", "sgd"])
@pytest.mark.parametrize("start", ["pissa", "random"])
def test_full_is_one_lora_with_two_learning_rates(adam: bool, start: str) -> None:
    """200 steps in fp64: CoLA(M, N) is the control arm with lr_A = M lr, lr_B = N lr."""
    options = {"init_weights": start == "pissa", "strategy": "full", "r": 2}
    model, delta = layer(num_A=2, num_B=3, **options)
    control, single = layer(num_A=1, num_B=1, **options)
    if start == "random":
        with torch.no_grad():
            single.A.copy_(delta.A.sum(0, keepdim=True))
            single.B.copy_(delta.B.sum(0, keepdim=True))
    fresh = delta.A.detach().clone()
    fit(model, delta, adam=adam, count=200)
    fit(control, single, adam=adam, count=200, lr_A=2, lr_B=3)
    assert relative(delta.weight(), single.weight()) < 1e-10
    if start == "pissa":
        assert torch.equal(delta.A[0], delta.A[1])
        assert torch.equal(delta.B[0], delta.B[2])
    moved = delta.A - fresh  # from any start the copies move alike
    assert relative(moved[0], moved[1]) < 1e-10
    assert float(moved.detach().abs().max()) > 1e-3


def test_heuristic_is_one_lora_of_rank_m_r() -> None:
    """Its blocks of B train with the group's size times the learning rate."""
    model, delta = layer(strategy="heuristic", num_A=2, num_B=3, r=2)
    control, single = layer(num_A=2, num_B=2, strategy="heuristic", r=2, init="pissa_split")
    sizes = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        single.A.copy_(delta.A)
        single.B.copy_(torch.stack([delta.B[0], delta.B[1] + delta.B[2]]))
        for buffer in ("A0", "B0"):
            getattr(single, buffer).zero_()
    target = tiny.numbers(6, 8, key=9)
    for step in range(100):
        x = tiny.numbers(16, 8, key=step)
        for net, d, scale in ((model, delta, None), (control, single, sizes)):
            (net(x) - x @ target.T).square().mean().backward()
            with torch.no_grad():
                for p in d.parameters():
                    factor = scale.view(-1, 1, 1) if scale is not None and p is d.B else 1.0
                    p -= 1e-3 * factor * p.grad
                    p.grad = None
    assert relative(delta.weight(), single.weight()) < 1e-10


@pytest.mark.parametrize(("init", "blocks"), [("pissa", 2), ("pissa_split", 3), ("kaiming", 3)])
def test_groups_of_equal_size_never_separate(init: str, blocks: int) -> None:
    """(3, 5): sizes 1, 1, 3. From "pissa" the product has rank 2 r, else 3 r."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if init != "pissa" else "ignore", plait.PlaitWarning)
        options = {"num_A": 3, "num_B": 5, "r": 2, "strategy": "heuristic", "init": init}
        model, delta = layer(40, 30, init_weights=True, **options)
    fit(model, delta, adam=False, count=30)
    groups = torch.stack([delta.B[0], delta.B[1], delta.B[2:].sum(0)])
    S = torch.linalg.svdvals(sum(b @ a for b, a in zip(groups, delta.A, strict=True)))  # type: ignore[arg-type]
    assert int((1e-7 * S[0] < S).sum()) == blocks * 2
    assert torch.equal(delta.B[2], delta.B[3])  # inside a group always


def test_adam_hardly_separates_groups_of_other_sizes() -> None:
    """The size scales a gradient, and Adam does not see the scale: only its epsilon tells."""
    model, delta = layer(40, 30, init_weights=True, strategy="heuristic")
    fit(model, delta, adam=True, count=30)
    assert relative(delta.A[0], delta.A[1]) < 1e-5
    model, delta = layer(40, 30, init_weights=True, strategy="heuristic")
    fit(model, delta, adam=False, count=30)
    assert relative(delta.A[0], delta.A[1]) > 1e-5


def test_equal_groups_are_warned() -> None:
    with pytest.warns(plait.PlaitWarning, match=r"\[1, 1\].*rank 1 r, not 2 r.*pissa_split"):
        plait.ColaConfig(num_A=2, num_B=2, strategy="heuristic")


# Draws -----------------------------------------------------------------------------------------


def test_draws_are_pinned() -> None:
    """Keyed by seed, step and layer name: the same in every process, rank and resumed run."""
    _, delta = layer(strategy="random", num_A=4, num_B=3)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.0)
    found = []
    for _ in range(4):
        found.append(delta.draw.tolist())
        for p in delta.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    # torch.randint(3, (4,)) by a CPU generator of seed crc32("0/t/linear"), t = 0, 1, 2, 3
    assert found == [[0, 1, 1, 1], [2, 0, 1, 0], [2, 1, 0, 0], [0, 2, 1, 0]]
    _, other = layer(strategy="random", num_A=4, num_B=3, seed=1)
    assert other.draw.tolist() == [0, 2, 0, 0]


def test_one_draw_for_all_micro_batches_and_another_after_the_step() -> None:
    model = helpers.wrap(CASE, strategy="random", init_weights=False).train()
    optimizer = torch.optim.SGD(helpers.trained(model).values(), lr=0.0)
    outputs = []
    for _ in range(3):
        draws = [d.draw.clone() for d in deltas(model)]
        for _ in range(4):
            outputs.append(logits(model))
            assert all(torch.equal(d.draw, e) for d, e in zip(deltas(model), draws, strict=True))
        model(**helpers.batch(model)).loss.backward()
        optimizer.step()
        assert any(not torch.equal(d.draw, e) for d, e in zip(deltas(model), draws, strict=True))
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[3], outputs[4])
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("strategy", ["random", "random_b"])
def test_draws_are_uniform(strategy: str) -> None:
    """Chi-square over 6000 steps; the mean update over them is the evaluation's."""
    _, delta = layer(3, 2, r=1, strategy=strategy, num_A=2, num_B=3)
    options = 3 if strategy == "random" else 2
    draws, total, count = [], torch.zeros(3, 2, dtype=torch.float64), 6000
    for t in range(count):
        delta.t.fill_(t)
        delta.after_step()
        draws.append(delta.draw)
        if strategy == "random":
            total[delta.draw, torch.arange(2)] += 1
        else:
            total[torch.arange(3), delta.draw] += 1
    table = torch.stack(draws)
    for column in table.T:
        seen = torch.bincount(column, minlength=options).double()
        expected = count / options
        chi = float(((seen - expected) ** 2 / expected).sum())
        assert chi < 13.8  # 2 degrees of freedom, p = 0.001
    joint = torch.bincount(table[:, 0] * options + table[:, 1], minlength=options**2).double()
    expected = count / options**2
    assert float(((joint - expected) ** 2 / expected).sum()) < 26.1  # independent: 8 degrees
    mean = sum(total[j, i] / count * delta.B[j] @ delta.A[i] for j in range(3) for i in range(2))
    assert relative(delta.scaling * mean, delta.weight()) < 0.05


def test_undrawn_slices_have_gradient_zero() -> None:
    model, delta = layer(strategy="random", num_A=1, num_B=3)
    model(tiny.numbers(4, 8)).sum().backward()
    drawn = int(delta.draw[0])
    for j in range(3):
        assert bool(delta.B.grad[j].any()) == (j == drawn)


# Relatives -------------------------------------------------------------------------------------


def test_one_of_each_is_pissa() -> None:
    """M = N = 1 trains like upstream's PiSSA."""
    ours = get_peft_model(
        tiny.OneLinear(30, 20, torch.float32),  # type: ignore[arg-type]
        plait.ColaConfig(
            r=2, lora_alpha=2, num_A=1, num_B=1, svd="exact", target_modules=["linear"]
        ),
    )
    theirs = get_peft_model(
        tiny.OneLinear(30, 20, torch.float32),  # type: ignore[arg-type]
        LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["linear"]),
    )
    target = tiny.numbers(20, 30, key=9, dtype=torch.float32)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(helpers.trained(model).values(), lr=1e-2)
        for step in range(5):
            x = tiny.numbers(8, 30, key=step, dtype=torch.float32)
            (model(x) - x @ target.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    x = tiny.numbers(8, 30, dtype=torch.float32)
    assert float((ours(x) - theirs(x)).detach().abs().max()) < 1e-6 * float(x.abs().max()) * 5


def test_two_adapters_of_different_strategies() -> None:
    model = helpers.wrap(CASE, strategy="random", init_weights=False)
    first = logits(model)
    options = {"strategy": "heuristic", "num_A": 3, "num_B": 4, "init": "pissa_split"}
    model.add_adapter("other", CASE.config(**options, init_weights=False))
    model.set_adapter("other")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "heuristic", "num_A": 3, "num_B": 2}, "num_B = 2: heuristic needs num_A = 3"),
        ({"init": "pissa_split"}, 'init="pissa_split" needs "heuristic", not "full"'),
        ({"init": "pissa_split", "strategy": "random"}, 'needs "heuristic", not "random"'),
        ({"strategy": "all"}, "strategy = 'all' is not known"),
        ({"num_A": 0}, "num_A = 0 is out of range"),
    ],
)
def test_refused_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.ColaConfig(**options)
