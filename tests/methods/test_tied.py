"""Tied-LoRA: one pair of factors for the layers of a shape, wherever a model goes."""

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

import plait
from plait.testing import checks, tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    layers,
    logits,
    one_layer,
    relative,
    steps,
    trained,
    wrap,
)

CASE = Case("tied", {"r": 3})
VERA = Case("tied", {"r": 3, "train": ["u", "v"]})
BOTH = pytest.mark.parametrize("case", [CASE, VERA], ids=["trained", "frozen"])
SUBSETS = [
    list(names)
    for k in range(1, 5)
    for names in itertools.combinations("ABuv", k)
    if {"B", "v"} & set(names)
]


def shared(model: Any, adapter: str = "default") -> None:
    """Assert that layers of equal rank and shape hold one A and one B, and others do not."""
    for name in ("A", "B"):
        groups: dict[Any, set[int]] = {}
        for delta in deltas(model, adapter):
            groups.setdefault(delta.alike, set()).add(id(getattr(delta, name)))
        assert all(len(ids) == 1 for ids in groups.values()), f"{name} parted"
        assert len({next(iter(ids)) for ids in groups.values()}) == len(groups)
    for name in ("u", "v"):
        assert len({id(getattr(d, name)) for d in deltas(model, adapter)}) == len(deltas(model))


# The formula -----------------------------------------------------------------------------------


def test_worked_example() -> None:
    # By hand: u A = (2, 4), B u A = (2, 4; 6, 12), times v = (10, 1), s = 2.
    _, host = one_layer(CASE, 2, 2, r=1, lora_alpha=2)
    delta: Any = host.plait_delta["default"]
    with torch.no_grad():
        for name, value in {"A": [[1.0, 2]], "B": [[1.0], [3]], "u": [2.0], "v": [10.0, 1]}.items():
            getattr(delta, name).copy_(torch.tensor(value))
    expected = torch.tensor([[40.0, 80], [12, 24]], dtype=torch.float64)
    assert torch.equal(delta.weight(), expected)


@settings(max_examples=25)
@given(
    n_in=st.integers(1, 7), n_out=st.integers(1, 7), r=st.integers(1, 4),
    train=st.sampled_from(SUBSETS),
)  # fmt: skip
def test_forward_is_the_loop(n_in: int, n_out: int, r: int, train: list[str]) -> None:
    """Rank by rank, outputs and all gradients."""
    model, host = one_layer(CASE, n_in, n_out, r=r, train=train)
    delta: Any = host.plait_delta["default"]
    assert sorted(dict(delta.named_parameters())) == sorted(train)
    model.train()
    x = tiny.numbers(4, n_in).requires_grad_()
    dy = tiny.numbers(4, n_out, key=1)
    fast = model(x) - host.base_layer(x)
    slow = torch.zeros(())
    for k in range(r):
        up = delta.v * delta.B[:, k]
        slow = slow + delta.scaling * torch.outer(delta.u[k] * (x @ delta.A[k]), up)
    wanted = [x, *delta.parameters()]
    assert float((fast - slow).detach().abs().max()) < 1e-12
    for found, expected in zip(
        torch.autograd.grad(fast, wanted, dy),
        torch.autograd.grad(slow, wanted, dy),
        strict=True,
    ):
        assert float((found - expected).abs().max()) < 1e-12 * max(float(expected.abs().max()), 1)


@pytest.mark.parametrize("train", SUBSETS, ids="".join)
def test_start_of_every_subset(train: list[str]) -> None:
    """dW = 0, and every trained tensor gets a gradient within three steps."""
    case = Case("tied", {"r": 2, "train": train}, lr=5e-2)
    checks.start_is_the_base(case)
    checks.gradients_reach_everything(case)
    delta = deltas(wrap(case))[0]
    assert torch.equal(delta.u, torch.ones(2))
    if "B" in train:
        assert not delta.B.any()
        assert torch.equal(delta.v, torch.ones(24))
    else:
        assert delta.B.any()
        assert not delta.v.any()


