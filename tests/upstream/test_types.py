"""Every type of the installed peft in a run file."""

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.run.config import config_from_dict, config_to_dict, method_options, peft_config
from plait.run.evaluate import evaluate_run
from plait.run.export import export_run
from plait.run.train import train
from plait.upstream.table import BASELINES
from plait.upstream.types import peft_types, type_of
from tests.support.runs import character_tokenizer, copy_rows, write_rows

# What a type needs and has no default for, or has one that does not fit a small model.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 6, "tinit": 1, "tfinal": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "TRAINABLE_TOKENS": {"token_indices": [4, 5, 6, 7, 8]},
    "VBLORA": {"num_vectors": 32, "vector_length": 64},
}
QUICK = ["MISS", "HIRA", "LN_TUNING", "IA3", "DELORA"]
OTHERS = {"POLY", "XLORA"}  # need tasks, and trained adapters
ALL = sorted(peft_types().keys() - OTHERS) if os.environ.get("PLAIT_UPSTREAM") else QUICK


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("types"), character_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=128,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", copy_rows(24))
    return folder


def config(place: Path, to: Path, method: dict[str, Any], **sections: Any) -> Any:
    return config_from_dict(
        {
            "model": {"name": str(place / "base")},
            "method": method,
            "data": {"train": str(place / "rows.jsonl"), "validation": 0.2},
            "training": {
                "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
                "warmup_steps": 0, "logging_steps": 1, "use_cpu": True, "save_strategy": "no",
            },
            "evaluation": {"generate": False},
            "output": {"dir": str(to)},
            **sections,
        }
    )  # fmt: skip


def test_the_types_are_those_of_the_installed_peft() -> None:
    kinds = peft_types()
    assert len(kinds) >= 30
    assert not {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PLAIT_SORA"} & kinds.keys()
    assert all(hasattr(peft, name) for name in kinds.values())
    assert type_of("peft:MISS") == "MISS"
    assert type_of("peft:NO") is type_of("miss") is None
    assert "peft:MISS" in BASELINES
    assert "peft:NO" not in BASELINES
    assert "peft:MISS" not in list(BASELINES)  # no name of `plait methods`


def test_options_are_those_of_the_type() -> None:
    method = {"name": "peft", "type": "miss", "r": 16}
    cfg = config_from_dict({"method": method})
    assert (cfg.method.name, cfg.method.options) == ("peft:MISS", {"r": 16})
    assert type(peft_config(cfg.method, "causal_lm")).__name__ == "MissConfig"
    assert config_from_dict(config_to_dict(cfg)) == cfg
    assert "mini_r" in method_options("peft:MISS")
    for wrong, expected in (
        ({"name": "peft"}, "method: peft needs a type, such as MISS. Types: ADALORA, "),
        ({"name": "peft", "type": "MIS"}, "method.type is 'MIS', which is not a type .*mean MISS"),
        ({"name": "peft", "type": "P_TUNING"}, "method.type is 'P_TUNING', which is not a type"),
        ({"name": "peft:MIS"}, "method.name is 'MIS', which is not a type"),
        ({"name": "peft", "type": "MISS", "mini": 3}, "method.mini is not an option of peft:MISS"),
        ({"name": "peft", "type": "MISS", "r": "x"}, "method.r is 'x'. It should be"),
    ):
        with pytest.raises(ValueError, match=expected):
            config_from_dict({"method": wrong})


@pytest.mark.parametrize("kind", ALL)
def test_a_type_trains_loads_and_exports(kind: str, place: Path, tmp_path: Path) -> None:
    """Evaluated again from its folder it has the same loss; PLAIT_UPSTREAM=1: all types."""
    method = {"name": "peft", "type": kind, **NEEDS.get(kind, {})}
    folder = train(config(place, tmp_path / "run", method))
    evaluation = folder.read_evaluation()
    again, after = evaluate_run(folder.path), evaluation["after"]
    assert after["loss"] < evaluation["before"]["loss"]
    assert again["loss"] == pytest.approx(after["loss"], abs=1e-6)
    if kind in QUICK:
        assert export_run(folder.path, to="merged")[0].is_dir()


def test_miss_is_a_plain_lora(place: Path, tmp_path: Path) -> None:
    """peft's own conversion, exactly."""
    folder = train(config(place, tmp_path / "run", {"name": "peft", "type": "MISS", "r": 8}))
    report = export_run(folder.path, to="lora")[1]
    assert report.weight_error < 1e-5
    assert (folder.lora / "adapter_model.safetensors").is_file()


# ------------------------------------------------------------------------------------- starts


def test_eva_gets_its_rows(place: Path, tmp_path: Path) -> None:
    """Without them peft leaves A at zero, and nothing would train."""
    from plait.run.prepare import prepare

    method = {"name": "lora", "r": 4, "init_lora_weights": "eva"}
    cfg = config(place, tmp_path / "run", method)
    model = prepare(cfg).model
    factors = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert factors
    assert all(bool(p.any()) for p in factors)
    folder = train(cfg)
    after = folder.read_evaluation()["after"]["loss"]
    assert evaluate_run(folder.path)["loss"] == pytest.approx(after, abs=1e-6)
    assert after < folder.read_evaluation()["before"]["loss"]


def test_starts_that_would_do_nothing_are_refused(place: Path, tmp_path: Path) -> None:
    method = {"name": "lora", "init_lora_weights": "corda"}
    with pytest.raises(ValueError, match="init_lora_weights is corda, which reads training"):
        train(config(place, tmp_path / "run", method))
    with pytest.raises(ValueError, match=r"method.init_lora_weights is 'lora_ga'"):
        config(place, tmp_path / "run", {"name": "lora", "init_lora_weights": "lora_ga"})
    assert not (tmp_path / "run").exists()
