"""Load an exported folder with stock transformers and peft and write its logits.

Run by path in a fresh process, never imported: it shows that an export needs no plait.

    python stock_check.py JOBS.json

JOBS.json is a list of jobs, each with: model (name or folder), adapter (folder or null), task,
labels, dtype, quantization (null, or the options of a BitsAndBytesConfig: those of the run),
trust_remote_code, revision, pad (a token id or null), inputs (safetensors of the model's inputs),
logits (safetensors to write).
"""

import json
import sys

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file


def main(path: str) -> None:
    """Read the jobs; for each, run the model on the inputs and write the logits."""
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        write_logits(job)


def write_logits(job):
    """Do one job."""
    kind = "CausalLM" if job["task"] == "causal_lm" else "SequenceClassification"
    options = {"dtype": job["dtype"], "revision": job["revision"], "use_safetensors": True}
    if job["labels"]:
        options["num_labels"] = job["labels"]
    if job["quantization"] not in (None, "none"):
        options["quantization_config"] = transformers.BitsAndBytesConfig(**job["quantization"])
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(
        job["model"], trust_remote_code=job["trust_remote_code"], **options
    )
    if job.get("pad") is not None:  # the tokenizer's; the config of the base may say another one
        model.config.pad_token_id = job["pad"]
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    if "plait" in sys.modules:
        raise RuntimeError("plait was imported; the check would show nothing.")
    # On some CPUs bitsandbytes evaluates a 4-bit layer in bf16. plait switches that off, because
    # the layer's gradients would stop; here it would hide what the export loses.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore
    inputs = {name: tensor.to(model.device) for name, tensor in load_file(job["inputs"]).items()}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    save_file({"logits": logits.float().cpu().contiguous()}, job["logits"])


if __name__ == "__main__":
    main(sys.argv[1])
