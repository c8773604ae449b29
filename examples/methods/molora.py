"""A mixture of LoRAs with a balance loss: two micro-batches for each step, with padding."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
ids = torch.randint(3, 30, (8, 24))
mask = (torch.arange(24) < torch.tensor([24, 20, 16, 12] * 2)[:, None]).long()
labels = ids.where(mask == 1, -100)

for weight in (0.0, 0.1):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
    # --8<-- [start:config]
    config = plait.MoLoraConfig(
        num_experts=4, top_k=2, balance="switch", balance_weight=weight, target_modules="all-linear"
    )
    model = get_peft_model(base, config)
    plait.set_micro_batches(model, 2)  # PlaitCallback and plait train do this
    # --8<-- [end:config]
    layers = [m.plait_delta["default"] for m in model.modules() if hasattr(m, "plait_delta")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(30):
        for half in (slice(0, 4), slice(4, 8)):
            inputs = {"input_ids": ids[half], "attention_mask": mask[half], "labels": labels[half]}
            loss = model(**inputs).loss
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    uneven = torch.stack([layer.balance.last for layer in layers]).mean()
    print(f"balance_weight {weight}: loss {loss:.3f}, balance {uneven:.3f} (1 is even)")
