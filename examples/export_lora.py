"""Export adapters as plain LoRA: exact where the algebra allows, else with the error printed."""

import copy
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))


def trained(config: plait.DeltaConfig) -> torch.nn.Module:
    """A copy of the base model with an adapter of this config, a few steps trained."""
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


model = trained(plait.ColaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
folder = tempfile.mkdtemp()
# --8<-- [start:exact]
export = plait.to_lora(model)  # 2 r ranks: the trained product and its start
print(f"cola: rank {export.config.r}, part of dW left out: {export.error:g}")
export.write(folder)
# --8<-- [end:exact]

fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
plain = PeftModel.from_pretrained(fresh, folder).eval()  # of type LORA: nothing of plait runs
difference = (plain(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
print(f"{type(plain.base_model).__name__}, largest logit difference: {difference:.1e}")

model = trained(plait.DualLoraConfig(r=8, target_modules="all-linear", gate_steps=10))
# --8<-- [start:lossy]
for rank in (4, 8, 16, 32):
    export = plait.to_lora(model, rank=rank)
    print(f"dual_lora as a LoRA of rank {rank}: {export.error:.0%} of dW left out")
export = plait.to_lora(model, energy=0.99)
print(f"for 99 % of each |dW|^2: ranks up to {max(layer.rank for layer in export.layers)}")
# --8<-- [end:lossy]
