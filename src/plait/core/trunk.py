"""The trunk: the finished links of a chain beside one adapted layer, frozen, scaling 1.

    y = W x + B (A x)        A: (R, in)   B: (out, R)   R = sum of the links' ranks

storage="stack" keeps A and B as non-persistent buffers of the tuner layer, upstream's or plait's,
and adds the product in a forward hook of its base layer: the base weight's bytes never change, so
quantised bases work and a disabled adapter leaves the base model bit for bit. storage="merge"
writes W = cast(W0 + B A) from a kept copy of W0 (on the CPU) instead: one rounding however many
links, but a disabled adapter then leaves the base with its finished links.

A trunk belongs to one adapter and acts while that adapter is active. It has no parameters.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plait.core import events
from plait.core.bridge import PlaitLayer
from plait.core.delta import NotMergeable

Storage = Literal["stack", "merge"]
_BUFFERS = ("plait_trunk_A", "plait_trunk_B")


def is_quantized(base: nn.Module) -> bool:
    """Whether a base layer packs its weight, as bitsandbytes does."""
    return type(base.weight) is not nn.Parameter


def trunk_of(layer: nn.Module) -> "Trunk | None":
    """The trunk of a tuner layer, if it has one."""
    return vars(layer).get("plait_trunk")


def hosted(layer: Any) -> nn.ModuleDict:
    """What a tuner layer, plait's or upstream LoRA's, holds by adapter name."""
    return getattr(layer, layer.adapter_layer_names[0])


class Trunk:
    """The finished links of one layer."""

    def __init__(self, layer: Any, adapter: str, storage: Storage) -> None:
        self.layer, self.adapter, self.storage = layer, adapter, storage
        self.base: Any = layer.get_base_layer()
        self.transposed = isinstance(self.base, Conv1D)  # GPT-2 stores (in, out)
        self.handles: list[Any] = []
        self.start: Tensor | None = None  # W0, with storage="merge"
        self.kept: tuple[Tensor, Tensor] | None = None  # the factors, with storage="merge"
        layer.plait_trunk = self
        # peft calls this method of a layer to unload it, in merge_and_unload too.
        layer.unload_and_optionally_merge_module = self.unload
        if storage == "merge":
            self.start = self.base.weight.detach().to("cpu", copy=True)
            return
        for name in _BUFFERS:
            layer.register_buffer(name, None, persistent=False)
        self.handles = [
            layer.base_layer.register_forward_hook(self._add),
            layer.register_forward_hook(self._see_mixed, with_kwargs=True),
        ]

    def set(self, A: Tensor, B: Tensor) -> None:
        """Replace the factors: A (R, in), B (out, R), fp32 (fp64 for fp64 links)."""
        if self.storage == "merge":
            self.kept = (A, B)
            self._put(self._added(self._kept_start(), []))
            return
        device = self.base.weight.device
        self.layer.plait_trunk_A = A.to(device)
        self.layer.plait_trunk_B = B.to(device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R), scaling 1."""
        if self.kept is not None:
            return self.kept
        return self.layer.plait_trunk_A, self.layer.plait_trunk_B

    def effective(self, weight: Tensor) -> Tensor:
        """The base weight (out, in) with the finished links."""
        if self.storage == "merge":
            return weight
        A, B = self.factors()
        return weight.to(B.dtype) + B @ A

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the base layer."""
        if self.layer.disable_adapters or self.adapter not in self.layer.active_adapters:
            return None
        A, B = self.factors()
        x = args[0].to(A.dtype)
        return output + F.linear(F.linear(x, A), B).to(output.dtype)

    def _see_mixed(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Forward hook of an upstream layer: peft puts adapter_names among its keywords."""
        if kwargs.get("adapter_names") is not None:
            self.refuse_mixed()

    def refuse_mixed(self) -> None:
        """Raise ValueError: in a mixed batch, every row would get the finished links."""
        raise ValueError(
            f"adapter_names: adapter {self.adapter!r} is a chain, whose finished links cannot be "
            "chosen by row. Stack it first, plait.chain.save_stacked, and load that adapter."
        )

    # Merging and unloading --------------------------------------------------------------------

    def unload(
        self, merge: bool, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Return the layer's base without the tuner layer, with the links merged in or unchanged.

        Args:
            merge: add the finished links and the named adapters, in one rounding.
            safe_merge: raise if the result is not finite.
            adapter_names: None: the active ones.

        Raises:
            NotMergeable: a quantised base.
            ValueError: with safe_merge, the result is not finite.
        """
        layer, merged, total = self.layer, set(self.layer.merged_adapters), None
        chosen = list(adapter_names or layer.active_adapters) if merge else []
        names = [n for n in chosen if n in hosted(layer) and n not in merged]
        if merge or merged:
            if is_quantized(self.base):
                raise NotMergeable(
                    f"{type(self.base).__name__}: merging a chain needs a dequantised base. "
                    "Export to plain LoRA instead (--to lora)."
                )
            weight = self.base.weight.detach() if merged else self._kept_start()
            total = self._added(weight, names, links=self.adapter in {*names, *merged})
            if safe_merge and not torch.isfinite(total).all():
                raise ValueError(
                    "NaNs detected in the merged weights. A link of the chain seems to be broken; "
                    "the base weight is unchanged."
                )
        self.remove()
        if total is not None:
            self._put(total)
        return self.base

    def remove(self) -> None:
        """Remove the trunk from the layer and restore the base weight."""
        for handle in self.handles:
            handle.remove()
        stacked = _BUFFERS if self.storage == "stack" else ()
        for name in (*stacked, "plait_trunk", "unload_and_optionally_merge_module"):
            delattr(self.layer, name)
        if self.start is not None:
            self._put(self.start)

    def _kept_start(self) -> Tensor:
        """W0, in the base's own layout."""
        start = self.base.weight.detach() if self.start is None else self.start
        return start.to(self.base.weight.device)

    @torch.no_grad()
    def _added(self, weight: Tensor, names: Sequence[str], links: bool = True) -> Tensor:
        """cast(weight + finished links + updates of the named adapters), one rounding."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # A weight that holds a merged adapter already holds the links of storage="merge", too.
        if links and not (self.storage == "merge" and self.layer.merged_adapters):
            A, B = self.factors()
            update = (B @ A).to(wide)
            wide = wide + (update.T if self.transposed else update)
        for name in names:
            if isinstance(self.layer, PlaitLayer):
                events.check_fired(self.layer.plait_delta[name])  # type: ignore[arg-type]
            wide = wide + self.layer.get_delta_weight(name).to(wide)
        return wide.to(weight.dtype)

    def _put(self, weight: Tensor) -> None:
        """Make a tensor the base weight, in the dtype that the model was cast to since.

        A new Parameter: weights may be tied to others.
        """
        before = self.base.weight
        weight = weight.to(before.device, before.dtype)
        self.base.weight = nn.Parameter(weight, before.requires_grad)
