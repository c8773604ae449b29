"""LoRA-RITE does not care in which basis the rank space is written; AdamW does."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float64")
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
layers = [m for m in model.modules() if hasattr(m, "lora_A")]
for layer in layers:
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
ids = torch.randint(3, base.config.vocab_size, (8, 24))


# --8<-- [start:train]
def train(model, make):
    optimizer = make(model)
    model.train()
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    return torch.cat([layer.get_delta_weight("default").flatten() for layer in layers])


def rite(model):
    return plait.create_lora_rite_optimizer(model, lr=1e-2)


# --8<-- [end:train]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


other = copy.deepcopy(model)  # the same model: A -> R A, B -> B R^-1
R = torch.randn(4, 4, dtype=torch.float64)
with torch.no_grad():
    for layer in (m for m in other.modules() if hasattr(m, "lora_A")):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A.copy_(R @ A)
        B.copy_(B @ torch.linalg.inv(R))

for name, make in (("LoRA-RITE", rite), ("AdamW", adamw)):
    one, two = (train(copy.deepcopy(m), make) for m in (model, other))
    print(f"{name}, dW of two bases, relative distance: {(one - two).norm() / one.norm():.1e}")
    if make is rite:
        print(f"LoRA-RITE: no entry of dW differs by more than {(one - two).abs().max():.1e}")
