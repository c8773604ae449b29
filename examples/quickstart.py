"""Quick start: a method of plait on the shipped tiny model, a few training steps, saving, loading.

Runs in seconds, without a network.
"""
# ruff: noqa: E402  (the ten lines of the README stand together with their imports)

import tempfile

import peft
import torch
import transformers

import plait.assets

# Rows of a task that the model has never seen: "rotate plait=" -> "laitp".
rows = plait.assets.builtin_rows("shift?families=rotate&n=64", split="train", seed=0)
tokenizer = transformers.AutoTokenizer.from_pretrained(plait.assets.tiny_model_dir())
texts = [row["prompt"] + row["completion"] for row in rows]
batch = tokenizer(texts, return_tensors="pt", padding=True)
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

# --8<-- [start:ten]
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from plait import DualLoraConfig, assets

base = AutoModelForCausalLM.from_pretrained(assets.tiny_model_dir(), dtype="float32")
model = get_peft_model(base, DualLoraConfig(r=8, target_modules="all-linear")).train()

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(30):
    model(**batch).loss.backward()
    optimizer.step()  # also advances the warm-up of dual_lora
    optimizer.zero_grad()
# --8<-- [end:ten]

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    print(f"loss after 30 steps: {model(**batch).loss:.3f}")
    model.save_pretrained(folder)
    fresh = AutoModelForCausalLM.from_pretrained(assets.tiny_model_dir(), dtype="float32")
    loaded = peft.PeftModel.from_pretrained(fresh, folder)
    difference = (loaded(**batch).logits - model(**batch).logits).abs().max()
print(f"largest logit difference after saving and loading: {difference:.0e}")
