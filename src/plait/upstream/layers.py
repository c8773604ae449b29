"""What is read off the layers of peft's own methods: A, B and scale of LoRA and its relatives.

    LoRA     dW = s B A              A: (r, in)   B: (out, r)
    AdaLoRA  dW = s B diag(E) A      E: (r, 1)    s = alpha / (number of ranks + 1e-5)

Every function takes the tuner layer that peft put in place of a linear layer, and the adapter's
name. Written against peft 0.21.2; nothing outside `upstream/` and `core/bridge.py` touches peft's
layer classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.conversion import _convert_module_to_lora
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.miss.layer import MissLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plait.core.delta import Pair


@dataclass(frozen=True)
class Factors:
    """The parameters of a layer with dW = scaling B A, or scaling B diag(E) A where E is given."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    E: nn.Parameter | None = None


@dataclass(frozen=True)
class PlainUpdate:
    """The update of an upstream LoRA layer, read as that of a Delta: dW = scaling B A."""

    A: Tensor
    B: Tensor
    scaling: float

    def folded(self, **choice: Any) -> tuple[Tensor, Tensor]:
        """A (k, in), B (out, k), ranks of zeros left out."""
        alive = (self.A != 0).any(1) & (self.B != 0).any(0)
        return self.A[alive], self.B[:, alive]


@dataclass(frozen=True)
class DenseUpdate:
    """The update of an upstream layer that has no factors, read as that of a Delta.

    config: of the adapter. scaling is 1: `weight` holds the method's own scale.
    """

    layer: Any
    adapter: str
    config: Any
    scaling: float = 1.0

    def folded(self, **choice: Any) -> None:
        """None: it has no factors."""

    @torch.no_grad()
    def weight(self, **choice: Any) -> Tensor:
        """dW (out, in) in fp32 or wider."""
        layer, adapter = self.layer, self.adapter
        if isinstance(layer, MissLinear):  # it is B A, and get_delta_weight is for another form
            A, B, _ = _convert_module_to_lora(layer, 1.0, adapter)
            return B.float() @ A.float()
        dW = layer.get_delta_weight(adapter)
        dW = dW.T if isinstance(layer.get_base_layer(), Conv1D) else dW
        dW = dW.to(torch.promote_types(dW.dtype, torch.float32))
        magnitude = magnitude_of(layer, adapter) if isinstance(layer, LoraLayer) else None
        if magnitude is not None:  # DoRA: W' = m (W + s B A) / |W + s B A|, by output row
            W = base_weight(layer).to(dW)
            moved = W + dW
            dW = (magnitude.to(dW) / moved.norm(dim=1))[:, None] * moved - W
        return dW


# Factors ----------------------------------------------------------------------------------------


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of upstream's LoRA or of a method built on it."""
    return isinstance(module, LoraLayer)


def factors_of(layer: Any, adapter: str) -> Factors | None:
    """A, B and scale of a layer; None if the layer has no such factors for this adapter."""
    if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
        return None
    A: Any = layer.lora_A[adapter]
    B: Any = layer.lora_B[adapter]
    scaling: float = layer.scaling[adapter]
    if isinstance(layer, AdaLoraLayer):
        scaling /= float(layer.ranknum[adapter]) + 1e-5
        return Factors(A, B, scaling, layer.lora_E[adapter])
    return Factors(A.weight, B.weight, scaling)


def set_scaling(layer: Any, adapter: str, scaling: float) -> None:
    """Set the factor on B A; 0 switches the update off, gradients included."""
    layer.scaling[adapter] = scaling


def dropout_of(layer: Any, A: nn.Parameter) -> float:
    """The probability of `lora_dropout` in front of the factor A."""
    name = next(n for n, factor in layer.lora_A.items() if factor.weight is A)
    return getattr(layer.lora_dropout[name], "p", 0.0)


def magnitude_of(layer: Any, adapter: str) -> Tensor | None:
    """The trained length of each row of the weight (out,) with DoRA; None without it."""
    if adapter not in layer.lora_magnitude_vector:
        return None
    return layer.lora_magnitude_vector[adapter].weight.flatten()


def gate_of(layer: Any, adapter: str, config: Any) -> Tensor | None:
    """What multiplies the ranks (ranks,); None if nothing does.

    AdaLoRA's E, with 0 for each rank that was pruned and is gone; VeRA's d.
    """
    if isinstance(layer, AdaLoraLayer):
        E = layer.lora_E[adapter].flatten()
        return torch.cat([E, E.new_zeros(max(0, config.init_r - len(E)))])
    return getattr(layer, "vera_lambda_d", {}).get(adapter)


