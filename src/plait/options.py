"""Options of every config: a default, a help text and bounds on the field, and remedies for typos.

It imports neither torch nor peft, so that a mistake in a config file is answered at once.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

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
    below: float | None = None,
) -> Any:
    """A dataclass field with its help text and, for numbers, its bounds.

    Args:
        default: the default value, or a function that makes one, such as `list`.
        help: shown by `plait init`, on the pages and by `plait methods`.
        least: smallest value; of a text, its length. above, below: exclusive bounds. All hold for
            each item of a list.

    They are checked when a config file is read, and by `check_options`, which the config classes
    call, with the values of a Literal type.
    """
    facts = {"help": help, "least": least, "above": above, "below": below}
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
    least, above, below = (facts.get(bound) for bound in ("least", "above", "below"))
    if value is None or (least is None and above is None and below is None):
        return
    whole = kind is int or kind == int | None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        noun = "whole number" if whole else "number"
        raise ValueError(f"{name} = {value!r} is not a {noun}. Give one.")
    if (
        not math.isfinite(value)
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise ValueError(f"{name} = {value!r} is out of range. Give {_range(least, above, below)}.")


def check_options(config: Any, section: str) -> None:
    """Check each field of a dataclass that has bounds or a Literal type.

    Raises:
        ValueError: as `check_option`, the option named `section.name`.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        check_option(f"{section}.{f.name}", hints[f.name], f.metadata, getattr(config, f.name))


def _range(least: float | None, above: float | None, below: float | None) -> str:
    lower = "" if least is None else f"{least} or more"
    lower = lower if above is None else f"more than {above}"
    upper = "" if below is None else f"less than {below}"
    return " and ".join(filter(None, (lower, upper)))