def test_forward_is_merged_is_exported(tmp_path: Path) -> None:
    model = wrap(CASE)
    steps(model, adamw(model, 1e-2), 4, key=None)
    expected = logits(model)
    export = plait.to_lora(model)
    assert export.error == 0
    assert {one.rank for one in export.layers} == {3}
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        assert relative(stock(input_ids=tiny.tokens()).logits, expected) < 1e-5
    model.merge_adapter()
    assert relative(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    shared(model)
    plain = model.merge_and_unload()
    assert relative(base_logits(plain), expected) < 1e-5


@pytest.mark.parametrize("train", SUBSETS, ids="".join)
def test_count(train: list[str]) -> None:
    """r (in + out) for each shape and r + out for each layer, of what is trained."""
    model = wrap(CASE, train=train)
    # q and up: (24, 24) and (24, 40); v: (24, 12); two blocks
    per_shape = {"A": 3 * 24 * 3, "B": 3 * (24 + 12 + 40), "u": 6 * 3, "v": 2 * (24 + 12 + 40)}
    assert sum(p.numel() for p in trained(model).values()) == sum(per_shape[n] for n in train)
    assert model.get_nb_trainable_parameters()[0] == sum(per_shape[n] for n in train)


def test_gradient_is_the_sum_over_the_layers() -> None:
    """Against a copy of the adapter in which every layer has its own A and B."""
    model = wrap(CASE, init_weights=False).train()
    parted = copy.deepcopy(model)
    for delta in deltas(parted):
        delta.owner = []
        for name in ("A", "B"):
            setattr(delta, name, torch.nn.Parameter(getattr(delta, name).detach().clone()))
    for one in (model, parted):
        one(**batch(one)).loss.backward()
    for delta in deltas(model):
        alike = [
            p for d, p in zip(deltas(model), deltas(parted), strict=True) if d.alike == delta.alike
        ]
        assert len(alike) == 2
        for name in ("A", "B"):
            total = sum((getattr(p, name).grad for p in alike), torch.zeros(()))
            assert relative(getattr(delta, name).grad, total) < 1e-5
            assert relative(getattr(alike[0], name).grad, total) > 1e-2


def test_frozen_factors_are_upstreams_vera() -> None:
    """A, B frozen, u = .1, v = 0, on projections of one shape: outputs along a training."""
    targets = ["q_proj", "o_proj"]
    ours = get_peft_model(
        tiny.llama(),
        plait.TiedLoraConfig(r=4, lora_alpha=4, train=["u", "v"], target_modules=targets),
    )
    theirs = get_peft_model(
        tiny.llama(), VeraConfig(r=4, d_initial=0.1, vera_dropout=0.0, target_modules=targets)
    )
    vera = [m for m in theirs.modules() if hasattr(m, "vera_lambda_d")]
    assert len(vera) == len(deltas(ours)) == 4
    with torch.no_grad():
        for delta, layer in zip(deltas(ours), vera, strict=True):
            delta.A.copy_(layer.vera_A["default"])  # type: ignore[index]
            delta.B.copy_(layer.vera_B["default"])  # type: ignore[index]
            delta.u.fill_(0.1)
    mine = trained(ours)
    assert len(mine) == len(trained(theirs)) == 8
    optimizers = [torch.optim.SGD(trained(m).values(), lr=0.5) for m in (ours, theirs)]
    for step in range(4):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            ids = tiny.tokens(key=step)
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for delta, layer in zip(deltas(ours), vera, strict=True):
        assert delta.v.any()
        assert relative(delta.u, layer.vera_lambda_d["default"]) < 1e-5  # type: ignore[index]
        assert relative(delta.v, layer.vera_lambda_b["default"]) < 1e-4  # type: ignore[index]
    assert relative(base_logits(ours.eval()), base_logits(theirs.eval())) < 1e-5


# Sharing ---------------------------------------------------------------------------------------


@BOTH
def test_layers_of_a_shape_share(case: Case) -> None:
    model = wrap(case)
    shared(model)
    alike = {d.alike for d in deltas(model)}
    assert alike == {(3, 24, 24), (3, 24, 12), (3, 24, 40)}
    assert len(deltas(model)) == 6
    patterns = wrap(case, rank_pattern={"layers.1.self_attn.q_proj": 2})
    shared(patterns)
    assert {d.alike for d in deltas(patterns)} == {*alike, (2, 24, 24)}


@BOTH
@pytest.mark.parametrize("lean", [False, True], ids=["loaded", "lean"])
def test_sharing_survives_a_file(case: Case, lean: bool, tmp_path: Path) -> None:
    model = wrap(case)
    steps(model, adamw(model, 1e-2), 3)
    model.add_adapter("other", case.config(init_weights=False, seed=3))
    model.save_pretrained(tmp_path)
    for name in ("default", "other"):
        folder = tmp_path if name == "default" else tmp_path / "other"
        names = [n.rpartition(".")[2] for n in load_file(folder / "adapter_model.safetensors")]
        assert {n: names.count(n) for n in "ABuv"} == {"A": 3, "B": 3, "u": 6, "v": 6}
    expected = logits(model)
    loaded = PeftModel.from_pretrained(
        tiny.llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=lean
    )
    shared(loaded)
    assert torch.equal(logits(loaded), expected)
    assert set(trained(loaded)) == {n for n in trained(model) if ".other." not in n}
    loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=lean)
    for adapter in ("default", "other"):
        shared(loaded, adapter)
        for one in (loaded, model):
            one.set_adapter(adapter)
        assert torch.equal(logits(loaded), logits(model))
    loaded.set_adapter("default")
    optimizer = adamw(loaded, 1e-2)
    steps(loaded, optimizer, 2)  # and what is loaded trains as one
    shared(loaded)
    assert not torch.equal(logits(loaded), expected)


