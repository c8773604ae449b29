"""HydraLoRA: one A, several B, a router of the token's own; counted products, masks, limits."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import plait
from plait.testing import checks, tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    batch,
    deltas,
    layers,
    logits,
    one_delta,
    one_layer,
    relative,
    steps,
    trained,
    update,
    wrap,
)
from plait.upstream.export import to_lora
from tests.support.routers import Softmaxes, form
from tests.support.starts import with_random_start

CASE = Case("hydra", {"r": 2, "num_B": 3})


def layer(n_in: int = 7, n_out: int = 5, **options: Any) -> tuple[Any, Any]:
    """`one_delta` of CASE, with a random start too."""
    return with_random_start(*one_delta(CASE, n_in, n_out, **options))


def loop(delta: Any, x: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
    """s sum_i w_i(x) B_i A x, up-projection by up-projection; inputs: of A for each B."""
    weights = torch.exp(x @ delta.G.T)
    weights = weights / weights.sum(-1, keepdim=True)
    total = torch.zeros(())
    for i, B in enumerate(delta.B):
        own = x if inputs is None else inputs[i]
        term = own @ delta.A.T @ B.T
        if delta.A0 is not None:
            term = term - own @ delta.A0.T @ delta.B0.T
        total = total + weights[..., i : i + 1] * term
    return delta.scaling * total


def test_worked_example() -> None:
    # By hand: w = (.25, .75) for x = (1, 1) and (.5, .5) for (0, 1); A x = 3 and 2; s = 2.
    model, delta = layer(2, 2, r=1, num_B=2, lora_alpha=2)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2]]))
        delta.B.copy_(torch.tensor([[[1.0], [0]], [[0], [2]]]))
        delta.G.copy_(torch.tensor([[0, 0], [math.log(3), 0]]))
    x = torch.tensor([[1.0, 1], [0, 1]], dtype=torch.float64)
    expected = torch.tensor([[1.5, 9], [2, 4]], dtype=torch.float64)
    assert relative(update(model, x), expected) < 1e-7  # ln 3 in fp32


@settings(max_examples=25)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), n=st.integers(1, 4), r=st.integers(1, 3),
    axes=st.integers(1, 3), init=st.sampled_from(["kaiming", "pissa"]),
)  # fmt: skip
def test_forward_is_the_loop(n_in: int, n_out: int, n: int, r: int, axes: int, init: str) -> None:
    """Outputs and all gradients, the router's too, for inputs of 2, 3 and 4 axes."""
    model, delta = layer(n_in, n_out, num_B=n, r=r, init=init)
    x = tiny.numbers(*[2] * axes, n_in).requires_grad_()
    dy = tiny.numbers(*[2] * axes, n_out, key=1)
    fast, slow = update(model, x), loop(delta, x)
    assert relative(fast, slow) < 1e-12
    wanted = [x, *delta.parameters()]
    for p, found, expected in zip(
        wanted,
        torch.autograd.grad(fast, wanted, dy),
        torch.autograd.grad(slow, wanted, dy),
        strict=True,
    ):
        scale = max(float(expected.abs().max()), 1)  # n = 1: the router's gradient is zero
        assert float((found - expected).abs().max()) < 1e-12 * scale, p.shape


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 3, 2, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    model, delta = layer()
    x = tiny.numbers(*shape)
    found = update(model, x)
    assert found.shape == (*shape[:-1], 5)
    assert relative(found, loop(delta, x)) < 1e-12


def test_start_and_defaults() -> None:
    model = wrap(CASE)
    for delta in deltas(model):
        bound = 1 / math.sqrt(delta.base.in_features)
        assert not delta.B.any()
        assert 0.8 * bound < float(delta.A.detach().abs().max()) <= bound
        assert 0.5 * bound < float(delta.G.detach().abs().max()) <= bound
    config = plait.HydraLoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.num_B) == (4, 32, 0.05, 4)
    assert not config.independent_dropout


def test_count() -> None:
    """r in + N r out + N in."""
    model = wrap(CASE)
    expected = sum(
        2 * one.in_features + 3 * 2 * one.out_features + 3 * one.in_features
        for one in layers(model)
    )
    assert sum(p.numel() for p in trained(model).values()) == expected


# Relatives -------------------------------------------------------------------------------------


