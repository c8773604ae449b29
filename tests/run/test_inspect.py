"""Inspection: every number against its definition, and runs of every kind from end to end."""

import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn

from plait.core.bridge import PlaitLayer
from plait.inspect.direction import alignment, principal
from plait.inspect.routing import Load, entropy
from plait.inspect.similarity import basis, chance, cosine, overlap, principal_angles
from plait.inspect.spectrum import effective_rank, numerical_rank, stable_rank
from plait.inspect.update import Update
from plait.run.data import load_data
from plait.run.inspect import findings
from plait.run.inspect.adapted import Adapted, FullAdapted, adapted_layers, place
from plait.run.inspect.findings import InspectReport, LayerReport, UpdateReport, short_names
from plait.run.inspect.pictures import draw
from plait.run.inspect.runs import inspect_runs
from plait.run.prepare import load_run
from plait.run.train import train
from plait.testing import helpers, tiny
from plait.testing.case import Case
from plait.testing.tiny import numbers
from plait_cli import main
from tests.support import ROOT
from tests.support.runs import copy_rows, film_rows, run_config, save_model, write_rows

sizes = st.integers(1, 6)


def spans(n: int, k: int, key: int) -> Tensor:
    return numbers(n, k, key=key)


# ---------------------------------------------------------------------------------- similarities


@pytest.mark.parametrize("small", [1e-12, 1e-9, 0.3])
def test_principal_angles_of_known_planes(small: float) -> None:
    # Planes that share no axis but are turned by two known angles, one far below 1e-8.
    large = 1.2
    e = torch.eye(6, dtype=torch.float64)
    x = torch.stack([e[0], e[1]], 1)
    y = torch.stack(
        [
            math.cos(large) * e[0] + math.sin(large) * e[2],
            math.cos(small) * e[1] + math.sin(small) * e[3],
        ],
        1,
    )
    turn = torch.linalg.qr(numbers(6, 6)).Q
    found = principal_angles(turn @ x, turn @ y)
    assert found.tolist() == pytest.approx([small, large], rel=1e-3, abs=1e-15)
    assert overlap(found) == pytest.approx((math.cos(small) ** 2 + math.cos(large) ** 2) / 2)


def test_principal_angles_of_equal_orthogonal_and_nested_spaces() -> None:
    x = spans(7, 3, 0)
    assert principal_angles(x, x).max() < 1e-14
    assert principal_angles(x, x[:, 1:] * 5).max() < 1e-14  # a line inside a plane: angle 0
    e = torch.eye(7, dtype=torch.float64)
    apart = principal_angles(e[:, :3], e[:, 3:])
    assert apart.tolist() == [math.pi / 2] * 3
    assert overlap(apart) == pytest.approx(0, abs=1e-30)


def test_principal_angles_of_zero_and_of_dependent_columns() -> None:
    x = spans(5, 2, 0)
    assert principal_angles(x, torch.zeros(5, 2, dtype=torch.float64)).tolist() == []
    assert overlap(torch.zeros(0)) is None
    twice = torch.cat([x, x[:, :1] * 2], dim=1)  # three columns that span a plane
    assert basis(twice).shape == (5, 2)
    assert principal_angles(twice, spans(5, 4, 1)).shape == (2,)


@settings(max_examples=40)
@given(n=st.integers(1, 8), k=sizes, m=sizes, key=st.integers(0, 999))
def test_principal_angles_equal_scipy_and_know_no_basis(n: int, k: int, m: int, key: int) -> None:
    from scipy.linalg import subspace_angles

    x, y = spans(n, min(k, n), key), spans(n, min(m, n), key + 1)
    found = principal_angles(x, y)
    wanted = torch.from_numpy(subspace_angles(x.numpy(), y.numpy())).flip(0)
    assert torch.allclose(found, wanted, atol=1e-7)  # scipy's angles near 0: the root of eps
    assert torch.allclose(found, principal_angles(y, x), atol=1e-9)
    share = overlap(found)
    naive = float(torch.linalg.norm(basis(x).T @ basis(y)) ** 2) / len(found)
    assert share == pytest.approx(naive, abs=1e-9)
    # B R^-1 and R A span what B and A span.
    R = torch.linalg.qr(numbers(x.shape[1], x.shape[1], key=key + 2)).Q
    R = R * torch.linspace(1, 30, len(R), dtype=torch.float64)
    assert torch.allclose(principal_angles(x @ R, y), found, atol=1e-7)


def test_chance_is_the_mean_overlap_of_random_spaces() -> None:
    pairs = [(spans(12, 3, 2 * i), spans(12, 5, 2 * i + 1)) for i in range(400)]
    shares = [overlap(principal_angles(x, y)) or 0.0 for x, y in pairs]
    error = np.std(shares) / math.sqrt(len(shares))
    assert chance(*pairs[0]) == 5 / 12
    assert abs(np.mean(shares) - 5 / 12) < 4 * error


