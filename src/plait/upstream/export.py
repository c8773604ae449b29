"""Export: any adapter of plait as a plain LoRA that stock peft and every server can load.

A LowRankDelta with a constant mix is a LoRA already: gate and mix are folded into the factors and
the scale is kept, so the export is exact. A DenseDelta, or a smaller rank on request, gives the
best rank-k part of each dW, with its error measured. peft computes alpha / r for each module, so a
rank that differs between layers is written with an alpha that keeps the scale. The finished links
of a chain are stacked in front of the live adapter: [s_1 B_1 | .. ] [A_1; ..], scaling 1.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plait.core import events
from plait.core.bridge import PlaitLayer
from plait.core.combine import WeightedSum
from plait.core.config import DeltaConfig
from plait.core.delta import Delta
from plait.core.sharding import refuse_sharded
from plait.core.trunk import Trunk, trunk_of
from plait.upstream.layers import PlainUpdate, plain_update


@dataclass(frozen=True)
class LayerExport:
    """One layer of an export: its rank and the part of dW left out (relative Frobenius norm)."""

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class LoraExport:
    """A plain LoRA: config and tensors as peft stores them, and what each layer lost."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: list[LayerExport]

    @property
    def error(self) -> float:
        """The largest part of a dW that was left out; 0 for an exact export."""
        return max(layer.error for layer in self.layers)

    def write(self, folder: str | Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def update_of(layer: nn.Module, adapter: str) -> Delta | PlainUpdate | None:
    """What an adapter adds to a tuner layer, plait's or upstream LoRA's; None for others.

    Raises:
        ValueError: an upstream layer whose update is more than s B A of a linear layer.
    """
    if isinstance(layer, PlaitLayer) and adapter in layer.plait_delta:
        return layer.plait_delta[adapter]  # type: ignore[return-value]
    return plain_update(layer, adapter)


def to_lora(
    model: PeftModel,
    adapter: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    task: str | None = None,
    approx: Literal["mean"] | None = None,
    pad: bool = False,
) -> LoraExport:
    """An adapter as a plain LoRA, the finished links of its chain included.

    Args:
        model: a PeftModel with an adapter of plait, or of upstream's plain LoRA.
        adapter: its name.
        rank: largest rank of a layer. None: exact where the method allows it, else the config's r.
        energy: smallest share of ||dW||_F^2 to keep in each layer, 0 to 1; sets the rank by layer.
        task: which task of a task table.
        approx: "mean" takes a token router as uniform.
        pad: give all layers the largest rank, with zeros, for servers that read no rank pattern.

    Raises:
        NotMergeable: the update depends on the input and neither task nor approx settles it.
        ValueError: rank and energy together or out of range, an update of zero everywhere, or a
            model that is sharded (FSDP2).
    """
    if rank is not None and energy is not None:
        raise ValueError(f"rank = {rank} and energy = {energy}: give one of them.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank = {rank}. Give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy = {energy}. Give a share above 0 and up to 1.")
    refuse_sharded(model, "to_lora")
    config: Any = model.peft_config[adapter]
    updates = {
        name: (layer, update)
        for name, layer in model.get_base_model().named_modules()
        if (update := update_of(layer, adapter)) is not None
    }
    summed = any(isinstance(update, WeightedSum) for _, update in updates.values())
    saved = {} if summed else get_peft_model_state_dict(model, adapter_name=adapter)
    key = f"plait_{config.key}_delta" if isinstance(config, DeltaConfig) else ".lora_"
    tensors = {name: value for name, value in saved.items() if key not in name}
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    layers: list[LayerExport] = []
    transposed = False
    for name, (layer, update) in updates.items():
        if isinstance(update, Delta):
            events.check_fired(update)
        trunk = trunk_of(layer)
        if trunk is not None and trunk.adapter != adapter:
            trunk = None
        A, B, scale, error = plain_factors(update, rank, energy, trunk, task=task, approx=approx)
        layers.append(LayerExport(name, len(A), error))
        if len(A):  # a LoRA of rank 0 does not exist: the layer is left out
            factors[name] = A, B, scale
            transposed |= isinstance(layer.get_base_layer(), Conv1D)  # type: ignore[operator]
    widest = max((layer.rank for layer in layers), default=0)
    alphas: dict[str, float] = {}
    for name, (A, B, scale) in factors.items():
        if pad:
            spare, scale, B = widest - len(A), 1.0, scale * B
            A, B = F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))
        path = f"base_model.model.{name}"
        tensors[f"{path}.lora_A.weight"] = A.contiguous()
        tensors[f"{path}.lora_B.weight"] = B.contiguous()
        alphas[name] = scale * len(A)
    live = {layer.name: widest if pad else layer.rank for layer in layers if layer.rank}
    if not live:
        method = config.key if isinstance(config, DeltaConfig) else "lora"
        raise ValueError(f"{method}: the update is zero in every layer. Train before export.")
    r = Counter(live.values()).most_common(1)[0][0]
    alpha = Counter(alphas[n] for n, k in live.items() if k == r).most_common(1)[0][0]
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft's type says int and its code takes a float
        rank_pattern={f"^{re.escape(n)}": k for n, k in live.items() if k != r},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},  # type: ignore[misc]
        target_modules=list(live),
        fan_in_fan_out=transposed,
        task_type=config.task_type,
        bias="lora_only" if config.bias == "plait_only" else config.bias,
        modules_to_save=None if summed else config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    return LoraExport(lora, {n: t.detach().cpu() for n, t in tensors.items()}, layers)