def lora_beside(delta: Any, B: Tensor) -> tuple[Any, Any]:
    """Upstream's LoRA on the same layer with A and a given B."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["linear"])
    dtype = delta.A.dtype
    lora: Any = get_peft_model(tiny.OneLinear(7, 5, dtype), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    linear = lora.get_submodule("base_model.model.linear")
    with torch.no_grad():
        linear.lora_A["default"].weight.copy_(delta.A)
        linear.lora_B["default"].weight.copy_(B)
    assert delta.scaling == linear.scaling["default"]
    return lora, linear


def test_one_B_is_lora() -> None:
    """Bit for bit, output and gradients; the router, having no choice, gets none."""
    model, host = one_layer(CASE, 7, 5, torch.float32, num_B=1)
    delta: Any = host.plait_delta["default"]
    lora, linear = lora_beside(delta, delta.B[0])
    x = tiny.numbers(6, 7, dtype=torch.float32)
    for training in (False, True):
        ours, theirs = model.train(training)(x), lora.train(training)(x)
        assert torch.equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert relative(delta.B.grad[0], linear.lora_B["default"].weight.grad) < 1e-6
    assert relative(delta.A.grad, linear.lora_A["default"].weight.grad) < 1e-6
    assert float(delta.G.grad.abs().max()) < 1e-6


def test_equal_B_are_lora() -> None:
    """Whatever the router says; they stay equal only where it is uniform."""
    model, delta = layer()
    with torch.no_grad():
        delta.B.copy_(delta.B[0].clone().expand_as(delta.B))
    lora, linear = lora_beside(delta, delta.B[0])
    x = tiny.numbers(6, 7)
    assert relative(model(x), lora(x)) < 1e-14
    model(x).square().sum().backward()
    lora(x).square().sum().backward()
    assert relative(delta.B.grad.sum(0), linear.lora_B["default"].weight.grad) < 1e-12
    assert relative(delta.A.grad, linear.lora_A["default"].weight.grad) < 1e-12
    assert float(delta.G.grad.abs().max()) < 1e-12
    assert relative(delta.B.grad[0], delta.B.grad[1]) > 1e-3


def test_permuting_the_B_changes_nothing() -> None:
    model, delta = layer()
    x = tiny.numbers(6, 7)
    before = update(model, x)
    with torch.no_grad():
        order = [2, 0, 1]
        delta.B.copy_(delta.B[order].clone())
        delta.G.copy_(delta.G[order].clone())
    assert relative(update(model, x), before) < 1e-12


# Dropout ---------------------------------------------------------------------------------------


def test_one_mask_serves_all_B_and_the_router_reads_x() -> None:
    model, delta = layer(lora_dropout=0.5)
    x = tiny.numbers(20, 7)
    with tiny.seed(1):
        found = update(model, x)
    with tiny.seed(1):
        dropped = torch.nn.functional.dropout(x, 0.5)
    assert relative(found, loop(delta, x, [dropped] * 3)) < 1e-12


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_independent_masks(init: str) -> None:
    model, delta = layer(lora_dropout=0.5, independent_dropout=True, init=init)
    x = tiny.numbers(20, 7)
    with tiny.seed(1):
        found = update(model, x)
    with tiny.seed(1):
        dropped = torch.nn.functional.dropout(x.unsqueeze(-2).expand(20, 3, 7), 0.5)
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    assert relative(found, loop(delta, x, list(dropped.unbind(1)))) < 1e-12
    with torch.no_grad():
        model.eval()
        assert relative(update(model, x), loop(delta, x)) < 1e-12


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("gate", ["sora", {"name": "droplora", "inner_dropout": 0.5}])
def test_gates_meet_independent_masks(gate: Any, init: str) -> None:
    """A gate acts on rank k of every copy of the rank activations."""
    options = {"gates": [gate], "lora_dropout": 0.5, "independent_dropout": True, "init": init}
    model, delta = layer(num_B=3, **options)
    x = tiny.numbers(20, 7)
    with torch.no_grad():
        if gate == "sora":
            g = delta.live()
            with tiny.seed(1):
                found = update(model, x)
            with tiny.seed(1):
                dropped = torch.nn.functional.dropout(x.unsqueeze(-2).expand(20, 3, 7), 0.5)
            delta.A.mul_(g[:, None])  # the gate folded in by hand
            if delta.A0 is not None:
                delta.A0.mul_(g[:, None])
            assert relative(found, loop(delta, x, list(dropped.unbind(1)))) < 1e-12
        assert model.train()(x).isfinite().all()
        assert model.eval()(x).isfinite().all()


# Fast form -------------------------------------------------------------------------------------


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and count."""
        name = func.overloadpacket.__name__
        self.count += name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "linear", "dot")
        return func(*args, **(kwargs or {}))


