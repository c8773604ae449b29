"""SoRA: the proximal step, the penalty, the gate's own rates, what is left when ranks are gone."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import plait
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    layers,
    logits,
    one_delta,
    relative,
    steps,
    trained,
    wrap,
)
from plait.upstream.export import to_lora

CASE = Case("sora", {"l1_weight": 0.1})
STILL = {"l1_weight": 0.0, "xi": 0.0}  # neither penalty nor threshold


layer = partial(one_delta, CASE)  # of one fp64 layer, in training


def set_gates(model: Any, *values: list[float]) -> None:
    """Give the first layers these gates."""
    with torch.no_grad():
        for delta, g in zip(deltas(model), values, strict=False):
            delta.g.copy_(torch.tensor(g))


def gates(model: Any) -> list[Tensor]:
    """Copies of all gates."""
    return [delta.g.detach().clone() for delta in deltas(model)]


# Formula ---------------------------------------------------------------------------------------


def test_published_defaults() -> None:
    config = plait.SoraConfig()
    assert (config.r, config.lora_alpha, config.l1_weight) == (8, 16, 10.0)
    assert (config.xi, config.prox, config.gate_lr) == (3e-4, "exact", None)


@settings(max_examples=20)
@given(n_in=st.integers(1, 7), n_out=st.integers(1, 7), r=st.integers(1, 4), pissa=st.booleans())
def test_update_is_the_loop_over_ranks(n_in: int, n_out: int, r: int, pissa: bool) -> None:
    """Outputs and gradients; with a start that is subtracted the gate acts on the whole rank."""
    model, delta = layer(n_in, n_out, r=r, init="pissa" if pissa else "kaiming")
    if pissa:
        delta.A0.copy_(tiny.numbers(*delta.A0.shape))
        delta.B0.copy_(tiny.numbers(*delta.B0.shape, key=1))
    x, dy = tiny.numbers(3, n_in), tiny.numbers(3, n_out, key=2)
    slow = torch.zeros(3, n_out, dtype=torch.float64)
    for t in range(3):
        for k in range(r):
            term = (delta.A[k] @ x[t]) * delta.B[:, k]
            if pissa:
                term = term - (delta.A0[k] @ x[t]) * delta.B0[:, k]
            slow[t] = slow[t] + delta.scaling * delta.g[k] * term
    fast = model(x) - layers(model)[0].base_layer(x)
    assert relative(fast, slow) < 1e-11
    params = [delta.A, delta.B, delta.g]
    for found, wanted in zip(
        torch.autograd.grad(fast, params, dy), torch.autograd.grad(slow, params, dy), strict=True
    ):
        assert float((found - wanted).abs().max()) < 1e-11 * max(float(wanted.abs().max()), 1)


def test_start() -> None:
    """A Kaiming, B = 0, g ~ N(0, 1), each layer its own draw; s = alpha / r."""
    model = wrap(CASE, r=64, lora_alpha=96)
    drawn = torch.cat(gates(model))
    assert abs(float(drawn.mean())) < 0.15
    assert 0.85 < float(drawn.std()) < 1.15
    assert not torch.equal(*gates(model)[:2])
    for delta in deltas(model):
        assert delta.scaling == 1.5
        assert not delta.B.any()
        assert float(delta.A.abs().max()) <= 1 / math.sqrt(delta.base.in_features)


def test_without_penalty_and_threshold_and_with_gates_of_1_it_is_lora() -> None:
    """Upstream's LoRA of the same start, over training, where g has no learning rate to move."""
    model = wrap(CASE, **STILL)
    lora = get_peft_model(
        tiny.llama(),
        LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj", "up_proj"],
        ),
    )  # fmt: skip
    modules: Any = dict(lora.named_modules())
    pairs = [(d, modules["base_model.model." + d.base.name]) for d in deltas(model)]
    for delta, module in pairs:
        delta.g.requires_grad_(False).fill_(1.0)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(delta.A)
    steps(model, adamw(model, 1e-2, eps=1e-6), 5, key=None)
    optimizer = adamw(lora, 1e-2, eps=1e-6)
    lora.train()
    for step in range(5):
        ids = tiny.tokens(key=step)
        lora(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for delta, module in pairs:
        assert torch.equal(delta.g, torch.ones(4))
        assert relative(delta.A, module.lora_A["default"].weight) < 1e-5
        assert relative(delta.B, module.lora_B["default"].weight) < 1e-5
    assert relative(logits(model), base_logits(lora.eval())) < 1e-5


# Penalty, decay, learning rate -----------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("parts", [1, 4])
def test_penalty_enters_once_per_step(task_type: str | None, parts: int) -> None:
    """l1_weight sign(g) / (all gate entries), whatever the accumulation; of g alone."""
    found = []
    for weight in (0.0, 10.0):
        model = wrap(CASE, task_type=task_type, l1_weight=weight, xi=0.0).train()
        inputs = batch(model, rows=8)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
        for i in range(parts):
            rows = slice(i * 8 // parts, (i + 1) * 8 // parts)
            (model(**{n: v[rows] for n, v in inputs.items()}).loss / parts).backward()
        optimizer.step()
        found.append({n: p.grad for n, p in trained(model).items()})
    all_gates = torch.cat(gates(model))
    for name, without in found[0].items():
        extra = found[1][name] - without
        if name.endswith(".g"):
            wanted = 10.0 * trained(model)[name].sign() / len(all_gates)
            assert relative(extra, wanted) < 1e-5
        else:
            assert torch.equal(found[1][name], without)
    assert float(plait.penalty(model)) == pytest.approx(float(10 * all_gates.abs().mean()))  # type: ignore[arg-type]


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam, decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "Adamax": (torch.optim.Adamax, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {"eps": (None, 1e-12)}),
}


def descend(
    options: dict[str, Any], kind: Any, groups: Any, closed: bool = False, rates: Any = None
) -> dict[str, Tensor]:
    """Four steps on given gradients, in fp64; returns the parameters.

    groups: makes the optimizer's parameter groups of the Delta. rates: factors of the learning
    rate by step, set by a scheduler.
    """
    _, delta = layer(**{**STILL, **options})
    cls, more = kind
    optimizer = cls(groups(delta), **more)
    scheduler = rates and torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: rates[min(t, 3)])

    def gradients(key: int) -> Tensor:
        for i, p in enumerate(delta.parameters()):
            p.grad = tiny.numbers(*p.shape, key=10 * key + i) + p.detach()
        return torch.zeros(())

    for key in range(4):
        if closed:
            optimizer.zero_grad()
            optimizer.step(lambda key=key: gradients(key))
        else:
            gradients(key)
            optimizer.step()
        if scheduler:
            scheduler.step()
    return {n: p.detach() for n, p in delta.named_parameters()}


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_weight_decay_on_the_gate(name: str, closed: bool) -> None:
    """As with groups made by hand, A and B with decay and g without."""
    kind = OPTIMIZERS[name]
    found = descend(
        {}, kind, lambda d: [{"params": [d.A, d.B, d.g], "weight_decay": 0.5, "lr": 0.1}], closed
    )
    wanted = descend(
        {},
        kind,
        lambda d: [
            {"params": [d.A, d.B], "weight_decay": 0.5, "lr": 0.1},
            {"params": [d.g], "weight_decay": 0.0, "lr": 0.1},
        ],
        closed,
    )
    for n, value in wanted.items():
        assert relative(found[n], value) < 1e-10, n
    decayed = descend({}, kind, lambda d: [{"params": [d.g], "weight_decay": 0.5, "lr": 0.1}])
    assert relative(decayed["g"], wanted["g"]) < 1e-10  # a group of its own changes nothing


