"""What each type of the installed peft can do, found out on a small model; some minutes.

python docs/_generate/peft_types.py > docs/_generate/peft_types.md
"""

import gc
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from plait.upstream.types import own_targets, peft_types

WIDTH = 256  # below it the defaults of some types do not fit
# What a type needs and has no default for.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 6, "tinit": 1, "tfinal": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "VBLORA": {"num_vectors": 32, "vector_length": 64},
}


def base() -> Any:
    """The same random Llama each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def config_of(kind: str) -> Any:
    """The config of a type as a run file makes it."""
    cls = vars(peft)[peft_types()[kind]]
    options = NEEDS.get(kind, {})
    if "target_modules" in cls.__dataclass_fields__ and not own_targets(kind):
        options = {"target_modules": "all-linear", **options}
    return cls(task_type="CAUSAL_LM", **options)


def probe(kind: str) -> dict[str, str]:
    """Train three steps, save, load, merge and convert; each answer is yes or the reason."""
    ids = torch.arange(24).view(2, 12) % 40
    found: dict[str, str] = {}
    model = get_peft_model(base(), config_of(kind))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    found["trains"] = "yes" if losses[-1] < losses[0] - 1e-4 else f"no: {losses[0]:.4f} stays"
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for name, check in (("loads", _loads), ("merges", _merges), ("converts", _converts)):
        try:
            found[name] = check(kind, model, ids, expected)
        except Exception as error:  # whatever a type makes of it
            found[name] = f"no: {type(error).__name__}"
        gc.collect()
    return found


@torch.no_grad()
def _loads(kind: str, model: Any, ids: Any, expected: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(), folder).eval()
    return _near(loaded(input_ids=ids).logits, expected)


@torch.no_grad()
def _converts(kind: str, model: Any, ids: Any, expected: Any) -> str:
    """peft's own conversion to a LoRA of rank 64, on the original base."""
    if kind == "LORA":
        return "is one"
    config, state = peft.convert_to_lora(model, rank=64)
    plain = get_peft_model(base(), config).eval()
    peft.set_peft_model_state_dict(plain, state)
    return _near(plain(input_ids=ids).logits, expected)


@torch.no_grad()
def _merges(kind: str, model: Any, ids: Any, expected: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: Any = PeftModel.from_pretrained(base(), folder).eval()
    return _near(loaded.merge_and_unload()(input_ids=ids).logits, expected)


def _near(found: Any, expected: Any) -> str:
    off = float((found - expected).abs().max() / expected.abs().max())
    return "yes" if off < 1e-4 else f"off by {off:.1%}"


def rows() -> Iterator[str]:
    """The lines of the table."""
    yield "| type | trains | loads | merges | peft converts it to LoRA |"
    yield "|---|---|---|---|---|"
    for kind in sorted(peft_types()):
        try:
            found = probe(kind)
        except Exception as error:
            found = {"trains": f"no: {type(error).__name__}: {' '.join(str(error).split())[:80]}"}
        cells = (found.get(name, "") for name in ("trains", "loads", "merges", "converts"))
        yield f"| `{kind}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in rows():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
