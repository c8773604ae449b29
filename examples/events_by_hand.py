"""An optimizer that is no torch.optim.Optimizer: its steps are told to plait by hand."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))
steps = 20
config = plait.DualModuleLoraConfig(r=4, total_steps=steps, target_modules="all-linear")
model = get_peft_model(base, config).train()
trained = [p for p in model.parameters() if p.requires_grad]

# --8<-- [start:loop]
for _ in range(steps):
    loss = model(input_ids=ids, labels=ids).loss
    (loss + plait.penalty(model)).backward()  # the penalty once per optimizer step
    with torch.no_grad():
        for p in trained:
            p -= 0.01 * p.grad
    plait.after_step(model)  # before the gradients are cleared
    model.zero_grad()
# --8<-- [end:loop]
layer = model.base_model.model.model.layers[0].self_attn.q_proj
print("optimizer steps seen:", layer.plait_delta["default"].steps)
