"""The common part of optimizers of (A, B): the pairs of a model, and a torch Optimizer on them.

A pair is A (r, in) and B (out, r); a change of basis (A, B) -> (R A, B R^-1) leaves dW unchanged.
Factors that are slices of a 3-D parameter are joined, A side by side on `in`, B stacked on `out`;
their state has the parameter's shape. Pairs of one shape share one batched linear algebra call.
Other trained parameters (routers, heads, norms, biases) are updated by AdamW in further groups of
the same optimizer. All state is held in fp32 or better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from plait.core import Pair
from plait.core.bridge import PlaitLayer
from plait.core.sharding import is_shard
from plait.upstream.layers import free_pair, is_lora_layer

_FLAT = (
    "is not a matrix (FSDP1 and DeepSpeed ZeRO flatten parameters). Use DDP or one process, or "
    "train with AdamW or LoRA+."
)


def wide(t: Tensor) -> Tensor:
    """The tensor in fp32 or better, detached; not a copy where it is wide already."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


# Pairs ------------------------------------------------------------------------------------------


def collect_pairs(model: nn.Module, adapter: str | None = None) -> list[Pair]:
    """The pairs of an adapter, in the order of the model's layers.

    Args:
        model: with plait's layers or upstream LoRA layers.
        adapter: its name. None: the active one.

    Raises:
        ValueError: a layer whose factors are no free pair, named with the way out; no pair at all;
        several active adapters and no name.
    """
    return [pair for _, pairs in layer_pairs(model, adapter) for pair in pairs]


def layer_pairs(model: nn.Module, adapter: str | None = None) -> list[tuple[nn.Module, list[Pair]]]:
    """The adapted layers with their pairs, as collect_pairs."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PlaitLayer) or is_lora_layer(module)
    ]
    if adapter is None:
        adapter = _active(layers)
    paired = []
    for name, layer in layers:
        if isinstance(layer, PlaitLayer):
            delta: Any = dict(layer.plait_delta.items()).get(adapter)
            pairs = [] if delta is None else delta.pairs()
        else:
            pair = free_pair(name.removeprefix("base_model.model."), layer, adapter)
            pairs = [] if pair is None else [pair]
        if pairs:
            paired.append((layer, pairs))
    if not paired:
        raise ValueError(
            f"The model has no pair (A, B) of adapter {adapter!r}. These optimizers train LoRA and "
            "methods made of free factors; train this model with AdamW."
        )
    _check([pair for _, pairs in paired for pair in pairs])
    return paired


def _active(layers: Sequence[tuple[str, Any]]) -> str:
    names = list(dict.fromkeys(n for _, layer in layers for n in layer.active_adapters))
    if len(names) != 1:
        active = ", ".join(names) or "none"
        raise ValueError(f"Active adapters: {active}. Name the one to train, adapter=...")
    return names[0]


def _check(pairs: Sequence[Pair]) -> None:
    """Raise ValueError unless every factor is a trained matrix and in one pair only."""
    taken = set()
    for pair in pairs:
        for letter, p, slices in (("A", pair.A, pair.A_slices), ("B", pair.B, pair.B_slices)):
            at = f"{pair.name}: {letter}"
            if p.ndim != (2 if slices is None else 3):
                raise ValueError(f"{at} of shape {tuple(p.shape)} {_FLAT}")
            if not p.requires_grad:
                raise ValueError(
                    f"{at} is frozen, and both factors of a pair move together. Let it train, or "
                    "train with AdamW or LoRA-FA."
                )
            for i in slices or (None,):
                if (p, i) in taken:
                    raise ValueError(
                        f"{at} is shared with another layer or pair, so no basis is free. Train "
                        "with AdamW."
                    )
                taken.add((p, i))


def join(t: Tensor, slices: tuple[int, ...] | None, dim: int) -> Tensor:
    """A factor as a matrix: the slices of a 3-D tensor side by side on `dim`."""
    return t if slices is None else torch.cat([t[i] for i in slices], dim)


def part(t: Tensor, slices: tuple[int, ...] | None, dim: int, value: Tensor) -> None:
    """Write a matrix back to where `join` took it from."""
    if slices is None:
        t.copy_(value)
    else:
        for i, v in zip(slices, value.chunk(len(slices), dim), strict=True):
            t[i].copy_(v)


@dataclass
class Bucket:
    """Pairs of one shape and the same hyper-parameters, as batches: A (n, r, in), B (n, out, r).

    slots: index of each pair among those of its A. group_A, group_B: param groups. step: completed.
    """

    pairs: list[Pair]
    slots: list[int]
    group_A: dict[str, Any]
    group_B: dict[str, Any]
    step: int

    def A(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """What `of` gives for each A, or a tensor of its shape, as (n, r, in)."""
        return torch.stack([join(wide(of(p.A)), p.A_slices, 1) for p in self.pairs])

    def B(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """What `of` gives for each B, as (n, out, r)."""
        return torch.stack([join(wide(of(p.B)), p.B_slices, 0) for p in self.pairs])

    def put_A(self, of: Callable[[nn.Parameter], Tensor], values: Tensor) -> None:
        """Write (n, r, in) back."""
        for p, value in zip(self.pairs, values, strict=True):
            part(of(p.A), p.A_slices, 1, value)

    def put_B(self, of: Callable[[nn.Parameter], Tensor], values: Tensor) -> None:
        """Write (n, out, r) back."""
        for p, value in zip(self.pairs, values, strict=True):
            part(of(p.B), p.B_slices, 0, value)


def itself(p: nn.Parameter) -> Tensor:
    """The parameter; an argument of Bucket.A and its like."""
    return p


def gradient(p: nn.Parameter) -> Tensor:
    """Its gradient, zero where there is none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


