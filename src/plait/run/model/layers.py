"""The linear layers of a model: which can be adapted, and which a pattern selects."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plait.options import shown
from plait.run.model.head import HEADS
from plait.upstream.table import BASELINES

# Layers whose weight the model reads without calling the layer, so that an update has no effect.
_UNCALLED = {
    "dt_proj": ("mamba", "falcon_mamba", "jamba", "zamba"),
    "out_proj": ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"),
}
_SECONDS = 3.0  # that a regular expression may take for all layers of a model

# Reads [expression, names]; in a process of its own, for nothing else ends a match that takes long.
_MATCH = "import json, re, sys; e, n = json.load(sys.stdin); [re.fullmatch(e, name) for name in n]"


def quantised_reason(method: str, quantization: str) -> str | None:
    """Why a method does not work on a base of this `model.quantization`; None if it does."""
    return BASELINES[method].no_quantised.get(quantization) if method in BASELINES else None


def ignored_layers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those of these layers whose update the model would ignore."""
    kind = model.config.model_type
    return [name for name in names if kind in _UNCALLED.get(name.rpartition(".")[2], ())]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that `all-linear` adapts, by name: all but the output and heads."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and name.partition(".")[0] not in HEADS
    }


def check_patterns(options: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse regular expressions among a method's options that are none, or that take too long.

    options: of the method; peft matches target_modules, exclude_modules, modules_to_save,
    layers_pattern and the keys of rank_pattern and alpha_pattern with the names of all modules.

    Raises:
        ValueError: names the option, the expression and the reason.
    """
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(options.get(key), str):
            _check_pattern(f"method.{key}", options[key], options[key], names)
    for key in ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern"):
        patterns = options.get(key) or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            _check_pattern(f"method.{key}", pattern, rf"(.*\.)?({pattern})", names)


def _check_pattern(key: str, text: str, expression: str, names: Iterable[str]) -> None:
    if re.fullmatch(r"[\w.-]*", text):
        return
    try:
        re.compile(expression)
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([expression, list(names)]),
            text=True,
            timeout=_SECONDS,
            check=True,
            capture_output=True,
        )
    except (re.error, RecursionError, OverflowError, subprocess.CalledProcessError) as error:
        reason = "too large" if isinstance(error, subprocess.CalledProcessError) else error
        raise ValueError(
            f"{key} has {shown(text)}, which is not a regular expression ({reason}). Correct it."
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{key} has {shown(text)}, a regular expression that takes more than {_SECONDS:g} s on "
            "the names of this model's layers. Write a simpler one, or a list of names."
        ) from None


def parameter_counts(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """Return (trainable parameters, all parameters), with the adapter's."""
    if isinstance(model, PeftModel):  # knows how many numbers a 4-bit weight packs
        return model.get_nb_trainable_parameters()
    total = sum(p.numel() for p in model.parameters())
    return total, total
