"""One adapted layer of a run in one form: plait's, upstream's, or a fully trained one.

A view reads tensors when asked and gives them in fp64, weights as (out, in) whatever their storage.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plait.core.bridge import PlaitLayer
from plait.core.delta import Delta, mode
from plait.core.low_rank import LowRankDelta
from plait.core.mix import Mix, TaskTable, TokenRouter
from plait.inspect.update import Update
from plait.run.model import adaptable_layers
from plait.upstream.layers import (
    base_weight,
    factors_of,
    gate_of,
    is_tuner_layer,
    magnitude_of,
)

SINGLE = "dW"  # the name of an update that is the only one of its layer


def wide(tensor: Tensor) -> Tensor:
    """A tensor in fp64, detached; on the CPU if its device has no fp64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Adapted(ABC):
    """One layer. Names of its updates: SINGLE, or those of tasks or experts."""

    name: str

    @abstractmethod
    def weight(self) -> Tensor:
        """W (out, in), dequantised."""

    @abstractmethod
    def updates(self) -> dict[str, tuple[Update, int]]:
        """Name -> (dW, attainable rank)."""

    def factors(self) -> dict[str, Tensor]:
        """Name -> trained factor (r, in) or (out, r): A, B, A[1], A[task], C, ..; may be empty."""
        return {}

    def gate(self) -> Tensor | None:
        """What multiplies the ranks (ranks,), or None."""
        return None

    def router(self) -> tuple[Delta, TokenRouter] | None:
        """The Delta whose inputs a token router reads, and that router."""
        return None

    @property
    def kind(self) -> str:
        """What the updates are: "single", "tasks" or "experts"."""
        return "single"


class PlaitAdapted(Adapted):
    """A layer with one of plait's methods."""

    def __init__(self, name: str, layer: PlaitLayer, adapter: str) -> None:
        self.name, self.layer = name, layer
        self.delta: Any = layer.plait_delta[adapter]

    def weight(self) -> Tensor:
        """W, from the layer."""
        return wide(self.layer.base_weight())

    @property
    def kind(self) -> str:
        """What the mix makes of the updates."""
        mix = self.mix()
        if isinstance(mix, TokenRouter):
            return "experts"
        return "tasks" if isinstance(mix, TaskTable) else "single"

    def mix(self) -> Tensor | Mix | None:
        """The mix in evaluation, None for a dense update."""
        if not isinstance(self.delta, LowRankDelta):
            return None
        with mode(self.delta, training=False):
            return self.delta.mix()

    @torch.no_grad()
    def updates(self) -> dict[str, tuple[Update, int]]:
        """dW; that of each task; with a token router the part s B_i A_i of each expert."""
        delta, mix = self.delta, self.mix()
        if not isinstance(delta, LowRankDelta):
            return {SINGLE: (Update(wide(delta.weight())), delta.rank())}
        if isinstance(mix, TokenRouter):
            return {
                f"expert {i}": (self._update(A, B), min(len(A), *self._shape))
                for i, (A, B) in enumerate(self._experts(mix), 1)
            }
        tasks: dict[str, str | None] = {SINGLE: None}
        if isinstance(mix, TaskTable):
            tasks = {task: task for task in mix.tasks}
        return {
            name: (self._update(*delta.folded(task=task)), delta.rank())
            for name, task in tasks.items()
        }

    @property
    def _shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def _update(self, A: Tensor, B: Tensor) -> Update:
        return Update(self.delta.scaling * wide(B), wide(A))

    def _experts(self, router: TokenRouter) -> Iterator[tuple[Tensor, Tensor]]:
        """A_i and B_i of each group of the rank axis, the gate folded in."""
        with mode(self.delta, training=False):
            A, B = self.delta.factors()
            gate = self.delta.gate()
        if gate is not None:
            A = gate[:, None] * A
        n = len(router.G)
        for i in range(n):  # "expand" has one A for all B, "reduce" one B for all A
            yield (
                A if router.kind == "expand" else A.unflatten(0, (n, -1))[i],
                B if router.kind == "reduce" else B.unflatten(1, (n, -1))[:, i],
            )

    def factors(self) -> dict[str, Tensor]:
        """Parameters named A.., C.. (r, in) and B.., D.. (out, r), slices of 3-D ones apart.

        Where a method trains something else, such as coefficients: the factors that follow.
        """
        mix, (out, width) = self.mix(), self._shape
        factors: dict[str, Tensor] = {}
        for name, p in self.delta.named_parameters(recurse=False):
            size = {"A": -1, "C": -1, "B": -2, "D": -2}.get(name[0])
            if size is None or p.ndim not in (2, 3) or p.shape[size] != (width, out)[-size - 1]:
                continue
            if p.ndim == 2:
                factors[name] = wide(p)
                continue
            labels: Any = range(1, len(p) + 1)
            if isinstance(mix, TaskTable) and len(mix.tasks) == len(p):
                labels = mix.tasks
            factors |= {f"{name}[{label}]": wide(a) for label, a in zip(labels, p, strict=True)}
        if not factors and isinstance(self.delta, LowRankDelta):
            with torch.no_grad(), mode(self.delta, training=False):
                A, B = self.delta.factors()
            factors = {"A": wide(A), "B": wide(B)}
        return factors

    def gate(self) -> Tensor | None:
        """The product of the gates in evaluation, one number a rank."""
        if not isinstance(self.delta, LowRankDelta):
            return None
        with torch.no_grad(), mode(self.delta, training=False):
            g = self.delta.live()
            g = self.delta.gate() if g is None else g
        return None if g is None else wide(g)

    def router(self) -> tuple[Delta, TokenRouter] | None:
        """The Delta and its router."""
        mix = self.mix()
        return (self.delta, mix) if isinstance(mix, TokenRouter) else None


