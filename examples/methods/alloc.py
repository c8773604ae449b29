"""Allocating LoRA: ranks are scored on a development batch and move between layers."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (12, 24))
train, development = ids[:8], ids[8:]

config = plait.AllocLoraConfig(
    r=4, first=10, every=10, rounds=3, n_A=5, target_modules=["q_proj", "v_proj", "down_proj"]
)
model = get_peft_model(base, config)
plait.set_development_batch(model, {"input_ids": development, "labels": development})


def live_ranks() -> list[int]:
    """Live ranks of each layer."""
    return [int(t.sum()) for n, t in model.named_buffers() if n.endswith("live_ranks")]


budget = sum(live_ranks())
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model.train()
for step in range(1, 41):
    loss = model(input_ids=train, labels=train).loss
    loss.backward()
    optimizer.step()  # ranks move after steps 10, 20 and 30
    optimizer.zero_grad()
    if step in (1, 10, 20, 30, 40):
        print(f"step {step}: loss {loss:.3f}, live ranks {live_ranks()}")

print(f"never more than {budget} ranks: {sum(live_ranks()) <= budget}")
export = plait.to_lora(model)
ranks = [layer.rank for layer in export.layers]
print(f"ranks of the plain LoRA: {ranks}, left out: {export.error:g}")
