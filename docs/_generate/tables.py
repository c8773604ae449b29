"""Tables of methods, options, optimizers, chains and run files, written from the registry."""

import dataclasses
import inspect
import os
import typing
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import plait
from _generate.cost import SIDE
from _generate.markdown import code, paper, table, yes
from plait import list_methods
from plait.chain.recipes import RECIPES
from plait.core import DeltaConfig
from plait.core.gate import gates_of
from plait.federated import ALGORITHMS
from plait.federated.adapter import Layer
from plait.run.compare.study import StudyConfig, TuneConfig, VaryConfig
from plait.run.config import (
    OBJECTIVES,
    PEFT_INTERNAL,
    TRAINING_DEFAULTS,
    ChainConfig,
    ColumnsConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Option,
    OutputConfig,
    ParallelConfig,
    method_options,
    optimizer_options,
    starter_config,
)
from plait.run.optimizers import OPTIMIZERS, optimizer_support
from plait.run.support import tables
from plait.upstream.table import BASELINES
from plait_cli import _parser
from plait_cli.methods import _type_name

ROOT = Path(__file__).parents[2]
OPTIONS = ("option", "type", "default", "what it is")
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "data.columns": ColumnsConfig,
    "parallel": ParallelConfig,
    "evaluation": EvaluationConfig,
    **{f"objective.{name}": cls for name, cls in OBJECTIVES.items() if name != "sft"},
    "chain": ChainConfig,
    "output": OutputConfig,
    "study": StudyConfig,
    "study.tune": TuneConfig,
    "study.vary": VaryConfig,
}


# ------------------------------------------------------------------------------------ options


def option_rows(options: Iterable[Option]) -> list[tuple[str, str, str, str]]:
    """One row an option: name, type, default, help."""
    rows = []
    for o in options:
        default = {None: "null", True: "true", False: "false"}.get(
            o.default if o.default is None or isinstance(o.default, bool) else "", str(o.default)
        )
        names = " or ".join(map(code, _type_name(o).split(" | ")))
        rows.append((code(o.name), names, code(default), o.help.replace("|", "\\|")))
    return rows


def method_options_table(key: str) -> str:
    """The options that a method adds or changes; for "common", those that all methods have."""
    if key == "common":
        return table(OPTIONS, option_rows(common_options()))
    common = {f.name: f for f in dataclasses.fields(DeltaConfig)}
    options = method_options(key)
    changed = [
        f.name
        for f in dataclasses.fields(plait.find(key).config)
        if f.name not in common
        or (f.default, f.metadata) != (common[f.name].default, common[f.name].metadata)
    ]
    return table(OPTIONS, option_rows(options[name] for name in changed if name in options))


def common_options() -> list[Option]:
    """The options of DeltaConfig."""
    hints = typing.get_type_hints(DeltaConfig)
    options = []
    for f in dataclasses.fields(DeltaConfig):
        if f.name not in PEFT_INTERNAL:
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name == "target_modules":
                default = "all-linear"
            options.append(Option(f.name, hints[f.name], default, str(f.metadata["help"])))
    return options


def optimizer_options_table(name: str) -> str:
    """The options of an optimizer in a run file."""
    return table(OPTIONS, option_rows(optimizer_options(name).values()))


def section(name: str) -> str:
    """The keys of a section of a run file or a comparison's: type, default, and help if any."""
    cls = SECTIONS[name]
    hints = typing.get_type_hints(cls)
    options = [
        Option(
            f.name,
            hints[f.name],
            f.default_factory() if callable(f.default_factory) else f.default,
            str(f.metadata["help"]),
        )
        for f in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[f.name])
    ]
    columns = 4 if any(o.help for o in options) else 3
    rows = [row[:columns] for row in option_rows(options)]
    return table(("key", "type", "default", "what it is")[:columns], rows)


def starter() -> str:
    """What `plait init` writes."""
    return f"```yaml\n{starter_config()}```"


def training_defaults() -> str:
    """The TrainingArguments whose default plait changes."""
    rows = [(code(k), code(v)) for k, v in TRAINING_DEFAULTS.items()]
    return table(("key", "plait's default"), rows)


# ------------------------------------------------------------------------------------ methods


def methods_table() -> str:
    """plait's methods."""
    rows = [
        (
            f"[`{m.key}`](docs/methods/{m.key}.md)",
            f"{m.title}, {paper(m.paper)}",
            code(m.formula),
            m.parameters,
            m.rank,
            yes(m.mergeable),
            yes(m.exact_export),
        )
        for m in list_methods()
    ]
    head = ("name", "paper", "formula", "trained, one layer", "rank of dW", "merge")
    return table((*head, "exact as LoRA"), rows)


def facts(key: str) -> str:
    """What the registry says of one method."""
    m = plait.find(key)
    rows = [
        ("name in configs", code(m.key)),
        ("config class", code(f"plait.{m.config.__name__}")),
        ("type in `adapter_config.json`", code(f"PLAIT_{m.key.upper()}")),
        ("paper", f"{m.title}, {paper(m.paper)}"),
        ("merge into the base weight", yes(m.mergeable)),
        ("exact as a plain LoRA", yes(m.exact_export)),
        ("needs the number of steps", yes(needs_steps(m))),
    ]
    return table(("", ""), rows)


