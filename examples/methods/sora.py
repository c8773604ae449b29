"""SoRA: gates fall to zero while training; prune takes their ranks away for good."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))

config = plait.SoraConfig(r=8, xi=5e-3, target_modules="all-linear")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)  # never of the gates
model.train()
for step in range(1, 81):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()  # adds the gradient of the mean |g| before, thresholds g after
    optimizer.zero_grad()
    if step in (1, 40, 80):
        gates = torch.cat([p for n, p in model.named_parameters() if n.endswith(".g")])
        live = int((gates != 0).sum())
        print(f"step {step}: loss {loss:.3f}, {live} of {len(gates)} ranks live")

model.eval()
with torch.no_grad():
    before = model(input_ids=ids).logits
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = plait.prune(model)
    after = model(input_ids=ids).logits
left = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(
    f"pruned: {min(kept.values())} to {max(kept.values())} ranks a layer, {left} of {size} numbers"
)
print(f"logits before and after differ by at most {(after - before).abs().max():.1e}")
export = plait.to_lora(model)
print(f"plain LoRA: {len(export.layers)} layers, left out: {export.error:g}")