def test_cosine_equals_a_loop() -> None:
    x, y = numbers(3, 4), numbers(3, 4, key=1)
    inner = left = right = 0.0
    for i in range(3):
        for j in range(4):
            inner += float(x[i, j] * y[i, j])
            left += float(x[i, j] ** 2)
            right += float(y[i, j] ** 2)
    assert cosine(x, y) == pytest.approx(inner / math.sqrt(left * right), rel=1e-12)
    assert cosine(x, -3 * x) == pytest.approx(-1)
    assert cosine(x, torch.zeros_like(x)) is None
    assert cosine(x, y[:2]) is None


# --------------------------------------------------------------------------------------- updates


@settings(max_examples=40)
@given(out=sizes, width=sizes, k=st.integers(0, 8), m=sizes, key=st.integers(0, 99))
def test_a_product_is_its_dense_matrix(out: int, width: int, k: int, m: int, key: int) -> None:
    low = Update(numbers(out, k, key=key), numbers(k, width, key=key + 1))
    other = Update(numbers(out, m, key=key + 2), numbers(m, width, key=key + 3))
    assert low.A is not None
    assert other.A is not None
    dense, dense_other = Update(low.B @ low.A), Update(other.B @ other.A)
    U, V = numbers(out, 2, key=key + 4), numbers(width, 2, key=key + 5)
    assert torch.allclose(low.left(U), U.T @ dense.B)
    assert torch.allclose(dense.left(U), U.T @ dense.B)
    assert torch.allclose(low.right(V), dense.B @ V)
    wanted = float((dense.B * dense_other.B).sum())
    for a, b in ((low, other), (low, dense_other), (dense, other), (dense, dense_other)):
        assert a.inner(b) == pytest.approx(wanted, abs=1e-10)
    s = low.singular_values()
    assert len(s) == min(k, out, width)
    full = torch.linalg.svdvals(dense.B)
    assert torch.allclose(s, full[: len(s)], atol=1e-10)
    assert full[len(s) :].sum() < 1e-10
    assert low.untouched() is None


def test_ranks_of_known_spectra() -> None:
    equal = torch.full((5,), 3.0, dtype=torch.float64)
    assert stable_rank(equal) == pytest.approx(5)
    assert effective_rank(equal) == pytest.approx(5)
    assert numerical_rank(equal, (9, 5)) == 5
    one = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    assert (stable_rank(one), effective_rank(one), numerical_rank(one, (3, 3))) == (1, 1, 1)
    s = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert stable_rank(s) == pytest.approx((16 + 4 + 1 + 1) / 16)
    # p = 1/2, 1/4, 1/8, 1/8: H = 1.75 ln 2
    assert effective_rank(s) == pytest.approx(2**1.75)
    for none in (torch.zeros(3), torch.zeros(0)):
        assert (stable_rank(none), effective_rank(none), numerical_rank(none, (3, 3))) == (0, 0, 0)
    # The threshold: max(out, in) 2^-23 of the largest.
    s = torch.tensor([1.0, 1.01 * 100 * 2**-23, 0.99 * 100 * 2**-23], dtype=torch.float64)
    assert numerical_rank(s, (7, 100)) == 2


@settings(max_examples=30)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(1e-3, 1e3))
def test_ranks_do_not_know_the_scale_and_keep_their_order(values: list[float], c: float) -> None:
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for rank in (stable_rank, effective_rank):
        assert rank(s * c) == pytest.approx(rank(s), rel=1e-9)
        assert 1 - 1e-9 <= rank(s) <= len(s) + 1e-9
    assert stable_rank(s) <= numerical_rank(s, (1, 1)) + 1e-9


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_principal_is_the_svd(shape: tuple[int, int]) -> None:
    W = numbers(*shape)
    U, w, V = principal(W, 3)
    full = torch.linalg.svd(W)
    best = full.U[:, :3] @ torch.diag(full.S[:3]) @ full.Vh[:3]
    assert torch.allclose(w, full.S[:3])
    assert torch.allclose(U * w @ V.T, best, atol=1e-10)
    assert torch.allclose(V.T @ V, torch.eye(3, dtype=torch.float64), atol=1e-10)


def test_alignment_of_known_updates() -> None:
    W = numbers(6, 9)
    parts = U, w, V = principal(W, 2)
    for factor in (0.1, -2.0):  # along W's principal part, or against it
        found = alignment(Update(factor * (U * w) @ V.T), parts)
        assert (found.left, found.right) == (pytest.approx(1), pytest.approx(1))
        assert found.cosine == pytest.approx(math.copysign(1, factor))
    rest = W - (U * w) @ V.T  # what is left of W lies outside
    found = alignment(Update(rest), parts)
    assert (found.left, found.right) == (pytest.approx(0, abs=1e-20), pytest.approx(0, abs=1e-20))
    assert found.cosine == pytest.approx(0, abs=1e-12)
    mixed = Update(U[:, :1] @ numbers(1, 9))  # writes into W's first direction, reads anything
    found = alignment(mixed, parts)
    assert found.left == pytest.approx(1)
    dW = mixed.B
    share = sum(float((dW @ v).square().sum()) for v in V.T) / float(dW.square().sum())
    assert found.right == pytest.approx(share)
    best = (U * w) @ V.T
    naive = (dW * best).sum() / torch.linalg.norm(dW) / torch.linalg.norm(best)
    assert found.cosine == pytest.approx(float(naive))
    zero = alignment(Update(torch.zeros(6, 9, dtype=torch.float64)), parts)
    assert dataclasses.astuple(zero) == (None, None, None)