def needs_steps(m: plait.Method) -> bool:
    """Whether a method with its defaults needs the number of optimizer steps."""
    gates = gates_of(m.config(), m.delta) if issubclass(m.delta, plait.LowRankDelta) else []
    return m.config.total_steps_needed or any(gate.total_steps_needed for gate in gates)


def baselines() -> str:
    """The upstream methods and full fine-tuning."""
    rows = [
        (
            code(b.key),
            b.summary,
            code(b.formula),
            b.parameters,
            b.rank,
            yes(b.mergeable),
            yes(b.exact_export),
            paper(b.paper),
        )
        for b in BASELINES.values()
    ]
    head = ("name", "what", "formula", "trained, one layer", "rank of dW", "merge")
    return table((*head, "exact as LoRA", "paper"), rows)


def baseline_defaults() -> str:
    """What plait sets for a baseline where upstream's default differs."""
    rows = []
    for b in BASELINES.values():
        same = ", ".join(f"{code(ours)} is {code(theirs)}" for ours, theirs in b.renamed.items())
        values = ", ".join(code(f"{k} = {v}") for k, v in {**b.fixed, **b.defaults}.items())
        if b.config:
            rows.append((code(b.key), code(f"peft.{b.config}"), values or "none", same))
    return table(("name", "config class", "set by plait", "other names"), rows)


# ------------------------------------------------------------------------- what works with what


def all_keys() -> list[str]:
    """plait's methods and the baselines."""
    return [*(m.key for m in list_methods()), *BASELINES]


def optimizer_support_table() -> str:
    """Which optimizer trains which method."""
    rows = [
        (code(key), *[yes(optimizer_support(name, key) is None) for name in OPTIMIZERS])
        for key in all_keys()
    ]
    return table(("method", *map(code, OPTIMIZERS)), rows)


def chain_methods() -> str:
    """Which recipe of a chain works with which method, and why not."""
    rows = []
    for key in all_keys():
        reasons = [plait.chain_support(plan, key) for plan in RECIPES]
        why = next((r.partition(": ")[2] for r in reasons if r), "")
        rows.append((code(key), *(yes(reason is None) for reason in reasons), why))
    return table(("method", *map(code, RECIPES), "why not"), rows)


def matrix() -> str:
    """What works with what, and the reasons why not."""
    groups, notes = tables()
    parts = []
    for group, (head, *rows) in groups.items():
        cells = [[code(row[0]), *row[1:]] for row in rows]
        parts.append(f"**{group.capitalize()}**\n\n{table(head, cells)}")
    reasons = "\n".join(f"- no {number}: {note}" for number, note in enumerate(notes, 1))
    return "\n\n".join([*parts, reasons])


def compositions() -> str:
    """The run files of examples/compositions and what each one combines."""
    rows = []
    for file in sorted((ROOT / "examples" / "compositions").glob("*.yaml")):
        first = file.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        rows.append((code(file.name), first))
    return table(("file", "what"), rows)


def federated() -> str:
    """The federated methods and the bytes that each sends for one layer, by its formula."""
    layer = Layer(SIDE, SIDE, 8, 2.0)
    cohort = [layer] * 8
    rows = []
    for key, cls in ALGORITHMS.items():
        method = cls()
        if cls.uses == "any":
            sizes = ("by the patterns",) * 2
        else:
            sizes = tuple(f"{4 * n:,}" for n in (method.up(layer), method.down(layer, cohort)))
        first = summary(cls)
        what = (first.partition(": ")[2] or first).rstrip(".")
        takes = {"": "any", "any": "any of low rank"}.get(cls.uses, code(cls.uses))
        rows.append(
            (code(key), what, takes, yes(cls.ranks), yes(cls.robust), cls.exact, *sizes),
        )
    head = ("method", "what it does", "adapter", "unequal ranks", "robust means, privacy", "exact")
    return table((*head, "bytes up", "bytes down"), rows, right=2)


# -------------------------------------------------------------------- command line and reference


def command(*verbs: str) -> str:
    """What `plait VERB .. --help` prints; without a verb, `plait --help`."""
    os.environ["COLUMNS"] = "88"  # argparse reads the width of the terminal from here
    parser: Any = _parser()
    for verb in verbs:
        parser = next(a for a in parser._actions if a.dest in ("verb", "action")).choices[verb]
    return f"```text\n{parser.format_help().strip()}\n```"


def summary(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def reference(module: str, *names: str) -> str:
    """Names of a module, each with its first line and the file that defines it."""
    rows = []
    for name in names:
        thing = getattr(import_module(module), name)
        documented = inspect.isclass(thing) or inspect.isfunction(thing)
        what = summary(thing) if documented else f"the type {code(thing)}"
        origin = import_module(thing.__module__ if documented else module).__file__
        file = Path(str(origin)).relative_to(ROOT).as_posix()
        rows.append((code(name), what.replace("|", "\\|"), f"[{file}]({file})"))
    return table(("name", "what it is", "defined in"), rows)


def module_reference(module: str, *names: str) -> str:
    """The same with the module's name and first line above."""
    return f"`{module}`: {summary(import_module(module))}\n\n{reference(module, *names)}"
