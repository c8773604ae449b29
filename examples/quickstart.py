"""Quick start: a method of plait on the shipped tiny model, a few training steps, saving, loading.

Runs in seconds, without a network.
"""

import tempfile

import peft
import torch
import transformers

# --8<-- [start:five]
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from plait import DualLoraConfig, assets

base = AutoModelForCausalLM.from_pretrained(assets.tiny_model_dir(), dtype="float32")
model = get_peft_model(base, DualLoraConfig(r=8, target_modules="all-linear"))
# --8<-- [end:five]

model.print_trainable_parameters()

# Rows of a task that the model has never seen: "rotate plait=" -> "laitp".
rows = assets.builtin_rows("shift?families=rotate&n=64", split="train", seed=0)
tokenizer = transformers.AutoTokenizer.from_pretrained(assets.tiny_model_dir())
texts = [row["prompt"] + row["completion"] for row in rows]
batch = tokenizer(texts, return_tensors="pt", padding=True)
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model.train()
for step in range(1, 31):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()  # the warm-up of dual_lora counts this step by itself
    optimizer.zero_grad()
    if step in (1, 10, 20, 30):
        print(f"step {step}: loss {loss:.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    fresh = AutoModelForCausalLM.from_pretrained(assets.tiny_model_dir(), dtype="float32")
    loaded = peft.PeftModel.from_pretrained(fresh, folder)
model.eval()
difference = (loaded(**batch).logits - model(**batch).logits).abs().max()
print(f"largest logit difference after saving and loading: {difference:.0e}")
