"""DropLoRA: in training each token loses some ranks; evaluated and exported it is a plain LoRA."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))

config = plait.DropLoraConfig(
    r=8, inner_dropout=0.5, scope="step", lora_dropout=0.0, target_modules="all-linear"
)
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model.train()
for step in range(1, 41):
    first = model(input_ids=ids, labels=ids).loss
    again = model(input_ids=ids, labels=ids).loss
    first.backward()
    if step == 1:
        print(f"one mask for all forwards of a step: {bool(first == again)}")
    optimizer.step()  # the next step draws another one
    optimizer.zero_grad()
    if step in (1, 20, 40):
        print(f"step {step}: loss {first:.3f} with half of the ranks")

model.eval()
with torch.no_grad():
    adapter = model(input_ids=ids, labels=ids)
    print(f"all ranks, without masks: loss {adapter.loss:.3f}")
    export = plait.to_lora(model)
    print(f"as a plain LoRA of rank {export.layers[0].rank}, left out: {export.error:g}")
    merged = model.merge_and_unload()(input_ids=ids).logits
print(f"merged and unmerged logits differ by at most {(merged - adapter.logits).abs().max():.1e}")
