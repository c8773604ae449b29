"""Fed-ALoRA for unequal ranks: what a round's end does to a client, and its export."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))

config = plait.FedAloraHetConfig(r=8, common_rank=4, target_modules="all-linear")
model = get_peft_model(base, config)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss after 10 steps: {loss:.3f}")

# A client alone: the server's B_bar becomes its own B2 B1, and the function stays.
before = model(input_ids=ids).logits.detach()
for module in model.modules():
    if hasattr(module, "plait_delta"):
        delta = module.plait_delta["default"]
        gen = torch.Generator().manual_seed(1)
        delta.begin_round(delta.B_bar + (delta.B2 @ delta.B1).detach(), gen)
after = model(input_ids=ids).logits.detach()
print(f"a round's end, logits differ by at most {(after - before).abs().max():.0e}")
print("rank of the plain LoRA:", plait.to_lora(model).layers[0].rank)
