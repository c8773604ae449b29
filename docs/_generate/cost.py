"""The cost tables: parameters, ranks and arithmetic of each method, computed from the code."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import plait
from _generate.markdown import code, table
from plait import list_methods
from plait.core import DeltaConfig
from plait.core.delta import planned

SIDE = 4096  # the layer of the cost tables: SIDE x SIDE, TOKENS tokens
TOKENS = 2048
SMALL_SIDES, FEW_TOKENS = (256, 512, 768), (8, 16)  # the layers whose operations are counted
# (in, out) of the linear layers of Llama-2-7B, without the output layer: the layers of all-linear.
LLAMA_2_7B = [*[(4096, 4096)] * 4, *[(4096, 11008)] * 2, (11008, 4096)] * 32

# What the cost tables show: label -> options. A method that is not listed shows its defaults.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "dual_lora": {
        "r1 = r2 = 4": {},
        "r = 32": {"r": 32, "lora_alpha": 64},
    },
    "dual_module": {
        "r_s = 2, r_e = 6": {},
        "r = 128, r_s = 32": {"r": 128, "shared_r": 32, "target_r": 80},
    },
    "shared_b": {
        "token, n = 3": {},
        "task, n = 3": {"routing": "task", "tasks": ["a", "b", "c"]},
    },
    "cola": {
        "full, 2 A, 3 B": {},
        "random, 2 A, 3 B": {"strategy": "random"},
        "heuristic, 2 A, 3 B": {"strategy": "heuristic"},
        "heuristic, pissa_split": {"strategy": "heuristic", "init": "pissa_split"},
        "full, kaiming": {"init": "kaiming"},
    },
    "nola": {
        "128 bases": {"num_basis_A": 128, "num_basis_B": 128},
        "256 bases": {},
        "r = 16, 512 bases": {"r": 16, "num_basis_A": 512, "num_basis_B": 512},
    },
    "tied": {
        "A, B, u, v": {},
        "u, v": {"train": ["u", "v"]},
        "r = 256, u, v": {"train": ["u", "v"], "r": 256, "lora_alpha": 256},
    },
    "hydra": {"r = 4, 4 B": {}, "r = 4, 8 B": {"num_B": 8}},
    "molora": {
        "r = 4, 8 experts": {},
        "r = 4, 8 experts, top 2": {"top_k": 2},
    },
    "fedalora_het": {"r = 8, q = 16": {}, "r = 64, q = 16": {"r": 64}},
    "droplora": {"r = 8": {}},
    "sora": {
        "all 8 ranks live": {},
        "all live, pissa": {"init": "pissa"},
    },
    "alloc": {
        "8 of 16 slots live": {},
        "8 of 16 live, pissa": {"init": "pissa"},
    },
}


class OneLayer(nn.Module):
    """The layer of the cost tables."""

    def __init__(self, side: int, device: str = "cpu") -> None:
        super().__init__()
        self.linear = nn.Linear(side, side, bias=False, device=device).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        return self.linear(x)


class Counts(NamedTuple):
    """One row of a cost table, as text."""

    trained: str
    stored: str
    rank: str
    export: str
    arithmetic: str
    llama: str


def adapted(config: Any, side: int, device: str = "cpu") -> Any:
    """The layer of the cost tables with an adapter, or without one if the config is None."""
    layer = OneLayer(side, device)
    if config is None:
        return layer
    config = dataclasses.replace(config, target_modules=["linear"])
    return get_peft_model(layer, config).to(device)


class Arithmetic(TorchDispatchMode):
    """Counts the operations of matrix products, those in place and with `out=` among them.

    Torch's FlopCounterMode misses these two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[1:3] if "add" in name else args[:2]
            self.total += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def arithmetic(config: Any) -> Fraction:
    """Count the floating-point operations of the matrix products in a forward and a backward.

    A count is a polynomial of degree at most 1 in the tokens and at most 2 in the side, so the
    counts of a few small layers give that of SIDE x SIDE and TOKENS tokens exactly.
    """

    def counted(side: int, tokens: int) -> int:
        model = adapted(config, side)  # a new one keeps nothing of an earlier count
        x = torch.zeros(tokens, side, requires_grad=True)
        with Arithmetic() as counter:
            model.train()(x).sum().backward()
        return counter.total

    by_side = {}
    for side in SMALL_SIDES:
        by_side[side] = at(TOKENS, {n: counted(side, n) for n in FEW_TOKENS})
    return at(SIDE, by_side)


