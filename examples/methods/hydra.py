"""HydraLoRA: one A, several B that a router mixes for each token; equal B are a LoRA."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))

config = plait.HydraLoraConfig(num_B=3, lora_dropout=0.0, target_modules="all-linear")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model.train()
for step in range(1, 31):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, 30):
        print(f"step {step}: loss {loss:.3f}")

model.eval()
with torch.no_grad():
    whole = model(input_ids=ids).logits
    alone = model(input_ids=ids[2:3]).logits
    print(f"a row alone and in its batch differ by at most {(alone[0] - whole[2]).abs().max():.1e}")

    try:
        model.merge_adapter()
    except plait.NotMergeable as error:
        print(error)

    model.merge_adapter(approx="mean")  # a uniform router: an approximation
    rough = model(input_ids=ids, labels=ids).loss
    model.unmerge_adapter()
    print(f"merged as a mean: loss {rough:.3f}")
    print("unmerged, equal to the last bit:", torch.equal(model(input_ids=ids).logits, whole))
