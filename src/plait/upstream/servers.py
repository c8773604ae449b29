"""What servers read of a plain LoRA: one row a reader, and why it cannot take an export.

Each reader computes the scale of layer i in its own way:

    stock peft        alpha_i / r_i, both patterns and use_rslora read
    vLLM >= 0.33      alpha_i / r_i, both patterns and use_rslora read     vllm/lora/peft_helper.py
    vLLM < 0.33       alpha / r for all layers, patterns dropped           vllm/lora/peft_helper.py
    SGLang 0.5.23     alpha / r for all layers, patterns and use_rslora    sglang/srt/lora/lora.py
                      dropped; it stacks q, k, v, and gate, up
    llama.cpp         alpha / (rank of the tensor), patterns and           src/llama-adapter.h,
                      use_rslora dropped                                   convert_lora_to_gguf.py

What a reader drops, it drops without a word; what it refuses, it refuses when it loads the adapter.
tests/serving/readers.py computes dW by each of these rules.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PREFIX = "base_model.model."  # of the names in an adapter file
HEADS = ("classifier", "score")  # the modules of modules_to_save that servers know
# max_lora_rank of vLLM is one of these, 16 by default (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Names of linear layers that SGLang packs and serves (sglang/srt/lora/utils.py).
_SGLANG_LAYERS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "lm_head", "embed_tokens"),
    *("in_proj", "in_proj_qkv", "in_proj_z", "fc1_latent_proj", "fc2_latent_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wq_b", "wk", "weights_proj"),
}
# Layers that SGLang stacks -> those that it then looks for (normalize_qkv_proj and
# normalize_gate_up_proj in lora.py): without them it raises KeyError or finds no target module.
_STACKED = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}
_TIED = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Base:
    """What readers look at in the base model of an adapter.

    layers: names of its layers, without those that a tuner put into them. tied: whether lm_head is
    the embedding.
    """

    layers: frozenset[str]
    tied: bool = False

    @classmethod
    def of(cls, model: Any) -> "Base":
        """Read a base model, adapted or not."""
        names = (name.partition(".base_layer")[0] for name, _ in model.named_modules())
        config = getattr(model, "config", None)  # a model of one's own may have none
        return cls(frozenset(names), bool(getattr(config, "tie_word_embeddings", False)))


Check = Callable[[Any, Mapping[str, Tensor], Base], list[str]]


@dataclass(frozen=True)
class Reader:
    """A program that loads plain LoRAs.

    key: its name in `plait export --for`; "" for an old version, which is only reported on. title:
    its name and version. check: why it cannot take an export, [] if it reads it right; takes
    adapter_config, tensors and the base.
    """

    key: str
    title: str
    check: Check

    def reasons(self, config: Any, tensors: Mapping[str, Tensor], base: Base) -> list[str]:
        """Why it cannot read an export right; [] if it does.

        Args:
            config: a LoraConfig. tensors: as saved by peft. base: of the adapter.
        """
        return self.check(config, tensors, base)


def stacked_with(names: Collection[str], base: Base) -> list[str]:
    """Return layers of a base that SGLang needs an update of, because it stacks them with others.

    names: the adapted layers.
    """
    needed = {
        f"{parent}.{sibling}"
        for parent, _, last in (name.rpartition(".") for name in names)
        for sibling in _STACKED.get(last, ())
    }
    return sorted((needed - {*names}) & base.layers)


def max_lora_rank(rank: int) -> int | None:
    """The smallest max_lora_rank of vLLM that serves a rank; None above the largest."""
    return next((r for r in VLLM_RANKS if r >= rank), None)


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Adapted layers and their ranks."""
    end = ".lora_A.weight"
    return {name.removesuffix(end): len(A) for name, A in tensors.items() if name.endswith(end)}


def _others(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are no factors of a linear layer."""
    return [n for n in tensors if not n.endswith((".lora_A.weight", ".lora_B.weight"))]


def _listed(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def _dropped(config: Any, rslora: bool) -> list[str]:
    """The options of the scale that a reader drops, with what follows."""
    names = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    names += ["use_rslora"] if rslora and config.use_rslora else []
    return [f"it drops {' and '.join(names)}, so scales would be wrong"] if names else []


def _peft(config: Any, tensors: Mapping[str, Tensor], base: Base) -> list[str]:
    return []


def _vllm(config: Any, tensors: Mapping[str, Tensor], base: Base) -> list[str]:
    reasons = []
    rank = max(_layers(tensors).values())
    if max_lora_rank(rank) is None:
        reasons.append(f"rank {rank} is above {VLLM_RANKS[-1]}, its largest max_lora_rank")
    if config.bias != "none":
        reasons.append("it refuses trained biases")
    heads = {*HEADS} & {*(config.modules_to_save or ())}
    others = [n for n in _others(tensors) if n.split(".")[-2] not in heads]
    if others and config.bias == "none":
        reasons.append(f"it refuses {_listed(others)}")
    return reasons


def _old_vllm(config: Any, tensors: Mapping[str, Tensor], base: Base) -> list[str]:
    reasons = _vllm(config, tensors, base) + _dropped(config, rslora=False)
    if config.modules_to_save:
        reasons.append("it refuses modules_to_save")
    return reasons


def _sglang(config: Any, tensors: Mapping[str, Tensor], base: Base) -> list[str]:
    reasons = _dropped(config, rslora=True)
    layers = _layers(tensors)
    if len({*layers.values()}) > 1:
        reasons.append("it fails on layers of different ranks")
    missing = stacked_with([name.removeprefix(_PREFIX) for name in layers], base)
    if missing:
        reasons.append(f"it needs factors of {_listed(missing)} too, which it stacks with others")
    unknown = {name.rpartition(".")[2] for name in layers} - _SGLANG_LAYERS
    if unknown:
        reasons.append(f"it does not serve layers named {_listed(unknown)}")
    if _others(tensors):
        reasons.append(f"it reads no {_listed(_others(tensors))}")
    return reasons


def _llamacpp(config: Any, tensors: Mapping[str, Tensor], base: Base) -> list[str]:
    reasons = _dropped(config, rslora=True)
    if config.fan_in_fan_out:
        reasons.append("its converter transposes the factors of GPT-2's layers")
    if _others(tensors):
        reasons.append(f"it reads no {_listed(_others(tensors))}")
    ends = {name.rpartition(".")[2] for name in _layers(tensors)} & {*_TIED}
    if base.tied and ends:
        reasons.append(f"it refuses {_listed(ends)} where the base ties lm_head to the embedding")
    return reasons


READERS = (
    Reader("peft", "stock peft", _peft),
    Reader("vllm", "vLLM >= 0.33", _vllm),
    Reader("", "older vLLM", _old_vllm),
    Reader("sglang", "SGLang", _sglang),
    Reader("llamacpp", "llama.cpp", _llamacpp),
)
SERVERS = tuple(reader.key for reader in READERS if reader.key)
