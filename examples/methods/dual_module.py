"""DMC: the schedule needs the number of steps; in the end only the chosen expert ranks are left."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))

steps = 60
config = plait.DualModuleLoraConfig(
    r=8, target_r=3, deltaT=5, total_steps=steps, target_modules="all-linear"
)
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model.train()
for step in range(1, steps + 1):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()  # adds the penalty before the step, screens the expert after it
    optimizer.zero_grad()
    if step in (1, 20, 40, 60):
        print(f"step {step}: loss {loss:.3f}, penalty {plait.penalty(model):.3f}")

export = plait.to_lora(model)
ranks = [layer.rank for layer in export.layers]
kept = sum(ranks) / len(ranks) - 2 * 2  # each layer also has 2 r_s ranks of the shared module
print(f"expert ranks kept, mean over {len(ranks)} layers: {kept:g} of 6")
print(f"ranks of the plain LoRA: {min(ranks)} to {max(ranks)}, left out: {export.error:g}")
