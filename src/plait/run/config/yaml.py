"""Reading a config file: YAML and command-line overrides in, checked dataclasses out.

PyYAML reads `1e-4` as a string; checking against the declared type makes it a number. It reads
`no` as False; here it is a `Boolean`, which becomes the word `no` where the type means a word.
Every error names the file or the command line, the dotted key, the value and the remedy.

A file is read within bounds: its size, its depth, and its number of values with all aliases
followed, so that no file takes much time or memory before it is refused.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml

from plait.options import did_you_mean, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_BYTES = 1024 * 1024  # largest config file
_DEPTH = 32  # deepest nesting
_VALUES = 20_000  # most values, aliases followed
_PROBLEM = 200  # characters of a parser's text that an error shows
# What PyYAML raises: also for a date with a month 13 and for a number of 5,000 digits.
_BROKEN = (yaml.YAMLError, ValueError, TypeError, OverflowError)


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
    size = path.stat().st_size
    if size > _BYTES:
        raise ValueError(f"{path}: has {size:,} bytes. A config file has up to {_BYTES:,}.")
    try:
        raw = _parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.object[error.start]:#x} is not UTF-8 text. Convert the file to "
            "UTF-8."
        ) from None
    except _BROKEN as error:
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
        raise ValueError(
            f"command line: {shown(text)} is not an override. Write section.key=value."
        )
    here = raw
    for depth, part in enumerate(parts[:-1], 1):
        below = here.get(part)
        here[part] = {} if below is None else below
        here = here[part]
        if not isinstance(here, dict):
            raise ValueError(
                f"command line: {key} is below {'.'.join(parts[:depth])}, which is {shown(here)} "
                "and has no keys. Set that key itself."
            )
    try:
        here[parts[-1]] = _parse(value)
    except _BROKEN as error:
        raise ValueError(
            f"command line: {shown(text)}: {_yaml_problem(error)}. Quote it."
        ) from None
    return key


class Boolean(str):
    """A YAML boolean as it was written (`no`, `off`, `True`); `truth` is its value."""

    @property
    def truth(self) -> bool:
        """Its value."""
        return yaml.SafeLoader.bool_values[self.lower()]


class _Loader(yaml.SafeLoader):
    """Refuses lone surrogates, and a key that stands twice; PyYAML silently keeps the last one.

    It stops at the first value that is too deep or one too many. Booleans become `Boolean`.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > _DEPTH or self.values > _VALUES:
            raise _too_large(self.depth > _DEPTH, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
            except TypeError:  # a list or a mapping
                twice = False
            else:
                seen.add(key)
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} is given twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        try:
            str(value).encode()
        except UnicodeEncodeError:
            problem = "half of a surrogate pair, which is no character"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value

    def construct_boolean(self, node: yaml.ScalarNode) -> Boolean:
        return Boolean(self.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_boolean)


def _parse(text: str) -> Any:
    """Parse YAML within bounds.

    Raises one of _BROKEN.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that is too deep or too large once its aliases are followed."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > _DEPTH:
            raise _too_large(True, node.start_mark)
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        if sizes[id(node)] > _VALUES:
            raise _too_large(False, node.start_mark)
        return sizes[id(node)]

    size(root, 1)


def _too_large(deep: bool, mark: yaml.Mark) -> yaml.YAMLError:
    problem = (
        f"nested more than {_DEPTH} levels deep"
        if deep
        else f"more than {_VALUES:,} values, aliases followed"
    )
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _yaml_problem(error: Exception) -> str:
    """Describe on one line where YAML is broken."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, problem = error.problem_mark, " ".join(str(error.problem).split())
        if len(problem) > _PROBLEM:
            problem = f"{problem[:_PROBLEM]} ..."
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    return " ".join(str(error).split())[:_PROBLEM]


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
            raise ValueError(
                source.unknown(str(name)[:_PROBLEM], known, f"Sections: {', '.join(known)}.")
            )
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{source.at(name)} is {shown(value)}. It should be keys and values.")
    return {name: raw.get(name) or {} for name in known}


