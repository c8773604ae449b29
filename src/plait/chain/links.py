"""The live link of one layer: upstream's LoRA or a low-rank Delta of plait, read and restarted.

A link is read as (A, B, s) with dW = s B A when it is tied. A new one starts as its method starts,
from keyed generators: LoRA with A at U(-1, 1) / sqrt(in) and B = 0, a Delta through `restart`.
"""

import re
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from plait.chain.plan import ChainPlan
from plait.chain.recipes import Recipe, recipe_of
from plait.core.bridge import PlaitLayer
from plait.core.config import DeltaConfig
from plait.core.delta import Delta
from plait.core.dense import DenseDelta
from plait.core.init import kaiming, seeded
from plait.core.low_rank import LowRankDelta
from plait.core.registry import find
from plait.core.sharding import refuse_sharded
from plait.core.trunk import is_quantized
from plait.upstream.export import update_of
from plait.upstream.layers import factors_of, set_scaling
from plait.upstream.table import BASELINES, baseline_of, start_kind


def chain_support(plan: str, method_key: str) -> str | None:
    """Why a plan does not work with a method; None where it does.

    Example:
        >>> import plait
        >>> plait.chain_support("chain", "lora") is None
        True
        >>> plait.chain_support("rac", "pissa").partition(",")[0]
        'rac: pissa edits the base weight at its start'

    Args:
        plan: a recipe, such as "chain".
        method_key: a method of plait, or a baseline such as "lora".

    Raises:
        ValueError: an unknown plan or method.
    """
    recipe = recipe_of(plan)
    if method_key in BASELINES:
        reason = BASELINES[method_key].no_chain
    else:
        reason = _against(method_key, find(method_key).delta, recipe)
    return f"{plan}: {reason}." if reason else None


def _against(key: str, delta: type[Delta], recipe: Recipe) -> str | None:
    """Why a recipe does not work with a Delta class; None where it does."""
    if issubclass(delta, DenseDelta) or not issubclass(delta, LowRankDelta):
        return f"{key}'s update has full rank and no factors that a finished link could keep"
    if not delta.mergeable:
        return f"{key}'s update depends on the input, so a finished link is no matrix"
    if delta.no_restart:
        return delta.no_restart
    return recipe.no_delta and recipe.no_delta.format(key=key)


