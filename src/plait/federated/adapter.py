"""A model's adapter as one flat state dict, `<layer>/<name>` -> tensor, and back.

    lora:      model.layers.0.self_attn.q_proj/A (r, in), .../B (out, r)
    a Delta:   .../<its parameters and persistent buffers>, such as .../A_s, .../keep, .../t
    the rest:  what trains outside the adapted layers, such as a new head: score/weight

Federated methods work on these dicts alone, so they need no model and no engine. Tensors that
leave a model are copies on the CPU. Layers are in the order of the model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from plait.core.config import DeltaConfig
from plait.core.delta import Delta
from plait.core.dense import DenseDelta
from plait.core.init import kaiming, seeded
from plait.core.trunk import Trunk, trunk_of
from plait.gates.screening import Screening, names_of
from plait.upstream.export import update_of
from plait.upstream.layers import factors_of
from plait.upstream.table import baseline_of, start_kind

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """What a federated method knows of an adapted layer: dW (out, in) of rank r, scaling s."""

    in_features: int
    out_features: int
    r: int
    scaling: float

    @property
    def dense(self) -> int:
        """Numbers of a dense (out, in) matrix."""
        return self.in_features * self.out_features

    @property
    def pair(self) -> int:
        """Numbers of A (r, in) and B (out, r)."""
        return self.r * (self.in_features + self.out_features)


def refusal(config: Any) -> str | None:
    """Why an adapter of this config cannot be averaged over clients; None where it can.

    Args:
        config: peft's, of upstream's LoRA or of a method of plait.
    """
    baseline = baseline_of(config)
    if baseline is not None:
        if baseline.no_federation is None and start_kind(config) != "drawn":
            return (
                f"init_lora_weights = {config.init_lora_weights!r} edits the base weight or takes "
                "a client's data, so the clients' base models differ. Use True"
            )
        return baseline.no_federation
    if not isinstance(config, DeltaConfig) or config.delta_cls is None:
        kind = str(getattr(config, "peft_type", config)).removeprefix("PeftType.")
        return f"an adapter of type {kind} is neither upstream's LoRA nor a method of plait"
    key, delta = config.key, config.delta_cls
    if issubclass(delta, DenseDelta):
        return (
            f"{key}'s update is linear in none of its factors, so the mean of the clients' factors "
            "says nothing of the mean of their updates. Use a method of low rank"
        )
    if delta.allocates(config):
        return (
            f"{key} moves ranks between layers on each client's own scores, so a rank of one "
            "client is another one elsewhere. Leave the allocation out"
        )
    return None


def updates_of(model: nn.Module, adapter: str = "default") -> dict[str, tuple[Any, Any]]:
    """Layer name -> (tuner layer, its Delta or upstream update) of an adapter.

    Raises:
        ValueError: no such adapter, or one that cannot be averaged.
    """
    configs: Any = model.peft_config if isinstance(model, PeftModel) else {}
    if adapter not in configs:
        raise ValueError(
            f"federated: the model has no adapter {adapter!r}. Wrap it with get_peft_model first."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    updates = {}
    for name, layer in base.named_modules():
        update = update_of(layer, adapter)
        if update is not None:
            updates[name] = (layer, update)
    if not updates:
        reason = refusal(configs[adapter]) or "it adapts no linear layer"
        raise ValueError(f"federated: adapter {adapter!r}: {reason}.")
    return updates


def layers_of(model: nn.Module, adapter: str = "default") -> dict[str, Layer]:
    """Shape, rank and scaling of each adapted layer."""
    found = {}
    for name, (layer, update) in updates_of(model, adapter).items():
        r = update.config.r if isinstance(update, Delta) else len(update.A)
        found[name] = Layer(layer.in_features, layer.out_features, r, update.scaling)
    return found


def screened(model: nn.Module, adapter: str = "default") -> tuple[str, ...]:
    """Names of parameters on which a 0/1 mask of the client acts."""
    names: set[str] = set()
    for _, update in updates_of(model, adapter).values():
        gates = update.gates if isinstance(update, Delta) else []
        if any(isinstance(gate, Screening) for gate in gates):
            names |= set(names_of(update))
    return tuple(sorted(names))


def parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters and whatever else trains, by their keys."""
    found, seen = {}, set()
    for name, (layer, update) in updates_of(model, adapter).items():
        if isinstance(update, Delta):
            own = dict(update.named_parameters())
            lent = update.shared if update.owner else ()
            named = {n: p for n, p in own.items() if n not in lent}
            seen |= {id(p) for p in own.values()}
        else:
            factors: Any = factors_of(layer, adapter)
            named = {"A": factors.A, "B": factors.B}
        found |= {f"{name}/{n}": p for n, p in named.items()}
        seen |= {id(p) for p in named.values()}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, p in base.named_parameters():
        if p.requires_grad and id(p) not in seen:
            module, _, last = name.replace(f".modules_to_save.{adapter}", "").rpartition(".")
            found[f"{module}/{last}"] = p
    return found