def products(model: Any, x: Tensor) -> int:
    """Matrix products of a forward."""
    with torch.no_grad(), Products() as seen:
        model(x)
    return seen.count


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)])
@pytest.mark.parametrize(
    ("fused", "dropout", "expected"),
    [
        (True, 0.0, 3),  # A and the router in one product, all B at once, the base layer's own
        (True, 0.5, 4),  # dropout is on the input of A, not on that of the router: two products
        (False, 0.0, 4),
        (False, 0.5, 4),
    ],
)
def test_products_do_not_grow_with_the_number_of_B(
    fused: bool, dropout: float, expected: int, shape: tuple[int, ...]
) -> None:
    with form(fused):
        found = {
            n: products(layer(num_B=n, lora_dropout=dropout)[0], tiny.numbers(*shape))
            for n in (1, 2, 5, 16)
        }
    assert found == dict.fromkeys((1, 2, 5, 16), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_operations(fused: bool) -> None:
    """2 tokens (r in + N in + N r out), beside the base layer's 2 tokens in out."""
    model, _ = layer(n_in=16, n_out=24, num_B=5, r=2)

    def in_place(*shapes: Any, **_: Any) -> int:
        return addmm_flop(*shapes)

    lacking = {torch.ops.aten.addmm_: in_place}  # in torch's own table
    counting = FlopCounterMode(display=False, custom_mapping=lacking)
    with form(fused), torch.no_grad(), counting as counter:
        model(tiny.numbers(10, 16))
    expected = 2 * 10 * (2 * 16 + 5 * 16 + 5 * 2 * 24 + 16 * 24)
    assert counter.get_total_flops() == expected


# The router ------------------------------------------------------------------------------------


def test_a_token_alone_decides() -> None:
    """A row does not depend on its batch, a position not on later ones; in a whole model too."""
    model = wrap(CASE, init_weights=False)
    with torch.no_grad():
        for delta in deltas(model):
            delta.G.mul_(30)  # weights far from uniform
        inputs = batch(model)
        whole = model(**inputs).logits
        for row in range(4):
            one = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
            assert relative(one[0], whole[row]) < 1e-5
        for cut in range(1, 8):
            ids = inputs["input_ids"].clone()
            ids[:, cut:] = 5
            assert relative(model(input_ids=ids).logits[:, :cut], whole[:, :cut]) < 1e-5


@pytest.mark.parametrize("fused", [True, False])
def test_router_is_fp32_under_bf16(fused: bool) -> None:
    """In a bf16 layer and under bf16 autocast, in training and in evaluation."""
    model, _ = one_layer(CASE, 7, 5, torch.bfloat16)
    plain, _ = one_layer(CASE, 7, 5, torch.float32)
    with form(fused), Softmaxes() as softmaxes:
        for training in (True, False):
            x = tiny.numbers(6, 7)
            assert model.train(training)(x.bfloat16()).dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16):
                assert plain.train(training)(x.float()).dtype == torch.bfloat16
    assert len(softmaxes.seen) == 4
    for weights in softmaxes.seen:
        assert weights.computed_in == weights.dtype == torch.float32
        assert weights.error < 1e-6


def test_B_part_in_training() -> None:
    """From B_i = 0 they differ after two steps: the router's weights differ from the start."""
    model = wrap(CASE)
    steps(model, adamw(model, 1e-2), 2)
    for delta in deltas(model):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert relative(delta.B[i], delta.B[j]) > 1e-6


# Merge and export ------------------------------------------------------------------------------


def test_no_weight_holds_a_live_router() -> None:
    model = wrap(CASE, init_weights=False)
    text = (
        r"hydra cannot be merged: its update depends on the token\. Use merge\(approx=\"mean\"\) "
        "or keep the adapter"
    )
    for act in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: to_lora(model),
        deltas(model)[0].weight,
    ):
        with pytest.raises(plait.NotMergeable, match=text):
            act()
    alone, _ = layer(n_in=8, n_out=8)
    with torch.no_grad():
        alone.eval()
        x = tiny.numbers(200, 8)
        y = update(alone, x)
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    assert float(rest.norm() / y.norm()) > 0.05


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_mean_is_exact_for_a_uniform_router(init: str) -> None:
    model = wrap(CASE, init=init)
    steps(model, adamw(model, 1e-2), 3)
    with torch.no_grad():
        for delta in deltas(model):
            delta.G.zero_()
            mean = delta.B.mean(0) @ delta.A
            if init == "pissa":
                mean = mean - delta.B0 @ delta.A0
            assert relative(delta.weight(approx="mean"), delta.scaling * mean) < 1e-4
    expected = logits(model)
    model.merge_adapter(approx="mean")
    assert relative(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert {one.rank for one in to_lora(model, approx="mean").layers} == {
        2 if init == "kaiming" else 4
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_B": 0}, "num_B = 0 is out of range. Give 1 or more"),
        ({"num_B": 1.5}, "num_B = 1.5 is not a whole number"),
        ({"init": "svd"}, "init = 'svd' is not known. Use one of 'kaiming', 'pissa'"),
    ],
)
def test_refused_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.HydraLoraConfig(**options)


def test_contract_with_many_options() -> None:
    """Checkpointing and micro-batches with every option of the page at once."""
    options = {"num_B": 3, "independent_dropout": True, "init": "pissa", "gates": ["sora"]}
    checks.checkpointing_changes_nothing(Case("hydra", options))
