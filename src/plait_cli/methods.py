"""`plait methods`: what there is, and what one method takes."""

import argparse
import types
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from plait.core import Method
    from plait.run.config import Option
    from plait.upstream.table import Baseline

# What a name from papers can mean besides the methods listed here.
_ELSEWHERE = {
    "alora": ("activated LoRA: upstream's lora with alora_invocation_tokens",),
    "cola": (
        "chain of LoRA (COLA, 2401.04151): tie and restart, `chain: {plan: chain}` in a run file",
        "the GLUE task CoLA: a data set, not a method",
    ),
}


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Add the verb and its arguments."""
    text = "list the methods, or show one: formula, options, paper"
    parser = subparsers.add_parser("methods", help=text, description=text.capitalize() + ".")
    parser.add_argument("name", nargs="?", help="a method, or a name that papers use for one")
    parser.add_argument(
        "--matrix", action="store_true", help="what works with what: gates, optimizers, chains, ..."
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table, or what a name means."""
    from plait_cli import console

    if args.matrix:
        if args.name is not None:
            raise ValueError(f"--matrix shows all methods. Leave {args.name} out.")
        _print_matrix(console())
    elif args.name is None:
        _print_table(console())
    else:
        _print_meanings(args.name, console())
    return 0


def _entries() -> "list[Method | Baseline]":
    import plait
    from plait.upstream.table import BASELINES

    return [*plait.list_methods(), *BASELINES.values()]


def _print_table(console: "Console") -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for e in _entries():
        merge = "yes" if e.mergeable else "no"
        export = "exact" if e.exact_export else "approximate"
        table.add_row(
            e.key,
            f"{e.formula}\n"
            f"trained, one layer: {e.parameters}; rank: {e.rank}\n"
            f"merge: {merge}; export to LoRA: {export}; paper: {e.paper or 'none'}",
        )
    console.print(table)
    console.print("\nOptions of one method: plait methods NAME")


def _print_matrix(console: "Console") -> None:
    """Print a table for each group of features, and why a cell says no."""
    from rich.table import Table

    from plait.run.support import tables

    groups, notes = tables()
    for group, (head, *rows) in groups.items():
        table = Table(*head, box=None, pad_edge=False, title=group, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for number, note in enumerate(notes, 1):
        console.print(f"no {number}: {note}", soft_wrap=True)


def _print_meanings(name: str, console: "Console") -> None:
    """Print the method of this key, or everything that the name can mean.

    Raises:
        ValueError: the name means nothing here.
    """
    from plait.run.config import did_you_mean

    entries = {e.key: e for e in _entries()}
    meant = [e for e in entries.values() if name.lower() in _other_names(e)]
    elsewhere = _ELSEWHERE.get(name.lower(), ())
    if name in entries:
        _print_method(entries[name], console)
        if elsewhere:
            console.print(f"\nNot to be confused with, under the name {name}:")
            for text in elsewhere:
                console.print(f"  {text}")
    elif meant or elsewhere:
        console.print(f"{name} can mean:", style="bold")
        for e in meant:
            console.print(f"  {e.key}: {e.summary} ({e.paper})")
        for text in elsewhere:
            console.print(f"  {text}")
    else:
        raise ValueError(f"{name!r} is not a method. {did_you_mean(name, entries)}")


def _other_names(entry: "Method | Baseline") -> set[str]:
    """Return what papers call a method, in lower case: `CoLA (collaborative)` is also `cola`."""
    titles = (entry.title, entry.title.partition(" (")[0], *entry.names)
    return {title.lower() for title in titles}


def _print_method(entry: "Method | Baseline", console: "Console") -> None:
    from rich.table import Table

    from plait.run.config import method_options

    console.print(f"{entry.key}: {entry.summary}", style="bold")
    facts = Table.grid(padding=(0, 2))
    for what, value in (
        ("formula", entry.formula),
        ("paper", entry.paper or "none"),
        ("trained, one layer", entry.parameters),
        ("attainable rank", entry.rank),
        ("merge", "yes" if entry.mergeable else "no"),
        ("export to LoRA", "exact" if entry.exact_export else "approximate, error printed"),
    ):
        facts.add_row(what, value)
    console.print(facts)
    options = method_options(entry.key)
    if not options:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("option", "type", "default", "help"):
        table.add_column(column, overflow="fold")
    for option in options.values():
        default = "" if option.default is None else str(option.default)
        table.add_row(option.name, _type_name(option), default, option.help)
    console.print()
    console.print(table)


def _type_name(option: "Option") -> str:
    """Return a type as a user reads it."""

    def shown(hint: Any) -> str:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Literal:
            return " | ".join(map(str, inner))
        if origin in (typing.Union, types.UnionType):
            return " | ".join(shown(h) for h in inner if h is not types.NoneType)
        if origin is not None:
            return f"{origin.__name__}[{', '.join(map(shown, inner))}]"
        return hint.__name__ if isinstance(hint, type) else str(hint)

    return shown(option.type)
