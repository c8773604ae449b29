"""How stock peft and the servers read a plain LoRA: one function a reader, written from its source.

Each takes what is in the folder and returns the update (out, in) that the reader adds to each
linear layer, in fp64, or raises Refused as it would. `lost` is what it passes over without a word.
They share no code with plait's own knowledge of servers, so that a test can hold the two together.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

HEADS = ("classifier", "score")
PREFIX = "base_model.model."


class Refused(Exception):
    """The reader refuses the adapter when it loads it."""


@dataclass(frozen=True)
class Saved:
    """A saved adapter. shapes: layer -> (out, in) of the base model's weight."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]

    @classmethod
    def load(cls, folder: Path, shapes: dict[str, tuple[int, int]]) -> "Saved":
        """Read a folder."""
        config = json.loads((folder / "adapter_config.json").read_text())
        return cls(config, load_file(folder / "adapter_model.safetensors"), shapes)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> A (r, in), B (out, r), fp64."""
        end = ".lora_A.weight"
        return {
            name.removesuffix(end).removeprefix(PREFIX): (
                A.double(),
                self.tensors[name.replace("lora_A", "lora_B")].double(),
            )
            for name, A in self.tensors.items()
            if name.endswith(end)
        }

    def others(self) -> list[str]:
        """Names of tensors that are no factors."""
        return [n for n in self.tensors if not n.endswith((".lora_A.weight", ".lora_B.weight"))]


@dataclass(frozen=True)
class Reading:
    """updates: layer -> dW (out, in). lost: tensors that the reader ignores."""

    updates: dict[str, Tensor]
    lost: list[str] = field(default_factory=list)


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def peft(saved: Saved) -> Reading:
    """Stock peft 0.21.2: tuners/lora/model.py (_create_and_replace), utils/other.py (patterns).

    The factors have to have the rank that the config gives the layer.
    """
    config, updates = saved.config, {}
    for name, (A, B) in saved.pairs().items():
        r = _pattern(config["rank_pattern"], name, config["r"])
        alpha = _pattern(config["alpha_pattern"], name, config["lora_alpha"])
        if len(A) != r:
            raise Refused(f"{name}: size mismatch, rank {len(A)} in the file and {r} in the config")
        scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        updates[name] = scale * B @ A
    return Reading(updates)


def _check_vllm(saved: Saved) -> None:
    """What vLLM refuses: vllm/lora/peft_helper.py, _validate_features and validate_legal;

    vllm/lora/utils.py, parse_fine_tuned_lora_name; vllm/config/lora.py, max_lora_rank.
    """
    config = saved.config
    if config["use_dora"] or config["lora_bias"] or config["bias"] != "none":
        raise Refused("DoRA or a bias")
    if {*(config["modules_to_save"] or ())} - {*HEADS}:
        raise Refused("modules_to_save")
    init = config["init_lora_weights"]
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        raise Refused(f"init_lora_weights={init}: the base was changed")
    if config["alora_invocation_tokens"] or config["layer_replication"] or config["use_qalora"]:
        raise Refused("aLoRA, layer replication or QALoRA")
    if max(len(A) for A, _ in saved.pairs().values()) > 512:
        raise Refused("rank above 512")
    for name in saved.others():  # a head is known by the last part of its module's name alone
        module = name.split(".")[-2]
        if module not in HEADS or module not in (config["modules_to_save"] or ()):
            raise Refused(f"{name} is unsupported LoRA weight")


def vllm(saved: Saved) -> Reading:
    """vLLM 0.33.0: vllm/lora/peft_helper.py, get_rank_and_scaling; both patterns are read."""
    _check_vllm(saved)
    config, updates = saved.config, {}
    for name, (A, B) in saved.pairs().items():
        r = _pattern(config["rank_pattern"], name, config["r"])
        alpha = _pattern(config["alpha_pattern"], name, config["lora_alpha"])
        scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        updates[name] = scale * B @ A
    return Reading(updates)


def old_vllm(saved: Saved) -> Reading:
    """vLLM before 0.33: vllm/lora/peft_helper.py, vllm_lora_scaling_factor, one for all layers."""
    if saved.config["modules_to_save"]:
        raise Refused("vLLM only supports modules_to_save being None.")
    _check_vllm(saved)
    r, alpha = saved.config["r"], saved.config["lora_alpha"]
    scale = alpha / math.sqrt(r) if saved.config["use_rslora"] else alpha / r
    return Reading({name: scale * B @ A for name, (A, B) in saved.pairs().items()})


def sglang(saved: Saved) -> Reading:
    """SGLang 0.5.23: srt/lora/lora.py (scaling; q, k, v and gate, up are stacked), mem_pool.py

    (buffers of rank r, in which other ranks do not fit), utils.py (the layers that it knows). A
    head belongs to no block, and no module asks for it.
    """
    config = saved.config
    if config["use_dora"]:
        raise Refused("DoRA")
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    updates, pairs = {}, saved.pairs()
    for name, (A, B) in pairs.items():
        parent, _, last = name.rpartition(".")
        if last not in known:
            raise Refused(f"does not recognize target_modules={name}")
        if last == "q_proj" and f"{parent}.v_proj" not in pairs:
            raise Refused(f"KeyError: {parent}.v_proj")
        first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last)
        if first is not None and f"{parent}.{first}" not in pairs:
            raise Refused(f"cannot find a target module name for {name}")
        if len(A) != config["r"]:
            raise Refused(f"{name}: rank {len(A)} does not fit a buffer of rank {config['r']}")
        updates[name] = config["lora_alpha"] / config["r"] * B @ A
    return Reading(updates, saved.others())


def llamacpp(saved: Saved) -> Reading:
    """llama.cpp (llama-cpp-python 0.3.36): src/llama-adapter.h, get_scale; convert_lora_to_gguf.py.

    The converter transposes layers whose weight it transposes, GPT-2's Conv1D, and the factors
    with them; the runtime refuses shapes that are not the weight's. Norms are converted, and the
    runtime passes over them.
    """
    lost = []
    for name in saved.others():
        if "_layernorm" not in name and ".norm" not in name:
            raise Refused(f"Unexpected name {name!r}: Not a lora_A or lora_B tensor")
        lost.append(name)
    updates = {}
    for name, (A, B) in saved.pairs().items():
        dW = saved.config["lora_alpha"] / len(A) * B @ A
        if saved.config["fan_in_fan_out"]:
            dW = dW.T
        if dW.shape != saved.shapes[name]:
            raise Refused(f"{name}: incorrect shape (hint: maybe wrong base model?)")
        updates[name] = dW
    return Reading(updates, lost)


# By the titles under which plait reports on them.
READERS: dict[str, Callable[[Saved], Reading]] = {
    "stock peft": peft,
    "vLLM >= 0.33": vllm,
    "older vLLM": old_vllm,
    "SGLang": sglang,
    "llama.cpp": llamacpp,
}
