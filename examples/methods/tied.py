"""Tied-LoRA: all layers of a shape train one A and one B; a file holds them once."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir


def base() -> torch.nn.Module:
    """The tiny model."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")


torch.manual_seed(0)
ids = torch.randint(3, base().config.vocab_size, (8, 24))
for label, train in {"tied": ["A", "B", "u", "v"], "A and B frozen": ["u", "v"]}.items():
    config = plait.TiedLoraConfig(r=8, train=train, target_modules="all-linear")
    model = get_peft_model(base(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    model.train()
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{label}: {model.num_parameters(only_trainable=True)} numbers, loss {loss:.3f}")

lora = 8 * sum(
    m.in_features + m.out_features
    for name, m in base().named_modules()
    if isinstance(m, torch.nn.Linear) and name != "lm_head"
)
print(f"LoRA of the same rank: {lora} numbers")

model = get_peft_model(base(), plait.TiedLoraConfig(r=8, target_modules="all-linear"))
layers = [m.plait_delta["default"] for m in model.modules() if hasattr(m, "plait_delta")]
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    names = list(load_file(Path(folder, "adapter_model.safetensors")))
    kept = sum(name.endswith(".A") for name in names)
    print(f"{len(layers)} layers, {len({id(d.A) for d in layers})} of A, {kept} in the file")
    loaded = PeftModel.from_pretrained(base(), folder)
    again = [m.plait_delta["default"] for m in loaded.modules() if hasattr(m, "plait_delta")]
    print("shared again after loading:", len({id(d.A) for d in again}) == kept)
