"""Write a plain LoRA as the GGUF file that llama.cpp loads, and read it back.

llama.cpp's converter comes with its source alone. This module needs only the package `gguf`, which
knows llama.cpp's names of tensors. What that package does not know stands in FAMILIES: the
architecture that llama.cpp has for a class of transformers, and whether it orders the rows of the
query and key projections in another way. transformers rotates the two halves of a head against
each other, llama.cpp's Llama neighbouring rows (`permute` of LlamaModel in convert_hf_to_gguf.py),
so these rows of B are interleaved. A is never reordered, because the inputs are not.

llama.cpp multiplies each update by lora_alpha / (rank of that tensor) and reads no pattern.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from plait.upstream.export import LoraExport
from plait.upstream.servers import READERS, Base

FILE = "adapter.gguf"
# Class of transformers -> name in gguf.MODEL_ARCH, and whether rows of q and k are interleaved.
FAMILIES: dict[str, tuple[str, bool]] = {
    "LlamaForCausalLM": ("LLAMA", True),
    "MistralForCausalLM": ("LLAMA", True),
    "Qwen2ForCausalLM": ("QWEN2", False),
    "Qwen3ForCausalLM": ("QWEN3", False),
    "Phi3ForCausalLM": ("PHI3", False),
    "GemmaForCausalLM": ("GEMMA", False),
    "Gemma2ForCausalLM": ("GEMMA2", False),
}
_READER = next(reader for reader in READERS if reader.key == "llamacpp")
_PREFIX, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_MERGE = "Merge instead (--to merged); llama.cpp's convert_hf_to_gguf.py turns that into GGUF."


def write_gguf(lora: LoraExport, base: PreTrainedModel, file: Path) -> None:
    """Write a LoRA to a GGUF file.

    Args:
        lora: of one rank, with alpha == r and no patterns. Tensors of float32, float16 or bfloat16
            are written as such.
        base: the base model.
        file: to be written.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: llama.cpp could not read the adapter, or would read it differently.
    """
    gguf = package()
    arch, _ = _family(base)
    tensors = dict(_tensors(lora, base))  # everything is checked before the file is opened
    writer: Any = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.config.lora_alpha))
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:  # numpy has no such type
            kind = gguf.GGMLQuantizationType.BF16
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(file: Path, base: PreTrainedModel) -> LoraExport:
    """Read a LoRA, as float32, from a file that write_gguf wrote.

    Raises ValueError if a tensor belongs to no layer of this base model.
    """
    gguf = package()
    known, heads = _known_names(base), _heads(base)
    modules = {known.get_name(name): name for name, _ in base.named_modules()}
    reader, tensors, targets = gguf.GGUFReader(file), {}, set()
    for stored in reader.tensors:
        name, _, factor = stored.name.rpartition(".weight.lora_")
        if name not in modules:
            raise ValueError(f"{file}: {stored.name} belongs to no layer of the base model.")
        tensor = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
        rows = heads.get(name.rpartition(".")[2], 0) if factor == "b" else 0
        key = f"{_PREFIX}{modules[name]}.lora_{factor.upper()}.weight"
        tensors[key] = _halves(tensor, rows) if rows else tensor
        targets.add(modules[name])
    factors = [t for key, t in tensors.items() if key.endswith(_ENDS[0])]
    config = LoraConfig(
        r=len(factors[0]),
        lora_alpha=reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents(),
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )
    return LoraExport(config, tensors, [])


def check_gguf(lora: LoraExport, base: PreTrainedModel) -> None:
    """Raise what write_gguf would raise."""
    package()
    _names(lora, base)


def package() -> Any:
    """The package gguf; ImportError without it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            f"--to gguf needs the package gguf ({error}). Install it with: pip install "
            '"plait[gguf]"'
        ) from error


def _family(base: PreTrainedModel) -> tuple[str, bool]:
    """Name in gguf.MODEL_ARCH of a base model, and whether rows of q and k are interleaved."""
    name = type(base).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"--to gguf knows llama.cpp's tensors of {', '.join(FAMILIES)}, and not of {name}. "
            "Export with --to lora and use llama.cpp's convert_lora_to_gguf.py, or merge: --to "
            "merged and convert_hf_to_gguf.py."
        )
    return FAMILIES[name]


def _tensors(lora: LoraExport, base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and tensor of each factor: A (r, in), B (out, r)."""
    for key, (name, heads) in _names(lora, base).items():
        tensor = lora.tensors[key].detach().cpu()
        yield name, (_interleaved(tensor, heads) if heads else tensor).contiguous()


def _known_names(base: PreTrainedModel) -> Any:
    """The package's map from names of modules to llama.cpp's names."""
    gguf = package()
    arch, _ = _family(base)
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], base.config.num_hidden_layers)


def _heads(base: PreTrainedModel) -> dict[str, int]:
    """The layers whose rows llama.cpp interleaves -> the number of heads."""
    config, (_, interleaved) = base.config, _family(base)
    if not interleaved:
        return {}
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def _names(lora: LoraExport, base: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """peft's name of a tensor -> llama.cpp's name, and the heads of a B to interleave, else 0."""
    reasons = _READER.reasons(lora.config, lora.tensors, Base.of(base))
    if reasons:
        raise ValueError(f"{_READER.title}: {'; '.join(reasons)}. {_MERGE}")
    known, heads, names = _known_names(base), _heads(base), {}
    for key in lora.tensors:
        module = key.removeprefix(_PREFIX)
        module, _, factor = module.removesuffix(".weight").rpartition(".lora_")
        name = known.get_name(module)
        if name is None or name == "token_embd":
            kind = type(base).__name__
            raise ValueError(f"llama.cpp takes no LoRA of {module} in a {kind}. {_MERGE}")
        rows = heads.get(name.rpartition(".")[2], 0) if factor == "B" else 0
        names[key] = f"{name}.weight.lora_{factor.lower()}", rows
    return names


def _interleaved(B: Tensor, heads: int) -> Tensor:
    """Rows of B (out, r) of each head from first half, second half to neighbouring pairs."""
    return B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


def _halves(B: Tensor, heads: int) -> Tensor:
    """The inverse of _interleaved."""
    return B.reshape(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