class Link:
    """The live link of one layer.

    Attributes:
        name: of the layer in the base model. layer: the tuner layer. shape: (out, in) of dW.
        r: the adapter's rank here. block: the transformer block that the layer is in.
    """

    r: int

    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter
        base = layer.get_base_layer()
        refuse_sharded(layer, f"chain: {name}", "Train in one process or with DDP.")
        self.quantized = is_quantized(base)
        self.half = not self.quantized and base.weight.dtype.itemsize < 4
        self.shape: tuple[int, int] = (layer.out_features, layer.in_features)
        index = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        self.block = index[0] if index else name

    def parameters(self) -> list[nn.Parameter]:
        """All its parameters, the frozen ones included."""
        raise NotImplementedError

    def trained(self, plan: ChainPlan) -> list[nn.Parameter]:
        """The parameters that the plan trains."""
        return self.parameters()

    def read(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """A (k, in), B (out, k) and s with dW = s B A: fp32 copies (fp64 of fp64) on the CPU."""
        raise NotImplementedError

    def check(self, lengths: list[int]) -> None:
        """Raise ValueError if a link is too short for the method's schedule."""

    def start(self, plan: ChainPlan, number: int, steps: int) -> None:
        """Start link `number` (0, 1, ..) of `steps` steps; link 0 keeps the adapter's start."""
        raise NotImplementedError

    def resume(self, plan: ChainPlan, number: int, steps: int) -> None:
        """Set what the link's saved state does not hold."""

    def switch(self, on: bool) -> None:
        """Turn the update on or off; gradients are exactly 0 while it is off."""
        raise NotImplementedError

    def frozen(self, plan: ChainPlan) -> nn.Parameter | None:
        """The factor that the plan freezes, None if it freezes none."""
        return None


class LoraLink(Link):
    """The link of an upstream LoRA layer."""

    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        super().__init__(name, layer, adapter)
        factors: Any = factors_of(layer, adapter)
        self.A: nn.Parameter = factors.A
        self.B: nn.Parameter = factors.B
        self.scaling: float = factors.scaling
        self.r = r = layer.r[adapter]
        if self.A.shape != (r, self.shape[1]) or self.B.shape != (self.shape[0], r):
            raise ValueError(
                f"chain: the factors of {name} are {tuple(self.A.shape)} and "
                f"{tuple(self.B.shape)}, so they are sharded or flattened (DeepSpeed ZeRO, FSDP). "
                "Train in one process or with DDP."
            )

    def parameters(self) -> list[nn.Parameter]:
        """A and B."""
        return [self.A, self.B]

    def trained(self, plan: ChainPlan) -> list[nn.Parameter]:
        """A and B without the frozen side."""
        return [p for p in self.parameters() if p is not self.frozen(plan)]

    def frozen(self, plan: ChainPlan) -> nn.Parameter | None:
        """The sketched side."""
        return {"A": self.A, "B": self.B, None: None}[plan.freeze]

    def read(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """The live ranks of the factors."""
        A, B = (_kept(p) for p in (self.A[:rank], self.B[:, :rank]))
        return A, B, self.scaling

    @torch.no_grad()
    def start(self, plan: ChainPlan, number: int, steps: int) -> None:
        """A at U(-1, 1) / sqrt(in) and B = 0; or a sketch and 0. Surplus ranks are zero.

        A rank of which both factors are zero gets the gradient 0 and stays zero.
        """
        r, rank = self.r, plan.rank(number, self.r)
        if plan.freeze == "A":
            self.A.copy_(plan.draw(number, self.name, r, self.shape[1]))
            self.B.zero_()
        elif plan.freeze == "B":
            self.B.copy_(plan.draw(number, self.name, r, self.shape[0]).T)
            self.A.zero_()
        elif number:
            self.A.copy_(kaiming(seeded(plan.seed, number, self.name), r, self.shape[1]))
            self.B.zero_()
        self.A[rank:] = 0
        self.B[:, rank:] = 0

    def switch(self, on: bool) -> None:
        """Turn the update on or off through its scale."""
        set_scaling(self.layer, self.adapter, self.scaling if on else 0.0)


class DeltaLink(Link):
    """The link of a plait layer."""

    def __init__(self, name: str, layer: PlaitLayer, adapter: str) -> None:
        super().__init__(name, layer, adapter)
        self.delta: Any = layer.plait_delta[adapter]
        self.r = self.delta.config.r

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the Delta."""
        return list(self.delta.parameters())

    def read(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """The factors in evaluation, gate and mix folded in."""
        A, B = self.delta.folded()
        return _kept(A), _kept(B), self.delta.scaling

    def check(self, lengths: list[int]) -> None:
        """As the Delta's own schedule asks."""
        for steps in set(lengths):
            self.delta.adapter.total_steps = steps
            self.delta.check_schedule()

    def start(self, plan: ChainPlan, number: int, steps: int) -> None:
        """The method's own start on the weight with the trunk; its schedule spans the link."""
        if number:
            self.delta.restart(seeded(plan.seed, number, self.name))
        self.resume(plan, number, steps)

    def resume(self, plan: ChainPlan, number: int, steps: int) -> None:
        """Set the length of the method's schedule."""
        self.delta.adapter.total_steps = steps


def _kept(p: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return p.detach().to("cpu", wide, copy=True).contiguous()


def find_links(model: nn.Module, plan: ChainPlan, adapter: str) -> list[Link]:
    """The links of a model's adapter, in the order of its layers.

    Raises:
        ValueError: no chain of this plan is possible with the method, a layer or the base, with
            the reason.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: Any = model.peft_config if isinstance(model, PeftModel) else {}
    config = configs.get(adapter)
    baseline = None if config is None else baseline_of(config)
    if baseline is not None:
        _check_upstream(baseline.key, config, plan)
    elif isinstance(config, DeltaConfig):
        reason = chain_support(plan.recipe, config.key)
        if reason:
            raise ValueError(reason)
        if plan.ranks is not None:
            raise ValueError(
                f"chain: ranks = {plan.ranks} needs upstream's lora; {config.key} keeps "
                "its own r. Leave ranks out."
            )
    elif config is not None:
        kind = str(config.peft_type).removeprefix("PeftType.")
        raise ValueError(f"chain: an adapter of type {kind} has no links. Use lora.")
    links: list[Link] = []
    for name, layer in base.named_modules():
        update = update_of(layer, adapter)
        if isinstance(update, Delta):
            assert isinstance(layer, PlaitLayer)
            _check_delta(name, update)
            links.append(DeltaLink(name, layer, adapter))
        elif update is not None:
            links.append(LoraLink(name, layer, adapter))
    if not links:
        raise ValueError(
            f"chain: the model has no adapter {adapter!r} of LoRA or of a low-rank method of "
            "plait. Wrap it first."
        )
    _check_storage(links, plan)
    return links


def _check_upstream(key: str, config: Any, plan: ChainPlan) -> None:
    """Raise ValueError for a method of peft's, a start or targets that a link cannot repeat."""
    reason = chain_support(plan.recipe, key)
    if reason:
        raise ValueError(reason)
    if start_kind(config) not in ("drawn", "data"):
        raise ValueError(
            f"chain: init_lora_weights = {config.init_lora_weights!r} edits the base weight or "
            "takes data, which a new link cannot. Use True."
        )
    if config.target_parameters:
        raise ValueError("chain: target_parameters are no linear layers. Leave them out.")


def _check_delta(name: str, delta: Delta) -> None:
    """Raise ValueError for an update that is no constant product of factors."""
    key = delta.adapter.key
    if not isinstance(delta, LowRankDelta) or delta.no_restart:
        raise ValueError(f"chain: {name} has no factors that a finished link of {key} could keep.")
    if delta.depends_on is not None:
        raise ValueError(f"chain: the update of {key} depends on the input. Use another method.")


def _check_storage(links: list[Link], plan: ChainPlan) -> None:
    """Raise ValueError for base weights that finished links cannot be merged into."""
    if plan.storage != "merge":
        return
    for link in links:
        if link.quantized:
            kind = type(link.layer.get_base_layer()).__name__
            raise ValueError(
                f'chain: storage = "merge" edits the base weight, and {link.name} is {kind}. '
                'Use storage="stack".'
            )
