"""Mixtures of LoRAs: dense and top-k against the loop; balance losses against explicit ones."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import plait
from plait.core.mix import TokenRouter
from plait.core.route import NOWHERE, Rows
from plait.methods._balance import loramoe, switch
from plait.methods.molora import MoLora
from plait.run.train import train
from plait.testing import checks, tiny
from plait.testing.case import Case
from plait.testing.checks import CHECKS
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
from tests.support.runs import copy_rows, run_config, save_model, write_rows
from tests.support.starts import with_random_start

CASE = Case("molora", {"r": 2, "num_experts": 3})
SWITCH = Case(
    "molora",
    {"r": 2, "num_experts": 4, "top_k": 2, "balance": "switch", "balance_weight": 0.5},
    experts=("A", "B", "G"),
    additive={"balance": "none"},
)
LORAMOE = Case(
    "molora",
    {"r": 2, "num_experts": 4, "balance": "loramoe", "balance_weight": 0.5},
    experts=("A", "B", "G"),
    additive={"balance": "none"},
)
TYPED = Case("molora", {**LORAMOE.options, "delta": 0.5})
BALANCED = [SWITCH, LORAMOE, TYPED]
IDS = ["switch", "loramoe", "typed"]
each = pytest.mark.parametrize("case", BALANCED, ids=IDS)


def layer(n_in: int = 7, n_out: int = 5, **options: Any) -> tuple[Any, Any]:
    """`one_delta` of CASE, with a random start too."""
    return with_random_start(*one_delta(CASE, n_in, n_out, **options))


def weights_of(delta: Any, x: Tensor) -> Tensor:
    """Softmax of all experts; of them the k largest, made to sum to 1."""
    w = torch.exp(x @ delta.G.T)
    w = w / w.sum(-1, keepdim=True)
    k = delta.config.top_k
    if k is None:
        return w
    rank = (w[..., None, :] > w[..., :, None]).sum(-1)  # how many are larger
    w = w * (rank < k)
    return w / w.sum(-1, keepdim=True)


def loop(delta: Any, x: Tensor) -> Tensor:
    """s sum_i w_i(x) B_i A_i x, expert by expert."""
    w = weights_of(delta, x)
    total = torch.zeros(())
    for i in range(len(delta.A)):
        term = x @ delta.A[i].T @ delta.B[i].T
        if delta.A0 is not None:
            term = term - x @ delta.A0.T @ delta.B0.T
        total = total + w[..., i : i + 1] * term
    return delta.scaling * total


# The formula -----------------------------------------------------------------------------------


def test_worked_example() -> None:
    # By hand: w = (.25, .75) for x = (1, 1) and (.5, .5) for (0, 1); s = 2.
    model, delta = layer(2, 2, r=1, num_experts=2, lora_alpha=2)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[[1.0, 0]], [[0, 2]]]))
        delta.B.copy_(torch.tensor([[[1.0], [0]], [[0], [3]]]))
        delta.G.copy_(torch.tensor([[0, 0], [math.log(3), 0]]))
    x = torch.tensor([[1.0, 1], [0, 1]], dtype=torch.float64)
    expected = torch.tensor([[0.5, 9], [0, 6]], dtype=torch.float64)
    assert relative(update(model, x), expected) < 1e-7  # ln 3 in fp32


@settings(max_examples=40)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), n=st.integers(1, 5), r=st.integers(1, 3),
    axes=st.integers(1, 3), init=st.sampled_from(["kaiming", "pissa"]), data=st.data(),
)  # fmt: skip
def test_forward_is_the_loop(
    n_in: int, n_out: int, n: int, r: int, axes: int, init: str, data: Any
) -> None:
    """Outputs and all gradients, dense and top-k, for inputs of 2, 3 and 4 axes."""
    k = data.draw(st.one_of(st.none(), st.integers(1, n)))
    model, delta = layer(n_in, n_out, num_experts=n, r=r, top_k=k, init=init)
    x = tiny.numbers(*[2] * axes, n_in).requires_grad_()
    dy = tiny.numbers(*[2] * axes, n_out, key=1)
    fast, slow = update(model, x), loop(delta, x)
    assert float((fast - slow).detach().abs().max()) < 1e-12 * max(
        float(slow.detach().abs().max()), 1
    )
    wanted = [x, *delta.parameters()]
    for p, found, expected in zip(
        wanted,
        torch.autograd.grad(fast, wanted, dy),
        torch.autograd.grad(slow, wanted, dy),
        strict=True,
    ):
        scale = max(float(expected.abs().max()), 1)  # n = 1: the router's gradient is zero
        assert float((found - expected).abs().max()) < 1e-12 * scale, p.shape


@settings(max_examples=30)
@given(n=st.integers(1, 8), tokens=st.integers(1, 5), flat=st.booleans(), data=st.data())
def test_top_k_keeps_k_weights_that_sum_to_one(n: int, tokens: int, flat: bool, data: Any) -> None:
    """Exactly k are live, where weights are equal too."""
    k = data.draw(st.integers(1, n))
    G = torch.zeros(n, 6) if flat else tiny.numbers(n, 6, dtype=torch.float32)
    w = TokenRouter(G, "pair", top_k=k).weights(tiny.numbers(2, tokens, 6, dtype=torch.float32))
    assert w.shape == (2, tokens, n)
    assert bool(((w > 0).sum(-1) == k).all())
    assert float((w.sum(-1) - 1).abs().max()) < 1e-6
    dense = TokenRouter(G, "pair").weights(tiny.numbers(2, tokens, 6, dtype=torch.float32))
    assert bool(((w > 0) <= (dense >= dense.topk(k).values[..., -1:])).all())


def test_unused_experts_have_gradient_zero() -> None:
    model, delta = layer(num_experts=3, top_k=1)
    with torch.no_grad():
        delta.G.copy_(torch.eye(3, 7) * 50)
    x = torch.zeros(4, 7, dtype=torch.float64)
    x[:, 1] = 1  # every token prefers expert 1
    model(x).square().sum().backward()
    assert delta.B.grad[1].any()
    assert not delta.B.grad[[0, 2]].any()
    assert not delta.A.grad[[0, 2]].any()


def test_one_expert_is_lora() -> None:
    model, host = one_layer(CASE, 7, 5, torch.float32, num_experts=1)
    delta: Any = host.plait_delta["default"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["linear"])
    lora: Any = get_peft_model(tiny.OneLinear(7, 5, torch.float32), config)  # type: ignore[arg-type]
    linear = lora.get_submodule("base_model.model.linear")
    with torch.no_grad():
        linear.lora_A["default"].weight.copy_(delta.A[0])
        linear.lora_B["default"].weight.copy_(delta.B[0])
    x = tiny.numbers(6, 7, dtype=torch.float32)
    ours, theirs = model(x), lora(x)
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert relative(delta.B.grad[0], linear.lora_B["default"].weight.grad) < 1e-6
    assert float(delta.G.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_token_alone_decides(top_k: int | None) -> None:
    model = wrap(CASE, init_weights=False, top_k=top_k)
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


def test_a_number_of_experts_for_each_block(tmp_path: Path) -> None:
    """A list as in MoLA's scripts; counted, saved, loaded, and too short a list is refused."""
    model = wrap(CASE, num_experts=[2, 4], top_k=2)
    assert [len(d.A) for d in deltas(model)] == [2] * 3 + [4] * 3
    assert [d.rank() for d in deltas(model)] == [4] * 6
    checks.counts_are_the_formula(CASE)
    expected = sum(
        len(d.A) * (2 * (one.in_features + one.out_features) + one.in_features)
        for d, one in zip(deltas(model), layers(model), strict=True)
    )
    assert sum(p.numel() for p in trained(model).values()) == expected
    steps(model, adamw(model, 1e-2), 2)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["num_experts"] == [2, 4]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), logits(model))
    text = r"num_experts has 1 entries, and model\.layers\.1\.self_attn\.q_proj is not in one of as"
    with pytest.raises(ValueError, match=text):
        wrap(CASE, num_experts=[2])
    with pytest.raises(ValueError, match="num_experts has 2 entries, and linear is not in one"):
        one_layer(CASE, 7, 5, num_experts=[2, 4])


