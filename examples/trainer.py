"""A method with a schedule under transformers' Trainer: PlaitCallback tells it the length."""

import tempfile

import torch

# --8<-- [start:trainer]
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import plait
from plait.assets import tiny_model_dir

base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
config = plait.DualModuleLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)
# --8<-- [end:trainer]
torch.manual_seed(0)
rows = torch.randint(3, base.config.vocab_size, (64, 24))
data = [{"input_ids": row, "labels": row} for row in rows]
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    learning_rate=5e-3,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
# --8<-- [start:train]
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[plait.PlaitCallback()])
trainer.train()
# --8<-- [end:train]
layer = model.base_model.model.model.layers[0].self_attn.q_proj
print("optimizer steps seen:", layer.plait_delta["default"].steps)
