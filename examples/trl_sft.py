"""Supervised fine-tuning with TRL: SFTTrainer takes a plait config as it takes a LoraConfig.

Needs the extra: pip install "plait[trl]". Runs offline on the model that plait ships.
"""

import sys
import tempfile

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import plait
from plait.assets import builtin_rows, tiny_model_dir


def main(output: str) -> tuple[float, float]:
    """Train, save and load back; return the training loss of the first and the last step."""
    rows = builtin_rows("shift?n=256", "train", 0)
    data = Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in rows])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir()),
        args=SFTConfig(
            output_dir=output,
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir()),
        peft_config=plait.DualLoraConfig(
            r=8, gate_steps=10, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        # Only methods with a schedule over the whole run need it; it never hurts.
        callbacks=[plait.PlaitCallback()],
    )
    trainer.train()
    trainer.save_model(output)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir())
    PeftModel.from_pretrained(base, output).merge_and_unload()  # dual_lora merges exactly
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        first, last = main(sys.argv[1] if len(sys.argv) > 1 else folder)
    print(f"training loss: {first:.3f} in the first step, {last:.3f} in the last")
