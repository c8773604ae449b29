"""DropLoRA: what a mask does, whom it is shared with, and plain LoRA everywhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import plait
from plait.core.init import seeded
from plait.kernels.choose import switches
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    logits,
    relative,
    steps,
    trained,
    update,
    wrap,
)
from plait.testing.helpers import one_delta as layer
from plait.upstream.export import to_lora

TOKEN = Case("droplora", {"scope": "token", "lora_dropout": 0.0})
STEP = Case("droplora", {"scope": "step", "lora_dropout": 0.0})


def loop(delta: Any, x: Tensor, z: Tensor) -> Tensor:
    """The update of tokens x (T, in) with masks z (T, r), one rank at a time."""
    s, p = delta.config.lora_alpha / delta.config.r, delta.config.inner_dropout
    y = torch.zeros(len(x), len(delta.B), dtype=x.dtype)
    for t in range(len(x)):
        for k in range(delta.config.r):
            y[t] += s * z[t, k] / (1 - p) * (delta.A[k] @ x[t]) * delta.B[:, k]
    return y


def drawn(delta: Any) -> Tensor:
    """The mask (r,) of the next step, by its definition: from seed, completed steps, layer."""
    gen = seeded(delta.config.seed, delta.steps, delta.base.name)
    return (torch.rand(delta.config.r, generator=gen) >= delta.config.inner_dropout).double()


# Formula ---------------------------------------------------------------------------------------


def test_published_defaults() -> None:
    config = plait.DropLoraConfig()
    assert (config.inner_dropout, config.scope, config.lora_dropout) == (0.5, "token", 0.05)


@settings(max_examples=20)
@given(
    n_in=st.integers(1, 7), n_out=st.integers(1, 7), r=st.integers(1, 4),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9]), scope=st.sampled_from(["token", "step"]),
)  # fmt: skip
def test_training_is_the_loop_over_ranks(
    n_in: int, n_out: int, r: int, p: float, scope: str
) -> None:
    """Outputs and gradients, and the update without a mask in evaluation."""
    case = TOKEN if scope == "token" else STEP
    model, delta = layer(case, n_in, n_out, r=r, inner_dropout=p)
    x, dy = tiny.numbers(3, n_in), tiny.numbers(3, n_out, key=1)
    if scope == "step":
        z = drawn(delta).expand(3, -1)
        fast = update(model, x)
    else:
        with tiny.seed(2):
            fast = update(model, x)
        with tiny.seed(2):
            z = torch.nn.functional.dropout(torch.ones(3, r, dtype=torch.float64), p) * (1 - p)
    slow = loop(delta, x, z)
    assert relative(fast, slow) < 1e-12
    params = [delta.A, delta.B]
    for found, wanted in zip(
        torch.autograd.grad(fast, params, dy), torch.autograd.grad(slow, params, dy), strict=True
    ):
        assert relative(found, wanted) < 1e-12
    model.eval()
    plain = loop(delta, x, torch.full((3, r), 1 - p, dtype=torch.float64))
    assert relative(update(model, x), plain) < 1e-12


@pytest.mark.parametrize("case", [TOKEN, STEP], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_evaluation_is_lora_and_p_0_is_lora_in_training(
    case: Case, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit against upstream's LoRA of the same weights, and against no gate at all.

    One thing is not equal to the last bit: in training the fused form adds the update's share of a
    gradient to that of the frozen layer within one product, which rounds once less than upstream.
    """
    with tiny.seed():
        lora = get_peft_model(
            tiny.llama(),
            LoraConfig(
                r=4, lora_alpha=8, lora_dropout=dropout, task_type="CAUSAL_LM",
                target_modules=["q_proj", "v_proj", "up_proj"],
            ),
        )  # fmt: skip

    def same_weights(model: Any) -> Any:
        mine = dict(model.named_modules())
        for name, module in lora.named_modules():
            if name.endswith(("q_proj", "v_proj", "up_proj")):
                delta = mine[name].plait_delta["default"]
                with torch.no_grad():
                    module.lora_B["default"].weight.copy_(delta.B)
                    module.lora_A["default"].weight.copy_(delta.A)
        return model

    dropping = same_weights(wrap(case, init_weights=False, lora_dropout=dropout))
    assert torch.equal(logits(dropping), base_logits(lora.eval()))
    assert not torch.equal(logits(dropping.train()), base_logits(lora))  # p = 0.5 does something

    model = same_weights(
        wrap(case, init_weights=False, lora_dropout=dropout, inner_dropout=0.0)
    ).train()
    ungated = wrap(case, init_weights=False, lora_dropout=dropout, inner_dropout=0.0).train()
    for delta in deltas(ungated):
        delta.gates = []

    def end(one: Any) -> list[Tensor]:
        """Loss and gradients."""
        one.zero_grad()
        with tiny.seed(3):
            loss = one(**batch(model)).loss
        loss.backward()
        gradients = [p.grad for _, p in sorted(trained(one).items()) if p.grad is not None]
        assert len(gradients) == 2 * 6
        return [loss.detach(), *gradients]

    expected = end(lora.train())
    fused = end(model)
    assert all(map(torch.equal, fused, end(ungated)))
    for found, wanted in zip(fused, expected, strict=True):
        assert relative(found, wanted) < 1e-6
    monkeypatch.setattr(switches, "fused", False)
    assert all(map(torch.equal, end(model), expected))
    assert all(map(torch.equal, end(ungated), expected))


