"""Optimizers in run files: strict options, who trains what, and resuming bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import plait
from plait import PlaitWarning
from plait.optim import LoraRite, LorSum
from plait.run.check import check
from plait.run.config import (
    OptimizerConfig,
    check_method,
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    optimizer_options,
)
from plait.run.optimizers import OPTIMIZERS, make_optimizer, optimizer_support
from plait.run.prepare import training_arguments
from plait.run.train import train
from plait.testing import tiny
from plait.upstream.table import BASELINES
from tests.support.pairs import lora
from tests.support.runs import assert_same, copy_rows, interrupt, run_config, save_model, write_rows

PLAIN = {"name": "lora", "r": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


# Which optimizer trains what --------------------------------------------------------------------


def test_support_comes_from_the_deltas() -> None:
    for method in [m.key for m in plait.list_methods()] + list(BASELINES):
        assert optimizer_support("default", method) is None
    plain = {"lora", "rslora", "pissa"}
    for name in OPTIMIZERS:
        able = {m for m in BASELINES if optimizer_support(name, m) is None}
        assert able == plain | ({"dora"} if name == "loraplus" else set()), name
    assert optimizer_support("lora_rite", "cola") is None
    assert optimizer_support("lora_rite", "shared_b") is None
    assert optimizer_support("lorsum", "cola") == "its factors are several to a layer"
    assert optimizer_support("lora_rite", "dual_module") == "its gate belongs to single ranks"
    assert optimizer_support("lora_rite", "dora") == "its magnitude depends on dW"
    assert "sign(D C)" in str(optimizer_support("lorsum", "dual_lora"))
    assert "lora_A and lora_B" in str(optimizer_support("loraplus", "cola"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_support_is_what_building_says(name: str) -> None:
    """Every method that can be trained builds an optimizer; the others of plait's do not."""
    options = {"loraplus": {"loraplus_lr_ratio": 4.0}}.get(name, {})
    for method in plait.list_methods():
        from plait.testing.case import Case
        from plait.testing.helpers import wrap

        model = wrap(Case(method.key))
        if optimizer_support(name, method.key) is None:
            make_optimizer(name, options, model, {})
        elif name in ("lora_rite", "lorsum"):
            with pytest.raises(ValueError):
                make_optimizer(name, options, model, {})
    make_optimizer(name, options, lora(), {})


def test_options_are_those_of_the_function_and_come_with_help() -> None:
    for name in OPTIMIZERS:
        options = optimizer_options(name)
        assert not {"lr", "weight_decay", "adapter", "model"} & options.keys()
        assert all(o.help.endswith(".") for o in options.values()), name
    assert optimizer_options("lora_rite")["escape"].default is True
    assert optimizer_options("loraplus")["loraplus_lr_ratio"].default is None
    assert optimizer_options("lorafa") == {}
    assert optimizer_options("default") == {}


# The section ------------------------------------------------------------------------------------


def test_section_is_checked_and_written_back(tmp_path: Path) -> None:
    raw = {"name": "lora_rite", "betas": [0.9, "0.99"], "eps": "1e-7", "escape": "no"}
    config = config_from_dict({"optimizer": raw})
    expected = {"betas": (0.9, 0.99), "eps": 1e-7, "escape": False}
    assert config.optimizer == OptimizerConfig(name="lora_rite", options=expected)
    assert config_from_dict({}).optimizer == OptimizerConfig()
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert config_from_dict(config_to_dict(config)) == config
    on_top = load_config(file, ["optimizer.balance=true"])
    assert on_top.optimizer.options["balance"] is True


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"optimizer": {"name": "lora_right"}},
        "config: optimizer.name is 'lora_right', which is not an optimizer. Did you mean "
        "lora_rite?",
    ),
    (
        {"optimizer": {"name": "lora_rite", "escap": True}},
        "config: optimizer.escap is not an option of lora_rite. Did you mean escape?",
    ),
    (
        {"optimizer": {"name": "lorsum", "sweeps": "two"}},
        "config: optimizer.sweeps is 'two'. It should be a valid integer",
    ),
    (
        {"optimizer": {"name": "lorsum", "start": "left"}},
        "config: optimizer.start is 'left'. It should be 'out' or 'in'.",
    ),
    (
        {"optimizer": {"sweeps": 1}},
        "config: optimizer.sweeps is not an option of default. Name the optimizer, optimizer.name.",
    ),
    (
        {"optimizer": {"name": "lora_rite", "lr": 1e-3}},
        "config: optimizer.lr cannot be set. Set training.learning_rate.",
    ),
    (
        {"optimizer": {"name": "lora_rite", "weight_decay": 0.1}},
        "config: optimizer.weight_decay cannot be set. Set training.weight_decay.",
    ),
    (
        {"optimizer": {"name": "loraplus"}},
        "config: optimizer: loraplus needs loraplus_lr_ratio. Give it.",
    ),
    (
        {"optimizer": {"name": "lorsum"}, "method": {"name": "cola"}},
        "config: optimizer.name: lorsum cannot train cola: its factors are several to a layer. "
        "Use one of lora_rite, or the default.",
    ),
    (
        {"optimizer": {"name": "lora_rite"}, "method": {"name": "vera"}},
        "config: optimizer.name: lora_rite cannot train vera: it has no pairs (A, B) of free "
        "factors. Use the default.",
    ),
    (
        {"optimizer": {"name": "lorsum"}, "method": {"name": "lora", "lr_scale": {"B": 4}}},
        "config: optimizer.name: lorsum has one learning rate for A and B, and method.lr_scale is "
        "given. Remove one of the two.",
    ),
    (
        {"optimizer": {"name": "lora_rite"}, "training": {"adam_beta2": 0.95}},
        "config: optimizer.name: lora_rite does not read training.adam_beta2. Remove it; the "
        "options of lora_rite stand in the section optimizer.",
    ),
    (
        {"optimizer": {"name": "riemannian"}, "training": {"optim": "sgd"}},
        "config: optimizer.name: riemannian does not read training.optim. Remove it; the options "
        "of riemannian stand in the section optimizer.",
    ),
]


