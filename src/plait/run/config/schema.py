"""The options of every method, optimizer and TrainingArguments, read without torch or peft.

They stand in `schema.json`, written from the classes by `python -m plait.run.config`. Where
another peft or transformers is installed than the one it was written with, the classes are read.
"""

import ast
import dataclasses
import enum
import functools
import importlib
import inspect
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from plait.options import BOUNDS
from plait.upstream.table import BASELINES

FILE = Path(__file__).with_name("schema.json")
_NAMES = {
    t.__name__: t for t in (int, float, str, bool, list, dict, set, tuple)
} | {"Any": Any}  # fmt: skip

# Fields of a PeftConfig that say where an adapter comes from, not what it is.
PEFT_INTERNAL = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "plait_version",
    "checksums",
}


@dataclass(frozen=True)
class Option:
    """One option of a method or an optimizer.

    hint: its type, or the text of one as the schema has it. default: None for a required one.
    bounds: those of `plait.options.option`, as far as there are any.
    """

    name: str
    hint: Any
    default: Any
    help: str
    required: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def type(self) -> Any:
        """The type; a class of peft's is imported for it."""
        return read_type(self.hint) if isinstance(self.hint, str) else self.hint


def methods() -> list[str]:
    """Return the names of plait's own methods."""
    return list(_schema()["methods"])


def method_class_options(name: str) -> dict[str, Option] | None:
    """Return the options of a plait method's config class; None for a method of a plugin."""
    return _options(_schema()["methods"].get(name))


def peft_class_options(name: str) -> dict[str, Option] | None:
    """Return the options of one of peft's config classes; None if the schema does not have it."""
    return _options(_schema()["peft"].get(name))


def optimizer_class_options(name: str) -> dict[str, Option] | None:
    """Return the options of a named optimizer; None if there is no such optimizer."""
    return _options(_schema()["optimizers"].get(name))


def optimizers() -> list[str]:
    """Return the names of the optimizers that a run file can name."""
    return list(_schema()["optimizers"])


def training_types() -> dict[str, str]:
    """Return the fields of transformers.TrainingArguments and the texts of their types."""
    return _schema()["training"]


def class_options(cls: type) -> dict[str, Option]:
    """Return the options of a config class that is loaded, as the schema would have them."""
    return _options(json.loads(json.dumps(_fields(cls)))) or {}


def read_type(text: str) -> Any:
    """Return the type that a text of the schema means.

    Raises:
        ValueError: the text is no such type.
    """
    return _read_node(ast.parse(text, mode="eval").body)