def test_no_weight_holds_a_live_router() -> None:
    model = wrap(CASE, init_weights=False)
    for act in (model.merge_adapter, model.merge_and_unload, lambda: to_lora(model)):
        with pytest.raises(plait.NotMergeable, match=r"molora cannot be merged: .*approx=\"mean\""):
            act()
    with torch.no_grad():
        for delta in deltas(model):
            delta.G.zero_()
    expected = logits(model)
    model.merge_adapter(approx="mean")
    assert relative(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert {one.rank for one in to_lora(model, approx="mean").layers} == {6}


def test_defaults() -> None:
    config = plait.MoLoraConfig()
    assert (config.r, config.lora_alpha, config.num_experts, config.top_k) == (4, 32, 8, None)
    assert (config.balance, config.balance_weight, config.delta) == ("none", 1e-3, 0.0)
    assert not any(d.needs_events for d in deltas(wrap(CASE)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_experts": 0}, "num_experts = 0: give whole numbers from 1"),
        ({"num_experts": [2, 0]}, r"num_experts = \[2, 0\]: give whole numbers from 1"),
        ({"top_k": 9}, "top_k = 9 with 8 experts. Give 8 or less"),
        ({"top_k": 3, "num_experts": [4, 2]}, "top_k = 3 with 2 experts. Give 2 or less"),
        ({"top_k": 0}, "top_k = 0 is out of range. Give 1 or more"),
        (
            {"num_experts": 3, "balance": "loramoe"},
            'balance = "loramoe" halves the experts. 3 is odd; give even',
        ),
        ({"num_experts": [2, 5], "balance": "loramoe"}, "5 is odd; give even"),
        ({"balance": "mola"}, "balance = 'mola' is not known. Use one of 'none', 'loramoe'"),
        ({"balance_weight": -1}, "balance_weight = -1 is out of range"),
        ({"delta": 0.5}, 'delta = 0.5 is for balance = "loramoe". Set it as well'),
    ],
)
def test_refused_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.MoLoraConfig(**options)


def test_switch_without_top_k_is_warned() -> None:
    with pytest.warns(plait.PlaitWarning, match="without top_k is the constant 1. Give top_k"):
        plait.MoLoraConfig(balance="switch")


# Balance losses, by hand -----------------------------------------------------------------------


def config(**options: Any) -> Any:
    """A config of a balanced mixture."""
    return plait.MoLoraConfig(**{"num_experts": 2, "balance": "loramoe", **options})


def test_loramoe_by_hand() -> None:
    # q = (.75, .25; .25, .75): mean .5, variance (4 * .0625) / 3; over .25: 1/3.
    w = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]], dtype=torch.float64)
    kept = torch.ones(2, 1, dtype=torch.float64)
    assert float(loramoe(w, kept, NOWHERE, config())) == pytest.approx(1 / 3, rel=1e-8)
    # delta .5, types 1, 0: z = (1.125, .125; .125, 1.125): mean .625, variance 1/3.
    typed = Rows(sample_types=torch.tensor([1, 0]))
    found = float(loramoe(w, kept, typed, config(delta=0.5)))
    assert found == pytest.approx((1 / 3) / 0.625**2, rel=1e-8)
    # types 0, 1: z = (.375, .375; .375, .375)
    typed = Rows(sample_types=torch.tensor([0, 1]))
    assert float(loramoe(w, kept, typed, config(delta=0.5))) == pytest.approx(0, abs=1e-12)