# --------------------------------------------------------------------------------------- routers


def test_entropy_of_known_routers() -> None:
    assert entropy(torch.full((7,), 1 / 7, dtype=torch.float64)) == pytest.approx(math.log(7))
    assert entropy(torch.tensor([0.0, 1.0, 0.0])) == 0
    uniform = Load(4)
    uniform.add(torch.full((10, 4), 0.25))
    assert uniform.entropy == pytest.approx(math.log(4))
    assert uniform.load_entropy == pytest.approx(math.log(4))
    decided = Load(4)  # each token sure, the load even
    decided.add(torch.eye(4))
    assert (decided.entropy, decided.tokens) == (0, 4)
    assert decided.load.tolist() == decided.first.tolist() == [0.25] * 4
    assert decided.load_entropy == pytest.approx(math.log(4))


@settings(max_examples=30)
@given(n=st.integers(1, 5), tokens=st.integers(1, 9), cut=st.integers(0, 9), key=st.integers(0, 99))
def test_load_equals_a_loop_in_any_batches(n: int, tokens: int, cut: int, key: int) -> None:
    w = numbers(tokens, n, key=key).softmax(-1)
    load = Load(n)
    for part in (w[:cut], w[cut:]):
        load.add(part)
    sums, first, total = [0.0] * n, [0] * n, 0.0
    for row in w.tolist():
        for i, value in enumerate(row):
            sums[i] += value
            total -= value * math.log(value)
        first[row.index(max(row))] += 1
    assert load.load.tolist() == pytest.approx([x / tokens for x in sums])
    assert load.first.tolist() == pytest.approx([x / tokens for x in first])
    assert load.entropy == pytest.approx(total / tokens)
    assert load.load.sum() == pytest.approx(1)
    assert load.entropy <= load.load_entropy + 1e-12 <= math.log(n) + 1e-9


# ----------------------------------------------------------------------------------------- views

PLAIT = [
    Case("dual_lora"),
    Case("dual_module", {"r": 6}),
    Case("cola", {"strategy": "heuristic"}),
    Case("sora"),
    Case("alloc"),
    Case("nola", {"num_basis_A": 4, "num_basis_B": 4}),
    Case("tied"),
]
ROUTED = [
    Case("shared_b"),
    Case("shared_b", {"gates": ["sora"]}),
    Case("hydra"),
    Case("hydra", {"init": "pissa"}),
    Case("molora"),
    Case("molora", {"init": "pissa", "top_k": 2}),
]
UPSTREAM = {
    "lora": LoraConfig(r=3, init_lora_weights=False),
    "rslora": LoraConfig(r=3, init_lora_weights=False, use_rslora=True),
    "dora": LoraConfig(r=3, init_lora_weights=False, use_dora=True),
    "adalora": AdaLoraConfig(r=3, init_r=3, total_step=10, init_lora_weights=False),
    "vera": VeraConfig(r=3, init_weights=False),
    "vblora": VBLoRAConfig(r=3, num_vectors=8, vector_length=4, topk=2),
    "unilora": UniLoraConfig(r=3, theta_d_length=50),
}


