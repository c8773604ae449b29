"""The optimizers that a run file can name: the options of each, and the methods it trains.

`default` is what transformers makes from `training.optim`. lora_rite and lorsum are plait's own;
loraplus, lorafa and riemannian are upstream peft's. Learning rate and weight decay come from
`training`; options are the keywords of the function that makes the optimizer.
"""

import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from plait.core import FrozenLinear, LowRankDelta, Pair, find, seeded
from plait.core.delta import vars_of
from plait.optim import create_lora_rite_optimizer, create_lorsum_optimizer
from plait.upstream.table import BASELINES

DEFAULT = "default"
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


@dataclass(frozen=True)
class NamedOptimizer:
    """One row of the table.

    make: (model, the keys of `training` that it reads, options by keyword) -> the optimizer.
    options_of: the function whose keywords and docstring are the options. supports: method -> why
    the optimizer cannot train it, or None. unread: keys of `training` that it ignores. scales:
    whether method.lr_scale works. clips: whether Trainer may clip the gradients.
    """

    key: str
    make: Callable[..., Optimizer]
    options_of: Callable[..., Any]
    supports: Callable[[str], str | None]
    unread: tuple[str, ...] = ()
    scales: bool = True
    clips: bool = True


# Which methods ----------------------------------------------------------------------------------


def _free_pairs(method: str) -> str | None:
    """Why a method has no free pairs (A, B)."""
    pairs = _pairs_of(method)
    return pairs if isinstance(pairs, str) else None


def _one_pair(method: str) -> str | None:
    """Why a layer of a method is not one plain pair of matrices."""
    pairs = _pairs_of(method)
    if isinstance(pairs, str):
        return pairs
    if len(pairs) == 1 and pairs[0].A.ndim == pairs[0].B.ndim == 2:
        return None
    return "its factors are several to a layer"


def _pairs_of(method: str) -> Any:
    """The pairs of a small layer of a method, or the reason why there are none."""
    if method in BASELINES:
        factor = nn.Parameter(torch.zeros(1, 1))
        return BASELINES[method].no_pairs or [Pair("layer", factor, factor, 1.0)]
    registered = find(method)
    delta: Any = registered.delta
    if not issubclass(delta, LowRankDelta):
        return delta.no_pairs
    if delta.own_gates:
        return "its gate belongs to single ranks"
    if vars_of(delta, "free_pairs") is vars_of(LowRankDelta, "free_pairs"):
        return delta.no_pairs
    config = registered.config()
    side = 2 * config.r
    base = FrozenLinear(
        "layer", side, side, torch.float32, lambda: torch.zeros(side, side), blank=True
    )
    return delta(base, config, seeded(0)).pairs()


def _named_lora(method: str) -> str | None:
    """Why upstream, which looks for names of parameters, does not find the factors of a method."""
    if method in BASELINES and BASELINES[method].lora_names:
        return None
    return "it looks for parameters that upstream's LoRA names lora_A and lora_B"


def _plain_lora(method: str) -> str | None:
    """Why a method is not a plain pair (A, B) under upstream's names."""
    return BASELINES[method].no_pairs if method in BASELINES else _named_lora(method)


# How they are made ------------------------------------------------------------------------------


def _lora_rite(model: nn.Module, args: Any, **options: Any) -> Optimizer:
    return create_lora_rite_optimizer(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, **options
    )


def _lorsum(model: nn.Module, args: Any, **options: Any) -> Optimizer:
    return create_lorsum_optimizer(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, **options
    )


def _adamw(args: Any) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _loraplus(
    model: Any,
    args: Any,
    *,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
) -> Optimizer:
    """AdamW with a larger learning rate for B.

    Args:
        model: with upstream LoRA.
        args: of training.
        loraplus_lr_ratio: learning rate of B and of vectors divided by that of A; 1 or more.
        loraplus_lr_embedding: learning rate of factors of embeddings.
    """
    if loraplus_lr_ratio < 1:
        raise ValueError(
            f"optimizer.loraplus_lr_ratio is {loraplus_lr_ratio}. Give 1 or more, such as 16."
        )
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=loraplus_lr_ratio,
        loraplus_lr_embedding=loraplus_lr_embedding,
        loraplus_weight_decay=args.weight_decay,
        **_adamw(args),
    )


def _lorafa(model: Any, args: Any) -> Optimizer:
    """AdamW on B alone, its gradient projected; A is frozen."""
    config = model.active_peft_config
    return create_lorafa_optimizer(
        model, config.r, config.lora_alpha, args.learning_rate, args.weight_decay
    )


