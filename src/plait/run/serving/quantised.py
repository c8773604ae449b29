"""Merge an adapter into a quantised base: into the weights that it computes with.

The packed layers become plain ones with the same weights, in float32, and the update is added.
Written with 16 bits this is exact up to their rounding. Packing it again is not: an update is often
smaller than the distance of two packed values, so a part of it is lost (peft issue 2321).
"""

from collections.abc import Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from plait.run.model import head_of, load_base
from plait.run.prepare import TrainedRun, load_trained


def merge_quantised(run: TrainedRun, choice: Mapping[str, Any]) -> dict[str, PreTrainedModel]:
    """Merge the adapter of a run on a quantised base; return the result in two forms.

    Args:
        run: with model.quantization 8bit or 4bit.
        choice: of a task or an approximation, for methods that need one.

    Returns:
        "bfloat16" or "float16", the type that the run computed in if it has 16 bits: a plain model.
        "8bit" or "4bit": the merged weights packed as the base was.

    Raises:
        NotMergeable: the update depends on the input.
        ImportError: bitsandbytes is not installed.
    """
    model, cfg = load_trained(run.folder, run.cfg, run.tokenizer, run.facts, True), run.cfg.model
    merge: Any = model.merge_and_unload
    merged = merge(safe_merge=True, **choice)
    narrow = cfg.dtype if cfg.dtype in ("bfloat16", "float16") else "bfloat16"
    with TemporaryDirectory() as scratch:
        merged.save_pretrained(scratch)
        run.tokenizer.save_pretrained(scratch)
        base = replace(cfg, name=scratch, revision=None)
        plain = replace(base, dtype=narrow, quantization="none")
        heads = head_of(cfg.task, run.facts.get("labels"))
        forms = {narrow: plain, cfg.quantization: base}
        return {name: load_base(form, *heads).eval() for name, form in forms.items()}