# The optimizer ----------------------------------------------------------------------------------


class PairOptimizer(Optimizer):
    """A torch Optimizer over the pairs of an adapter and AdamW over what else trains.

    param_groups: one of kind "pairs", then those of kind "other". A factor may be moved to a group
    of its own learning rate and weight decay. Subclasses give `init_pair` and `step_pairs`.

    Raises:
        ValueError: at construction as collect_pairs; at a step, where the parameters were replaced
        by shards.
    """

    key: ClassVar[str]
    # It clips, or must not be clipped: Trainer's max_grad_norm has to be 0. See plait.callback.
    own_clipping: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[Pair],
        *,
        lr: float,
        weight_decay: float,
        other_lr: float,
        **options: Any,
    ) -> None:
        for name, value in (("lr", lr), ("other_lr", other_lr), ("weight_decay", weight_decay)):
            at_least(self.key, name, value, 0)
        self.pairs = list(pairs)
        factors = list(dict.fromkeys(p for pair in pairs for p in (pair.A, pair.B)))
        held = set(factors)
        rest = [p for p in model.parameters() if p.requires_grad and p not in held]
        other = {"kind": "other", "lr": other_lr, "betas": (0.9, 0.999), "eps": 1e-8}
        groups = [{"params": factors, "kind": "pairs", "weight_decay": weight_decay, **options}]
        for params, decay in (
            ([p for p in rest if p.ndim > 1], weight_decay),
            ([p for p in rest if p.ndim <= 1], 0.0),  # biases and norms, as in Trainer
        ):
            if params:
                groups.append({"params": params, "weight_decay": decay, **other})
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def init_pair(self, pair: Pair, count: int) -> None:
        """Create the state of a pair's parameters; `count` pairs have this A."""
        raise NotImplementedError

    def step_pairs(self, buckets: list[Bucket]) -> None:
        """Update all pairs that have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: recomputes the gradients and returns the loss; runs with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_pairs(self._buckets())
        for group in self.param_groups:
            if group["kind"] == "other":
                step_adamw(group, self.state)
        return loss

    def _buckets(self) -> list[Bucket]:
        """The pairs that have a gradient, by shape and hyper-parameters."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        counts: dict[nn.Parameter, int] = {}
        slots = []
        for pair in self.pairs:
            slots.append(counts.get(pair.A, 0))
            counts[pair.A] = slots[-1] + 1
        buckets: dict[Any, Bucket] = {}
        steps = {}
        for pair, slot in zip(self.pairs, slots, strict=True):
            for p in (pair.A, pair.B):
                if p not in groups:
                    raise ValueError(f"{pair.name}: the optimizer's parameter {_FLAT}")
                if is_shard(p):
                    raise ValueError(
                        f"{pair.name}: a factor is sharded (FSDP2). Keep the adapter out of "
                        "sharding and average its gradients, or train with AdamW."
                    )
            if pair.A.grad is None and pair.B.grad is None:
                continue
            if pair.A not in steps:
                if not self.state[pair.A]:
                    self.init_pair(pair, counts[pair.A])
                steps[pair.A] = int(self.state[pair.A]["step"])
                self.state[pair.A]["step"] += 1
            a, b, step = groups[pair.A], groups[pair.B], steps[pair.A]
            shapes = pair.A.shape, pair.B.shape, len(pair.A_slices or ()), len(pair.B_slices or ())
            key = (shapes, pair.A.dtype, pair.B.dtype, pair.A.device, id(a), id(b), step)
            bucket = buckets.setdefault(key, Bucket([], [], a, b, step))
            bucket.pairs.append(pair)
            bucket.slots.append(slot)
        return list(buckets.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """As torch, which casts state to the parameter's dtype; ours stays as wide as it is."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                device = "cpu" if name == "step" else p.device
                self.state[p][name] = value.to(device, copy=True)


def at_least(key: str, name: str, value: Any, least: float, below: float = float("inf")) -> None:
    """Check that a hyper-parameter is in its range.

    Raises:
        ValueError: it is not; names the value and the range.
    """
    if not least <= value < below:
        end = f" and below {below:g}" if below < float("inf") else ""
        raise ValueError(f"{key}: {name} = {value}. Give {least:g} or more{end}.")


def step_adamw(group: dict[str, Any], state: Any) -> None:
    """AdamW, torch's own function, in fp32 or better."""
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if not state[p]:
            zero = torch.zeros_like(wide(p))
            state[p].update(step=torch.zeros(()), exp_avg=zero, exp_avg_sq=zero.clone())
    if not params:
        return
    values = [wide(p) for p in params]
    beta1, beta2 = group["betas"]
    adamw(
        values,
        [wide(p.grad) for p in params],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for p, value in zip(params, values, strict=True):
        if value.dtype != p.dtype:
            p.copy_(value)
