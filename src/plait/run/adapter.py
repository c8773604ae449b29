"""Save adapters and read them back: every file checked, every weight accounted for, no pickles."""

import json
import math
import pickle
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plait.chain import chain_of
from plait.core.bridge import keep_masters
from plait.options import shown
from plait.run.config import PEFT_INTERNAL, ModelConfig
from plait.run.config.yaml import Source, bounded, check_value
from plait.run.folder import replace_dir, write_atomic
from plait.run.model import base_name
from plait.upstream.adalora import upstream_noise
from plait.upstream.table import saved_options, start_kind

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_REMEDY = "Copy it again, or train again."
# Options that training, the data or the base model decide: an adapter may have others than the run.
_DECIDED = PEFT_INTERNAL | {
    *("modules_to_save", "fan_in_fan_out", "rank_pattern"),  # and names that end in _modules
    *("total_steps", "total_step", "tinit", "tfinal", "tasks"),
}
_PICKLES = ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt", "adapter_model.pth")


def keep_start(model: nn.Module, to: Path) -> None:
    """Save the start of a method that moves a part of the base weight into the adapter.

    `save_trained` needs it for PiSSA and its like. What is there already stays: a resumed run
    began from it.
    """
    if splits_base(model) and not to.is_dir():
        adapter: Any = model
        replace_dir(to, lambda folder: adapter.save_pretrained(str(folder)))


def save_trained(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
    start: Path,
    base: ModelConfig,
    state: dict[str, Any] | None = None,
) -> int:
    """Save the trained adapter, or the whole model; return how many numbers it holds.

    base: how the run names the base model. start: what `keep_start` saved; PiSSA and its like
    become a plain LoRA of twice the rank, which is loaded on the whole base weight. state: the
    whole weights, where each process holds a part of them.
    """
    options: dict[str, Any] = {} if state is None else {"state_dict": state}
    if splits_base(model):
        options["path_initial_model_for_weight_conversion"] = str(start)

    def write(folder: Path) -> int:
        model.save_pretrained(str(folder), **options)
        if isinstance(model, PeftModel):
            name_base(folder, base)
        tokenizer.save_pretrained(str(folder))
        chain = chain_of(model)
        if chain is not None:
            chain.save(folder)
        if isinstance(model, PeftModel):
            return stored_numbers(folder)
        return sum(p.numel() for p in model.parameters())

    with upstream_noise():
        return replace_dir(to, write)


def name_base(folder: Path, base: ModelConfig) -> None:
    """Write name and revision of the base into a saved adapter_config.json.

    peft writes where the base was loaded from, for a built-in the place where plait is installed,
    and no revision.
    """
    file = folder / CONFIG
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved |= {"base_model_name_or_path": base_name(base), "revision": base.revision}
    write_atomic(file, json.dumps(saved, indent=2, sort_keys=True))


def splits_base(model: nn.Module) -> bool:
    """Whether upstream put a part of the base weight into the adapter at its start."""
    return isinstance(model, PeftModel) and start_kind(model.active_peft_config) == "residual"


# What peft raises for options of another kind than it expects.
_MISFITS = (TypeError, AttributeError, KeyError, IndexError, re.error)


def load_adapter(base: PreTrainedModel, path: Path, expected: PeftConfig) -> PeftModel:
    """Put a saved adapter on its base model.

    expected: what the run's config makes of its method; an adapter of another method is refused.
    Raises FileNotFoundError for missing files, and ValueError for a pickle, a damaged file, an
    adapter of another method, of another model's shapes, of a newer plait, or an incomplete one;
    for options other than the run's, and numbers that are NaN or infinite.
    """
    stored_numbers(path)
    config = read_config(path, expected)
    with readable(path / WEIGHTS, _REMEDY), upstream_noise():
        try:
            model = PeftModel.from_pretrained(base, str(path), config=config)
        except (ValueError, *_MISFITS) as error:
            named = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = f"{named}{first_line(error)}"
            raise ValueError(
                f"{path / CONFIG}: makes no adapter of this base model ({reason}). {_REMEDY}"
            ) from error
        _refill(model, path, keep_masters(model))
        _check_complete(model, path)
    return model