def randomized(model: nn.Module) -> nn.Module:
    """Trained tensors away from their start."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in helpers.trained(model).values():
            p.add_(torch.randn(p.shape, generator=gen) * 0.1)
    return model.eval()


def check_view(view: Adapted, layer: Any) -> None:
    """x dW^T is what the layer adds to its base layer, and dW has its attainable rank."""
    (dW, rank), *more = view.updates().values()
    assert not more
    x = numbers(5, layer.in_features, dtype=torch.float32)
    with torch.no_grad():
        added = layer(x) - layer.get_base_layer()(x)
    assert torch.allclose(dW.right(x.double().T).T.float(), added, atol=2e-5)
    W = view.weight()
    assert W.shape == (layer.out_features, layer.in_features)
    bias = layer.get_base_layer().bias
    plain = layer.get_base_layer()(x) - (0 if bias is None else bias)
    assert torch.allclose(x @ W.float().T, plain, atol=1e-5)
    s = dW.singular_values()
    assert numerical_rank(s, tuple(W.shape)) <= rank <= min(W.shape)
    for name, factor in view.factors().items():
        assert factor.shape[-1 if name[0] in "AC" else -2] == W.shape[1 if name[0] in "AC" else 0]


@pytest.mark.parametrize("case", PLAIT, ids=str)
def test_update_of_a_method_is_what_the_layer_adds(case: Case) -> None:
    model = helpers.wrap(case, init_weights=False)
    views = adapted_layers(model)
    layers = helpers.layers(model)
    assert [v.name for v in views] == [layer.name for layer in layers]
    for view, layer in zip(views[:3], layers, strict=False):
        check_view(view, layer)


@pytest.mark.parametrize("key", UPSTREAM)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_update_of_upstream_is_what_the_layer_adds(key: str, base: str) -> None:
    config = dataclasses.replace(UPSTREAM[key])
    config.target_modules = ["q_proj", "up_proj"] if base == "llama" else ["c_attn"]
    if base == "gpt2":
        config.fan_in_fan_out = True  # type: ignore[attr-defined]
    model = randomized(get_peft_model(vars(tiny)[base](), config))
    views = {view.name: view for view in adapted_layers(model)}
    assert len(views) == (4 if base == "llama" else 2)
    inner: Any = model.get_base_model()
    for name in list(views)[:2]:
        check_view(views[name], inner.get_submodule(name))


@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_experts_weighted_by_the_router_are_what_the_layer_adds(case: Case) -> None:
    model = helpers.wrap(case, init_weights=False)
    view, layer = adapted_layers(model)[0], helpers.layers(model)[0]
    found = view.router()
    assert found is not None
    assert view.kind == "experts"
    x = numbers(5, layer.in_features, dtype=torch.float32)
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
        w = found[1].weights(x)  # (tokens, n)
    assert torch.allclose(w.sum(-1), torch.ones(5))
    for t in range(5):
        total = torch.zeros(layer.out_features, dtype=torch.float64)
        for weight, (dW, _) in zip(w[t], view.updates().values(), strict=True):
            total += weight.double() * dW.right(x[t, :, None].double())[:, 0]
        assert torch.allclose(total.float(), added[t], atol=1e-5)


def test_tasks_have_an_update_each() -> None:
    case = Case("shared_b", {"routing": "task", "tasks": ["law", "code"]})
    view = adapted_layers(helpers.wrap(case, init_weights=False))[0]
    assert view.kind == "tasks"
    assert list(view.factors()) == ["A[law]", "A[code]", "B"]
    s = 2.0  # lora_alpha / r
    for task, (dW, rank) in view.updates().items():
        A, B = view.factors()[f"A[{task}]"], view.factors()["B"]
        assert torch.allclose(dW.right(torch.eye(A.shape[1]).double()), s * B @ A)
        assert rank == 4


def test_factors_that_are_not_trained_are_those_that_follow() -> None:
    view = adapted_layers(helpers.wrap(PLAIT[5], init_weights=False))[0]  # nola trains coefficients
    assert {name: tuple(f.shape) for name, f in view.factors().items()} == {
        "A": (4, 24), "B": (24, 4),
    }  # fmt: skip


def test_untouched_share_of_a_hand_made_dual_lora() -> None:
    model, layer = helpers.one_layer(Case("dual_lora"), 7, 5)
    delta: Any = layer.plait_delta["default"]
    with torch.no_grad():
        delta.A.copy_(numbers(*delta.A.shape, key=3))
        delta.B.copy_(numbers(*delta.B.shape, key=4))
    zeros = 0
    for i in range(5):
        for j in range(7):
            zeros += sum((delta.B[i, k] * delta.A[k, j]).item() for k in range(len(delta.A))) <= 0
    assert 0 < zeros < 35
    (dW, rank) = adapted_layers(model)[0].updates()["dW"]
    assert dW.untouched() == pytest.approx(zeros / 35)
    assert rank == 5


def test_gates() -> None:
    model = helpers.wrap(Case("dual_module", {"r": 6, "shared_r": 2}))
    delta = helpers.deltas(model)[0]
    with torch.no_grad():
        delta.E.copy_(torch.tensor([0.5, 0.0, -1.0, 2.0]))
        delta.keep.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert adapted_layers(model)[0].gate().tolist() == [0.5, 0, -1, 0]  # type: ignore[union-attr]
    assert adapted_layers(helpers.wrap(Case("cola")))[0].gate() is None
    assert adapted_layers(helpers.wrap(Case("dual_lora")))[0].gate() is None
    alloc = adapted_layers(helpers.wrap(Case("alloc")))[0].gate()
    assert alloc is not None
    assert alloc.tolist() == [1] * 4 + [0] * 4
    adalora = get_peft_model(
        tiny.llama(),
        AdaLoraConfig(r=3, init_r=3, total_step=10, target_modules=["q_proj"]),  # type: ignore[arg-type]
    )
    layer: Any = adalora.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_E["default"].copy_(torch.tensor([[1.0], [0.0], [3.0]]))
    assert adapted_layers(adalora)[0].gate().tolist() == [1, 0, 3]  # type: ignore[union-attr]


def test_dequantised_weight_and_update_on_a_4_bit_layer(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra plait[quant] is not installed")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    tiny.llama().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    plain = tiny.llama().get_submodule("model.layers.0.self_attn.q_proj").weight
    for config in (
        Case("dual_lora").config(init_weights=False),
        LoraConfig(target_modules=["q_proj"]),
    ):
        model = get_peft_model(base, config)
        view = adapted_layers(model)[0]
        gap = torch.linalg.norm(view.weight() - plain) / torch.linalg.norm(plain)
        assert 0 < gap < 0.2
        assert view.weight().dtype == torch.float64
        assert view.updates()["dW"][0].singular_values().shape[0] in (8, 24)
        base = model.unload()


def test_full_training_is_the_difference_of_the_weights() -> None:
    base, trained = tiny.gpt2(), tiny.gpt2()
    layer: Any = trained.transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.weight[3, 5] += 2  # stored (in, out)
    view = adapted_layers(trained, base)[0]
    assert isinstance(view, FullAdapted)
    dW, rank = view.updates()["dW"]
    assert rank == 24
    assert dW.B[5, 3] == pytest.approx(2, abs=1e-6)
    assert dW.untouched() == pytest.approx(1 - 1 / dW.B.numel())
    assert numerical_rank(dW.singular_values(), tuple(dW.B.shape)) == 1


def test_place_and_short_names() -> None:
    assert place("model.layers.13.mlp.up_proj") == (13, "model.layers.*.mlp.up_proj")
    assert place("h.2.experts.7.w1") == (2, "h.*.experts.*.w1")
    assert place("linear") == (None, "linear")
    names = ["model.layers.*.mlp.up_proj", "model.layers.*.attn.q_proj"]
    assert list(short_names(names).values()) == ["mlp.up_proj", "attn.q_proj"]
    assert short_names(["linear"]) == {"linear": "linear"}
    assert short_names(["a.*.b", "c"]) == {"a.*.b": "a.*.b", "c": "c"}


# ------------------------------------------------------------------------------------- whole runs

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4},
    "dual_lora": {"name": "dual_lora", "r": 4, "gate_steps": 2},
    "token": {"name": "shared_b", "r": 4},
    "task": {"name": "shared_b", "r": 4, "routing": "task"},
    "dual_module": {"name": "dual_module", "r": 6, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "cola": {"name": "cola", "r": 4},
    "full": {"name": "full"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows(tasks=True))


def quick(base: Path, rows: Path, run: Path, method: dict[str, Any], **sections: Any) -> Path:
    """A run of 3 steps."""
    method = method if method["name"] == "full" else {"target_modules": "all-linear", **method}
    sections.setdefault("training", {"max_steps": 3})
    sections.setdefault("evaluation", {"generate": False})
    return train(run_config(base, rows, run, method=method, **sections)).path


@pytest.fixture(scope="module")
def runs(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained runs by name; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("runs")
    return {n: quick(llama, rows, folder / n, method) for n, method in METHODS.items()}


def finite(value: Any) -> bool:
    """Whether all numbers of a JSON value are finite."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


