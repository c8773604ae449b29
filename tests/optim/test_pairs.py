"""Which pairs a model has, what is refused, and what the optimizers share: AdamW, state."""

import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

import plait
from plait.callback import check_clipping
from plait.optim import collect_pairs
from plait.optim.pairs import join, part
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import batch, deltas, steps, wrap
from tests.support.pairs import TARGETS, batch_of, change_basis, lora, train, values

FACTORIES = [plait.create_lora_rite_optimizer, plait.create_lorsum_optimizer]


def state(optimizer: torch.optim.Optimizer) -> Any:
    """The state dict, through a file that holds tensors only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Pairs of a model -------------------------------------------------------------------------------


def test_upstream_pairs_are_found_by_attribute_with_their_scale() -> None:
    pairs = collect_pairs(lora(rank_pattern={"v_proj": 2}, use_rslora=True))
    assert [p.name for p in pairs] == [
        f"model.layers.{i}.self_attn.{t}" for i in (0, 1) for t in TARGETS
    ]
    for pair, r in zip(pairs, [4, 2] * 2, strict=True):
        assert pair.A.shape == (r, 24)
        assert pair.B.shape[1] == r
        assert pair.scaling == pytest.approx(8 / r**0.5)


def test_one_adapter_of_several() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(collect_pairs(model)) == 4  # of the active one
    with pytest.raises(ValueError, match=r"q_proj: A is frozen, and both factors of a pair move"):
        collect_pairs(model, "other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"Active adapters: default, other\. Name the one"):
        collect_pairs(model)
    with pytest.raises(ValueError, match=r"no pair \(A, B\) of adapter 'third'"):
        collect_pairs(model, "third")


PAIRED = [
    ("shared_b", {}, [((0, 1, 2), None)]),
    ("shared_b", {"routing": "task", "tasks": ["a", "b"]}, [((0, 1), None)]),
    ("cola", {}, [((0, 1), (0, 1, 2))]),
    ("cola", {"strategy": "random"}, [((0, 1), (0, 1, 2))]),
    ("cola", {"strategy": "random_b"}, [((0, 1), (0, 1, 2))]),
    ("cola", {"strategy": "heuristic"}, [((0,), (0,)), ((1,), (1, 2))]),
    (
        "cola",
        {"strategy": "heuristic", "num_B": 4, "grouping": "released"},
        [((0,), (0, 1)), ((1,), (2, 3))],
    ),
]


@pytest.mark.filterwarnings("ignore:cola. groups")
@pytest.mark.parametrize(("key", "options", "slices"), PAIRED)
def test_gauge_of_a_method_leaves_its_output_unchanged(
    key: str, options: dict[str, Any], slices: list[Any]
) -> None:
    model = wrap(Case(key, options), tiny.llama().double(), init_weights=False).train()
    inputs = batch(model)
    before = model(**inputs).logits
    gen = torch.Generator().manual_seed(1)
    for delta in deltas(model):
        pairs = delta.pairs()
        assert [(p.A_slices, p.B_slices) for p in pairs] == slices
        for pair in pairs:
            change_basis(pair, torch.randn(4, 4, generator=gen, dtype=torch.float64))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-9)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.data())
def test_join_and_part_are_inverse(n: int, r: int, width: int, data: Any) -> None:
    slices = tuple(data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n))])
    A, B = tiny.numbers(n, r, width), tiny.numbers(n, width, r, key=1)
    joined = join(A, slices, 1), join(B, slices, 0)
    for k, i in enumerate(slices):
        assert torch.equal(joined[0][:, k * width : (k + 1) * width], A[i])
        assert torch.equal(joined[1][k * width : (k + 1) * width], B[i])
    C = A.clone()
    part(C, slices, 1, 2 * joined[0])
    for i in range(n):
        assert torch.equal(C[i], 2 * A[i] if i in slices else A[i])


# What is refused --------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.config: dict[str, Any] = {}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))
        self.config: dict[str, Any] = {}


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


REFUSED = [
    (lambda: lora(use_dora=True), r"q_proj: .*DoRA's magnitude depends on dW\. Leave the layer"),
    (
        lambda: lora(target_modules=["embed_tokens", "q_proj"]),
        r"embed_tokens: its factors are no free pair \(A, B\): an embedding is no linear layer",
    ),
    (
        lambda: get_peft_model(Conv(), LoraConfig(target_modules=["conv"])),  # type: ignore[arg-type]
        r"conv: .*a convolution is no linear layer\. .*or train with AdamW",
    ),
    (
        lambda: get_peft_model(
            MoE(),  # type: ignore[arg-type]
            LoraConfig(target_modules=[], target_parameters=["experts.weight"]),
        ),
        r"experts: .*target_parameters adapts a parameter that is no linear layer",
    ),
    (
        lambda: get_peft_model(tiny.llama(), AdaLoraConfig(target_modules=TARGETS, total_step=10)),
        r"AdaLoRA's gate E belongs to single ranks",
    ),
    (
        lambda: get_peft_model(tiny.llama(), VeraConfig(target_modules=["q_proj"])),
        r"no pair \(A, B\)|Active adapters: none",
    ),
    (
        lambda: wrap(Case("dual_lora")),
        r"q_proj: dual_lora has no pairs .*sign\(D C\) and relu\(B A\) change with the basis\. ",
    ),
    (
        lambda: wrap(Case("dual_module")),
        r"dual_module has no pairs .*a gate .screening. belongs to single ranks",
    ),
]


@pytest.mark.parametrize("create", FACTORIES)
@pytest.mark.parametrize(("make", "text"), REFUSED)
def test_refusals_name_layer_reason_and_way_out(make: Any, text: str, create: Any) -> None:
    with pytest.raises(ValueError, match=text):
        create(make())


def test_frozen_factor_is_refused() -> None:
    model = lora()
    model.base_model.model.model.layers[1].self_attn.v_proj.lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1\.self_attn\.v_proj: A is frozen, .* LoRA-FA\."):
        plait.create_lora_rite_optimizer(model)


def test_shared_factor_is_refused() -> None:
    model = lora()
    one, two = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    two.lora_A["default"].weight = one.lora_A["default"].weight
    with pytest.raises(ValueError, match=r"1\.self_attn\.q_proj: A is shared with another layer"):
        plait.create_lora_rite_optimizer(model)


def test_flat_shards_are_refused() -> None:
    model = lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    optimizer = plait.create_lora_rite_optimizer(model)
    whole = layer.lora_A["default"].weight
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(7))  # as ZeRO-3 and FSDP1
    with pytest.raises(
        ValueError, match=r"A of shape \(7,\) is not a matrix \(FSDP1 and DeepSpeed"
    ):
        plait.create_lora_rite_optimizer(model)
    layer.lora_A["default"].weight = whole
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(7))]  # as ZeRO-1 and 2
    with pytest.raises(ValueError, match=r"q_proj: the optimizer's parameter is not a matrix"):
        optimizer.step()


@pytest.mark.parametrize(
    ("create", "options", "text"),
    [
        (0, {"lr": -1}, r"lora_rite: lr = -1\. Give 0 or more\."),
        (0, {"betas": (0.9, 1.0)}, r"lora_rite: betas\[1\] = 1\.0\. Give 0 or more and below 1\."),
        (0, {"other_lr": -2.0}, r"lora_rite: other_lr = -2\.0\."),
        (1, {"momentum": 1.0}, r"lorsum: momentum = 1\.0\. Give 0 or more and below 1\."),
        (1, {"sweeps": -1}, r"lorsum: sweeps = -1\. Give 0 or more\."),
        (1, {"start": "left"}, r'lorsum: start = \'left\', metric = None\. start is "out" or "in"'),
        (1, {"metric": "kfac", "dampening": 0.5}, r"dampening = 0\.5 with metric=.kfac."),
    ],
)
def test_option_out_of_range(create: int, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FACTORIES[create](lora(), **options)


# What else trains -------------------------------------------------------------------------------


def test_other_parameters_get_torchs_adamw_bit_for_bit() -> None:
    one, two = (lora(modules_to_save=["lm_head", "norm"], bias="all") for _ in range(2))
    ours = plait.create_lora_rite_optimizer(one, lr=1e-2, weight_decay=0.1, other_lr=3e-3)
    kinds = [(g["kind"], g["lr"], g["weight_decay"]) for g in ours.param_groups]
    assert kinds == [("pairs", 1e-2, 0.1), ("other", 3e-3, 0.1), ("other", 3e-3, 0.0)]
    held = {p for g in ours.param_groups for p in g["params"]}
    assert held == {p for p in one.parameters() if p.requires_grad}

    def rest(model: nn.Module) -> list[nn.Parameter]:
        named = model.named_parameters()
        return [p for n, p in named if p.requires_grad and "lora_" not in n]

    matrices, vectors = ([p for p in rest(two) if (p.ndim > 1) is kind] for kind in (True, False))
    assert matrices
    assert vectors
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
    )
    for t in range(3):
        for model, optimizer in ((one, ours), (two, theirs)):
            for i, p in enumerate(rest(model)):
                p.grad = tiny.numbers(*p.shape, key=100 * t + i, dtype=p.dtype)
            optimizer.step()
    assert all(map(torch.equal, rest(one), rest(two)))


def test_router_of_shared_b_moves_with_the_pairs() -> None:
    model = wrap(Case("shared_b"), init_weights=False)
    optimizer = plait.create_lora_rite_optimizer(model, lr=1e-2)
    assert [g["kind"] for g in optimizer.param_groups] == ["pairs", "other"]
    before = [d.G.detach().clone() for d in deltas(model)]
    steps(model, optimizer, 1)
    assert all(not torch.equal(d.G, b) for d, b in zip(deltas(model), before, strict=True))


# As a torch optimizer ---------------------------------------------------------------------------

MAKES = {
    "rite": lambda m: plait.create_lora_rite_optimizer(m, lr=1e-2),
    "lorsum": lambda m: plait.create_lorsum_optimizer(m, lr=1e-2),
    "kfac": lambda m: plait.create_lorsum_optimizer(m, lr=1e-2, metric="kfac"),
    "sweeps0": lambda m: plait.create_lorsum_optimizer(m, lr=1e-2, sweeps=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKES)
def test_resume_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    def fresh() -> Any:
        return lora(tiny.llama(), modules_to_save=["lm_head"]).to(dtype)

    whole, make = fresh(), MAKES[name]
    train(whole, make(whole), range(5))
    first = fresh()
    optimizer = make(first)
    train(first, optimizer, range(3))
    second = fresh()
    second.load_state_dict(first.state_dict())
    again = make(second)
    again.load_state_dict(state(optimizer))
    for s in again.state.values():
        assert all(t.dtype == torch.float32 for t in s.values())  # whatever the parameter is
    train(second, again, range(3, 5))
    assert all(map(torch.equal, values(whole), values(second)))


def test_state_is_tensors_with_a_scalar_step() -> None:
    model = lora(modules_to_save=["lm_head"])
    optimizer = plait.create_lora_rite_optimizer(model)
    train(model, optimizer, range(1))
    for s in optimizer.state.values():
        assert all(isinstance(t, Tensor) for t in s.values())
    steps_seen = [s["step"] for s in optimizer.state.values() if "step" in s]
    assert steps_seen
    assert all(t.ndim == 0 and t == 1 for t in steps_seen)
    assert {"betas", "eps", "escape", "balance"} <= optimizer.state_dict()["param_groups"][0].keys()


@pytest.mark.parametrize("name", MAKES)
def test_closure_runs_with_gradients_on(name: str) -> None:
    one, two = lora(), lora()
    train(one, MAKES[name](one), range(1))
    optimizer = MAKES[name](two)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = two(**batch_of(0)).loss
        loss.backward()
        return loss

    two.train()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss > 0
    assert all(map(torch.equal, values(one), values(two)))


@pytest.mark.parametrize("name", MAKES)
def test_schedulers_and_accelerate(name: str) -> None:
    one, two = lora(), lora()
    optimizer = MAKES[name](one)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    one.train()
    for key in range(3):
        one(**batch_of(key)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    accelerator = Accelerator(cpu=True)
    inner = MAKES[name](two)
    model, wrapped, again = accelerator.prepare(
        two, inner, torch.optim.lr_scheduler.LambdaLR(inner, lambda t: 1 / (1 + t))
    )
    model.train()
    for key in range(3):
        accelerator.backward(model(**batch_of(key)).loss)
        wrapped.step()
        again.step()
        wrapped.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    assert all(map(torch.equal, values(one), values(two)))


def test_factors_may_have_learning_rates_of_their_own() -> None:
    model = lora()
    optimizer = plait.create_lora_rite_optimizer(model, lr=1e-2)
    pairs = optimizer.pairs
    (group,) = optimizer.param_groups
    group["params"] = [p.A for p in pairs]
    optimizer.add_param_group({**group, "params": [p.B for p in pairs], "lr": 0.0})
    before = [(p.A.detach().clone(), p.B.detach().clone()) for p in pairs]
    train(model, optimizer, range(1))
    for pair, (A, B) in zip(pairs, before, strict=True):
        assert not torch.equal(pair.A, A)
        assert torch.equal(pair.B, B)
    one_rate = plait.create_lorsum_optimizer(model)
    (group,) = one_rate.param_groups
    group["params"] = [p.A for p in pairs]
    one_rate.add_param_group({**group, "params": [p.B for p in pairs], "lr": 1.0})
    with pytest.raises(
        ValueError, match=r"has lr 0\.01 for A and 1 for B\. It steps dW as a whole"
    ):
        train(model, one_rate, range(1))


def test_clipping_of_raw_gradients_is_refused() -> None:
    model = lora()
    text = r"lora_rite: max_grad_norm = 1 clips the gradients of A and B .* Set max_grad_norm=0"
    optimizer = plait.create_lora_rite_optimizer(model)
    with pytest.raises(ValueError, match=text):
        check_clipping(optimizer, 1.0)
    with pytest.raises(ValueError, match=text):
        check_clipping(Accelerator(cpu=True).prepare(optimizer), 1.0)
    check_clipping(optimizer, 0.0)
    check_clipping(optimizer, None)
    check_clipping(torch.optim.AdamW(model.parameters()), 1.0)
    check_clipping(None, 1.0)
