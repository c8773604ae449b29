"""TRL's SFTTrainer takes plait's configs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import plait
from tests import tiny
from tests.tiny_runs import character_tokenizer, copy_rows

trl = pytest.importorskip("trl", reason="the extra plait[trl] is not installed")

EXAMPLE = Path(__file__).parent.parent / "examples" / "trl_sft.py"


@pytest.mark.slow
def test_example_trains_and_saves_an_adapter(tmp_path: Path) -> None:
    first, last = runpy.run_path(str(EXAMPLE))["main"](str(tmp_path))
    assert last < first
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PLAIT_DUAL_LORA"


@pytest.mark.parametrize(
    "config",
    [plait.DualLoraConfig, plait.DualModuleLoraConfig, plait.SharedBLoraConfig, plait.ColaConfig],
)
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
    trainer.train()
    deltas = [m for m in trainer.model.modules() if isinstance(m, plait.Delta)]
    assert len(deltas) == 14
    assert {delta.steps for delta in deltas if delta.t is not None} <= {3}
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
