"""Program of `processes.fresh_process`: load in a new process what another process saved.

    python -P fresh_program.py FOLDER METHODS    # METHODS: JSON, module name -> its file

Exports are loaded before plait is imported, so that stock peft alone reads them.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM


@torch.no_grad()
def logits_of(adapter: Path, **inputs: Tensor) -> tuple[str, Tensor]:
    """Name of a saved adapter's peft type, and logits of the saved base model with it."""
    base = LlamaForCausalLM.from_pretrained(adapter.parents[1] / "base")
    model = PeftModel.from_pretrained(base, adapter).eval()
    kind = str(model.peft_config["default"].peft_type).removeprefix("PeftType.")
    return kind, model(**inputs).logits


def register(name: str, file: str) -> None:
    """Import the module of a method by its name or, if Python's path lacks it, from its file."""
    from plait.testing.processes import load

    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        load(Path(file))


def refuse(*_: object, **__: object) -> None:
    """In place of svd and qr: loading must not compute the start from the base weight again."""
    raise AssertionError("a decomposition at load")


def main(folder: Path, methods: dict[str, str]) -> None:
    """Write the logits of each case; print the peft types of the adapters as JSON."""
    torch.set_num_threads(1)
    ids = load_file(folder / "inputs.safetensors")["input_ids"]
    cases = sorted(folder.glob("case*"))
    results: dict[Path, dict[str, Tensor]] = {case: {} for case in cases}
    for case in cases:
        if (case / "export").exists():
            kind, results[case]["exported"] = logits_of(case / "export", input_ids=ids)
            assert kind == "LORA", f"an export is of type {kind}"
    assert not [name for name in sys.modules if name.split(".")[0] == "plait"]

    before = {name.split(".")[0] for name in sys.modules}
    import plait  # noqa: F401

    brought = {name.split(".")[0] for name in sys.modules} - before
    assert brought <= {"plait"}, f"importing plait imports {brought}"
    for name, file in methods.items():
        register(name, file)

    torch.linalg.svd = torch.linalg.qr = refuse  # type: ignore[assignment]
    types = {}
    for case in cases:
        saved = load_file(case / "saved.safetensors")
        tasks = {"task_ids": saved["task_ids"]} if "task_ids" in saved else {}
        kind, results[case]["logits"] = logits_of(case / "adapter", input_ids=ids, **tasks)
        types[case.name] = kind
        tensors = {name: value.contiguous() for name, value in results[case].items()}
        save_file(tensors, case / "loaded.safetensors")
    print(json.dumps(types))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