def trained(model: nn.Module, adapter: str = "default") -> dict[str, tuple[int, ...]]:
    """Key -> shape of what trains."""
    named = parameters(model, adapter)
    return {key: tuple(p.shape) for key, p in named.items() if p.requires_grad}


def freeze(model: nn.Module, patterns: Iterable[str], adapter: str = "default") -> None:
    """Stop training the parameters that match one of the patterns, such as FFA-LoRA's A."""
    for key, p in parameters(model, adapter).items():
        if matches(key, patterns):
            p.requires_grad_(False)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a shell pattern fits the whole key or its name, the part after the slash."""
    name = key.rpartition("/")[2]
    return any(fnmatchcase(name, p) or fnmatchcase(key, p) for p in patterns)


def read(model: nn.Module, adapter: str = "default") -> StateDict:
    """The whole local state: parameters, and the buffers that a Delta saves."""
    state = dict(parameters(model, adapter).items())
    found: StateDict = {key: _copy(p) for key, p in state.items()}
    for name, (_, update) in updates_of(model, adapter).items():
        if isinstance(update, Delta):
            found |= {f"{name}/{n}": _copy(t) for n, t in update.state_dict().items()}
    return found


def _copy(t: Tensor) -> Tensor:
    return t.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def write(model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Put a whole local state, as `read` gives it, into the model.

    Raises:
        ValueError: keys are missing or unknown, or a shape differs.
    """
    named, updates = parameters(model, adapter), updates_of(model, adapter)
    parts: dict[str, StateDict] = {}
    rest = {}
    for key, value in state.items():
        layer, _, name = key.rpartition("/")
        if layer in updates and isinstance(updates[layer][1], Delta):
            parts.setdefault(layer, {})[name] = value
        else:
            rest[key] = value
    deltas = {n: u for n, (_, u) in updates.items() if isinstance(u, Delta)}
    plain = {k for k in named if k.rpartition("/")[0] not in deltas}
    _same_keys(plain, set(rest))
    _same_keys(set(deltas), set(parts))
    for key, value in rest.items():
        if value.shape != named[key].shape:
            raise ValueError(
                f"federated: {key} is {tuple(value.shape)}, the model's is "
                f"{tuple(named[key].shape)}. Give each client the state of its own rank."
            )
        named[key].copy_(value)
    for layer, part in parts.items():
        try:
            deltas[layer].load_state_dict(part)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip().rstrip(".")  # after torch's heading
            raise ValueError(
                f"federated: {layer}: {first}. Give each client the state of its own config."
            ) from None


def _same_keys(expected: set[str], actual: set[str]) -> None:
    apart = sorted(expected ^ actual)
    if apart:
        side = "missing" if apart[0] in expected else "unknown"
        raise ValueError(
            f"federated: {apart[0]} is {side} in the state (and {len(apart) - 1} more differ). "
            "Give a whole state, as read(model) returns it."
        )


@torch.no_grad()
def drawn(model: nn.Module, key: Iterable[object], adapter: str = "default") -> StateDict:
    """A fresh start of the adapter, from generators keyed by `key` and the layer's name.

    LoRA: A at U(-1, 1) / sqrt(in), B = 0, drawn as a chain draws a new link. A Delta: the start of
    its method. What trains outside the adapted layers has no such start and is left out.

    Raises:
        ValueError: the Delta cannot be redrawn, with the reason.
    """
    key, start_state = tuple(key), {}
    for name, (layer, update) in updates_of(model, adapter).items():
        gen = seeded(*key, name)
        if isinstance(update, Delta):
            if update.no_restart:
                raise ValueError(f"federated: {name} cannot be redrawn: {update.no_restart}.")
            start = type(update)(update.base, update.config, gen).to(update.base.dtype)
            start_state |= {f"{name}/{n}": _copy(t) for n, t in start.state_dict().items()}
        else:
            factors: Any = factors_of(layer, adapter)
            start_state[f"{name}/A"] = kaiming(gen, *factors.A.shape).to(factors.A.dtype)
            start_state[f"{name}/B"] = torch.zeros(factors.B.shape, dtype=factors.B.dtype)
    return start_state


def set_trunk(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], adapter: str = "default"
) -> None:
    """Add B A beside each named layer, frozen, scaling 1; the base weight stays as it is.

    Args:
        model: with the adapter.
        factors: layer -> A (R, in), B (out, R). A layer that is not named loses its trunk.
        adapter: its name.
    """
    for name, (layer, _) in updates_of(model, adapter).items():
        trunk = trunk_of(layer)
        if name in factors:
            (trunk or Trunk(layer, adapter, "stack")).set(*factors[name])
        elif trunk is not None:
            trunk.remove()