@BOTH
def test_sharing_survives_what_is_done_to_a_model(case: Case) -> None:
    model = wrap(case, init_weights=False)
    expected = logits(model)
    kept = [d.A.detach() for d in deltas(model)]  # alive, so that no address comes again
    pointers = {A.data_ptr() for A in kept}
    for change in (lambda: model.double(), lambda: model.bfloat16(), lambda: model.float()):
        change()
        shared(model)
        assert len({d.A.data_ptr() for d in deltas(model)}) == 3
        assert len({d.B.data_ptr() for d in deltas(model)}) == 3
    assert {d.A.data_ptr() for d in deltas(model)} != pointers
    model = wrap(case, init_weights=False)
    model.add_adapter("other", case.config(init_weights=False, seed=1))
    model.set_adapter("other")
    shared(model, "other")
    assert not {id(d.A) for d in deltas(model)} & {id(d.A) for d in deltas(model, "other")}
    model.set_adapter("default")
    model.delete_adapter("other")
    shared(model)
    assert torch.equal(logits(model), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shared(twin)
        assert not {id(d.A) for d in deltas(twin)} & {id(d.A) for d in deltas(model)}
        assert torch.equal(logits(twin), expected)
        steps(twin, adamw(twin, 1e-2), 1)
        assert torch.equal(logits(model), expected)


def test_sharing_survives_a_move_to_nowhere() -> None:
    """`to_empty` and meta devices make every tensor anew."""
    model = wrap(CASE)
    model.to_empty(device="meta")
    shared(model)
    assert len({n for n in trained(model) if n.endswith(".A")}) == 3


def test_an_adapter_that_is_shared_has_one_optimizer_state() -> None:
    model = wrap(CASE)
    optimizer = adamw(model, 1e-2)
    steps(model, optimizer, 1)
    assert len(optimizer.state) == 3 + 3 + 6 + 6


def test_injecting_is_refused() -> None:
    """Without a tuner nobody would hold what is shared; upstream's message names the remedy."""
    with pytest.raises(ValueError, match=r"PLAIT_TIED.*use `get_peft_model`"):
        inject_adapter_in_model(CASE.config(), tiny.llama())


def test_weighted_sums() -> None:
    """The sum is taken of the updates, so a shared factor is no obstacle."""
    model = wrap(CASE, init_weights=False)
    model.add_adapter("other", CASE.config(init_weights=False, seed=3))
    parts = [
        [layer.get_delta_weight(a) for layer in layers(model)] for a in ("default", "other")
    ]  # fmt: skip
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both")
    for i, layer in enumerate(layers(model)):
        expected = 0.5 * parts[0][i] - 2 * parts[1][i]
        assert relative(layer.get_delta_weight("both"), expected) < 1e-5
    shared(model)


def test_penalties_of_shared_tensors_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event adds the penalty's gradient to a tensor once, however many layers hold it."""
    from plait.methods.tied import TiedLora

    monkeypatch.setattr(TiedLora, "penalty", lambda self: self.A.square().sum())
    model = wrap(CASE, target_modules=["q_proj"], init_weights=False)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    optimizer.step()
    A = deltas(model)[0].A
    assert relative(A.grad, 2 * A) < 1e-6  # the mean over two layers of the same A


def test_parted_factors_are_refused() -> None:
    """As units of FSDP2 part them where torch itself does not refuse to."""
    model = wrap(CASE).train()
    delta = deltas(model)[3]
    delta.A = torch.nn.Parameter(delta.A.detach().clone())
    with pytest.raises(
        ValueError, match=r"tied: A of .*1.*q_proj is no longer that of .*0.*q_proj.* one unit"
    ):
        model(**batch(model))
    model.eval()(**batch(model))


# Options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ([], r"train = \[\]\. Give some of A, B, u, v"),
        (["A", "w"], r"train = \['A', 'w'\]\. Give some of A, B, u, v"),
        (["A", "u"], r"without B and v the update stays zero\. Add one of them"),
        (["A"], "without B and v the update stays zero"),
    ],
)
def test_refused_options(train: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.TiedLoraConfig(train=train)


def test_options_survive_the_file(tmp_path: Path) -> None:
    VERA.config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["train"] == ["u", "v"]
    assert plait.TiedLoraConfig.from_pretrained(tmp_path).train == ["u", "v"]
    assert plait.TiedLoraConfig().train == ["A", "B", "u", "v"]
