"""ALoRA (asymmetric): the mix in rank space against the loop, the router, task ids."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import plait
from plait.testing import helpers, tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    batch,
    deltas,
    logits,
    one_delta,
    one_layer,
    relative,
    trained,
    update,
)
from plait.upstream.export import to_lora
from tests.support.routers import Softmaxes, form

TOKEN = Case("shared_b", {"r": 2, "num_A": 3})
TASK = Case("shared_b", {"r": 2, "routing": "task", "tasks": ["law", "care", "maths"]})


def layer(case: Case = TOKEN, n_in: int = 7, n_out: int = 5, **options: Any) -> tuple[Any, Any]:
    """`one_delta` of the case."""
    return one_delta(case, n_in, n_out, **options)


def loop(delta: Any, x: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
    """s B sum_i w_i(x) A_i x, expert by expert; inputs: of each A, where they differ from x."""
    weights = torch.exp(x @ delta.G.T)
    weights = weights / weights.sum(-1, keepdim=True)
    total = torch.zeros(())
    for i, A in enumerate(delta.A):
        own = x if inputs is None else inputs[i]
        total = total + weights[..., i : i + 1] * (own @ A.T @ delta.B.T)
    return delta.scaling * total


def test_worked_example() -> None:
    # By hand: w = (.25, .75) and (.5, .5); mixed h 1.75 and 1.0.
    model, delta = layer(n_in=2, n_out=2, r=1, num_A=2, lora_alpha=2)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[[1.0, 0]], [[0, 2]]]))
        delta.B.copy_(torch.tensor([[1.0], [3]]))
        delta.G.copy_(torch.tensor([[0, 0], [math.log(3), 0]]))
    x = torch.tensor([[1.0, 1], [0, 1]], dtype=torch.float64)
    expected = torch.tensor([[3.5, 10.5], [2, 6]], dtype=torch.float64)
    assert relative(update(model, x), expected) < 1e-7  # ln 3 in fp32


@settings(max_examples=25)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), n=st.integers(1, 4), r=st.integers(1, 3),
    axes=st.integers(1, 3),
)  # fmt: skip
def test_mix_is_the_loop(n_in: int, n_out: int, n: int, r: int, axes: int) -> None:
    """Outputs and all gradients, the router's too."""
    model, delta = layer(n_in=n_in, n_out=n_out, num_A=n, r=r)
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
        scale = max(float(expected.abs().max()), 1e-3)  # n = 1: the router's gradient is zero
        assert float((found - expected).abs().max()) < 1e-12 * max(scale, 1), p.shape


def test_one_mask_serves_all_experts_and_the_router_reads_x() -> None:
    model, delta = layer(lora_dropout=0.5)
    x = tiny.numbers(20, 7)
    with tiny.seed(1):
        found = update(model, x)
    with tiny.seed(1):
        dropped = torch.nn.functional.dropout(x, 0.5)
    assert relative(found, loop(delta, x, [dropped] * 3)) < 1e-12


def test_independent_masks() -> None:
    model, delta = layer(lora_dropout=0.5, independent_dropout=True)
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


def test_start() -> None:
    model = helpers.wrap(TOKEN)
    for delta in deltas(model):
        bound = 1 / math.sqrt(delta.base.in_features)
        assert not delta.B.any()
        assert 0.8 * bound < float(delta.A.abs().max()) <= bound
        assert 0.5 * bound < float(delta.G.abs().max()) <= bound
        for i in range(3):
            for j in range(i):
                corr = torch.corrcoef(torch.stack([delta.A[i].flatten(), delta.A[j].flatten()]))
                assert abs(float(corr[0, 1].detach())) < 0.6  # independent draws
    assert plait.SharedBLoraConfig().lora_dropout == 0.05
    assert plait.SharedBLoraConfig().num_A == 3


def test_permuting_the_experts_changes_nothing() -> None:
    model, delta = layer()
    x = tiny.numbers(6, 7)
    before = update(model, x)
    with torch.no_grad():
        order = [2, 0, 1]
        delta.A.copy_(delta.A[order].clone())
        delta.G.copy_(delta.G[order].clone())
    assert relative(update(model, x), before) < 1e-12


