"""Dual LoRA: a fresh adapter is the base model, the gate opens step by step, merging is exact."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))
before = base.eval()(input_ids=ids).logits

config = plait.DualLoraConfig(r=8, gate_steps=20, target_modules="all-linear")
model = get_peft_model(base, config)
same = torch.equal(model.eval()(input_ids=ids).logits, before)
print("fresh adapter equals the base model:", same)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.train()
for step in range(1, 41):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()  # the gate counts this step by itself
    optimizer.zero_grad()
    if step in (1, 20, 40):
        print(f"step {step}: gate {min(1, step / config.gate_steps):.2f}, loss {loss:.3f}")

model.eval()
adapted = model(input_ids=ids).logits
merged = model.merge_and_unload()
difference = (merged(input_ids=ids).logits - adapted).abs().max()
print(f"largest logit difference after merging: {difference:.1e}")
