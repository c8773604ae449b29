"""NOLA: the file holds two short vectors a layer; everything else comes back from the seed."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))

config = plait.NolaConfig(r=8, num_basis_A=64, num_basis_B=64, seed=7, target_modules="all-linear")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
model.train()
for step in range(1, 31):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, 30):
        print(f"step {step}: loss {loss:.3f}")

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    trained = model(input_ids=ids).logits
    model.save_pretrained(folder)
    file = Path(folder, "adapter_model.safetensors")
    names = {name.rpartition(".")[2] for name in load_file(file)}
    print(f"{model.num_parameters(only_trainable=True)} numbers, the file holds {sorted(names)}")
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
    again = PeftModel.from_pretrained(fresh, folder)(input_ids=ids).logits
    print("reloaded from the seed, equal to the last bit:", torch.equal(again, trained))

    plait.to_lora(model).write(folder)  # A and B written out: a plain LoRA of rank r
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
    plain = PeftModel.from_pretrained(fresh, folder)(input_ids=ids).logits
    print(f"the plain LoRA and nola differ by at most {(plain - trained).abs().max():.1e}")