@pytest.mark.parametrize("rates", [None, [0.0, 0.5, 1.0, 0.25]])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD with momentum", "Adagrad", "Adamax"])
def test_own_learning_rate(name: str, rates: list[float] | None) -> None:
    """gate_lr in place of the group's, under the group's schedule, with decay on the rest."""
    kind = OPTIMIZERS[name]
    found = descend(
        {"gate_lr": 0.03},
        kind,
        lambda d: [{"params": [d.A, d.B, d.g], "weight_decay": 0.5, "lr": 0.1}],
        rates=rates,
    )
    wanted = descend(
        {},
        kind,
        lambda d: [
            {"params": [d.A, d.B], "weight_decay": 0.5, "lr": 0.1},
            {"params": [d.g], "weight_decay": 0.0, "lr": 0.03},
        ],
        rates=rates,
    )
    for n, value in wanted.items():
        assert relative(found[n], value) < 1e-10, n


def test_a_gate_without_gradient_stays() -> None:
    """Optimizers skip it; nothing is put back that was not taken."""
    _, delta = layer(**STILL, gate_lr=0.3)
    before = delta.g.detach().clone()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    delta.A.grad = torch.ones_like(delta.A)
    optimizer.step()
    assert torch.equal(delta.g, before)


def test_own_learning_rate_needs_the_common_one() -> None:
    _, delta = layer(**STILL, gate_lr=0.3)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.0)
    for p in delta.parameters():
        p.grad = torch.ones_like(p)
    text = r"SGD: lr = 0\.0, so a gate's step can be neither .* Give lr above 0\."
    with pytest.raises(ValueError, match=text):
        optimizer.step()


def rows(count: int = 8) -> list[dict[str, Any]]:
    """A data set for Trainer."""
    return [{"input_ids": t, "labels": t} for t in tiny.tokens(count)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Six steps of two micro-batches of 2 rows, with decay and a warm-up, no logging, no files."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
        "logging_strategy": "no", "max_steps": 6, "weight_decay": 0.4, "warmup_steps": 2,
        "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2, "adam_epsilon": 1e-5,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


@pytest.mark.parametrize("gate_lr", [None, 3e-2])
def test_under_trainer(gate_lr: float | None, tmp_path: Path) -> None:
    """Its one group with decay trains as groups made by hand, under the same schedule."""
    model, control = wrap(CASE, xi=1e-3, gate_lr=gate_lr), wrap(CASE, xi=1e-3)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=rows()).train()  # type: ignore[arg-type]
    named = trained(control)
    groups = [
        {"params": [p for n, p in named.items() if not n.endswith(".g")], "weight_decay": 0.4},
        {
            "params": [p for n, p in named.items() if n.endswith(".g")],
            "weight_decay": 0.0,
            "lr": gate_lr or 1e-2,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-5)
    trainer = Trainer(
        model=control, args=arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None)
    )  # type: ignore[arg-type]
    trainer.train()
    assert {delta.steps for delta in deltas(model)} == {6}
    for name, value in control.state_dict().items():
        assert relative(model.state_dict()[name].float(), value.float()) < 1e-4, name
    assert any(not torch.equal(a, b) for a, b in zip(gates(model), gates(wrap(CASE)), strict=True))