@torch.no_grad()
def plain_factors(
    delta: Delta | PlainUpdate,
    rank: int | None,
    energy: float | None,
    trunk: Trunk | None = None,
    **choice: Any,
) -> tuple[Tensor, Tensor, float, float]:
    """A (k, in), B (out, k), scale and relative error of dW = scale B A, exact or approximate.

    Args:
        delta: of one layer. rank, energy, choice: as in to_lora.
        trunk: finished links, which come first. Where the ranks then exceed min(in, out), the
            stack is compressed to that, which is exact.
    """
    factors = delta.folded(**choice)
    scale = delta.scaling
    if factors is not None:
        A, B = factors
        if trunk is not None:
            A0, B0 = (part.to(A) for part in trunk.factors())
            A, B, scale = torch.cat([A0, A]), torch.cat([B0, scale * B], dim=1), 1.0
            smaller = min(A.shape[1], B.shape[0])
            if len(A) > smaller:
                rank = min(rank or smaller, smaller)
        if (rank is None or rank >= len(A)) and energy is None:
            return A, B, scale, 0.0
        U, S, Vh = product_svd(A, B, scale)
    else:
        assert isinstance(delta, Delta)  # a PlainUpdate always folds
        U, S, Vh = torch.linalg.svd(delta.weight(**choice), full_matrices=False)
        rank = delta.config.r if rank is None and energy is None else rank
    total = S.square().sum()
    if not total:
        return Vh[:0], U[:, :0], 1.0, 0.0
    kept = S.square().cumsum(0) / total
    k = min(rank or len(S), len(S))
    if energy is not None:
        k = int((kept < energy - torch.finfo(S.dtype).eps).sum()) + 1
    root = S[:k].sqrt()
    error = float(S[k:].square().sum().sqrt() / total.sqrt())
    return root[:, None] * Vh[:k], U[:, :k] * root, 1.0, error


def product_svd(A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), Vh (k, in) of scale B A, k <= min(R, in, out), without forming B A.

    B A = Qb (Rb Ra^T) Qa^T: the SVD of a small matrix is enough.

    Args:
        A: (R, in). B: (out, R). scale: a factor on the product.
    """
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(scale * Rb @ Ra.T)
    return Qb @ U[:, : len(S)], S, Vh[: len(S)] @ Qa.T


def upstream_to_lora(
    model: PeftModel, rank: int | None = None, energy: float | None = None
) -> LoraExport:
    """An adapter of peft's own methods as a plain LoRA.

    Plain LoRA is copied and AdaLoRA is exact unless a size is given; the rest is peft's conversion.

    Args:
        model: with the adapter "default".
        rank: largest rank of a layer. energy: as in to_lora. Both None: the config's r.
    """
    config: Any = model.peft_config["default"]
    if isinstance(config, AdaLoraConfig):
        return to_lora(model, rank=rank, energy=energy)
    size: float | None = rank if rank is not None else energy
    if type(config) is LoraConfig and not config.use_dora and size is None:
        tensors = get_peft_model_state_dict(model)
        end = ".lora_A.weight"
        layers = [
            LayerExport(name.removesuffix(end), len(A), 0.0)
            for name, A in tensors.items()
            if end in name
        ]
        return LoraExport(
            config, {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, layers
        )
    lora, tensors = convert_to_lora(model, size or getattr(config, "r", 8))
    return LoraExport(lora, dict(tensors), _converted(model, tensors))


def _converted(model: PeftModel, tensors: dict[str, Tensor]) -> list[LayerExport]:
    """Rank and error of each layer of peft's conversion (scale 1: it sets alpha = rank)."""
    layers = []
    for name, module in model.base_model.named_modules():
        layer: Any = module
        key = f"base_model.{name}.lora_A.weight"
        if key in tensors:
            A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            dW = layer.get_delta_weight("default").float()
            error = torch.linalg.norm(dW - (B @ A).reshape(dW.shape).to(dW))
            layers.append(LayerExport(name, len(A), float(error / torch.linalg.norm(dW))))
    return layers