def check_section(section: Any, raw: dict[str, Any], prefix: str, source: Source) -> Any:
    """Make a section's dataclass from keys and values; prefix: its dotted key, or nothing.

    Raises:
        ValueError: a line for every unknown key and for every value of a wrong type or range; or
            what the dataclass itself refuses.
    """
    hints = typing.get_type_hints(section, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(section)}
    before = f"{prefix}." if prefix else ""
    problems = [
        source.unknown(
            f"{before}{str(key)[:_PROBLEM]}",
            fields,
            f"Keys of {prefix}: `plait init FILE` lists them.",
        )
        for key in raw
        if key not in fields
    ]
    values = {}
    for name, f in fields.items():
        if name not in raw:
            continue
        key, hint = f"{before}{name}", hints[name]
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

    value = _read_booleans(hint, value)
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        problems: dict[str, tuple[Any, list[str]]] = {}
        for detail in error.errors(include_url=False):
            steps, inner = _real_path(value, detail["loc"])
            dotted = ".".join([key, *(step[:_PROBLEM] for step in steps)])
            message = detail["msg"].removeprefix("Input should be ")
            problems.setdefault(dotted, (inner, []))[1].append(message)
        lines = [
            f"{source.at(dotted)} is {shown(inner)}. It should be {' or '.join(messages)}."
            for dotted, (inner, messages) in problems.items()
        ]
        raise ValueError("\n".join(lines)) from None


def _read_booleans(hint: Any, value: Any) -> Any:
    """Replace each `Boolean` by what its type means by it.

    That is a word of a Literal, a truth value, or else the text as it was written, which is right
    for a text and refused for a number.
    """
    members = _members(hint)
    if isinstance(value, Boolean):
        words = [w for m in members if typing.get_origin(m) is Literal for w in typing.get_args(m)]
        if value.lower() in words:
            return value.lower()
        return value.truth if bool in members or Any in members else str(value)
    origins = {typing.get_origin(member): typing.get_args(member) for member in members}
    if isinstance(value, list):
        lists = [origins[kind] for kind in (list, set, tuple) if origins.get(kind)]
        return [_read_booleans(lists[0][0] if lists else Any, item) for item in value]
    if isinstance(value, dict):
        of_values = origins[dict][1] if origins.get(dict) else Any
        return {
            str(name) if isinstance(name, Boolean) else name: _read_booleans(of_values, item)
            for name, item in value.items()
        }
    return value


def _members(hint: Any) -> list[Any]:
    """Return the members of a union, without bounds; of another type the type itself."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _members(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [hint]


def bounded(hint: Any, facts: typing.Mapping[str, Any]) -> Any:
    """Return a type with a field's bounds on each number in it, on the length of each text.

    A float has to be finite, unless the facts allow infinity, and a whole number has to fit into 64
    bits. A text that reads as a number is one where a bounded number comes first: 1e-4 is
    text to PyYAML.
    """
    names = {"ge": "least", "gt": "above", "le": "most", "lt": "below"}
    limits = {name: facts[ours] for name, ours in names.items() if facts.get(ours) is not None}
    return _limited(hint, limits, bool(facts.get("infinite")))


def _limited(hint: Any, limits: dict[str, Any], infinite: bool) -> Any:
    from pydantic import Field

    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is float and not infinite:
        return Annotated[float, Field(**limits, allow_inf_nan=False)]
    if hint is int:
        low: dict[str, Any] = {} if {"ge", "gt"} & limits.keys() else {"ge": -(2**63)}
        high: dict[str, Any] = {} if {"le", "lt"} & limits.keys() else {"lt": 2**63}
        return Annotated[int, Field(**limits, **low, **high)]
    if hint is float:
        return Annotated[float, Field(**limits)]
    if hint is str and "ge" in limits:
        return Annotated[str, Field(min_length=int(limits["ge"]))]
    if origin in (typing.Union, types.UnionType):
        union = typing.Union[tuple(_limited(part, limits, infinite) for part in inner)]  # noqa: UP007
        mixed = bool(limits) and str in inner and not {int, float}.isdisjoint(inner)
        return Annotated[union, Field(union_mode="left_to_right")] if mixed else union
    if origin in (list, dict, tuple) and Ellipsis not in inner:
        return types.GenericAlias(origin, tuple(_limited(part, limits, infinite) for part in inner))
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