def test_missing_event() -> None:
    model = wrap(CASE).train()
    for _ in range(51):
        model(**batch(model, rows=1)).loss.backward()
    text = r"sora: 51 training forwards, 0 optimizer steps seen\. .*call plait\.after_step\(model\)"
    with pytest.raises(plait.EventNeverFired, match=text):
        model.state_dict()


def test_by_hand() -> None:
    """plait.penalty and plait.after_step give what an optimizer's hooks give."""
    ends = []
    for hooked in (True, False):
        model = wrap(CASE, xi=0.01).train()
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        for key in range(4):
            loss = model(**batch(model, key=key)).loss
            if hooked:
                loss.backward()
                optimizer.step()
            else:
                (loss + plait.penalty(model)).backward()
                with torch.no_grad():
                    for p in trained(model).values():
                        p -= 0.1 * p.grad  # type: ignore[operator]
                plait.after_step(model)
            model.zero_grad()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert relative(ends[1][name].float(), value.float()) < 1e-4, name


# Export and prune ------------------------------------------------------------------------------

UNEQUAL = ([0.5, 0, -1, 0], [0, 0, 0, 2.0], [0, 0, 0, 0], [1, 0, 1, -3.0])


def stock(export: Any, folder: Path) -> Any:
    """An export read back by stock peft."""
    export.write(folder)
    return PeftModel.from_pretrained(tiny.llama(), folder).eval()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_export_leaves_zero_ranks_out(init: str, tmp_path: Path) -> None:
    model = wrap(CASE, init_weights=False, init=init)
    for delta in deltas(model) if init == "pissa" else []:
        for key, start in enumerate((delta.A0, delta.B0)):
            start.copy_(0.1 * tiny.numbers(*start.shape, key=key, dtype=torch.float32))
    set_gates(model, *UNEQUAL)
    export = to_lora(model)
    ranks = [1, 2][init == "pissa"]
    assert [part.rank for part in export.layers] == [ranks * k for k in (2, 1, 0, 3, 4, 4)]
    assert export.error == 0
    absent = deltas(model)[2].base.name
    assert not [name for name in export.tensors if absent in name]
    assert absent not in export.config.target_modules  # type: ignore[operator]
    other = stock(export, tmp_path)
    assert {len(A) for name, A in export.tensors.items() if "lora_A" in name} == {4 * ranks}
    assert (export.config.r, export.config.lora_alpha) == (4 * ranks, 4 * ranks)
    compact = stock(to_lora(model, compact=True), tmp_path / "compact")
    for part in export.layers:
        if part.rank:
            name = f"base_model.model.{part.name}"
            assert other.get_submodule(name).scaling["default"] == pytest.approx(1.0)
            assert compact.get_submodule(name).scaling["default"] == pytest.approx(2.0)
            assert compact.get_submodule(name).r["default"] == part.rank
    with torch.no_grad():
        found = other(input_ids=tiny.tokens()).logits
    assert float((found - logits(model)).abs().max()) < 1e-6
    expected = logits(model)
    model.merge_adapter()
    assert float((logits(model) - expected).abs().max()) < 1e-6


def test_export_of_nothing() -> None:
    model = wrap(CASE, init_weights=False)
    set_gates(model, *[[0.0] * 4] * 6)
    with pytest.raises(ValueError, match="sora: the update is zero in every layer"):
        to_lora(model)


def test_recovers_a_teacher_of_rank_2() -> None:
    """Fewer than r = 6 live ranks, and the teacher's function."""
    W = tiny.OneLinear(12, 10, torch.float32)
    teacher = 0.3 * tiny.numbers(10, 2, key=1) @ tiny.numbers(2, 12, key=2)
    with torch.no_grad():
        target = W.linear.weight + teacher.float()
    options = {"target_modules": ["linear"], "task_type": None, "r": 6, "lora_alpha": 6}
    model = wrap(CASE, W, **options, l1_weight=0.03, xi=2e-3).train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=2e-2, weight_decay=0.01)
    for key in range(400):
        x = tiny.numbers(64, 12, key=key, dtype=torch.float32)
        nn.functional.mse_loss(model(x), x @ target.T + W.linear.base_layer.bias).backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = deltas(model)[0]
    live = int((delta.g != 0).sum())
    assert 2 <= live < 6
    assert float((delta.weight() - teacher.float()).norm() / teacher.norm()) < 0.1
    assert to_lora(model).layers[0].rank == live
    plait.prune(model)
    assert deltas(model)[0].A.shape == (live, 12)
