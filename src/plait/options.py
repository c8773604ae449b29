"""Options of every config: a default, a help text and bounds on the field, and remedies for typos.

It imports neither torch nor peft, so that a mistake in a config file is answered at once.
"""

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

# Bound of a field -> its comparison and its words, in the order in which errors name them.
BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "least": (operator.ge, "{} or more"),
    "above": (operator.gt, "more than {}"),
    "most": (operator.le, "{} or less"),
    "below": (operator.lt, "less than {}"),
}

_MOST = 5  # names that a remedy shows

# What users of other tools write -> the names here, the likeliest first.
_SYNONYMS = {
    "accumulation": ("gradient_accumulation_steps",),
    "algorithm": ("method",),
    "alpha": ("lora_alpha",),
    "base_model": ("name",),
    "batch": ("per_device_train_batch_size", "batch_size"),
    "batch_size": ("per_device_train_batch_size",),
    "cutoff_len": ("max_length",),
    "dropout": ("lora_dropout",),
    "epochs": ("num_train_epochs",),
    "eval": ("validation",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "lr": ("learning_rate",),
    "max_seq_length": ("max_length",),
    "modules": ("target_modules",),
    "num_epochs": ("num_train_epochs",),
    "optimizer": ("optim",),
    "rank": ("r",),
    "ranks": ("r",),
    "scheduler": ("lr_scheduler_type",),
    "seq_length": ("max_length",),
    "steps": ("max_steps",),
    "targets": ("target_modules",),
    "warmup": ("warmup_steps",),
    "wd": ("weight_decay",),
}


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> Any:
    """A dataclass field with its help text and, for numbers, its bounds.

    Args:
        default: the default value, or a function that makes one, such as `list`;
            dataclasses.MISSING for a field that has none.
        help: shown by `plait init`, on the pages and by `plait methods`.
        least, most: smallest and largest value; of a text, its length. above, below: exclusive
            bounds. All hold for each item of a list. infinite: whether infinity is within them.

    They are checked when a config file is read, and by `check_options`, which the config classes
    call, with the values of a Literal type.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    facts = {"help": help, **bounds, "infinite": infinite}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


def did_you_mean(name: str, known: Iterable[str], where: str = "") -> str:
    """Return the remedy for an unknown name: at most five known ones, the nearest first.

    where: a sentence that says where all are listed, for a name that is near to none.
    """
    names = [str(n) for n in known]
    word = str(name).lower().replace("-", "_")
    near = [n for n in _SYNONYMS.get(word, ()) if n in names]
    if not near:
        scores = {n: difflib.SequenceMatcher(None, word, n.lower()).ratio() for n in names}
        best = max(scores.values(), default=0.0)
        near = [n for n in names if scores[n] >= max(0.6, best - 0.1)]
        near = sorted(near, key=lambda n: -scores[n])[:_MOST]
    if near:
        *others, last = near
        return f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    if len(names) <= _MOST:
        return f"Known: {', '.join(sorted(names))}."
    return where or f"Known: {', '.join(sorted(names)[:_MOST])} and {len(names) - _MOST} more."


def check_option(name: str, kind: Any, facts: Mapping[str, Any], value: Any) -> None:
    """Refuse a value outside a field's bounds or its Literal.

    Raises:
        ValueError: with the option's name, the value and the range.
    """
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        known = ", ".join(map(repr, typing.get_args(kind)))
        raise ValueError(f"{name} = {value!r} is not known. Use one of {known}.")
    limits = {name: facts[name] for name in BOUNDS if facts.get(name) is not None}
    if value is None or not limits:
        return
    if isinstance(value, str) and kind in (str, str | None):
        check_option(f"the length of {name}", int, facts, len(value))
        return
    whole = kind is int or kind == int | None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        noun = "whole number" if whole else "number"
        raise ValueError(f"{name} = {value!r} is not a {noun}. Give one.")
    finite = math.isfinite(value) or (facts.get("infinite") and not math.isnan(value))
    if not finite or not all(BOUNDS[bound][0](value, limit) for bound, limit in limits.items()):
        bounds = " and ".join(BOUNDS[bound][1].format(limit) for bound, limit in limits.items())
        raise ValueError(f"{name} = {value!r} is out of range. Give {bounds}.")


def check_options(config: Any, section: str = "") -> None:
    """Check each field of a dataclass that has bounds or a Literal type.

    Raises:
        ValueError: as `check_option`, the option named `section.name`.
    """
    hints, prefix = typing.get_type_hints(type(config)), f"{section}." if section else ""
    for f in dataclasses.fields(config):
        check_option(f"{prefix}{f.name}", hints[f.name], f.metadata, getattr(config, f.name))
