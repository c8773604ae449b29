"""Write the generated parts of the documentation from the code, so that they cannot go stale.

A page asks for a part with `<!-- generated: PART ARGUMENTS -->` on a line of its own; mkdocs calls
`on_page_markdown` for each page. README.md is not built by mkdocs; its parts stand between a begin
and an end mark and are rewritten with:

    python docs/hooks.py README.md
"""

import dataclasses
import functools
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import plait
from plait.core import DeltaConfig
from plait.core.delta import planned
from plait.core.gate import gates_of
from plait.federated import ALGORITHMS
from plait.federated.adapter import Layer
from plait.run.config import (
    _PEFT_INTERNAL,
    TRAINING_DEFAULTS,
    ChainConfig,
    ColumnsConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Option,
    OutputConfig,
    method_options,
    optimizer_options,
)
from plait.run.optimizers import OPTIMIZERS, optimizer_support
from plait.run.support import tables
from plait.upstream.table import BASELINES
from plait_cli.methods import _type_name

MARK = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)
BLOCK = re.compile(
    r"^<!-- begin generated: (.+?) -->\n.*?^<!-- end generated -->$", re.MULTILINE | re.DOTALL
)

SIDE = 4096  # the layer of the cost tables: SIDE x SIDE, TOKENS tokens
TOKENS = 2048
SMALL_SIDES, FEW_TOKENS = (256, 512, 768), (8, 16)  # what is counted in place of that layer
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

SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "data.columns": ColumnsConfig,
    "evaluation": EvaluationConfig,
    "chain": ChainConfig,
    "output": OutputConfig,
}


class OneLayer(nn.Module):
    """The layer of the cost tables."""

    def __init__(self, side: int, device: str = "cpu") -> None:
        super().__init__()
        self.linear = nn.Linear(side, side, bias=False, device=device).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        return self.linear(x)


# ------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: int = 0) -> str:
    """A Markdown table; the last `right` columns are numbers."""
    align = ["---"] * (len(head) - right) + ["---:"] * right
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def code(text: object) -> str:
    """Inline code for a table cell, where a bar would end the cell."""
    return f"`{text}`".replace("|", "\\|") if str(text) else ""


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


def own_options(key: str) -> list[Option]:
    """The options that a method adds to DeltaConfig, or gives another default or help."""
    common = {f.name: f for f in dataclasses.fields(DeltaConfig)}
    own = {f.name: f for f in dataclasses.fields(plait.find(key).config)}
    changed = [
        name
        for name, f in own.items()
        if name not in common
        or (f.default, f.metadata) != (common[name].default, common[name].metadata)
    ]
    options = method_options(key)
    return [options[name] for name in changed if name in options]


def options_of(key: str) -> str:
    """Table of a method's own options, or of all options that every method has."""
    head = ("option", "type", "default", "what it is")
    if key != "common":
        return table(head, option_rows(own_options(key)))
    hints = typing.get_type_hints(DeltaConfig)
    defaults = {"target_modules": "all-linear"}
    rows = [
        Option(
            f.name,
            hints[f.name],
            defaults.get(f.name, f.default_factory() if callable(f.default_factory) else f.default),
            str(f.metadata["help"]),
        )
        for f in dataclasses.fields(DeltaConfig)
        if f.name not in _PEFT_INTERNAL
    ]
    return table(head, option_rows(rows))


def optimizer_options_of(name: str) -> str:
    """Table of an optimizer's options, as a run file takes them."""
    head = ("option", "type", "default", "what it is")
    return table(head, option_rows(optimizer_options(name).values()))


def optimizer_support_table() -> str:
    """Which optimizer trains which method."""
    keys = [m.key for m in plait.list_methods()] + list(BASELINES)
    rows = [
        (code(key), *[yes(optimizer_support(name, key) is None) for name in OPTIMIZERS])
        for key in keys
    ]
    return table(("method", *map(code, OPTIMIZERS)), rows)


def baselines() -> str:
    """Table of the upstream methods and of full fine-tuning."""
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
    """Table of what plait sets for a baseline where upstream's default differs."""
    rows = []
    for b in BASELINES.values():
        given = {**b.fixed, **b.defaults}
        same = ", ".join(f"{code(ours)} is {code(theirs)}" for ours, theirs in b.renamed.items())
        values = ", ".join(code(f"{k} = {v}") for k, v in given.items())
        if b.config:
            rows.append((code(b.key), code(f"peft.{b.config}"), values or "none", same))
    return table(("name", "config class", "set by plait", "other names"), rows)


def methods_table() -> str:
    """Table of plait's methods."""
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
        for m in plait.list_methods()
    ]
    head = ("name", "paper", "formula", "trained, one layer", "rank of dW", "merge")
    return table((*head, "exact as LoRA"), rows)


