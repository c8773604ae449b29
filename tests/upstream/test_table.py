"""The table of upstream facts: light, complete, and recognised from a peft config."""

import ast
from pathlib import Path

import peft
import pytest

import plait
from plait.run.config import MethodConfig, peft_config
from plait.upstream import options, table
from plait.upstream.table import BASELINES, baseline_of, start_kind


def config_of(name: str) -> peft.PeftConfig | None:
    """The config that a run file with the method's name alone makes."""
    return peft_config(MethodConfig(name=name), "causal_lm", total_steps=100)


@pytest.mark.parametrize("module", [table, options])
def test_the_table_imports_neither_torch_nor_peft(module: object) -> None:
    tree = ast.parse(Path(str(vars(module)["__file__"])).read_text(encoding="utf-8"))
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    allowed = {"collections", "dataclasses", "math", "typing"}
    light = {"plait.upstream.options", "plait.upstream.types"}  # the second imports peft if asked
    assert {n for n in names if n.partition(".")[0] not in allowed} <= light


@pytest.mark.parametrize("name", BASELINES)
def test_a_config_leads_back_to_its_row(name: str) -> None:
    assert baseline_of(config_of(name)) is BASELINES[name]


def test_configs_of_other_methods_have_no_row() -> None:
    assert baseline_of(peft.IA3Config()) is None
    assert baseline_of(plait.ColaConfig()) is None
    both = peft.LoraConfig(use_dora=True, use_rslora=True, init_lora_weights="pissa")
    assert baseline_of(both) is BASELINES["dora"]  # the one that fits least


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (True, "drawn"),
        (False, "drawn"),
        ("gaussian", "drawn"),
        ("orthogonal", "drawn"),
        ("eva", "data"),
        ("pissa_niter_4", "residual"),
        ("olora", "residual"),
        ("loftq", "other"),
    ],
)
def test_starts(start: bool | str, kind: str) -> None:
    config = peft.LoraConfig()
    config.init_lora_weights = start  # type: ignore[assignment]
    assert start_kind(config) == kind


@pytest.mark.parametrize("row", BASELINES.values(), ids=lambda row: row.key)
def test_reasons_read_as_one_clause(row: table.Baseline) -> None:
    """They stand before a full stop in errors and as notes of the matrix."""
    reasons = [
        row.no_chain,
        row.no_federation,
        row.no_export,
        row.no_pairs,
        row.no_best_checkpoint,
        *row.no_quantised.values(),
    ]
    for reason in reasons:
        assert reason is None or (reason and not reason.endswith((".", " "))), reason
    assert set(row.no_quantised) <= {"8bit", "4bit"}
