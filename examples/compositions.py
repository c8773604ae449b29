"""SoRA's gate and DropLoRA's on CoLA's factors: a composition by configuration alone."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32").eval()
ids = torch.randint(3, base.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = base(input_ids=ids).logits

config = plait.ColaConfig(
    r=8,
    strategy="heuristic",
    init="pissa_split",
    target_modules="all-linear",
    gates=[{"name": "sora", "l1_weight": 1.0, "xi": 0.01}, {"name": "droplora", "scope": "step"}],
)
model = get_peft_model(base, config)
with torch.no_grad():
    start = (model.eval()(input_ids=ids).logits - expected).abs().max()
print(f"a fresh adapter and the base model differ by {start:.0e}")

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for _ in range(60):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # the proximal step follows by itself
    optimizer.zero_grad()
export = plait.to_lora(model)
ranks = sorted({layer.rank for layer in export.layers})
print(f"ranks of the exported LoRA, gates of 0 left out: {ranks[0]} to {ranks[-1]}")