def _refill(model: PeftModel, path: Path, names: list[str]) -> None:
    """Copy saved weights once more into parameters that were rounded when they were loaded."""
    parameters = dict(model.named_parameters())
    with torch.no_grad(), safe_open(path / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
        for name in names:
            key = name.replace(f".modules_to_save.{model.active_adapters[0]}.", ".")
            if key in saved:
                parameters[name].copy_(file.get_tensor(key))


def load_weights(model: PeftModel, path: Path, remedy: str = _REMEDY) -> None:
    """Load saved weights into the adapter that a model already has, to train on.

    remedy: what the error about a damaged file says to do.
    Raises what load_adapter raises about the weights.
    """
    stored_numbers(path, remedy)
    with readable(path / WEIGHTS, remedy):
        model.load_adapter(str(path), model.active_adapters[0], is_trainable=True)
    _check_complete(model, path)


def stored_numbers(path: Path, remedy: str = _REMEDY) -> int:
    """Return how many numbers the adapter's file holds.

    Raises FileNotFoundError if there is none and ValueError if it is a pickle or damaged.
    """
    file = path / WEIGHTS
    if not file.is_file():
        pickled = [name for name in _PICKLES if (path / name).exists()]
        if pickled:
            raise ValueError(
                f"{path / pickled[0]}: is a pickle, which can run any code when it is read. "
                "Save the adapter as safetensors."
            )
        raise FileNotFoundError(f"{path}: {WEIGHTS} is missing. Give a folder with an adapter.")
    with readable(file, remedy), safe_open(file, framework="pt") as opened:
        shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
    return sum(map(math.prod, shapes))


def read_config(path: Path, expected: PeftConfig) -> PeftConfig:
    """Return the config of a saved adapter.

    expected: what the run's config makes of its method.
    Raises FileNotFoundError without one, and ValueError for that of another method or options.
    """
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path}: {CONFIG} is missing. Give a folder with an adapter.")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({error}). Save the adapter again.") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: is {shown(saved)}, no object. Save the adapter again.")
    kind, asked = saved.get("peft_type"), str(expected.peft_type).removeprefix("PeftType.")
    if kind != asked:
        named = kind if isinstance(kind, str) else shown(kind)
        raise ValueError(
            f"{file}: the adapter is of type {named}, the run's config.yaml asks for {asked}. "
            + (
                "Put the adapter of this run back, or correct method.name."
                if named in PEFT_TYPE_TO_CONFIG_MAPPING
                else "That type is not known here; install what made it."
            )
        )
    _check_options(saved, expected, file)
    try:
        return type(expected).from_pretrained(str(path))
    except (ValueError, *_MISFITS) as error:
        raise ValueError(f"{file}: {error}") from error


def _check_options(saved: Mapping[str, Any], expected: PeftConfig, file: Path) -> None:
    """Raise if an adapter_config.json has other options than the run, or values of another type.

    Options that upstream knows and plait does not are no exception: one of them alone makes another
    adapter of the same weights.
    """
    options = json.loads(json.dumps(saved_options(expected), default=list))
    hints = typing.get_type_hints(type(expected))
    for name, value in saved.items():
        if name not in options:
            continue  # of another version of peft, which says so when it reads the file
        if name in _DECIDED or name.endswith("_modules"):
            check_value(bounded(hints[name], {}), value, name, Source(str(file)))
        elif not _equal(value, options[name]):
            raise ValueError(
                f"{file}: {name} is {shown(value)}, the run's config.yaml has "
                f"{shown(options[name])}. Put the adapter of this run back, or correct "
                f"method.{name}."
            )


def _equal(saved: Any, wanted: Any) -> bool:
    """Whether two values of JSON are equal; numbers up to rounding."""
    if isinstance(wanted, bool) or isinstance(saved, bool):
        return saved is wanted
    if isinstance(saved, int | float) and isinstance(wanted, int | float):
        return math.isclose(saved, wanted, rel_tol=1e-6)
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return saved.keys() == wanted.keys() and all(_equal(saved[n], wanted[n]) for n in saved)
    return saved == wanted


def check_finite(folder: Path) -> None:
    """Raise if a safetensors file in a folder holds NaN or an infinite value.

    What cannot be read is left to whoever loads it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    _check_numbers(file, name, opened.get_tensor(name))
        except (SafetensorError, OSError):
            continue


def _check_numbers(file: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{file}: {name} has NaN or infinite values. {_REMEDY}")


def _check_complete(model: PeftModel, path: Path) -> None:
    """Raise unless the file's tensors are finite and exactly those of the model's adapter."""
    needed = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for names, what in (
        (needed.keys() - saved.keys(), "lacks"),
        (saved.keys() - needed.keys(), "has, but the model not,"),
    ):
        if names:
            raise ValueError(
                f"{path / WEIGHTS}: {what} {sorted(names)[0]} and {len(names) - 1} more. The "
                "adapter is of another model or another method's options; use the run's own."
            )
    for name, tensor in saved.items():
        _check_numbers(path / WEIGHTS, name, tensor)
        if tensor.is_floating_point() != needed[name].is_floating_point():
            kinds = (str(x.dtype).removeprefix("torch.") for x in (tensor, needed[name]))
            raise ValueError(
                f"{path / WEIGHTS}: {name} is {next(kinds)}, the method has {next(kinds)}. "
                f"{_REMEDY}"
            )


@contextmanager
def readable(where: Path, remedy: str) -> Iterator[None]:
    """Turn errors from reading a truncated file, or weights of another shape, into ValueErrors."""
    try:
        yield
    except RuntimeError as error:
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if sizes:
            raise ValueError(
                f"{where}: does not fit the base model ({len(sizes)} tensors of another shape): "
                f"{sizes[0].rstrip('.')}. Use the base model and options that it was trained with."
            ) from error
        if "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(f"{where}: damaged or cut off ({first_line(error)}). {remedy}") from error
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{where}: damaged or cut off ({first_line(error)}). {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, to stand in brackets."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
