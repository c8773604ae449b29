"""The LoRA loaders of vLLM and SGLang themselves, taken from their wheels: no GPU, no installation.

Both packages need CUDA to be imported as a whole. The files that read an adapter are plain Python,
so everything else that they import is replaced by empty stand-ins. `make test-loaders` unpacks the
wheels and runs the table of readers with these loaders in place of the rules in readers.py.
"""

import importlib
import importlib.util
import logging
import re
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.serving.readers import PREFIX, Reading, Refused, Saved

# Files of the wheels that are run; all other modules of the two packages are stand-ins.
REAL = {
    *("vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils"),
    *("sglang.srt.lora.lora", "sglang.srt.lora.lora_config", "sglang.srt.lora.utils"),
}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
REFUSALS = (KeyError, ValueError, AssertionError, RuntimeError)


class _StandIn(types.ModuleType):
    """A module that has a class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _VALUES.get(name, type(name, (), {}))


def _layer_number(name: str) -> int | None:
    match = re.search(r"layers\.(\d+)\.", name)
    return None if match is None else int(match.group(1))


def _logger(*_: Any) -> Any:
    logger: Any = logging.getLogger("tests.serving.loaders")
    logger.info_once = logger.warning_once = lambda *args: None
    return logger


# What the real files call, or test, of the stand-ins.
_VALUES: dict[str, Any] = {
    "PIN_MEMORY": False,
    "init_logger": _logger,
    "get_layer_id": _layer_number,
}


class _Finder:
    """Finds the real files below a folder, and stand-ins for the rest of the two packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("vllm", "sglang"):
            return None
        if name in REAL:
            file = self.folder.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def loaders(folder: Path) -> dict[str, Callable[[Saved], Reading]]:
    """Return the real readers by the titles of readers.READERS; folder: of the unpacked wheels."""
    sys.meta_path.insert(0, _Finder(folder))  # type: ignore[arg-type]
    return {"vLLM >= 0.33": _vllm(), "SGLang": _sglang()}


def _vllm() -> Callable[[Saved], Reading]:
    helper = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
    model = importlib.import_module("vllm.lora.lora_model").LoRAModel

    def read(saved: Saved) -> Reading:
        try:
            config = helper.from_dict({**saved.config, "vllm_max_position_embeddings": None})
            config.validate_legal(SimpleNamespace(max_lora_rank=512))
            loaded = model.from_lora_tensors(1, dict(saved.tensors), config, device="cpu")
        except REFUSALS as error:
            raise Refused(str(error)) from error
        return Reading(
            {
                name: layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
                for name, layer in loaded.loras.items()
            }
        )

    return read


def _sglang() -> Callable[[Saved], Reading]:
    lora = importlib.import_module("sglang.srt.lora.lora")
    config_of = importlib.import_module("sglang.srt.lora.lora_config").LoRAConfig
    utils = importlib.import_module("sglang.srt.lora.utils")

    def read(saved: Saved) -> Reading:
        config = config_of(config_dict=saved.config)
        if config.use_dora:  # srt/lora/lora_manager.py, which needs a GPU
            raise Refused("DoRA is not supported")
        base = SimpleNamespace(
            num_hidden_layers=1 + max(_layer_number(name) or 0 for name in saved.tensors),
            architectures=[],
        )
        updates: dict[str, Tensor] = {}
        try:
            targets = utils.get_normalized_target_modules(config.target_modules)
            if unknown := targets - utils._KNOWN_LORA_TARGET_MODULES:
                raise Refused(f"does not recognize {sorted(unknown)}")
            adapter = lora.LoRAAdapter("name", config, base, None, None)
            adapter.initialize_weights_from_tensors(dict(saved.tensors))
            for layer in adapter.layers:
                for name, A in layer.weights.items():
                    utils.get_target_module_name(name, targets)  # as mem_pool.py does
                    if "lora_A" in name:
                        B = layer.weights[name.replace("lora_A", "lora_B")]
                        layer_name = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                        updates |= _unstacked(layer_name, A, B, adapter, saved)
        except REFUSALS as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        return Reading(updates, [name for name in saved.tensors if _layer_number(name) is None])

    return read


def _unstacked(name: str, A: Tensor, B: Tensor, adapter: Any, saved: Saved) -> dict[str, Tensor]:
    """The updates of the layers that are one stacked layer in SGLang; a buffer has r rows each."""
    parent, _, last = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in STACKED.get(last, (last,))]
    if len(A) != len(parts) * adapter.config.r:
        raise Refused(f"{name}: {len(A)} rows do not fit a buffer of rank {adapter.config.r}")
    rows = torch.split(B.double(), [saved.shapes[part][0] for part in parts])
    factors = A.double().chunk(len(parts))
    return {p: adapter.scaling * b @ a for p, a, b in zip(parts, factors, rows, strict=True)}
