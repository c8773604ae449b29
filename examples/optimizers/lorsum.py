"""LoRSum under transformers' Trainer: no dropout, and no clipping of raw gradients."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (32, 24))
rows = [{"input_ids": row, "labels": row} for row in ids]

# --8<-- [start:train]
config = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
optimizer = plait.create_lorsum_optimizer(model, lr=0.5)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=30,
    per_device_train_batch_size=8,
    max_grad_norm=0.0,  # PlaitCallback refuses anything else
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows,
    optimizers=(optimizer, None),
    callbacks=[plait.PlaitCallback()],
)
# --8<-- [end:train]

start = model(input_ids=ids, labels=ids).loss.item()
trainer.train()
after = model.eval()(input_ids=ids, labels=ids).loss.item()
print(f"loss {start:.3f} -> {after:.3f}")
print(f"kept until the step: {optimizer.bytes_per_row / 1024:.1f} KiB for each token")
optimizer.remove()  # takes its hooks off the model