PICTURES = {
    "lora": {"norm", "spectrum"},
    "dual_lora": {"norm", "spectrum", "untouched"},
    "token": {"norm", "spectrum", "similarity_A", "similarity_dW", "routing"},
    "task": {"norm", "spectrum", "similarity_A", "similarity_dW"},
    "dual_module": {"norm", "spectrum", "similarity_A", "similarity_B", "gates"},
    "cola": {"norm", "spectrum", "similarity_A", "similarity_B"},
    "full": {"norm", "spectrum", "untouched"},
}


@pytest.mark.parametrize("name", METHODS)
def test_inspect_verb(
    name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["inspect", str(runs[name]), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    report = json.loads((out / "inspect.json").read_text())
    assert finite(report)
    assert list(report) == [f.name for f in dataclasses.fields(InspectReport)]
    assert (report["format"], report["principal"]) == (1, 8)
    (run,) = report["runs"]
    assert (run["label"], run["layers"], len(report["layers"])) == (name, 14, 14)
    drawn = {f"{p}.{kind}" for p in PICTURES[name] for kind in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == {"inspect.json", *drawn}
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5  # not blank
    for layer in report["layers"]:
        for u in layer["updates"]:
            assert u["numerical_rank"] <= u["rank"]
            assert u["norm"] == pytest.approx(math.sqrt(sum(s * s for s in u["spectrum"])), 1e-4)
            assert u["relative"] == pytest.approx(u["norm"] / layer["weight_norm"], 1e-4)
    # The tables show numbers of the report.
    for m in report["modules"]:
        assert m["layers"] == 2
        mine = [r for r in report["layers"] if r["module"] == m["module"]]
        norms = [u["norm"] for r in mine for u in r["updates"]]
        assert m["norm"] == pytest.approx(sum(norms) / len(norms), 1e-4)
        short = m["module"].removeprefix("model.layers.*.")
        assert re.search(rf"^{re.escape(short)} +2 +{m['norm']:.3g} ", text, re.MULTILINE)
    for s in report["similarity"]:
        assert f"{s['a']}, {s['b']}" in text
    if name == "token":
        assert "updates depend on the token; the numbers are of the experts' parts" in text
        assert "routing measured on 8 of 8 validation rows" in text


def test_numbers_of_one_layer_against_the_definitions(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    _, report = inspect_runs([runs["cola"]], tmp_path / "out", principal_k=3, pictures=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["inspect.json"]
    model = load_run(runs["cola"]).model
    layer = next(m for m in model.modules() if isinstance(m, PlaitLayer))
    found = next(r for r in report.layers if r.name == layer.name)
    (u,) = found.updates
    W, dW = layer.base_weight().double(), layer.get_delta_weight("default").double()
    U, w, Vh = torch.linalg.svd(W)
    s = torch.linalg.svdvals(dW)
    p = s[:8] / s[:8].sum()
    best = U[:, :3] @ torch.diag(w[:3]) @ Vh[:3]
    assert (u.rank, found.shape, found.block) == (8, (24, 24), 0)
    assert u.norm == pytest.approx(float(torch.linalg.norm(dW)), rel=1e-5)
    assert u.relative == pytest.approx(
        float(torch.linalg.norm(dW) / torch.linalg.norm(W)), rel=1e-5
    )
    assert u.stable_rank == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-5)
    assert u.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-3)
    assert u.left == pytest.approx(
        float((U[:, :3].T @ dW).square().sum() / (dW**2).sum()), rel=1e-4
    )
    assert u.right == pytest.approx(float((dW @ Vh[:3].T).square().sum() / (dW**2).sum()), rel=1e-4)
    along = (dW * best).sum() / torch.linalg.norm(dW) / torch.linalg.norm(best)
    assert u.cosine == pytest.approx(float(along), rel=1e-3, abs=1e-6)
    delta: Any = layer.plait_delta["default"]
    pair = next(p for p in report.pairs if p.layer == layer.name and p.kind == "B")
    a, b = delta.B[0].double(), delta.B[1].double()
    assert (pair.a, pair.b) == ("B[1]", "B[2]")
    assert pair.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-9)


def test_routing_leaves_padding_out(runs: dict[str, Path], tmp_path: Path) -> None:
    _, report = inspect_runs([runs["token"]], tmp_path / "out", pictures=False)
    run = load_run(runs["token"])
    model, data = run.model, load_data(run.cfg, run.tokenizer)
    assert data.validation is not None
    ids = data.validation["input_ids"]
    lengths = {len(row) for row in ids}
    layer: Any = [m for m in model.modules() if isinstance(m, PlaitLayer)][3]
    delta = layer.plait_delta["default"]
    inputs: list[Tensor] = []
    delta.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    weights: dict[str, list[Tensor]] = {"copy": [], "turn": []}
    with torch.no_grad():
        for row, task in zip(ids, data.validation["task"], strict=True):  # alone: no padding
            model(input_ids=torch.tensor([row]))
            weights[task].append((inputs.pop()[0].double() @ delta.G.T.double()).softmax(-1))
    found = next(r.routing for r in report.layers if r.name == layer.name)
    assert found is not None
    every = torch.cat(weights["copy"] + weights["turn"])
    assert found.tokens == len(every) == sum(map(len, ids))
    assert found.load == pytest.approx(every.mean(0).tolist(), abs=1e-5)
    assert sum(v or 0 for v in found.load) == pytest.approx(1)
    assert found.entropy == pytest.approx(float(-(every * every.log()).sum(-1).mean()), abs=1e-5)
    for task, parts in weights.items():
        assert found.tasks[task].load == pytest.approx(torch.cat(parts).mean(0).tolist(), abs=1e-5)
    assert sum(t.tokens for t in found.tasks.values()) == found.tokens
    assert lengths  # all rows are of known length
    whole = [load for load in report.loads if load.task is None]
    assert [load.layers for load in whole] == [14]


def test_rows_of_unequal_length_are_padded_and_not_counted(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    more = [{"prompt": "a>", "completion": "a" * n, "task": "copy"} for n in (1, 9, 4)]
    test = write_rows(tmp_path / "test.jsonl", more)
    _, report = inspect_runs(
        [runs["token"]], tmp_path / "out", pictures=False, overrides=[f"data.test={test}"]
    )
    run = load_run(runs["token"], [f"data.test={test}"])
    data = load_data(run.cfg, run.tokenizer)
    assert data.test is not None
    tokens = [len(ids) for ids in data.test["input_ids"]]
    assert len(set(tokens)) == 3
    assert {r.routing.tokens for r in report.layers if r.routing} == {sum(tokens)}
    assert "routing measured on 3 of 3 test rows" in report.runs[0].notes
    _, fewer = inspect_runs(
        [runs["token"]], tmp_path / "two", pictures=False, rows=2, overrides=[f"data.test={test}"]
    )
    assert {r.routing.tokens for r in fewer.layers if r.routing} == {sum(tokens[:2])}


def test_routing_says_why_it_is_left_out(
    llama: Path, rows: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = quick(llama, rows, tmp_path / "run", METHODS["token"], data={"validation": None})
    _, report = inspect_runs([run], pictures=False)
    assert (run / "inspect" / "inspect.json").is_file()
    assert report.runs[0].notes == [
        "routing left out: data.validation and data.test are not set. Give rows: plait inspect "
        f"{run} data.test=FILE"
    ]
    assert not report.loads
    _, report = inspect_runs([runs["token"]], tmp_path / "out", rows=0, pictures=False)
    assert report.runs[0].notes == ["routing left out: --rows 0"]


def test_encoder_with_a_pooler_and_a_head(tmp_path: Path) -> None:
    base = save_model("bert", tmp_path / "bert")
    rows = write_rows(tmp_path / "rows.jsonl", film_rows())
    run = quick(
        base, rows, tmp_path / "run", METHODS["token"], model={"task": "classification"},
        evaluation={},
    )  # fmt: skip
    _, report = inspect_runs([run], pictures=False)
    notes = report.runs[0].notes
    assert notes[0].startswith("trained whole and not inspected: ")
    assert "classifier" in notes[0]
    tokens = {r.module: r.routing.tokens for r in report.layers if r.routing}
    pooled = tokens.pop("bert.pooler.dense")
    assert pooled == 6  # a row each
    assert set(tokens.values()) == {6 * 3}


def test_several_runs_are_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    names = ("lora", "dual_lora", "full", "task")
    _, report = inspect_runs([runs[n] for n in names], tmp_path / "out")
    assert [r.label for r in report.runs] == list(names)
    assert report.notes == []
    layer = report.layers[0].name
    models = {n: load_run(runs[n]).model for n in ("lora", "dual_lora", "full")}
    base = tiny.llama().get_submodule(layer).weight.double()
    dW = {
        n: models[n].get_base_model().get_submodule(layer).get_delta_weight("default").double()
        for n in ("lora", "dual_lora")
    }
    dW["full"] = models["full"].get_submodule(layer).weight.double() - base
    pairs = {(p.kind, p.a, p.b): p for p in report.pairs if p.layer == layer}
    for a, b in (("lora", "dual_lora"), ("lora", "full"), ("dual_lora", "full")):
        naive = (dW[a] * dW[b]).sum() / dW[a].norm() / dW[b].norm()
        assert pairs["dW", a, b].cosine == pytest.approx(float(naive), rel=1e-4, abs=1e-7)
        assert pairs["dW", a, b].angles is None
    assert ("dW", "full", "task: copy") in pairs
    lora: Any = models["lora"].get_base_model().get_submodule(layer)
    dual: Any = models["dual_lora"].get_base_model().get_submodule(layer)
    pair = pairs["A", "lora: A", "dual_lora: A"]
    wanted = principal_angles(
        lora.lora_A["default"].weight.double().T, dual.plait_delta["default"].A.double().T
    ).rad2deg()
    assert pair.angles == pytest.approx(wanted.tolist())
    assert pair.cosine is None  # (4, in) and (2, in)
    assert pair.chance == pytest.approx(4 / 24)
    assert ("A", "lora: A", "task: A[copy]") in pairs
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        "norm.png", "untouched.png", "spectrum.png", "similarity_A.png", "similarity_B.png",
        "similarity_dW.png",
    }  # fmt: skip


def test_common_layers_are_compared(
    llama: Path, rows: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    method = {"name": "lora", "r": 2, "target_modules": ["q_proj"]}
    few = quick(llama, rows, tmp_path / "few", method)
    _, report = inspect_runs([runs["lora"], few], tmp_path / "out", pictures=False)
    assert len([r for r in report.layers if r.run == "few"]) == 2
    assert {p.layer for p in report.pairs} == {r.name for r in report.layers if r.run == "few"}
    assert report.notes == [
        "adapted in lora and not in few: model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj, model.layers.0.self_attn.o_proj, "
        "model.layers.0.mlp.gate_proj and 8 more; common layers are compared"
    ]
    assert {p.a for p in report.pairs if p.kind == "A"} == {"lora: A"}
    method = {"name": "lora", "r": 2, "target_modules": ["v_proj"]}
    other = quick(llama, rows, tmp_path / "other", method)
    with pytest.raises(ValueError) as caught:
        inspect_runs([few, other], tmp_path / "no", pictures=False)
    assert str(caught.value) == (
        f"{other}: no adapted layer is also adapted in {few}. Inspect them one by one."
    )


def test_runs_of_different_base_models(rows: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    wide = save_model("llama", tmp_path / "wide")
    tiny.llama(intermediate_size=44).save_pretrained(wide)
    run = quick(wide, rows, tmp_path / "run", METHODS["lora"])
    with pytest.raises(ValueError) as caught:
        inspect_runs([runs["lora"], run], tmp_path / "out")
    assert str(caught.value) == (
        f"{run}: 6 of 14 layers have another shape than in {runs['lora']}, such as "
        "model.layers.0.mlp.gate_proj: (44, 24), there (40, 24). The base models differ; inspect "
        "them one by one."
    )
    assert not (tmp_path / "out").exists()
    model = tiny.llama()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    model.save_pretrained(wide)
    other = quick(wide, rows, tmp_path / "other", METHODS["lora"])
    with pytest.raises(ValueError) as caught:
        inspect_runs([runs["lora"], other], tmp_path / "out")
    assert re.fullmatch(
        rf"{re.escape(str(other))}: the base weights of 14 of 14 layers differ from those of "
        rf"{re.escape(str(runs['lora']))}, by \d+% in model\.layers\.\S+\. The base models differ; "
        r"inspect them one by one\.",
        str(caught.value),
    )
    for p, q in zip(model.parameters(), tiny.llama().parameters(), strict=True):
        with torch.no_grad():
            p.copy_(q * 1.01)  # a little further trained
    model.save_pretrained(wide)
    near = quick(wide, rows, tmp_path / "near", METHODS["lora"])
    _, report = inspect_runs([runs["lora"], near], tmp_path / "out", pictures=False)
    assert report.notes == [
        "near and lora: the base weights of 14 layers differ, by up to 0.01 of their norm"
    ]


def test_what_is_there_is_not_overwritten(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "out", str(runs["lora"])
    arguments = ["inspect", run, "--out", str(out), "--no-pictures"]
    assert main(arguments) == 0
    (out / "old.png").write_text("of an earlier report")
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"plait inspect: {out}: exists. Give --force to replace it, or another --out.\n"
    )
    assert main([*arguments, "--force"]) == 0
    assert [p.name for p in out.iterdir()] == ["inspect.json"]
    capsys.readouterr()
    assert main(["inspect", run, "--out", run, "--force"]) == 2  # never the run itself
    assert capsys.readouterr().err == (
        f"plait inspect: {run}: holds something else than a report, which --force does not "
        "replace. Give another --out.\n"
    )
    assert (runs["lora"] / "adapter").is_dir()


def test_errors(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs["lora"])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(runs["lora"] / "config.yaml", unfinished)
    for words, text in (
        (
            [str(tmp_path)],
            f"{tmp_path}: no run is here (config.yaml is missing). Give the output.dir of a "
            "finished run.",
        ),
        (
            [run, str(unfinished)],
            f"{unfinished}: adapter/ is missing, so training did not finish. Continue it: plait "
            "train FILE --resume",
        ),
        ([run, f"{run}/"], f"{run}/: given twice. Give each run once."),
        ([run, "--rows", "-1"], "--rows -1 is below 0. Give 0 or more."),
        ([run, "--principal", "-2"], "--principal -2 is below 0. Give 0 or more."),
        (["data.test=x"], "there is no run folder. Give the output.dir of a finished run."),
    ):
        assert main(["inspect", *words, "--no-pictures"]) == 2
        assert capsys.readouterr().err == f"plait inspect: {text}\n"


def test_runs_and_overrides_in_any_order(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        str(runs["lora"]), "data.limit=20", "--out", str(out), "--no-pictures", str(runs["token"]),
    ]  # fmt: skip
    assert main(["inspect", *words]) == 0
    report = json.loads((out / "inspect.json").read_text())
    assert [r["label"] for r in report["runs"]] == ["lora", "token"]


def test_labels_are_told_apart(llama: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "again" / "lora"
    shutil.copytree(runs["lora"], copy)
    _, report = inspect_runs([runs["lora"], copy], tmp_path / "out", pictures=False, principal_k=0)
    assert [r.label for r in report.runs] == [f"{runs['lora'].parent.name}/lora", "again/lora"]
    same = next(p for p in report.pairs if p.kind == "dW")
    assert same.cosine == pytest.approx(1)
    assert {u.left for r in report.layers for u in r.updates} == {None}  # --principal 0


# --------------------------------------------------------------------------------------- pictures


def fake_report(spectrum: list[float | None]) -> InspectReport:
    """Two layers, one of them with an update of zero."""
    zero = UpdateReport("dW", 0.0, 0.0, 4, 0.0, 0.0, 0, None, None, None, None, [0.0] * 4)
    some = dataclasses.replace(zero, norm=1.0, relative=0.5, spectrum=spectrum)
    layers = [
        LayerReport("run", f"h.{i}.q", i, "h.*.q", (8, 8), 2.0, [u], None, None)
        for i, u in enumerate((zero, some))
    ]
    return InspectReport(
        1, 0, [findings.RunReport("run", "run", "lora", "m", 2, "single", [])], [],
        findings.by_module(layers), [], [], layers, [],
    )  # fmt: skip


def test_pictures_are_the_same_for_the_same_numbers_and_take_zeros() -> None:
    report = fake_report([1.0, 0.1, 0.0, 0.0])
    files = draw(report)
    assert set(files) == {"norm.png", "norm.svg", "spectrum.png", "spectrum.svg"}
    assert files == draw(report)
    assert b"attainable rank" in files["spectrum.svg"]
    with Image.open(io.BytesIO(files["norm.png"])) as image:
        assert image.format == "PNG"


def test_numbers_that_are_not_finite_become_null() -> None:
    text = fake_report([math.inf, math.nan, 1 / 3, 0.0]).text()
    spectrum = json.loads(text)["layers"][1]["updates"][0]["spectrum"]
    assert spectrum == [None, None, 0.333333, 0.0]
    assert '"spectrum": [null, null, 0.333333, 0.0]' in text  # on one line


def test_every_field_of_the_report_is_documented() -> None:
    page = (ROOT / "docs" / "inspect.md").read_text("utf-8")
    for cls in vars(findings).values():
        if dataclasses.is_dataclass(cls):
            for f in dataclasses.fields(cls):
                assert f"`{f.name}`" in page, f"{cls}: {f.name}"