def type_text(hint: Any) -> str:
    """Return a type as text that `read_type` reads; an Enum becomes a Literal of its values."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, types.NoneType):
        return "None"
    if hint is Any or hint in _NAMES.values():
        return hint.__name__ if isinstance(hint, type) else "Any"
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, inner))}]"
    if origin is types.UnionType:
        return " | ".join(map(type_text, inner))
    if origin is typing.Union:  # typing keeps one of two that differ in order: whichever came first
        return " | ".join(sorted(map(type_text, inner), key=lambda text: (text == "None", text)))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_text, inner))}]"
    if issubclass(hint, enum.Enum):
        return f"Literal[{', '.join(repr(member.value) for member in hint)}]"
    return f"{hint.__module__}.{hint.__qualname__}"


# The file ---------------------------------------------------------------------------------------


@functools.cache
def _schema() -> dict[str, Any]:
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    if stored["written_with"] == _installed():
        return stored
    return json.loads(json.dumps(build()))


def _installed() -> dict[str, str]:
    return {name: version(name) for name in ("peft", "transformers")}


def build() -> dict[str, Any]:
    """Return the schema of what is installed, read from the classes."""
    import peft
    from transformers import TrainingArguments

    from plait.core.registry import list_methods
    from plait.run.optimizers import OPTIMIZERS, option_facts

    importlib.import_module("plait.methods")  # registers them
    upstream = sorted({b.config for b in BASELINES.values() if b.config})
    hints = typing.get_type_hints(TrainingArguments)
    return {
        "written_with": _installed(),
        "methods": {
            m.key: _fields(m.config)
            for m in list_methods()
            if m.config.__module__.startswith("plait.methods.")
        },
        "peft": {name: _fields(vars(peft)[name]) for name in upstream},
        "optimizers": {
            name: {
                key: _facts(kind, default, text)
                for key, (kind, default, text) in option_facts(name).items()
            }
            for name in OPTIMIZERS
        },
        "training": {
            f.name: type_text(_enum_only(hints[f.name]))
            for f in dataclasses.fields(TrainingArguments)
        },
    }


def text() -> str:
    """Return the schema as the file has it: an option a line."""
    schema = json.loads(json.dumps(build()))
    lines = ["{", f'"written_with": {json.dumps(schema.pop("written_with"))},']
    training = schema.pop("training")
    for kind, owners in schema.items():
        lines.append(f'"{kind}": {{')
        for owner, options in owners.items():
            lines.append(f' "{owner}": {{')
            lines += _lines(options, "  ")
            lines.append(" }" + ("" if owner == list(owners)[-1] else ","))
        lines.append("},")
    return "\n".join([*lines, '"training": {', *_lines(training, " "), "}", "}"]) + "\n"


def _lines(entries: Mapping[str, Any], indent: str) -> list[str]:
    made = [f"{indent}{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()]
    return [f"{line}," for line in made[:-1]] + made[-1:]


# Classes to facts, facts to options -------------------------------------------------------------


def _fields(cls: Any) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    facts = {}
    for f in dataclasses.fields(cls):
        if f.name in PEFT_INTERNAL:
            continue
        default = f.default_factory() if callable(f.default_factory) else f.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        facts[f.name] = _facts(hints[f.name], default, f.metadata.get("help", ""), f.metadata)
    return facts


def _facts(hint: Any, default: Any, text: str, bounds: Mapping[str, Any] | None = None) -> Any:
    facts: dict[str, Any] = {"type": type_text(hint)}
    if default is not inspect.Parameter.empty:
        facts["default"] = default
    facts["help"] = " ".join(str(text).split())
    limits = bounds or {}
    return facts | {name: limits[name] for name in BOUNDS if limits.get(name) is not None}


def _options(facts: dict[str, dict[str, Any]] | None) -> dict[str, Option] | None:
    if facts is None:
        return None
    return {
        name: Option(
            name,
            fact["type"],
            fact.get("default"),
            fact["help"],
            "default" not in fact,
            {bound: fact[bound] for bound in BOUNDS if bound in fact},
        )
        for name, fact in facts.items()
    }


def _enum_only(hint: Any) -> Any:
    """Drop `str` from `Enum | str`, which would let every misspelt value pass."""
    members = typing.get_args(hint)
    if any(isinstance(m, type) and issubclass(m, enum.Enum) for m in members):
        return typing.Union[tuple(m for m in members if m is not str)]  # noqa: UP007
    return hint


def _read_node(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.BinOp(op=ast.BitOr()):
            return typing.Union[tuple(map(_read_node, _members(node)))]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = ast.literal_eval(inner)
            return Literal[values]
        case ast.Subscript(value=outer, slice=ast.Tuple(elts=parts)):
            return _read_node(outer)[tuple(map(_read_node, parts))]
        case ast.Subscript(value=outer, slice=part):
            return _read_node(outer)[_read_node(part)]
        case ast.Attribute(value=module, attr=name):
            return getattr(importlib.import_module(ast.unparse(module)), name)
    raise ValueError(f"{ast.unparse(node)} is not a type that the schema can hold.")


def _members(node: ast.expr) -> list[ast.expr]:
    """Return the members of `a | b | c`."""
    if isinstance(node, ast.BinOp):
        return [*_members(node.left), node.right]
    return [node]
