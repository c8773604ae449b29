"""TRL's SFTTrainer takes plait's configs."""

import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import plait
from plait.testing import tiny
from tests.support.runs import character_tokenizer, copy_rows

trl = pytest.importorskip("trl", reason="the extra plait[trl] is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_sft.py"


@pytest.mark.slow
def test_example_trains_and_saves_an_adapter(tmp_path: Path) -> None:
    first, last = runpy.run_path(str(EXAMPLE))["main"](str(tmp_path))
    assert last < first
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PLAIT_DUAL_LORA"


CONFIGS = [
    plait.DualLoraConfig,
    plait.DualModuleLoraConfig,
    plait.SharedBLoraConfig,
    plait.ColaConfig,
    partial(plait.DropLoraConfig, scope="step"),
    partial(plait.SoraConfig, xi=0.3, gates=["droplora"]),
    partial(plait.AllocLoraConfig, first=1, every=1, rounds=2),
    partial(plait.NolaConfig, num_basis_A=8, num_basis_B=8),
    plait.TiedLoraConfig,
    partial(plait.HydraLoraConfig, gates=[{"name": "sora", "xi": 0.3}]),
    partial(plait.MoLoraConfig, num_experts=2, balance="loramoe"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: getattr(c, "func", c).__name__)
def test_events_fire_once_a_step(config: Any, tmp_path: Path) -> None:
    trainer = trl.SFTTrainer(
        model=tiny.llama(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(copy_rows(12)),
        processing_class=character_tokenizer(),
        peft_config=config(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[plait.PlaitCallback()],
    )
    assert trainer.model is not None
    if isinstance(trainer.model.peft_config["default"], plait.AllocLoraConfig):
        ids = tiny.tokens()
        plait.set_development_batch(trainer.model, {"input_ids": ids, "labels": ids})
    trainer.train()
    deltas = [m for m in trainer.model.modules() if isinstance(m, plait.Delta)]
    assert len(deltas) == 14
    assert {delta.steps for delta in deltas if delta.t is not None} <= {3}
    gates = [d.g for d in deltas if "g" in d._parameters]
    assert not gates or any(not bool(g.all()) for g in gates), "no proximal step came"
    live = [int(d.live_ranks.sum()) for d in deltas if "live_ranks" in d._buffers]
    assert not live or len(set(live)) > 1, "no rank moved"
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