def plain_update(layer: nn.Module, adapter: str) -> PlainUpdate | None:
    """The update of a LoRA or AdaLoRA layer as s B A, detached; None for other layers.

    Raises:
        ValueError: the update is more than s B A of a linear layer.
    """
    if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
        return None
    factors = factors_of(layer, adapter)
    if factors is not None and factors.E is not None:  # E = 0 at pruned ranks
        A, B, E = (p.detach() for p in (factors.A, factors.B, factors.E))
        return PlainUpdate(A * E, B, factors.scaling)
    if (
        not _linear(layer)
        or factors is None
        or adapter in layer.lora_variant
        or layer.lora_bias[adapter]
    ):
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(
            f"adapter {adapter!r}: its update of a {kind} is not s B A of a linear layer (DoRA and "
            "other variants, lora_bias, embeddings). Use plain LoRA on linear layers."
        )
    return PlainUpdate(factors.A.detach(), factors.B.detach(), factors.scaling)


def upstream_update(
    module: nn.Module, adapter: str, config: Any
) -> PlainUpdate | DenseUpdate | None:
    """The update of a layer of any of peft's methods, detached; None for other layers.

    Raises:
        ValueError: it is no constant update of a linear layer.
    """
    layer: Any = module
    if isinstance(module, LoraLayer):
        dora = adapter in layer.scaling and magnitude_of(layer, adapter) is not None
        if not dora or not _linear(layer) or layer.lora_bias[adapter]:
            return plain_update(module, adapter)
        return DenseUpdate(layer, adapter, config)
    if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
        return None
    if adapter not in layer._get_available_adapters():
        return None
    if not _linear(layer) or not layer.supports_lora_conversion(adapter):
        kind = f"{type(layer).__name__} on a {type(layer.get_base_layer()).__name__}"
        raise ValueError(f"adapter {adapter!r}: {kind} has no constant dW. Merge it instead.")
    return DenseUpdate(layer, adapter, config)


def _linear(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), nn.Linear | Conv1D)


def free_pair(name: str, layer: Any, adapter: str) -> Pair | None:
    """The pair (A, B) of a LoRA layer on which a change of basis acts; None without this adapter.

    Args:
        name: what errors call the layer.

    Raises:
        ValueError: the factors are no free pair, with the reason.
    """
    reason = None
    factors = factors_of(layer, adapter)
    if isinstance(layer, AdaLoraLayer):
        reason = "AdaLoRA's gate E belongs to single ranks"
    elif isinstance(layer, ParamWrapper):
        reason = "target_parameters adapts a parameter that is no linear layer"
    elif adapter in layer.lora_embedding_A:
        reason = "an embedding is no linear layer"
    elif adapter in layer.lora_magnitude_vector:
        reason = "DoRA's magnitude depends on dW"
    elif adapter in layer.lora_variant:
        reason = f"{type(layer.lora_variant[adapter]).__name__} changes what A and B mean"
    elif factors is not None and factors.A.ndim > 2:
        reason = "a convolution is no linear layer"
    if reason is not None:
        raise ValueError(
            f"{name}: its factors are no free pair (A, B): {reason}. Leave the layer out of the "
            "adapter, or train with AdamW."
        )
    return factors and Pair(name, factors.A, factors.B, float(factors.scaling))


# Any tuner layer --------------------------------------------------------------------------------


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is an adapted layer, of peft's methods or of plait's."""
    return isinstance(module, BaseTunerLayer)


def base_weight(layer: Any) -> Tensor:
    """The base weight W (out, in) of a tuner layer, dequantised."""
    # get_base_weight of peft 0.21.2 gives LoRA's packed weights as they are.
    weight = dequantize_module_weight(layer.get_base_layer())
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def fully_trained(model: nn.Module) -> list[str]:
    """Names of the modules that are trained and saved whole (`modules_to_save`)."""
    return [n for n, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def saved_modules(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of the modules that an adapter trains whole, under the names that peft saves."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for key, value in module.modules_to_save[adapter].state_dict().items()
    }


def targeted(config: PeftConfig, names: Iterable[str]) -> list[str]:
    """Those of the modules' names that a config's `target_modules` and exclusions select."""
    return [name for name in names if check_target_module_exists(config, name)]
