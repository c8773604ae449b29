"""Three plans of a chain: a loop of your own, Trainer, and what is left in the end."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)


def base():
    """The shipped tiny Llama."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")


ids = torch.randint(3, base().config.vocab_size, (16, 24))
folder = tempfile.mkdtemp()
config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base(), config)
# --8<-- [start:loop]
plan = plait.ChainPlan.chain(links=3)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
schedule = plait.chain_schedule(plan, optimizer, total_steps=30)
chain = plait.chain.start(model, plan, total_steps=30)
for _ in range(30):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # ties a link after steps 10 and 20
    schedule.step()
    optimizer.zero_grad()
chain.finish()  # raises if a tie is missing
# --8<-- [end:loop]
model.eval()
with torch.no_grad():
    live = model(ids).logits
    # --8<-- [start:save]
    plait.chain.save_stacked(model, folder)  # one plain LoRA of rank 6
    stock = PeftModel.from_pretrained(base(), folder)
    # --8<-- [end:save]
    error = (stock.eval()(ids).logits - live).abs().max()
    print(f"rank of the stacked adapter: {stock.peft_config['default'].r}")
    print(f"its logits and those of the chain differ by {error:.0e}")
    merged = plait.chain.merge(model)
    error = (merged(ids).logits - live).abs().max()
    print(f"logits of the merged model and of the chain differ by {error:.0e}")

model = get_peft_model(base(), config)
data = [{"input_ids": row, "labels": row} for row in ids]
# --8<-- [start:trainer]
plan = plait.ChainPlan.rac(links=4, freeze="A", seed=0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
arguments = TrainingArguments(
    output_dir=folder,
    max_steps=20,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=data,
    optimizers=(optimizer, plait.chain_schedule(plan, optimizer, total_steps=20)),
    callbacks=[plait.ChainCallback(plan)],
)
trainer.train()
# --8<-- [end:trainer]
print("links tied under Trainer:", plait.chain.chain_of(model).ties)