def facts(key: str) -> str:
    """Short table of what the registry says of one method."""
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
    """Whether a method, with its defaults, needs the number of optimizer steps."""
    gates = gates_of(m.config(), m.delta) if issubclass(m.delta, plait.LowRankDelta) else []
    return m.config.total_steps_needed or any(gate.total_steps_needed for gate in gates)


def yes(fact: bool) -> str:
    """A class fact in words."""
    return "yes" if fact else "no"


def paper(source: str) -> str:
    """An arXiv id as a link; a venue as it is."""
    if re.fullmatch(r"\d{4}\.\d{5}", source):
        return f"[{source}](https://arxiv.org/abs/{source})"
    return source


def config_section(name: str) -> str:
    """Table of keys, types and defaults of one section of a run file."""
    cls = SECTIONS[name]
    hints = typing.get_type_hints(cls)
    rows = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            continue
        default = None if f.default is dataclasses.MISSING else f.default
        rows.append(option_rows([Option(f.name, hints[f.name], default, "")])[0][:3])
    return table(("key", "type", "default"), rows)


def training_defaults() -> str:
    """Table of the TrainingArguments that plait sets."""
    rows = [(code(k), code(v)) for k, v in TRAINING_DEFAULTS.items()]
    return table(("key", "plait's default"), rows)


def chain_methods() -> str:
    """Table of which plan of a chain works with which method, and why not."""
    rows = []
    for key in [*(m.key for m in plait.list_methods()), *BASELINES]:
        reasons = [plait.chain_support(plan, key) for plan in ("chain", "rac", "xgb")]
        why = next((r.partition(": ")[2] for r in reasons if r), "")
        rows.append((code(key), *(yes(reason is None) for reason in reasons), why))
    return table(("method", "`chain`", "`rac`", "`xgb`", "why not"), rows)


def command(verb: str) -> str:
    """What `plait VERB --help` prints."""
    from plait_cli import _parser

    os.environ["COLUMNS"] = "88"  # argparse reads the width of the terminal from here
    parser: Any = _parser()
    if verb == "all":
        text = parser.format_help()
    else:
        verbs = next(a for a in parser._actions if a.dest == "verb").choices
        text = verbs[verb].format_help()
    return f"```text\n{text.strip()}\n```"


# --------------------------------------------------------------------------------------- cost


class Counts(typing.NamedTuple):
    """What a cost table shows of one setting, as text."""

    trained: str
    stored: str
    rank: str
    export: str
    arithmetic: str
    llama: str


def adapted(config: Any, side: int, device: str = "cpu") -> Any:
    """The layer with a method on it, or alone where the config is None."""
    layer = OneLayer(side, device)
    if config is None:
        return layer
    config = dataclasses.replace(config, target_modules=["linear"])
    return get_peft_model(layer, config).to(device)


