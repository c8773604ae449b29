"""Reading a config file: YAML and command-line overrides in, checked dataclasses out.

PyYAML reads `1e-4` as a string; checking against the declared type makes it a number. Every error
names the file or the command line, the dotted key, the value and the remedy.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from plait.options import did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class Source:
    """Where a config came from, so that an error names the file or the command line."""

    def __init__(self, file: str, overridden: Iterable[str] = ()):
        self.file = file
        self.overridden = set(overridden)

    def at(self, key: str) -> str:
        """Return a dotted key with its place in front."""
        on_line = any(key == o or key.startswith(f"{o}.") for o in self.overridden)
        return f"{'command line' if on_line else self.file}: {key}"

    def unknown(self, key: str, known: Iterable[str], where: str = "") -> str:
        """Return the error text for an unknown key. where: see `did_you_mean`."""
        return f"{self.at(key)} is not known. {did_you_mean(key.rpartition('.')[2], known, where)}"


# Files ------------------------------------------------------------------------------------------


def read(path: Path, remedy: str) -> Any:
    """Parse a config file; {} for an empty one.

    Raises:
        FileNotFoundError: no such file; `remedy` ends the message.
        ValueError: broken YAML, with line and column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such config file. {remedy}".rstrip())
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_yaml_problem(error)}. Correct the YAML there.") from None
    return {} if raw is None else raw


def dump(plain: dict[str, Any]) -> str:
    """Return a nested dictionary as YAML, in its own order."""
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def override(raw: dict[str, Any], text: str) -> str:
    """Set `a.b=c` in a nested dict in place; return the dotted key.

    Raises:
        ValueError: no override, or one below a key that has no keys.
    """
    key, sign, value = text.partition("=")
    parts = key.split(".")
    if not sign or len(parts) < 2 or not all(parts):
        raise ValueError(f"command line: {text!r} is not an override. Write section.key=value.")
    here = raw
    for depth, part in enumerate(parts[:-1], 1):
        below = here.get(part)
        here[part] = {} if below is None else below
        here = here[part]
        if not isinstance(here, dict):
            raise ValueError(
                f"command line: {key} is below {'.'.join(parts[:depth])}, which is {here!r} and "
                "has no keys. Set that key itself."
            )
    try:
        here[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"command line: {text!r}: {_yaml_problem(error)}. Quote it.") from None
    return key


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice; PyYAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Say on one line where YAML is broken."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


# Checks -----------------------------------------------------------------------------------------


def check_sections(raw: Any, known: Iterable[str], source: Source) -> dict[str, dict[str, Any]]:
    """Return every known section as keys and values, {} where the file leaves it out.

    Raises:
        ValueError: no mapping, an unknown section, or one that is no mapping.
    """
    known = list(known)
    if not isinstance(raw, dict):
        kind = type(raw).__name__
        raise ValueError(f"{source.file}: is a {kind}. Give sections: {', '.join(known)}.")
    for name, value in raw.items():
        if name not in known:
            raise ValueError(source.unknown(str(name), known, f"Sections: {', '.join(known)}."))
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{source.at(name)} is {value!r}. It should be keys and values.")
    return {name: raw.get(name) or {} for name in known}


def check_section(section: Any, raw: dict[str, Any], prefix: str, source: Source) -> Any:
    """Make a section's dataclass from keys and values.

    Raises:
        ValueError: a line for every unknown key and for every value of a wrong type or range; or
            what the dataclass itself refuses.
    """
    hints = typing.get_type_hints(section, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(section)}
    problems = [
        source.unknown(
            f"{prefix}.{key}", fields, f"Keys of {prefix}: `plait init FILE` lists them."
        )
        for key in raw
        if key not in fields
    ]
    values = {}
    for name, f in fields.items():
        if name not in raw:
            continue
        key, hint = f"{prefix}.{name}", hints[name]
        try:
            if dataclasses.is_dataclass(hint) and isinstance(raw[name], dict):
                values[name] = check_section(hint, raw[name], key, source)
            else:
                values[name] = check_value(bounded(hint, f.metadata), raw[name], key, source)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return section(**values)
    except ValueError as error:  # between fields
        raise ValueError(f"{source.file}: {error}") from error


def check_value(hint: Any, value: Any, key: str, source: Source) -> Any:
    """Return a value as its type; a ValueError names every wrong key at or below `key`."""
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        problems: dict[str, tuple[Any, list[str]]] = {}
        for detail in error.errors(include_url=False):
            steps, inner = _real_path(value, detail["loc"])
            dotted = ".".join([key, *steps])
            message = detail["msg"].removeprefix("Input should be ")
            problems.setdefault(dotted, (inner, []))[1].append(message)
        lines = [
            f"{source.at(dotted)} is {inner!r}. It should be {' or '.join(messages)}."
            for dotted, (inner, messages) in problems.items()
        ]
        raise ValueError("\n".join(lines)) from None


def bounded(hint: Any, facts: typing.Mapping[str, Any]) -> Any:
    """Return a type with a field's bounds on each number in it, on the length of each text.

    A text that reads as a number is one where a bounded number comes first: 1e-4 is text to PyYAML.
    """
    names = {"ge": "least", "gt": "above", "le": "most", "lt": "below"}
    limits = {name: facts[ours] for name, ours in names.items() if facts.get(ours) is not None}
    return _limited(hint, limits) if limits else hint


def _limited(hint: Any, limits: dict[str, Any]) -> Any:
    from pydantic import Field

    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        return Annotated[hint, Field(**limits)]
    if hint is str and "ge" in limits:
        return Annotated[str, Field(min_length=int(limits["ge"]))]
    if origin in (typing.Union, types.UnionType):
        union = typing.Union[tuple(_limited(part, limits) for part in inner)]  # noqa: UP007
        mixed = str in inner and not {int, float}.isdisjoint(inner)
        return Annotated[union, Field(union_mode="left_to_right")] if mixed else union
    if origin in (list, dict):
        return types.GenericAlias(origin, tuple(_limited(part, limits) for part in inner))
    return hint


@functools.cache
def _adapter(hint: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _real_path(value: Any, loc: Sequence[str | int]) -> tuple[list[str], Any]:
    """Follow pydantic's location while it names keys of the value (not branches of a union)."""
    steps = []
    for part in loc:
        if not (isinstance(value, dict) and part in value):
            break
        value = value[part]
        steps.append(str(part))
    return steps, value