def test_one_expert_is_lora() -> None:
    """Bit for bit; and the router, having no choice, gets no gradient."""
    model, host = one_layer(TOKEN, 7, 5, torch.float32, num_A=1)
    delta: Any = host.plait_delta["default"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["linear"])
    lora = get_peft_model(tiny.OneLinear(7, 5, torch.float32), config)  # type: ignore[arg-type]
    linear: Any = lora.get_submodule("base_model.model.linear")
    with torch.no_grad():
        linear.lora_A["default"].weight.copy_(delta.A[0])
        linear.lora_B["default"].weight.copy_(delta.B)
    x = tiny.numbers(6, 7, dtype=torch.float32)
    assert delta.scaling == linear.scaling["default"]
    ours, theirs = model(x), lora(x)
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert relative(delta.B.grad, linear.lora_B["default"].weight.grad) < 1e-6
    assert float(delta.G.grad.abs().max()) < 1e-6


def test_uniform_router_is_the_mean() -> None:
    """merge(approx="mean") and the export with it are exact for a uniform router."""
    model = helpers.wrap(TOKEN, init_weights=False)
    with torch.no_grad():
        for delta in deltas(model):
            delta.G.zero_()
            mean = delta.scaling * delta.B @ delta.A.mean(0)
            assert relative(delta.weight(approx="mean"), mean) < 1e-6
    expected = logits(model)
    model.merge_adapter(approx="mean")
    assert relative(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert {layer.rank for layer in to_lora(model, approx="mean").layers} == {2}


def test_no_single_matrix_fits_a_live_router() -> None:
    model, _ = layer(n_in=8, n_out=8)
    with torch.no_grad():
        model.eval()
        x = tiny.numbers(200, 8)
        y = update(model, x)
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    assert float(rest.norm() / y.norm()) > 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_router_is_fp32_under_bf16(fused: bool) -> None:
    model, _ = one_layer(TOKEN, 7, 5, torch.bfloat16)
    with form(fused), Softmaxes() as softmaxes:
        assert model(tiny.numbers(6, 7).bfloat16()).dtype == torch.bfloat16
    (weights,) = softmaxes.seen
    assert weights.computed_in == weights.dtype == torch.float32
    assert weights.error < 1e-6


# Tasks -----------------------------------------------------------------------------------------


def test_each_row_uses_its_task() -> None:
    model, delta = layer(TASK)
    x, ids = tiny.numbers(4, 3, 7), torch.tensor([2, 0, 0, 1])
    expected = torch.stack(
        [delta.scaling * row @ (delta.B @ delta.A[k]).T for row, k in zip(x, ids, strict=True)]
    )
    assert relative(update(model, x, task_ids=ids), expected) < 1e-12
    per_token = torch.tensor([[0, 1, 2]] * 4)
    expected = torch.stack(
        [delta.scaling * x[:, k] @ (delta.B @ delta.A[k]).T for k in range(3)], dim=1
    )
    assert relative(update(model, x, task_ids=per_token), expected) < 1e-12
    assert "G" not in dict(delta.named_parameters())


def test_gradients_of_tasks() -> None:
    """A_k from its own rows only; an absent task's is 0, not None; B from all rows."""
    model, delta = layer(TASK)
    x, ids = tiny.numbers(4, 7), torch.tensor([0, 0, 2, 0])
    model(x, task_ids=ids).square().sum().backward()
    assert delta.A.grad[0].any()
    assert delta.A.grad[2].any()
    assert not delta.A.grad[1].any()
    whole = delta.B.grad.clone()
    delta.zero_grad()
    model(x[2:3], task_ids=ids[2:3]).square().sum().backward()
    alone = delta.A.grad[2].clone()
    assert not torch.equal(delta.B.grad, whole)
    delta.zero_grad()
    model(x, task_ids=ids).square().sum().backward()
    assert relative(delta.A.grad[2], alone) < 1e-12


def test_mixed_batch_is_separate_forwards() -> None:
    model = helpers.wrap(TASK, init_weights=False)
    ids = torch.tensor([1, 0, 2, 1])
    mixed = logits(model, task_ids=ids)
    for row, k in enumerate(ids):
        alone = logits(model, task_ids=torch.full((4,), int(k)))
        assert relative(mixed[row], alone[row]) < 1e-5


@pytest.mark.parametrize("task", ["law", "care", "maths"])
def test_a_task_is_one_stock_lora(task: str, tmp_path: Any) -> None:
    model = helpers.wrap(TASK, init_weights=False)
    ids = torch.full((4,), TASK.options["tasks"].index(task))
    expected = logits(model, task_ids=ids)
    export = to_lora(model, task=task)
    assert export.error == 0
    assert {layer.rank for layer in export.layers} == {2}
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        assert relative(stock(input_ids=tiny.tokens()).logits, expected) < 1e-6
    model.set_task(task)
    inputs = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(model(input_ids=inputs).logits, expected)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_missing_and_unknown_ids(task_type: str | None) -> None:
    model = helpers.wrap(TASK, task_type=task_type)
    ids = tiny.tokens()
    for training in (True, False):
        model.train(training)
        with pytest.raises(ValueError, match=r'no task_ids in this batch.*set_task\("law"\)'):
            model(input_ids=ids)
    model.set_task("care")
    model.eval()(input_ids=ids)
    with pytest.raises(ValueError, match="no task_ids in this batch"):
        model.train()(input_ids=ids)  # a default is for evaluation only
    model.set_task(None)
    with pytest.raises(ValueError, match="no task_ids"):
        model.eval()(input_ids=ids)
    for wrong, text in (
        (torch.tensor([0, 1, 2, 3]), r"task_ids holds 0\.\.3; .* 0\.\.2 \(law, care, maths\)"),
        (torch.tensor([0, -1, 2, 0]), r"task_ids holds -1\.\.2"),
        (torch.tensor([0, 1]), r"task_ids has shape \(2,\), the layer's input leads"),
    ):
        with pytest.raises(ValueError, match=text):
            model(input_ids=ids, task_ids=wrong)
    with pytest.raises(ValueError, match=r"Task 'maht' is not in this adapter.*law, care, maths"):
        model.set_task("maht")
    with pytest.raises(ValueError, match=r"set_task\('law'\): no adapter of this model has tasks"):
        helpers.wrap(TOKEN).set_task("law")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_repeats_ids_for_beams(task_type: str | None, beams: int) -> None:
    model = helpers.wrap(TASK, task_type=task_type, init_weights=False)
    with torch.no_grad():
        for delta in deltas(model):
            delta.A.mul_(8)  # tasks that say different things
    prompt, ids = tiny.tokens(3, 4), torch.tensor([0, 1, 2])
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    mixed = model.generate(input_ids=prompt, task_ids=ids, **options)
    seen = set()
    for row in range(3):
        one = slice(row, row + 1)
        alone = model.generate(input_ids=prompt[one], task_ids=ids[one], **options)
        width = alone.shape[1]
        assert torch.equal(mixed[row, :width], alone[0])
        model.set_task(TASK.options["tasks"][row])
        assert torch.equal(model.generate(input_ids=prompt[one], **options), alone)
        model.set_task(None)
        other = model.generate(input_ids=prompt[:1], task_ids=ids[one], **options)
        seen.add(tuple(other[0].tolist()))
    assert len(seen) > 1


def test_ids_survive_the_trainer(tmp_path: Any) -> None:
    """With remove_unused_columns=False, through collator and Trainer to the layers."""
    model = helpers.wrap(TASK)
    rows = [{"input_ids": t, "labels": t, "task_ids": k % 2} for k, t in enumerate(tiny.tokens(8))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True,
        remove_unused_columns=False, report_to=[], save_strategy="no", learning_rate=1e-2,
        disable_tqdm=True,
    )  # fmt: skip
    before = deltas(model)[0].A.detach().clone()
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    A = deltas(model)[0].A.detach()
    assert not torch.equal(A[:2], before[:2])
    assert torch.equal(A[2], before[2])  # no row of task 2: gradient 0 and no weight decay


def test_training_by_tasks_reaches_every_A() -> None:
    model = helpers.wrap(TASK)
    optimizer = helpers.adamw(model, 1e-2)
    for step in range(2):
        model.train()
        model(**batch(model, rows=6, key=step)).loss.backward()
        if step:
            assert all(part.any() for d in deltas(model) for part in d.A.grad)
        optimizer.step()
        optimizer.zero_grad()
    assert set(trained(model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"routing": "task"}, "routing = 'task' with tasks = None"),
        ({"tasks": ["a"]}, "routing = 'token' with tasks"),
        ({"routing": "task", "tasks": ["a", "a"]}, "names a task twice"),
        ({"routing": "row"}, "routing = 'row' is not known"),
        ({"num_A": 0}, "num_A = 0"),
    ],
)
def test_refused_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.SharedBLoraConfig(**options)


def test_merge_needs_a_task() -> None:
    model = helpers.wrap(TASK, init_weights=False)
    with pytest.raises(
        plait.NotMergeable, match=r"depends on the task\. Name one of law, care, maths"
    ):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Task 'tax' is not in this adapter"):
        model.merge_adapter(task="tax")
    with pytest.raises(plait.NotMergeable):
        to_lora(helpers.wrap(TOKEN, init_weights=False))
