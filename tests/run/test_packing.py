"""Packing: rows laid end to end train as they would alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import OPTConfig, OPTForCausalLM

import plait
from plait.run.check import check
from plait.run.data.packing import PackCollator, pack, packs_apart, padding
from plait.run.data.tokens import Collator
from plait.run.prepare import prepare
from plait.run.train import train
from plait.testing import tiny
from tests.support.runs import (
    character_tokenizer,
    copy_rows,
    run_config,
    save_model,
    weights,
    write_rows,
)


def test_packs_hold_every_row_once_within_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (300,), generator=generator).tolist()
    packs = pack(lengths, 40)
    assert sorted(row for rows in packs for row in rows) == list(range(300))
    sums = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(sums) <= 40
    assert len(packs) <= 1.05 * sum(lengths) / 40
    assert padding(sums, 8) < 0.05 < padding(lengths, 8)
    assert pack([3, 3, 3], 3) == [[0], [1], [2]]


ROWS = [
    {"input_ids": list(ids), "labels": [-100, *ids[1:]], "attention_mask": [1] * len(ids),
     "task_id": i % 2}
    for i, ids in enumerate([range(4, 9), range(3, 12), range(5, 7), range(9, 16), range(6, 14)])
]  # fmt: skip


def wrapped(config: Any = None, **options: Any) -> Any:
    model: Any = tiny.llama()
    if config is not None:
        torch.manual_seed(0)
        model = get_peft_model(
            model, config(target_modules="all-linear", task_type="CAUSAL_LM", **options)
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
    return model.double().train()


def gradients(model: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    targets = int(batch["labels"][:, 1:].ne(-100).sum())
    loss = model(**batch, num_items_in_batch=targets).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss), found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in one if one[n].any())


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (None, {}),
    "cola": (plait.ColaConfig, {"r": 2}),
    "dual_lora": (plait.DualLoraConfig, {"gate_steps": 2}),
    "hydra": (plait.HydraLoraConfig, {"r": 2, "lora_dropout": 0.0}),
    "shared_b": (
        plait.SharedBLoraConfig,
        {"r": 2, "routing": "task", "tasks": ["a", "b"], "lora_dropout": 0.0},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_rows(name: str) -> None:
    config, options = CASES[name]
    model, routed = wrapped(config, **options), name == "shared_b"
    loss, alone = gradients(model, Collator(character_tokenizer(), True, routed)(ROWS))
    packs = [[ROWS[1], ROWS[2], ROWS[0]], [ROWS[3], ROWS[4]]]
    batch = PackCollator(0, routed)(packs)
    assert batch["input_ids"].shape == (2, 16)
    packed, together = gradients(model, batch)
    assert packed == pytest.approx(loss, rel=1e-6)
    assert distance(alone, together) < 1e-6
    for broken in ({"use_cache": True}, {"position_ids": torch.arange(16).expand(2, -1)}):
        _, wrong = gradients(model, batch | broken)
        assert distance(alone, wrong) > 1e-3, broken


def test_the_probe_finds_models_that_mix_rows() -> None:
    assert packs_apart(tiny.llama())
    assert packs_apart(tiny.gpt2())
    assert packs_apart(wrapped(plait.ColaConfig, r=2))
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=2,
                  num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16)
    )  # fmt: skip
    assert not packs_apart(opt)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    save_model("llama", folder / "llama")
    rows = [{**row, "prompt": row["prompt"] * (1 + i % 5)} for i, row in enumerate(copy_rows(32))]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def config(place: Path, to: Path, **sections: Any) -> Any:
    data = {"validation": None} | sections.pop("data", {})
    method = {"name": "lora", "r": 4}
    options = {"data": data, "method": method, **sections}
    return run_config(place / "llama", place / "rows.jsonl", to, **options)


def test_a_run_with_packs_makes_the_step_of_one_without(place: Path, tmp_path: Path) -> None:
    """All rows are one batch, so the packs of a step hold the rows of a step."""
    runs, lines = [], []
    for packing in (False, True):
        training = {"max_steps": 2, "per_device_train_batch_size": 32}
        to = tmp_path / str(packing)
        data = {"packing": packing, "max_length": 64}
        cfg = config(place, to, data=data, training=training)
        runs.append(train(cfg, announce=lines.append))
    assert len(lines) == 3
    assert lines[2].startswith("packing: 32 rows in ")
    losses = [[r["loss"] for r in run.read_metrics() if "loss" in r] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    one, other = map(weights, runs)
    assert all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)


def test_steps_are_counted_in_packs(place: Path, tmp_path: Path) -> None:
    training = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    data = {"packing": True, "max_length": 64}
    run = prepare(config(place, tmp_path / "run", data=data, training=training))
    packs = pack([len(ids) for ids in run.data.train["input_ids"]], 64)
    assert run.steps == 2 * -(-len(packs) // 2)
    assert len(packs) < 16


def test_what_packing_refuses(place: Path, tmp_path: Path) -> None:
    packing = {"data": {"packing": True}}
    for sections, expected in (
        ({"model": {"task": "classification"}}, "only the rows of a causal model are packed"),
        ({"objective": {"name": "dpo"}}, "this is dpo"),
        ({"method": {"name": "molora", "num_experts": 2, "balance": "loramoe"}}, "mean over rows"),
    ):
        with pytest.raises(ValueError, match=f"data.packing: .*{expected}"):
            prepare(config(place, tmp_path / "run", **packing, **sections))


def test_a_model_that_mixes_rows_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.run.prepare.packs_apart", lambda model: False)
    with pytest.raises(ValueError, match="a llama mixes the rows of a pack"):
        train(config(place, tmp_path / "run", data={"packing": True}))
    assert not (tmp_path / "run").exists()


def test_the_memory_estimate_counts_packs(tmp_path: Path) -> None:
    """A pack is as long as many rows, so a step of as many packs takes more."""
    base = save_model("llama", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows(64))
    sizes = {
        packing: check(
            run_config(base, rows, tmp_path / "run", data={"packing": packing, "max_length": 64})
        ).memory
        for packing in (False, True)
    }
    assert sizes[True].traced
    assert sizes[True].activations > 2 * sizes[False].activations