def test_switch_by_hand() -> None:
    # Both tokens choose expert 0: f = (1, 0), p = (.675, .325), 2 * .675.
    w = torch.tensor([[[0.75, 0.25], [0.6, 0.4]]], dtype=torch.float64)
    kept = torch.ones(1, 2, dtype=torch.float64)
    options = config(balance="switch", top_k=1)
    assert float(switch(w, kept, NOWHERE, options)) == pytest.approx(1.35)
    # Without the second token: 2 * .75.
    kept[0, 1] = 0
    assert float(switch(w, kept, NOWHERE, options)) == pytest.approx(1.5)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 4), tokens=st.integers(1, 5), half=st.integers(1, 3),
    key=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_balance_is_the_loop(batch: int, tokens: int, half: int, key: int, data: Any) -> None:
    """Entry by entry, with padding and types; never negative."""
    n = 2 * half
    w = (3 * tiny.numbers(batch, tokens, n, key=key)).softmax(-1)
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    kept = torch.tensor([[float(t < length) for t in range(tokens)] for length in lengths]).double()
    types = torch.arange(batch) % 2
    k = data.draw(st.integers(1, n))
    z = []
    for row in range(batch):
        for e in range(n):
            q = sum(float(w[row, t, e]) for t in range(lengths[row]))
            z.append(q * (1.5 if (e < half) == (int(types[row]) == 1) else 0.5))
    mean = sum(z) / len(z)
    by_hand = sum((one - mean) ** 2 for one in z) / (len(z) - 1) / (mean**2 + 1e-10)
    found = float(loramoe(w, kept, Rows(sample_types=types), config(num_experts=n, delta=0.5)))
    assert found == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    assert found >= 0

    f, p, total = [0.0] * n, [0.0] * n, sum(lengths)
    for row in range(batch):
        for t in range(lengths[row]):
            chosen = sorted(range(n), key=lambda e, r=row, t=t: -float(w[r, t, e]))[:k]
            for e in range(n):
                f[e] += (e in chosen) / (k * max(total, 1))
                p[e] += float(w[row, t, e]) / max(total, 1)
    by_hand = n * sum(a * b for a, b in zip(f, p, strict=True))
    found = float(switch(w, kept, NOWHERE, config(balance="switch", num_experts=n, top_k=k)))
    assert found == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    assert found >= 0


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_uniform_router_is_balanced(n: int) -> None:
    """0 by loramoe where rows have equally many tokens, 1 by switch."""
    w = torch.full((3, 5, n), 1 / n, dtype=torch.float64)
    kept = torch.ones(3, 5, dtype=torch.float64)
    assert float(loramoe(w, kept, NOWHERE, config(num_experts=n))) == pytest.approx(0, abs=1e-12)
    for k in range(1, n + 1):
        options = config(balance="switch", num_experts=n, top_k=k)
        assert float(switch(w, kept, NOWHERE, options)) == pytest.approx(1, rel=1e-12)


