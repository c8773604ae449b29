"""ALoRA by task: one B for all tasks, one A for each; a task's adapter is a plain LoRA."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
ids = torch.randint(3, base.config.vocab_size, (8, 24))
task_ids = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])  # an index into `tasks` for each row

# --8<-- [start:tasks]
config = plait.SharedBLoraConfig(
    r=8, routing="task", tasks=["law", "medicine"], target_modules="all-linear"
)
model = get_peft_model(base, config)
# --8<-- [end:tasks]
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model.train()
for step in range(1, 31):
    # --8<-- [start:forward]
    loss = model(input_ids=ids, labels=ids, task_ids=task_ids).loss
    # --8<-- [end:forward]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, 30):
        print(f"step {step}: loss {loss:.3f}")

model.eval()
mixed = model(input_ids=ids, task_ids=task_ids).logits
model.set_task("medicine")  # rows without task_ids, in evaluation
alone = model(input_ids=ids[1::2]).logits
print(f"mixed batch and one task alone differ by {(mixed[1::2] - alone).abs().max():.1e}")

merged = model.merge_and_unload(task="medicine")
difference = (merged(input_ids=ids[1::2]).logits - alone).abs().max()
print(f"largest logit difference after merging one task: {difference:.1e}")
