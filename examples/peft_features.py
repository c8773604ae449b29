"""What peft's users expect, on a method of plait: several adapters, mixed batches, merging."""

import tempfile

import torch

# --8<-- [start:save]
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import plait  # registers the methods; a saved adapter loads only after this line
from plait.assets import tiny_model_dir

base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
config = plait.ColaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)
# --8<-- [end:save]
folder = tempfile.mkdtemp()


def train(model: torch.nn.Module, **inputs: object) -> None:
    """Make a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(5):
        model(input_ids=ids, labels=ids, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


torch.manual_seed(0)
ids = torch.randint(3, base.config.vocab_size, (3, 16))
train(model)

# --8<-- [start:load]
model.save_pretrained(folder)
fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
loaded = PeftModel.from_pretrained(fresh, folder)
# --8<-- [end:load]
same = torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
print("loaded adapter gives the same logits:", same)

# --8<-- [start:adapters]
model.add_adapter("law", plait.ColaConfig(r=4, target_modules="all-linear", seed=1))
model.set_adapter("law")  # "law" is active and trained, "default" rests
train(model)
with model.disable_adapter():
    bare = model(input_ids=ids).logits  # the base model, bit for bit
# --8<-- [end:adapters]
fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32").eval()
print("disabled adapters give the base model:", torch.equal(bare, fresh(input_ids=ids).logits))

# --8<-- [start:weighted]
model.base_model.add_weighted_adapter(["default", "law"], [0.7, 0.3], "both")
model.set_adapter("both")
plait.to_lora(model, "both").write(f"{folder}/both")  # a plain LoRA
# --8<-- [end:weighted]
model.set_adapter("law")

# --8<-- [start:mixed]
names = ["default", "law", "__base__"]  # one name for each row
mixed = model(input_ids=ids, adapter_names=names).logits
# --8<-- [end:mixed]
model.set_adapter("default")
gap = (model(input_ids=ids[:1]).logits - mixed[:1]).abs().max()
print(f"row 0 of the mixed batch and the same row alone differ by {gap:.1e}")

# --8<-- [start:merge]
model.merge_adapter()  # into the base weights, a copy of them is kept
model.unmerge_adapter()  # puts the copy back, bit for bit
plain = model.merge_and_unload(safe_merge=True)  # a plain transformers model
# --8<-- [end:merge]
print("merged model:", type(plain).__name__)

base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float32")
batches = [{"input_ids": ids, "labels": ids}] * 5
# --8<-- [start:together]
arms = [plait.Arm(name, config, batches, lr=lr) for name, lr in (("slow", 1e-3), ("fast", 1e-2))]
model, losses = plait.train_together(base, arms)  # an adapter and a list of losses for each arm
# --8<-- [end:together]
print("last losses:", {name: round(own[-1], 2) for name, own in losses.items()})