def _riemannian(
    model: Any,
    args: Any,
    *,
    reg: float = 1e-2,
    base: Literal["adamw", "sgd"] = "adamw",
) -> Optimizer:
    """AdamW or SGD on gradients that are preconditioned by the other factor.

    Args:
        model: with upstream LoRA.
        args: of training.
        reg: added to the diagonal of the r x r matrices.
        base: the optimizer that takes the preconditioned gradients.
    """
    cls: Any = torch.optim.AdamW if base == "adamw" else torch.optim.SGD
    kwargs = _adamw(args) if base == "adamw" else {}
    return create_riemannian_optimizer(
        model, cls, lr=args.learning_rate, reg=reg, weight_decay=args.weight_decay, **kwargs
    )


_ROWS = (
    NamedOptimizer(
        "lora_rite", _lora_rite, create_lora_rite_optimizer, _free_pairs, _ADAM, clips=False
    ),
    NamedOptimizer(
        "lorsum", _lorsum, create_lorsum_optimizer, _one_pair, _ADAM, scales=False, clips=False
    ),
    NamedOptimizer("loraplus", _loraplus, _loraplus, _named_lora),
    NamedOptimizer("lorafa", _lorafa, _lorafa, _plain_lora, _ADAM, scales=False),
    NamedOptimizer("riemannian", _riemannian, _riemannian, _plain_lora),
)
OPTIMIZERS: dict[str, NamedOptimizer] = {row.key: row for row in _ROWS}


def optimizer_support(optimizer: str, method_key: str) -> str | None:
    """Why an optimizer cannot train a method; None if it can.

    Args:
        optimizer: a name that a run file can give.
        method_key: of a plait method or a baseline.

    Raises:
        KeyError: no such optimizer.
    """
    if optimizer == DEFAULT:
        return None
    return OPTIMIZERS[optimizer].supports(method_key)


def check_optimizer(optimizer: str, method: str, lr_scale: Any, training: Collection[str]) -> None:
    """Check that an optimizer can train a method and reads every key that a run file sets.

    Args:
        optimizer, method: names. lr_scale: of the method. training: keys of that section that the
            file sets.

    Raises:
        ValueError: with the reason and the remedy; the caller adds file and key.
    """
    if optimizer == DEFAULT:
        return
    named = OPTIMIZERS[optimizer]
    reason = named.supports(method)
    if reason is not None:
        able = [name for name in OPTIMIZERS if optimizer_support(name, method) is None]
        others = f"one of {', '.join(able)}, or " if able else ""
        raise ValueError(f"{optimizer} cannot train {method}: {reason}. Use {others}the default.")
    if lr_scale and not named.scales:
        raise ValueError(
            f"{optimizer} has one learning rate for A and B, and method.lr_scale is given. Remove "
            "one of the two."
        )
    unread = [key for key in ("optim", "optim_args", *named.unread) if key in training]
    if unread:
        raise ValueError(
            f"{optimizer} does not read training.{unread[0]}. Remove it; the options of "
            f"{optimizer} stand in the section optimizer."
        )


def option_facts(optimizer: str) -> dict[str, tuple[Any, Any, str]]:
    """Option -> its type, its default (inspect.Parameter.empty if required) and its help."""
    if optimizer == DEFAULT:
        return {}
    function = OPTIMIZERS[optimizer].options_of
    hints = typing.get_type_hints(function)
    helps = _argument_help(inspect.getdoc(function) or "")
    elsewhere = {"lr", "weight_decay", "adapter"}  # other sections of the run file set them
    return {
        p.name: (hints[p.name], p.default, helps.get(p.name, ""))
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in elsewhere
    }


def _argument_help(doc: str) -> dict[str, str]:
    """The lines `name: text` of a docstring's Args."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)+)", doc, re.MULTILINE)
    entries = re.findall(
        r"^    (\w+): ((?:.+\n?)(?:     +.*\n?)*)", section[1] if section else "", re.M
    )
    return {name: " ".join(text.split()) for name, text in entries}


def make_optimizer(
    name: str, options: Mapping[str, Any], model: nn.Module, training: Mapping[str, Any]
) -> Optimizer:
    """The optimizer of a run.

    Args:
        name, options: of the section optimizer. model: with its adapter.
        training: of the config; learning rate, weight decay and the adam_* keys are read.

    Raises:
        ValueError: the model has parameters that the optimizer cannot train, or an option is out
            of range.
    """
    read = ("learning_rate", "weight_decay", *_ADAM)
    args = {key: training.get(key, getattr(TrainingArguments, key)) for key in read}
    return OPTIMIZERS[name].make(model, SimpleNamespace(**args), **options)
