"""Run by contract.fresh_process in a new process: load what another process saved."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

folder, modules = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
ids = load_file(folder / "inputs.safetensors")["input_ids"]
places = sorted(folder.glob("case*"))
found: dict[Path, dict[str, torch.Tensor]] = {place: {} for place in places}
types: dict[str, str] = {}


@torch.no_grad()
def logits(adapter: Path, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the saved base with a saved adapter."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), adapter)
    types[adapter.parent.name] = str(model.peft_config["default"].peft_type).removeprefix(
        "PeftType."
    )
    return model.eval()(input_ids=ids, **inputs).logits


for place in places:
    if (place / "export").exists():
        found[place]["exported"] = logits(place / "export")
        assert types[place.name] == "LORA"
assert not [name for name in sys.modules if name.split(".")[0] == "plait"]

before = {name.split(".")[0] for name in sys.modules}
import plait  # noqa: E402, F401

brought = {name.split(".")[0] for name in sys.modules} - before
assert brought <= {"plait"}, f"importing plait brings {brought}"

for path in modules:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def refuse(*_: object, **__: object) -> None:
    """Loading must not start from the base weight again."""
    raise AssertionError("a decomposition at load")


torch.linalg.svd = torch.linalg.qr = refuse
for place in places:
    saved = load_file(place / "saved.safetensors")
    inputs = {"task_ids": saved["task_ids"]} if "task_ids" in saved else {}
    found[place]["logits"] = logits(place / "adapter", **inputs)
    save_file({k: v.contiguous() for k, v in found[place].items()}, place / "found.safetensors")
print(json.dumps(types))