def arithmetic(config: Any) -> Fraction:
    """Floating-point operations of one forward and backward of TOKENS tokens, of matrix products.

    Each product is of degree 1 in the tokens or does not depend on them, and of degree 2 or less in
    the side, so counts of a few small layers give that of the large one exactly.
    """

    def counted(model: nn.Module, side: int, tokens: int) -> int:
        x = torch.zeros(tokens, side, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model.train()(x).sum().backward()
        return counter.get_total_flops()

    by_side = {}
    for side in SMALL_SIDES:
        model = adapted(config, side)
        by_side[side] = at(TOKENS, {n: counted(model, side, n) for n in FEW_TOKENS})
    return at(SIDE, by_side)


def at(place: int, values: Mapping[int, Fraction | int]) -> Fraction:
    """The polynomial through some values, at another place (Lagrange)."""
    total = Fraction(0)
    for x, y in values.items():
        others = [Fraction(place - other, x - other) for other in values if other != x]
        total += y * math.prod(others)
    return total


def counts(
    config: Any, rank: int | None, export: str, count: Callable[[Sequence[tuple[int, int]]], int]
) -> Counts:
    """Counts of one config; `rank` and `export` where the config is not of plait.

    count: trainable parameters of layers of these (in, out), what they share once.
    """
    model = adapted(config, SIDE, "meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(t.numel() for t in get_peft_model_state_dict(model).values())
    if rank is None:
        rank = model.base_model.model.linear.plait_delta["default"].rank()
    by_task = vars(config).get("tasks")  # a lone layer gets no task ids
    cost = "-" if by_task else f"{float(arithmetic(config) / arithmetic(None)):.3f}"
    formula = count([(SIDE, SIDE)])
    if trained != formula:
        raise ValueError(f"{config}: {trained} parameters, the formula says {formula}.")
    whole = count(LLAMA_2_7B)
    return Counts(f"{trained:,}", f"{stored:,}", f"{rank:,}", export, cost, f"{whole:,}")


def settings(key: str) -> dict[str, dict[str, Any]]:
    """The settings of a method that its cost table shows: label -> options."""
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
    """Rank of the exact plain LoRA of a trained adapter; "none" where there is no exact one."""
    tasks = vars(config).get("tasks")
    if not method.exact_export and not tasks:
        return "none"
    model = adapted(config, 16 * config.r)
    delta: Any = model.base_model.model.linear.plait_delta["default"]
    delta.randomize(torch.Generator().manual_seed(0))  # away from its start, as if trained
    export = plait.to_lora(model, task=tasks[0] if tasks else None)
    return f"{export.layers[0].rank}" + (" a task" if tasks else "")


def cost(*keys: str) -> str:
    """Table of counts of some methods, or of all, with LoRA beside them."""
    names = keys or tuple(m.key for m in plait.list_methods())
    rows: list[tuple[str, ...]] = [("`lora`, r = 8", *lora_counts())]
    for key in names:
        for label in settings(key):
            rows.append((f"{code(key)}, {label}", *method_counts(key, label)))
    head = ("setting", "trained", "stored", "attainable rank", "LoRA export rank", "arithmetic")
    return table((*head, "trained, Llama-2-7B"), rows, right=6)


# -------------------------------------------------------------------------------------- parts


def matrix() -> str:
    """Tables of what works with what, and the reasons."""
    groups, notes = tables()
    parts = []
    for group, (head, *rows) in groups.items():
        cells = [[code(row[0]), *row[1:]] for row in rows]
        parts.append(f"**{group.capitalize()}**\n\n{table(head, cells)}")
    reasons = "\n".join(f"- no {number}: {note}" for number, note in enumerate(notes, 1))
    return "\n\n".join([*parts, reasons])


def compositions() -> str:
    """The run files of examples/compositions, with what each combines."""
    folder = Path(__file__).parents[1] / "examples" / "compositions"
    rows = []
    for file in sorted(folder.glob("*.yaml")):
        first = file.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        rows.append((code(file.name), first))
    return table(("file", "what"), rows)


def federated() -> str:
    """Table of the federated methods: what each says of itself, bytes of one layer by formula."""
    layer = Layer(SIDE, SIDE, 8, 2.0)
    cohort = [layer] * 8
    rows = []
    for key, cls in ALGORITHMS.items():
        fixed = cls.uses != "any"
        method = cls()
        up, down = (
            (4 * n for n in (method.up(layer), method.down(layer, cohort))) if fixed else (0, 0)
        )
        sizes = (f"{up:,}", f"{down:,}") if fixed else ("by the patterns",) * 2
        what = (cls.__doc__ or "").partition("\n")[0].partition(": ")[2] or (cls.__doc__ or "")
        what = what.partition("\n")[0].rstrip(".")
        takes = {"": "any", "any": "any of low rank"}.get(cls.uses, code(cls.uses))
        names = (code(key), what, takes, yes(cls.ranks), yes(cls.robust), cls.exact)
        rows.append((*names, *sizes))
    head = ("method", "what it does", "adapter", "unequal ranks", "robust means, privacy", "exact")
    return table((*head, "bytes up", "bytes down"), rows, right=2)


PARTS: dict[str, Callable[..., str]] = {
    "federated": federated,
    "matrix": matrix,
    "compositions": compositions,
    "options": options_of,
    "facts": facts,
    "cost": cost,
    "methods": methods_table,
    "baselines": baselines,
    "baseline-defaults": baseline_defaults,
    "optimizer-options": optimizer_options_of,
    "optimizer-support": optimizer_support_table,
    "section": config_section,
    "training": training_defaults,
    "chain-methods": chain_methods,
    "command": command,
}


def part(request: str) -> str:
    """One generated part, such as `options cola`."""
    name, *arguments = request.split()
    if name not in PARTS:
        raise ValueError(f"generated part {name!r} is not known. Use one of {', '.join(PARTS)}.")
    return PARTS[name](*arguments)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the generated parts into a page (called by mkdocs)."""
    text = MARK.sub(lambda found: part(found[1]), markdown)
    # On a page of the site, links to the site's own sources are relative to that page.
    up = "../" * page.file.src_uri.count("/")
    return text.replace("](docs/", f"]({up}")


def rewrite(text: str) -> str:
    """A Markdown text with the parts between its marks made anew."""
    return BLOCK.sub(
        lambda found: (
            f"<!-- begin generated: {found[1]} -->\n{part(found[1])}\n<!-- end generated -->"
        ),
        text,
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(rewrite(file.read_text(encoding="utf-8")), encoding="utf-8")