def test_mean_over_masks_is_evaluation() -> None:
    model, delta = layer(TOKEN, r=4, lora_alpha=4)
    x = tiny.numbers(1, 7)
    with tiny.seed(), torch.no_grad():
        mean = update(model, x.expand(20_000, -1)).mean(0, keepdim=True)
    assert relative(mean, update(model.eval(), x)) < 0.05

    model, delta = layer(STEP, r=4, lora_alpha=4)
    x = tiny.numbers(1, 7)
    total = torch.zeros(4, dtype=torch.float64)
    for _ in range(20_000):
        total += delta.gate()
        delta.t += 1
    with torch.no_grad():
        mean = delta.scaling * (total / 20_000 * (x @ delta.A.T)) @ delta.B.T
    assert relative(mean, update(model.eval(), x)) < 0.05


# Scope -----------------------------------------------------------------------------------------


def test_step_is_one_matrix_of_the_kept_ranks() -> None:
    kept = set()
    for seed in range(8):
        model, delta = layer(STEP, 9, 8, r=5, seed=seed)
        x = tiny.numbers(40, 9)
        z = drawn(delta)
        kept.add(int(z.sum()))
        y = update(model, x)
        dW = torch.linalg.lstsq(x, y.detach()).solution.T
        assert relative(x @ dW.T, y) < 1e-10  # one matrix for all tokens
        assert int(torch.linalg.matrix_rank(dW, atol=1e-10)) == int(z.sum())
        y.square().sum().backward()
        for k in range(5):
            assert bool(delta.A.grad[k].any()) == bool(z[k])
            assert bool(delta.B.grad[:, k].any()) == bool(z[k])
    assert len(kept) > 1


def test_token_differs_between_tokens() -> None:
    model, _ = layer(TOKEN, 9, 8, r=5)
    x = tiny.numbers(1, 9).expand(30, -1)
    with tiny.seed():
        y = update(model, x)
    assert len({tuple(row) for row in y.detach().numpy().round(9)}) > 10


def test_a_step_may_drop_every_rank() -> None:
    model, delta = layer(STEP, r=1, inner_dropout=0.9)
    x = tiny.numbers(3, 7)
    while drawn(delta).any():
        delta.t += 1
    y = update(model, x)
    assert not y.any()
    y.sum().backward()
    assert not delta.A.grad.any()
    assert not delta.B.grad.any()


def masks(model: Any) -> list[Tensor]:
    """The step's mask of each layer."""
    return [delta.gate().clone() for delta in deltas(model)]


def test_step_mask_holds_for_a_step_and_changes_after_it() -> None:
    """Equal over micro-batches, another in the next step; layers and seeds differ."""
    model = wrap(STEP).train()
    optimizer = adamw(model, 1e-2)
    seen = []
    for step in range(4):
        first = masks(model)
        for part in range(2):
            model(**batch(model, rows=2, key=2 * step + part)).loss.backward()
            for before, now, delta in zip(first, masks(model), deltas(model), strict=True):
                assert torch.equal(before, now)
                assert torch.equal(now.double() / 2, drawn(delta))
        seen.append(torch.cat(first))
        optimizer.step()
        optimizer.zero_grad()
    assert not all(torch.equal(seen[0], other) for other in seen[1:])
    assert not all(torch.equal(first[0], other) for other in first[1:])
    assert not torch.equal(torch.cat(masks(wrap(STEP, seed=1).train())), seen[0])


def test_step_masks_after_resume(tmp_path: Path) -> None:
    whole, half = wrap(STEP), wrap(STEP)
    steps(whole, adamw(whole, 1e-2), 5)
    steps(half, adamw(half, 1e-2), 5)
    half.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True).train()
    for wanted, found in zip(masks(whole.train()), masks(resumed), strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("case", [TOKEN, STEP], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_masks(case: Case, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = wrap(case, init_weights=False, lora_dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            model.enable_input_require_grads()
        model.train()
        with tiny.seed(5):
            model(**batch(model)).loss.backward()
        gradients.append({n: p.grad for n, p in trained(model).items()})
    assert any(g is not None and g.any() for g in gradients[0].values())
    for name, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][name]), name  # type: ignore[arg-type]


def test_token_needs_no_events() -> None:
    model = wrap(TOKEN).train()
    for _ in range(51):
        model(**batch(model, rows=1)).loss.backward()
    assert all(delta.t is None for delta in deltas(model))
    model.state_dict()
    model = wrap(STEP).train()
    for _ in range(51):
        model(**batch(model, rows=1)).loss.backward()
    with pytest.raises(plait.EventNeverFired, match="droplora: 51 training forwards"):
        model.state_dict()


# Beside LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [TOKEN, STEP], ids=str)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_merged_exported_and_in_stock_peft(case: Case, init: str, tmp_path: Path) -> None:
    model = wrap(case, init=init, inner_dropout=0.25)
    with tiny.seed():
        steps(model, adamw(model, 1e-2), 8, key=None)  # each rank was kept in one of them
    expected = logits(model)
    export = to_lora(model.train())  # the mode does not matter
    model.eval()
    assert export.error == 0
    assert {part.rank for part in export.layers} == {8 if init == "pissa" else 4}
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    with torch.no_grad():
        found = stock(input_ids=tiny.tokens()).logits
    assert float((found - expected).abs().max()) < 1e-6
    model.merge_adapter()
    assert float((logits(model) - expected).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"inner_dropout": 1.0}, r"inner_dropout = 1\.0 is out of .* 0 or more and less than 1\."),
        ({"inner_dropout": -0.1}, r"inner_dropout = -0\.1 is out .* 0 or more and less than 1\."),
        ({"scope": "layer"}, r"scope = 'layer' is not known\. Use one of 'token', 'step'\."),
        ({"gates": ["droplora"]}, r"gates: droplora acts on droplora twice\. Give it once\."),
        ({"gates": [{"name": "sora", "p": 1}]}, r"gates: sora: p is not known\. "),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.DropLoraConfig(**options)