# Balance losses in training --------------------------------------------------------------------


def padded(rows: int = 8, key: int = 0) -> dict[str, Tensor]:
    """A batch with padding on the right, types, and labels everywhere, so that means add up."""
    ids = tiny.tokens(rows, 8, key)
    mask = (torch.arange(8)[None] < torch.tensor([8, 5, 7, 3] * 2)[:rows, None]).long()
    types = torch.arange(rows) % 2
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "sample_types": types}


def part_of(inputs: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """One micro-batch."""
    size = len(inputs["input_ids"]) // parts
    return {k: v[part * size : (part + 1) * size] for k, v in inputs.items()}


def router_of(delta: Any, seen: list[Tensor]) -> TokenRouter:
    """The router without a balance loss; its weights are noted, with their graph."""
    note = lambda w, rows: (seen.append(w), w)[1]  # noqa: E731
    return TokenRouter(delta.G, "pair", delta.config.top_k, note)


def explicit(
    case: Case, micro_batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Gradients of mean loss + weight * mean over the micro-batches of the sum over layers."""
    model = wrap(case, init_weights=False, balance="none", delta=0.0).train()
    options = case.config()
    kind = {"switch": switch, "loramoe": loramoe}[options.balance]
    seen: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(MoLora, "mix", lambda self: router_of(self, seen))
        for inputs in micro_batches:
            seen.clear()
            mask, types = inputs.get("attention_mask"), inputs.get("sample_types")
            given = {k: v for k, v in inputs.items() if k != "sample_types"}
            loss = model(**given).loss
            kept = torch.ones(inputs["input_ids"].shape) if mask is None else mask.float()
            terms = [kind(w, kept, Rows(sample_types=types), options) for w in seen]
            assert len(terms) == len(deltas(model))
            total = loss + options.balance_weight * torch.stack(terms).sum()
            (total / len(micro_batches)).backward()
    return {n: p.grad for n, p in trained(model).items() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 2e-5) -> None:
    """Assert equal gradients."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(found[name], value) < bound, name


def gradients(model: Any) -> dict[str, Tensor]:
    """Of what trains."""
    return {n: p.grad for n, p in trained(model).items() if p.grad is not None}


@each
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("parts", [1, 4])
def test_gradient_is_the_mean_over_the_micro_batches(
    case: Case, task_type: str | None, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = padded()
    micro = [part_of(inputs, p, parts) for p in range(parts)]
    expected = explicit(case, micro, monkeypatch)
    model = wrap(case, init_weights=False, task_type=task_type).train()
    if parts > 1:
        plait.set_micro_batches(model, parts)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    for one in micro:
        (model(**one).loss / parts).backward()
    optimizer.step()
    same(gradients(model), expected)
    plain = explicit(Case("molora", {**case.options, "balance_weight": 0.0}), micro, monkeypatch)
    assert any(relative(plain[n], v) > 1e-2 for n, v in expected.items())  # it is no small thing


@each
def test_what_the_loss_is_divided_by_does_not_matter(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss times 100 gets the same balance gradient, not 100 of it."""
    grads = []
    for factor in (0.0, 100.0):
        model = wrap(case, init_weights=False).train()
        (factor * model(**padded()).loss).backward()
        grads.append(gradients(model))
    plain = wrap(case, init_weights=False, balance="none", delta=0.0).train()
    given = {k: v for k, v in padded().items() if k != "sample_types"}
    (100 * plain(**given).loss).backward()
    for name, p in trained(plain).items():
        assert p.grad is not None
        balance = grads[0][name]
        difference = (grads[1][name] - p.grad - balance).abs().max()
        assert difference <= 0.02 * balance.abs().max() + 1e-4 * p.grad.abs().max(), name


@each
def test_outputs_are_those_without_balance(case: Case) -> None:
    model = wrap(case, init_weights=False).train()
    plain = wrap(case, init_weights=False, balance="none", delta=0.0).train()
    given = {k: v for k, v in padded().items() if k != "sample_types"}
    with_types = model(**padded()).logits
    torch.testing.assert_close(with_types, plain(**given).logits, rtol=0, atol=1e-6)
    model.eval()
    expected = plain.eval()(**given).logits
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-6)


@each
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_double_it(
    case: Case, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro = [part_of(padded(), p, 2) for p in range(2)]
    expected = explicit(case, micro, monkeypatch)
    model = wrap(case, init_weights=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plait.set_micro_batches(model, 2)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    model.train()
    for one in micro:
        (model(**one).loss / 2).backward()
    assert {d.balance.count for d in deltas(model)} == {2}
    optimizer.step()
    assert {d.balance.count for d in deltas(model)} == {0}
    same(gradients(model), expected)


def test_recomputation_of_two_masks_is_refused() -> None:
    """A backward of two forwards cannot know whose padding a recomputed layer had."""
    model = wrap(SWITCH, init_weights=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    one, two = (model(**part_of(padded(key=k), k, 2)).loss for k in range(2))
    (one + two).backward()  # equal masks
    inputs = padded(4)
    one = model(**inputs).loss
    two = model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(0)}).loss
    with pytest.raises(RuntimeError, match="different sample_types or padding masks of a balance"):
        (one + two).backward()


def test_padding_is_left_out() -> None:
    """Each layer's loss is that of the real tokens: what padding says does not reach it."""
    for case in (SWITCH, TYPED):
        model = wrap(case, init_weights=False).train()
        inputs = padded(4)
        model(**inputs)
        first = [float(d.balance.last) for d in deltas(model)]
        other = dict(inputs)
        other["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 9)
        model(**other)
        second = [float(d.balance.last) for d in deltas(model)]
        assert first == pytest.approx(second, rel=1e-5)
        del other["attention_mask"]
        model(**other)
        assert [float(d.balance.last) for d in deltas(model)] != pytest.approx(first, rel=1e-3)


def test_mixed_batches_balance_their_own_rows() -> None:
    model = wrap(TYPED, init_weights=False)
    model.add_adapter("other", TYPED.config(init_weights=False, seed=3))
    model.base_model.set_adapter(["default", "other"])
    inputs = padded(4)
    names = ["default", "other", "other", "default"]
    model.train()(**inputs, adapter_names=names)
    found = {a: [float(d.balance.last) for d in deltas(model, a)] for a in ("default", "other")}
    for adapter, own in (("default", [0, 3]), ("other", [1, 2])):
        model.base_model.set_adapter([adapter])
        model.train()(**{k: v[own] for k, v in inputs.items()})
        alone = [float(d.balance.last) for d in deltas(model, adapter)]
        assert found[adapter] == pytest.approx(alone, rel=1e-4)


def test_frozen_adapters_are_not_balanced() -> None:
    model = wrap(SWITCH, init_weights=False).train()
    for delta in deltas(model):
        delta.requires_grad_(False)
    model.enable_input_require_grads()
    model(**padded()).loss.backward()
    assert all(d.balance.last is None and d.balance.count == 0 for d in deltas(model))


# Who tells the micro-batches -------------------------------------------------------------------

UNTOLD = (
    r"molora: this optimizer step had 2 micro-batches and the balance loss took each for a step of "
    r"its own\. Call plait\.set_micro_batches\(model, 2\) before training, or add "
    r"plait\.PlaitCallback\(\) to the Trainer"
)


@each
def test_untold_micro_batches_are_refused(case: Case) -> None:
    model = wrap(case, init_weights=False).train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    before = [p.detach().clone() for p in trained(model).values()]
    for part in range(2):
        model(**part_of(padded(), part, 2)).loss.backward()
    with pytest.raises(ValueError, match=UNTOLD):
        optimizer.step()
    assert all(map(torch.equal, before, trained(model).values()))
    with pytest.warns(plait.PlaitWarning, match=UNTOLD):
        plait.after_step(model)  # by hand, the step is over: a warning is all that is left
    model(**padded()).loss.backward()
    optimizer.step()  # one micro-batch needs no word
    with pytest.raises(ValueError, match=r"set_micro_batches: count = 0\. Give 1 or more"):
        plait.set_micro_batches(model, 0)


def recorded(model: Any) -> list[dict[str, Tensor]]:
    """The training batches that a model gets from now on."""
    seen: list[dict[str, Tensor]] = []
    wanted = ("input_ids", "labels", "attention_mask", "sample_types")

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append({k: kwargs[k].clone() for k in wanted if k in kwargs})

    model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    return seen


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    """One step of 8 rows by SGD with a rate of 1: the parameters move by the gradient."""
    parts = options.get("gradient_accumulation_steps", 1)
    callbacks = options.pop("callbacks", [plait.PlaitCallback()])
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 8 // parts,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "logging_strategy": "no", "max_grad_norm": 0.0, "remove_unused_columns": False,
            **options,
        }
    )  # fmt: skip
    inputs = padded()
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(8)]
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return Trainer(
        model, arguments, train_dataset=rows, callbacks=callbacks, optimizers=(optimizer, schedule)  # type: ignore[arg-type]
    )  # fmt: skip


@each
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("parts", [1, 4])
def test_under_trainer(
    case: Case, task_type: str | None, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PlaitCallback tells; types go through the collator, the Trainer and the model."""
    model = wrap(case, init_weights=False, task_type=task_type)
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    seen = recorded(model)
    config, counts = model.peft_config["default"], []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counts.append(config.micro_batches)

    callbacks = [plait.PlaitCallback(), Note()]
    trainer(model, tmp_path, gradient_accumulation_steps=parts, callbacks=callbacks).train()
    assert len(seen) == parts
    assert counts == [parts]
    assert config.micro_batches is None  # PlaitCallback sets it for the run
    expected = explicit(case, seen, monkeypatch)
    moved = {n: before[n] - p.detach() for n, p in trained(model).items()}
    same(moved, expected, bound=1e-3)  # differences of fp32 numbers


def test_the_trainer_drops_types_unless_told(tmp_path: Path) -> None:
    text = (
        r"molora: delta = 0\.5 needs the type of each row, 0 or 1\. Pass model\(\.\.\., "
        r"sample_types=\.\.\.\), or set delta = 0"
    )
    with pytest.raises(ValueError, match=text):
        trainer(wrap(TYPED), tmp_path, remove_unused_columns=True).train()
    trainer(wrap(LORAMOE), tmp_path, remove_unused_columns=True).train()


def test_trainer_without_the_callback(tmp_path: Path) -> None:
    trainer(wrap(SWITCH), tmp_path, callbacks=[]).train()
    with pytest.raises(ValueError, match=UNTOLD):
        trainer(wrap(SWITCH), tmp_path, callbacks=[], gradient_accumulation_steps=2).train()
    trainer(wrap(CASE), tmp_path, callbacks=[], gradient_accumulation_steps=2).train()


@pytest.mark.parametrize("told", [True, False])
def test_under_accelerate(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    micro = [part_of(padded(), p, 2) for p in range(2)]
    expected = explicit(TYPED, micro, monkeypatch)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = wrap(TYPED, init_weights=False).train()
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if told:
        plait.set_micro_batches(wrapped, 2)

    def run() -> None:
        for inputs in micro:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**inputs).loss)
                prepared.step()
                prepared.zero_grad()

    if told:
        run()
        moved = {n: before[n] - p.detach() for n, p in trained(model).items()}
        same(moved, expected, bound=1e-3)
    else:
        with pytest.raises(ValueError, match=UNTOLD):
            run()


# Types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_types_are_checked(task_type: str | None) -> None:
    model = wrap(TYPED, task_type=task_type).train()
    inputs = padded(4)
    types = inputs.pop("sample_types")
    with pytest.raises(ValueError, match="needs the type of each row"):
        model(**inputs)
    with pytest.raises(ValueError, match="needs the type of each row"):
        model(**inputs, sample_types=types[:2])
    with pytest.raises(ValueError, match=r"sample_types holds \[0, 2, 0, 1\]\. Give 0 or 1 for"):
        model(**inputs, sample_types=torch.tensor([0, 2, 0, 1]))
    model(**inputs, sample_types=types)
    model.eval()(**inputs)  # evaluation needs none
    wrap(LORAMOE, task_type=task_type).train()(**inputs)  # nor does delta = 0
    for other in (wrap(CASE, task_type=task_type), wrap(SWITCH, task_type=task_type)):
        other.train()(**inputs, sample_types=types)  # and where given they do no harm


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        r"molora: a balance loss does not pass through the loss scale of fp16\. Use bf16, or "
        r'balance="none"'
    )
    for case in BALANCED:
        model = wrap(case).train()
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(ValueError, match=text),
        ):
            model(**padded())
        with torch.autocast("cpu", torch.float16):
            model.eval()(**padded())
        with torch.autocast("cpu", torch.bfloat16):
            model.train()(**padded()).loss.backward()
        assert all(d.balance.last.dtype == torch.float32 for d in deltas(model))
        assert all(g.isfinite().all() for g in gradients(model).values())
    with torch.autocast("cpu", torch.float16):
        wrap(CASE).train()(**padded())


def test_balance_balances() -> None:
    """What it is for: a router that prefers one expert spreads over all of them."""
    model, host = one_layer(SWITCH, 8, 8, torch.float32, top_k=1, balance_weight=1.0)
    delta: Any = host.plait_delta["default"]
    x = tiny.numbers(64, 8, dtype=torch.float32) + 1
    with torch.no_grad():
        delta.G.copy_(0.1 * tiny.numbers(4, 8, key=3))
        delta.G[0] += 0.2
    optimizer = torch.optim.SGD([delta.G], lr=0.2)
    losses = []
    for _ in range(60):
        (0 * model.train()(x)).sum().backward()
        losses.append(float(delta.balance.last))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 1.4
    assert losses[-1] < 1.1


# The gradients of fast_is_naive have the balance loss in them, on one side.
KEPT = [check for check in CHECKS if check is not checks.fast_is_naive]


@pytest.mark.parametrize("check", KEPT, ids=lambda check: check.__name__)
def test_contract_with_a_balance_loss(check: Any) -> None:
    check(SWITCH)


def test_contract_with_loramoe() -> None:
    for check in (checks.resume_is_exact, checks.checkpointing_changes_nothing):
        check(LORAMOE)


# plait train -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def test_types_in_a_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The column sample_type reaches every micro-batch of training; without it, an error."""
    seen = []

    def spy(w: Tensor, kept: Tensor, rows: Rows, config: Any) -> Tensor:
        assert rows is not None
        assert rows.sample_types is not None
        seen.append(rows.sample_types.tolist())
        return loramoe(w, kept, rows, config)

    monkeypatch.setattr(sys.modules[MoLora.__module__], "loramoe", spy)
    rows = [{**row, "sample_type": i % 2} for i, row in enumerate(copy_rows())]
    path = write_rows(tmp_path / "typed.jsonl", rows)
    method = {
        "name": "molora", "r": 2, "num_experts": 2, "balance": "loramoe", "delta": 0.5,
        "target_modules": ["q_proj"],
    }  # fmt: skip
    training = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    quick = {"generate": False}
    train(
        run_config(llama, path, tmp_path / "a", method=method, training=training, evaluation=quick)
    )
    assert len(seen) == 2 * 2 * 2  # steps, micro-batches, blocks
    assert all(len(types) == 4 and set(types) <= {0, 1} for types in seen)
    assert {t for types in seen for t in types} == {0, 1}

    plain = write_rows(tmp_path / "plain.jsonl", copy_rows())
    text = r"method\.delta is 0\.5, but the rows have no sample_type column\. Name it in data\.colu"
    with pytest.raises(ValueError, match=text):
        train(run_config(llama, plain, tmp_path / "b", method=method, training=training))
    wrong = write_rows(tmp_path / "wrong.jsonl", [{**r, "sample_type": "law"} for r in rows])
    with pytest.raises(ValueError, match=r"line \d+: the sample_type is 'law'\. Give 0 or 1"):
        train(run_config(llama, wrong, tmp_path / "c", method=method, training=training))