class UpstreamAdapted(Adapted):
    """A layer with one of peft's own methods."""

    def __init__(self, name: str, layer: Any, adapter: str, config: Any) -> None:
        self.name, self.layer, self.adapter, self.config = name, layer, adapter, config
        self.parts = factors_of(layer, adapter)

    def weight(self) -> Tensor:
        """W, of peft's layer."""
        return wide(base_weight(self.layer))

    @torch.no_grad()
    def updates(self) -> dict[str, tuple[Update, int]]:
        """s B A, with the gate E if there is one; with magnitudes what the rescaled rows come to.

        Without factors in the layer: peft's get_delta_weight.
        """
        adapter, layer = self.adapter, self.layer
        if self.parts is not None:
            A, B = self.factors().values()
            if self.parts.E is not None:
                A = wide(self.parts.E) * A
            low = Update(self.parts.scaling * B, A)
            lengths = magnitude_of(layer, adapter)
            if lengths is None:
                return {SINGLE: (low, min(len(A), *self._shape))}
            W = self.weight()
            moved = W + low.right(torch.eye(W.shape[1]).to(W))
            moved = wide(lengths)[:, None] * moved / torch.linalg.norm(moved, dim=1, keepdim=True)
            return {SINGLE: (Update(moved - W), min(W.shape))}
        weight = wide(layer.get_delta_weight(adapter))
        rank = min(layer.r[adapter], *weight.shape)
        transposed = isinstance(layer.get_base_layer(), Conv1D)
        U, S, Vh = torch.linalg.svd(weight.T if transposed else weight, full_matrices=False)
        return {SINGLE: (Update(U[:, :rank] * S[:rank], Vh[:rank]), rank)}  # the rest is rounding

    @property
    def _shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def factors(self) -> dict[str, Tensor]:
        """A (r, in) and B (out, r), if the layer has them."""
        if self.parts is None:
            return {}
        return {"A": wide(self.parts.A), "B": wide(self.parts.B)}

    def gate(self) -> Tensor | None:
        """The trained factor on each rank, 0 for a rank that was pruned."""
        gate = gate_of(self.layer, self.adapter, self.config)
        return None if gate is None else wide(gate)


class FullAdapted(Adapted):
    """A layer of a fully trained model, beside the same layer of its base."""

    def __init__(self, name: str, trained: Any, base: Any) -> None:
        self.name, self.trained, self.base = name, trained, base

    def weight(self) -> Tensor:
        """W, of the base model."""
        return self._read(self.base)

    def updates(self) -> dict[str, tuple[Update, int]]:
        """The trained weight less that of the base model."""
        trained = self._read(self.trained)
        dW = trained - self.weight().to(trained.device)
        return {SINGLE: (Update(dW), min(dW.shape))}

    @staticmethod
    def _read(layer: Any) -> Tensor:
        weight = wide(layer.weight)
        return weight.T if isinstance(layer, Conv1D) else weight


def adapted_layers(model: Any, base: nn.Module | None = None) -> list[Adapted]:
    """The adapted layers of a model, in its order.

    Args:
        model: a PeftModel, or a fully trained model.
        base: for the latter: its base model.
    """
    if not isinstance(model, PeftModel):
        assert base is not None
        before = adaptable_layers(base)
        return [FullAdapted(n, layer, before[n]) for n, layer in adaptable_layers(model).items()]
    adapter = model.active_adapters[0]
    config: Any = model.peft_config[adapter]
    layers: list[Adapted] = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, PlaitLayer):
            if adapter in module.plait_delta:
                layers.append(PlaitAdapted(name, module, adapter))
        elif is_tuner_layer(module):
            layers.append(UpstreamAdapted(name, module, adapter, config))
    return layers


def place(name: str) -> tuple[int | None, str]:
    """The block that a layer's name counts first, and the name with `*` for every number.

    `model.layers.3.mlp.up_proj` gives (3, "model.layers.*.mlp.up_proj").
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return (
        int(numbers[0]) if numbers else None,
        re.sub(r"(?<=\.)\d+(?=\.)", "*", name),
    )
