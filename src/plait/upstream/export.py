"""Export: any adapter as a plain LoRA that stock peft and every server can load.

A LowRankDelta with a constant mix is a LoRA already: gate and mix are folded into the factors, so
the export is exact. A DenseDelta, or a smaller rank on request, gives the best rank-k part of each
dW, with its error measured. The finished links of a chain are stacked in front of the live adapter:
[s_1 B_1 | .. ] [A_1; ..], scaling 1.

Two forms, which stock peft reads alike:

    default   one rank r in all layers, zeros fill up; s in B; lora_alpha = r; no patterns; where a
              server stacks layers (q, k, v; gate, up), those without an update get zeros
    compact   each layer's own rank; s = alpha_i / r_i by rank_pattern and alpha_pattern

Servers read the second one differently (see servers.py): many drop patterns without a word.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
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
from plait.upstream.layers import (
    DenseUpdate,
    PlainUpdate,
    fully_trained,
    plain_update,
    saved_modules,
    upstream_update,
)
from plait.upstream.moments import square_root
from plait.upstream.servers import HEADS, Base, stacked_with
from plait.upstream.table import start_kind

EXACT = 1e-6  # the part of a dW that rounding may cost: what an exact export stays below
TOLERATED = 0.01  # the part of a layer's dW that an export may leave out unasked


@dataclass(frozen=True)
class LayerExport:
    """One layer of an export: its rank before zeros fill it up, and what of dW is lost.

    error: the part that is left out; rounding: what the dtype of the file adds. Both are Frobenius
    norms relative to that of dW.
    """

    name: str
    rank: int
    error: float
    rounding: float = 0.0


@dataclass(frozen=True)
class LoraExport:
    """A plain LoRA: config and tensors as peft stores them, and what each layer lost.

    sized: whether its rank or energy was asked for, so that `error` is what the caller chose.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: list[LayerExport]
    sized: bool = False

    @property
    def rank(self) -> int:
        """The largest rank of a layer in the file, which servers size their buffers by."""
        return max(len(A) for name, A in self.tensors.items() if name.endswith(".lora_A.weight"))

    @property
    def error(self) -> float:
        """The largest part of a dW that was left out; 0 for an exact export."""
        return max(layer.error for layer in self.layers)

    @property
    def rounding(self) -> float:
        """The largest relative rounding error of a dW; 0 unless a dtype was asked for."""
        return max(layer.rounding for layer in self.layers)

    def write(self, folder: str | Path, *, lossy: bool = False) -> None:
        """Write adapter_config.json and adapter_model.safetensors into a folder.

        Args:
            folder: to write; it is made.
            lossy: write even where more than 1 % of a layer's update is left out, without rank or
                energy having been given.

        Raises:
            ValueError: so much is left out, unasked.
        """
        if not (lossy or self.sized):
            refuse_lossy(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refuse_lossy(export: LoraExport) -> None:
    """Raise ValueError for an export that leaves out more than 1 % of a layer's update."""
    worst = max(export.layers, key=lambda layer: layer.error)
    if worst.error > TOLERATED:
        raise ValueError(
            f"{worst.name}: a plain LoRA of rank {worst.rank} leaves out {worst.error:.1%} of its "
            "update. Merge instead (--to merged, merge_and_unload), which is exact; raise --rank "
            "(rank=); or accept the loss (--lossy, lossy=True)."
        )


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
    compact: bool = False,
    dtype: torch.dtype | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> LoraExport:
    """An adapter as a plain LoRA, the finished links of its chain included.

    All layers get one rank, zeros fill up, the scale goes into B, and lora_alpha equals r: stock
    peft and every server read that alike. Where SGLang stacks layers (q, k, v; gate, up), those
    without an update get factors of zeros.

    Args:
        model: a PeftModel with an adapter of plait or of peft.
        adapter: its name.
        rank: largest rank of a layer. None: exact where the method allows it, else the config's r.
        energy: smallest share of ||dW||_F^2 to keep in each layer, 0 to 1; sets the rank by layer.
        task: which task of a task table.
        approx: "mean" takes a token router as uniform.
        compact: keep each layer's own rank and scale, by rank_pattern and alpha_pattern. Smaller,
            for stock peft and vLLM >= 0.33: other servers drop the patterns without a word.
        dtype: of all floating tensors of the export; None: that of the factors.
        moments: layer -> second moment of its input (in, in), see second_moments. Where ranks are
            cut, the part that changes the layers' outputs least is left out.

    Raises:
        NotMergeable: the update depends on the input and neither task nor approx settles it.
        ValueError: rank and energy together or out of range; an update of zero everywhere; a model
            that is sharded (FSDP2); an adapter that trains what the default form cannot hold, such
            as biases; a live PiSSA or a relative, whose base weight is not the base model's; a
            number that the dtype cannot hold.
    """
    _check(model, adapter, rank, energy)
    config: Any = model.peft_config[adapter]
    updates = {
        name: (layer, update)
        for name, layer in model.get_base_model().named_modules()
        if (update := _exported_update(layer, adapter, config)) is not None
    }
    summed = any(isinstance(update, WeightedSum) for _, update in updates.values())
    modules = _modules_to_save(model, adapter) if summed else config.modules_to_save
    whole = isinstance(config, DeltaConfig | LoraConfig)  # all that it trains can be carried over
    if not compact or (not whole and getattr(config, "bias", "none") != "none"):
        _refuse_trained({**vars(config), "modules_to_save": modules})
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    layers: list[LayerExport] = []
    transposed = False
    for name, (layer, update) in updates.items():
        if isinstance(update, Delta):
            events.check_fired(update)
        trunk = trunk_of(layer)
        if trunk is not None and trunk.adapter != adapter:
            trunk = None
        moment = None if moments is None else moments[name]
        choice = {"task": task, "approx": approx}
        A, B, scale, error = plain_factors(update, rank, energy, trunk, moment, **choice)
        layers.append(LayerExport(name, len(A), error))
        if len(A):  # a LoRA of rank 0 does not exist: the layer is left out
            factors[name] = A, B, scale
            transposed |= isinstance(layer.get_base_layer(), Conv1D)  # type: ignore[operator]
    if not factors:
        kind: Any = config.peft_type
        method = config.key if isinstance(config, DeltaConfig) else str(kind.value)
        raise ValueError(
            f"{method.lower()}: the update is zero in every layer. Train before export."
        )
    form: dict[str, Any]
    if compact:
        form, pairs = _compact_form(factors)
    else:
        form, pairs = _one_rank_form({**factors, **_stacked_zeros(model, factors)})
    if dtype is not None:
        pairs, layers = _rounded(pairs, layers, dtype)
    tensors = _other_tensors(model, adapter, summed)
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    for name, (A, B) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    bias: Any = getattr(config, "bias", "none")
    lora = LoraConfig(
        **form,
        target_modules=_targets(model, list(pairs)),
        fan_in_fan_out=transposed,
        task_type=config.task_type,
        bias="lora_only" if bias == "plait_only" else bias,
        modules_to_save=modules,
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    kept = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    return LoraExport(lora, kept, layers, sized=rank is not None or energy is not None)


def _check(model: PeftModel, adapter: str, rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ValueError(f"rank = {rank} and energy = {energy}: give one of them.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank = {rank}. Give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy = {energy}. Give a share above 0 and up to 1.")
    refuse_sharded(model, "to_lora")
    config: Any = model.peft_config[adapter]
    start = getattr(config, "init_lora_weights", True)
    if start_kind(config) == "residual" or start == "loftq":
        raise ValueError(
            f"init_lora_weights = {start!r}: a part of the base weight is in "
            "the adapter, so on the unchanged base its factors are wrong. Save it with "
            "path_initial_model_for_weight_conversion, load that, and export it; plait train does "
            "the former by itself."
        )


def _exported_update(
    layer: nn.Module, adapter: str, config: Any
) -> Delta | PlainUpdate | DenseUpdate | None:
    """As update_of, and the updates of peft's other methods as dW."""
    if isinstance(layer, PlaitLayer) and adapter in layer.plait_delta:
        return layer.plait_delta[adapter]  # type: ignore[return-value]
    return upstream_update(layer, adapter, config)


def trained_beside(options: Mapping[str, Any]) -> list[str]:
    """What an adapter trains beside its update that no server reads from a plain LoRA.

    options: of its config; `bias`, `trainable_token_indices` and `modules_to_save` count.
    """
    trained = []
    bias = options.get("bias") or "none"
    if bias != "none":
        trained.append(f"biases (bias = {bias!r})")
    if options.get("trainable_token_indices"):
        trained.append("rows of the embedding (trainable_token_indices)")
    modules = options.get("modules_to_save") or ()
    others = sorted(m for m in modules if m.rpartition(".")[2] not in HEADS)
    if others:
        trained.append(f"{', '.join(others)} (modules_to_save)")
    return trained


def _refuse_trained(options: Mapping[str, Any]) -> None:
    """Raise ValueError for trained parameters that no server reads from an adapter."""
    trained = trained_beside(options)
    if trained:
        raise ValueError(
            f"The adapter trains {' and '.join(trained)}, which a plain LoRA for all servers does "
            "not hold. Merge it (--to merged, merge_and_unload); write it for stock peft alone "
            "(--compact, compact=True); or train without."
        )


def _one_rank_form(
    factors: Mapping[str, tuple[Tensor, Tensor, float]],
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Options and factors of one rank in all layers, with the scale in B."""
    r = max(len(A) for A, _, _ in factors.values())
    pairs = {
        name: (F.pad(A, (0, 0, 0, r - len(A))), F.pad(scale * B, (0, r - len(A))))
        for name, (A, B, scale) in factors.items()
    }
    return {"r": r, "lora_alpha": r}, pairs


def _stacked_zeros(
    model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor, float]]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Factors of rank 0 of layers without an update that a server stacks with adapted ones."""
    base, zeros = model.get_base_model(), {}
    like = next(A for A, _, _ in factors.values())
    for name in stacked_with(factors, Base.of(base)):
        layer: Any = base.get_submodule(name)
        layer = getattr(layer, "base_layer", layer)
        A, B = like.new_zeros(0, layer.in_features), like.new_zeros(layer.out_features, 0)
        zeros[name] = A, B, 1.0
    return zeros


def _compact_form(
    factors: Mapping[str, tuple[Tensor, Tensor, float]],
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Options and factors with each layer's own rank and scale: peft takes alpha / r by layer."""
    ranks = {name: len(A) for name, (A, _, _) in factors.items()}
    alphas = {name: scale * len(A) for name, (A, _, scale) in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas[name] for name, k in ranks.items() if k == r).most_common(1)[0][0]
    form = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": k for n, k in ranks.items() if k != r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
    }
    return form, {name: (A, B) for name, (A, B, _) in factors.items()}


def _rounded(
    pairs: Mapping[str, tuple[Tensor, Tensor]], layers: Iterable[LayerExport], dtype: torch.dtype
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[LayerExport]]:
    """The factors in another dtype, and the layers with what that costs."""
    rounded, errors = {}, {}
    for name, (A, B) in pairs.items():
        low = A.to(dtype), B.to(dtype)
        if not all(torch.isfinite(part).all() for part in low):
            raise ValueError(
                f"{name}: its factors overflow {str(dtype).removeprefix('torch.')}. Use bf16 or "
                "fp32 (--dtype, dtype=)."
            )
        rounded[name] = low
        difference = _norm(torch.cat([A, low[0].to(A)]), torch.cat([B, -low[1].to(B)], dim=1))
        errors[name] = difference / max(_norm(A, B), torch.finfo(torch.float64).tiny)
    return rounded, [replace(layer, rounding=errors.get(layer.name, 0.0)) for layer in layers]


def _norm(A: Tensor, B: Tensor) -> float:
    """||B A||_F in fp64, without forming B A."""
    _, Rb = torch.linalg.qr(B.double())
    _, Ra = torch.linalg.qr(A.double().T)
    return float(torch.linalg.norm(Rb @ Ra.T))


def _other_tensors(model: PeftModel, adapter: str, summed: bool) -> dict[str, Tensor]:
    """What the adapter saves beside its update, under peft's names."""
    config: Any = model.peft_config[adapter]
    own = isinstance(config, DeltaConfig)
    if summed or not (own or isinstance(config, LoraConfig)):  # a weighted sum has no file format
        return saved_modules(model, adapter)
    key = f"plait_{config.key}_delta" if own else ".lora_"
    saved = get_peft_model_state_dict(model, adapter_name=adapter)
    # peft also saves the frozen weight of an adapted lm_head or embedding.
    parts = (key, ".base_layer.weight")
    return {n: value for n, value in saved.items() if not any(part in n for part in parts)}


def _modules_to_save(model: PeftModel, adapter: str) -> list[str] | None:
    """Names of the saved modules that an adapter has a copy of; None without any."""
    kept = saved_modules(model, adapter)
    names = [n for n in fully_trained(model) if any(key.startswith(f"{n}.") for key in kept)]
    return sorted({name.rpartition(".")[2] for name in names}) or None


def _targets(model: PeftModel, names: list[str]) -> list[str]:
    """`target_modules` that select these layers: endings of names where they suffice."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    selected = {
        name
        for name, _ in model.get_base_model().named_modules()
        if name.rpartition(".")[2] in endings
    }
    return endings if selected == set(names) else names


@torch.no_grad()
def plain_factors(
    delta: Delta | PlainUpdate | DenseUpdate,
    rank: int | None,
    energy: float | None,
    trunk: Trunk | None = None,
    moment: Tensor | None = None,
    **choice: Any,
) -> tuple[Tensor, Tensor, float, float]:
    """A (k, in), B (out, k), scale and relative error of dW = scale B A, exact or approximate.

    Args:
        delta: of one layer. rank, energy, choice: as in to_lora.
        trunk: finished links, which come first. Where the ranks then exceed min(in, out), the
            stack is compressed to that, which is exact.
        moment: C = E[x x^T] (in, in); what is left out is then the part that changes the layer's
            output least, see moments.py. The error stays that of dW.
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
        if moment is not None:
            return weighted_factors(A, scale * B, moment, rank, energy)
        U, S, Vh = product_svd(A, B, scale)
    else:
        assert not isinstance(delta, PlainUpdate)  # it always folds
        dW = delta.weight(**choice)
        if moment is not None:
            rank = delta.config.r if rank is None and energy is None else rank
            eye = torch.eye(len(dW), dtype=dW.dtype, device=dW.device)
            return weighted_factors(dW, eye, moment, rank, energy)
        U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
        rank = delta.config.r if rank is None and energy is None else rank
    total = S.square().sum()
    k = _kept(S, rank, energy)
    if not k:
        return Vh[:0], U[:, :0], 1.0, 0.0
    root = S[:k].sqrt()
    error = float(S[k:].square().sum().sqrt() / total.sqrt())
    return root[:, None] * Vh[:k], U[:, :k] * root, 1.0, error


def weighted_factors(
    A: Tensor, B: Tensor, moment: Tensor, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, float, float]:
    """The rank-k part of dW = B A that is best for inputs of second moment C, as plain_factors.

    Args:
        A: (R, in). B: (out, R). moment: C (in, in). rank, energy: as in to_lora; energy is here the
            share of E |dW x|^2 to keep.
    """
    wide = A.double(), B.double()
    U, S, _ = product_svd(wide[0] @ square_root(moment.to(wide[0])), wide[1])
    k = _kept(S, rank, energy)
    if not k:
        return A[:0], B[:, :0], 1.0, 0.0
    down = U[:, :k].T @ wide[1] @ wide[0]
    root = down.norm(dim=1).clamp_min(torch.finfo(down.dtype).tiny).sqrt()
    left = 1 - (down.norm() / product_svd(*wide)[1].norm()).square()
    error = float(left.clamp_min(0).sqrt())
    return (down / root[:, None]).to(A), (U[:, :k] * root).to(B), 1.0, error


def _kept(S: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values (descending) to keep; 0 if all are 0."""
    total = S.square().sum()
    if not total:
        return 0
    if energy is None:
        return min(rank or len(S), len(S))
    kept = S.square().cumsum(0) / total
    return int((kept < energy - torch.finfo(S.dtype).eps).sum()) + 1


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