def at(place: int, values: Mapping[int, Fraction | int]) -> Fraction:
    """Value at `place` of the polynomial through the points `values` (Lagrange)."""
    total = Fraction(0)
    for x, y in values.items():
        others = [Fraction(place - other, x - other) for other in values if other != x]
        total += y * math.prod(others)
    return total


def counts(
    config: Any, rank: int | None, export: str, count: Callable[[Sequence[tuple[int, int]]], int]
) -> Counts:
    """Count parameters and operations of one config.

    Args:
        config: of the adapter.
        rank: the attainable rank; None asks plait's Delta.
        export: the rank of the exact LoRA export, as text.
        count: gives the trainable parameters of layers with these (in, out); tensors that layers
            share count once.

    Raises:
        ValueError: the formula `count` disagrees with the parameters of the model.
    """
    model = adapted(config, SIDE, "meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(t.numel() for t in get_peft_model_state_dict(model).values())
    if rank is None:
        rank = model.base_model.model.linear.plait_delta["default"].rank()
    by_task = vars(config).get("tasks")  # needs task ids, which OneLayer does not take
    cost = "-" if by_task else f"{float(arithmetic(config) / arithmetic(None)):.3f}"
    formula = count([(SIDE, SIDE)])
    if trained != formula:
        raise ValueError(f"{config}: {trained} parameters, the formula says {formula}.")
    whole = count(LLAMA_2_7B)
    return Counts(f"{trained:,}", f"{stored:,}", f"{rank:,}", export, cost, f"{whole:,}")


def settings(key: str) -> dict[str, dict[str, Any]]:
    """Label -> options of each setting in the cost table of a method."""
    return SETTINGS.get(key, {"defaults": {}})


@functools.cache
def method_counts(key: str, label: str) -> Counts:
    """Counts of one setting of a method."""
    method = plait.find(key)
    config = method.config(**settings(key)[label])

    def count(layers: Sequence[tuple[int, int]]) -> int:
        return planned((method.delta, config, n_in, n_out) for n_in, n_out in layers)

    return counts(config, None, export_rank(method, config), count)


@functools.cache
def lora_counts() -> Counts:
    """Counts of upstream's LoRA of rank 8."""
    config = LoraConfig(r=8, lora_alpha=16)
    return counts(config, 8, "8", lambda layers: sum(8 * (n_in + n_out) for n_in, n_out in layers))


def export_rank(method: plait.Method, config: DeltaConfig) -> str:
    """Rank of the plain LoRA that equals a trained adapter; "none" if there is none."""
    tasks = vars(config).get("tasks")
    if not method.exact_export and not tasks:
        return "none"
    model = adapted(config, 16 * config.r)
    delta: Any = model.base_model.model.linear.plait_delta["default"]
    delta.randomize(torch.Generator().manual_seed(0))  # as if it had been trained
    export = plait.to_lora(model, task=tasks[0] if tasks else None)
    return f"{export.layers[0].rank}" + (" a task" if tasks else "")


def cost(*keys: str) -> str:
    """Cost table of the given methods, or of all methods, with LoRA in the first row."""
    names = keys or tuple(m.key for m in list_methods())
    rows: list[tuple[str, ...]] = [("`lora`, r = 8", *lora_counts())]
    for key in names:
        for label in settings(key):
            rows.append((f"{code(key)}, {label}", *method_counts(key, label)))
    head = ("setting", "trained", "stored", "attainable rank", "LoRA export rank", "arithmetic")
    return table((*head, "trained, Llama-2-7B"), rows, right=6)