@pytest.mark.parametrize(("raw", "text"), WRONG)
def test_wrong_sections(raw: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_method(config_from_dict(raw))
    assert str(caught.value).startswith(text)


def test_check_builds_the_optimizer(llama: Path, rows: Path, tmp_path: Path) -> None:
    method = {**PLAIN, "lora_dropout": 0.1}
    cfg = run_config(llama, rows, tmp_path, method=method)
    cfg.optimizer = OptimizerConfig(name="lorsum")
    with pytest.raises(ValueError, match=r"q_proj has lora_dropout = 0\.1"):
        check(cfg)
    cfg.optimizer = OptimizerConfig(name="lora_rite")
    assert check(cfg).trainable


# Training ---------------------------------------------------------------------------------------


def quick(llama: Path, rows: Path, to: Path, optimizer: dict[str, Any], **sections: Any) -> Any:
    """A config of 10 steps with an optimizer."""
    training = {"max_grad_norm": 0.0, **sections.pop("training", {})}
    cfg = run_config(
        llama, rows, to, training=training, evaluation={"generate": False},
        **{"method": PLAIN, **sections},
    )  # fmt: skip
    return config_from_dict({**config_to_dict(cfg), "optimizer": optimizer})


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rite-lora": ({"name": "lora_rite", "balance": True}, {**PLAIN, "lora_dropout": 0.1}),
    "rite-cola": (
        {"name": "lora_rite"},
        {"name": "cola", "r": 2, "strategy": "heuristic", "init": "pissa_split"},
    ),
    "kfac": ({"name": "lorsum", "metric": "kfac"}, PLAIN),
    "lorafa": ({"name": "lorafa"}, PLAIN),
    "riemannian": ({"name": "riemannian"}, PLAIN),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_gives_the_same_weights(case: str, llama: Path, rows: Path, tmp_path: Path) -> None:
    optimizer, method = RESUMED[case]
    whole = train(quick(llama, rows, tmp_path / "a", optimizer, method=method))
    cfg = quick(llama, rows, tmp_path / "b", optimizer, method=method)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 10"):
        train(cfg, callbacks=[interrupt(5)])
    assert_same(whole, train(cfg, resume=True))
    assert f"| optimizer | {optimizer['name']}" in whole.card.read_text()


def test_accumulation_and_learning_rate_scales(llama: Path, rows: Path, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    lorsum = quick(llama, rows, tmp_path / "a", {"name": "lorsum"}, training=options)
    train(lorsum)
    method = {**PLAIN, "lr_scale": {"B": 4.0}}
    train(quick(llama, rows, tmp_path / "b", {"name": "lora_rite"}, method=method))


def test_plait_train_switches_clipping_off() -> None:
    rite = {"optimizer": {"name": "lora_rite"}}
    for training, shown in (({}, "1"), ({"max_grad_norm": 0.5}, "0.5")):
        text = rf"training\.max_grad_norm is {shown}, and lora_rite needs .* set to 0"
        with pytest.warns(PlaitWarning, match=text):
            args = training_arguments(config_from_dict({**rite, "training": training}))
        assert args.max_grad_norm == 0
    assert training_arguments(config_from_dict({})).max_grad_norm == 1.0


def trainer(model: Any, optimizer: Any, to: Path, **options: Any) -> Trainer:
    """A plain Trainer over tiny rows."""
    ids = tiny.tokens(16)
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        output_dir=str(to), max_steps=4, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model=model, args=args, train_dataset=data, optimizers=(optimizer, None),
        callbacks=[plait.PlaitCallback()],
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    "create", [plait.create_lora_rite_optimizer, plait.create_lorsum_optimizer]
)
def test_plain_trainer(create: Any, tmp_path: Path) -> None:
    model = lora()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer = create(model, lr=1e-2)
    with pytest.raises(ValueError, match=r"max_grad_norm = 1 clips .* Set max_grad_norm=0"):
        trainer(model, optimizer, tmp_path).train()
    trainer(model, optimizer, tmp_path, max_grad_norm=0.0).train()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert isinstance(optimizer, LoraRite | LorSum)
    assert int(optimizer.state[optimizer.pairs[0].A]["step"]) == 4
