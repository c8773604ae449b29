"""Export: any adapter of plait as a plain LoRA that stock peft and every server can load.

A LowRankDelta with a constant mix is a LoRA already: gate and mix are folded into the factors and
the scale is kept, so the export is exact. A DenseDelta, or a smaller rank on request, gives the
best rank-k part of each dW, with its error measured. peft computes alpha / r for each module, so a
rank that differs between layers is written with an alpha that keeps the scale.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from plait.core import events
from plait.core.bridge import PlaitLayer
from plait.core.combine import WeightedSum
from plait.core.delta import Delta, LowRankDelta


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


def to_lora(
    model: PeftModel,
    adapter: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    task: str | None = None,
    approx: Literal["mean"] | None = None,
) -> LoraExport:
    """An adapter as a plain LoRA.

    Args:
        model: a PeftModel with a plait adapter.
        adapter: its name.
        rank: largest rank of a layer. None: exact where the method allows it, else the config's r.
        energy: smallest share of ||dW||_F^2 to keep in each layer, 0 to 1; sets the rank by layer.
        task: which task of a task table.
        approx: "mean" takes a token router as uniform.

    Raises:
        NotMergeable: the update depends on the input and neither task nor approx settles it.
        ValueError: rank and energy together or out of range, or an update of zero everywhere.
    """
    if rank is not None and energy is not None:
        raise ValueError(f"rank = {rank} and energy = {energy}: give one of them.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank = {rank}. Give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy = {energy}. Give a share above 0 and up to 1.")
    config: Any = model.peft_config[adapter]
    key = f"plait_{config.key}_delta"
    found = [m.plait_delta for m in model.modules() if isinstance(m, PlaitLayer)]
    summed = any(isinstance(dict(d.items()).get(adapter), WeightedSum) for d in found)
    saved = {} if summed else get_peft_model_state_dict(model, adapter_name=adapter)
    tensors = {name: value for name, value in saved.items() if key not in name}
    layers: list[LayerExport] = []
    alphas: dict[str, float] = {}
    transposed = False
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, PlaitLayer) or adapter not in layer.plait_delta:
            continue
        delta: Any = layer.plait_delta[adapter]
        events.check_fired(delta)
        A, B, scale, error = plain_factors(delta, rank, energy, task=task, approx=approx)
        layers.append(LayerExport(name, len(A), error))
        if len(A):  # a LoRA of rank 0 does not exist: the layer is left out
            path = f"base_model.model.{name}"
            tensors[f"{path}.lora_A.weight"] = A.contiguous()
            tensors[f"{path}.lora_B.weight"] = B.contiguous()
            alphas[name] = scale * len(A)
            transposed |= layer.transposed
    live = {layer.name: layer.rank for layer in layers if layer.rank}
    if not live:
        raise ValueError(f"{config.key}: the update is zero in every layer. Train before export.")
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
        inference_mode=True,
    )
    return LoraExport(lora, {n: t.detach().cpu() for n, t in tensors.items()}, layers)


@torch.no_grad()
def plain_factors(
    delta: Delta, rank: int | None, energy: float | None, **choice: Any
) -> tuple[Tensor, Tensor, float, float]:
    """A (k, in), B (out, k), scale and relative error with dW = scale B A, or near it.

    Args:
        delta: of one layer. rank, energy, choice: as in to_lora.
    """
    factors = delta.folded(**choice) if isinstance(delta, LowRankDelta | WeightedSum) else None
    if factors is not None:
        A, B = factors
        if (rank is None or rank >= len(A)) and energy is None:
            return A, B, delta.scaling, 0.0
        Qb, Rb = torch.linalg.qr(B)  # dW = Qb (Rb Ra^T) Qa^T: the SVD of a small matrix is enough
        Qa, Ra = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(delta.scaling * Rb @ Ra.T)
        U, Vh = Qb @ U[:, : len(S)], Vh[: len(S)] @ Qa.T
    else:
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


def plain_parts(model: PeftModel) -> tuple[dict[str, Tensor], list[LayerExport]]:
    """Tensors and layers of an adapter that is a plain LoRA already."""
    saved = get_peft_model_state_dict(model)
    end = ".lora_A.weight"
    layers = [LayerExport(n.removesuffix(end), len(t), 0.0) for n, t in saved.items() if end in n]
    return {n: t.detach().cpu().contiguous() for n, t in saved.items()}, layers
