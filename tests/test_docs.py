"""The documentation: its examples run, its generated parts are those of the code, it builds."""

import dataclasses
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftConfig

import plait
from plait.core import DeltaConfig
from plait.upstream.table import BASELINES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^ *--8<-- "(.+?)(?::(\w+))?"$', re.MULTILINE)
METHODS = [m.key for m in plait.list_methods()]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fences(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return [body for name, _, body in FENCE.findall(page.read_text("utf-8")) if name == language]


def included() -> list[str]:
    """The example files that pages include."""
    found = {path for page in PAGES for path, _ in SNIPPET.findall(page.read_text("utf-8"))}
    return sorted(path for path in found if path.endswith(".py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_on_a_page_is_a_part_of_an_example(page: Path) -> None:
    for body in fences(page, "python"):
        rest = SNIPPET.sub("", body).replace("...", "").strip()
        assert not rest, f"{page.name}: this code is not included from examples/: {rest}"
        for path, section in SNIPPET.findall(body):
            text = (ROOT / path).read_text("utf-8")
            if section:
                assert f"--8<-- [start:{section}]" in text
                assert f"--8<-- [end:{section}]" in text


@pytest.mark.parametrize("path", sorted({*included(), "examples/quickstart.py"}))
def test_example_runs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path in ("examples/custom_method.py", "examples/test_custom_method.py"):
        pytest.skip("It registers a method for the whole process; the contract tests run it.")
    monkeypatch.setattr(sys, "argv", [path])
    out = io.StringIO()
    with torch.random.fork_rng(devices=[]), redirect_stdout(out):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert out.getvalue().strip()
    for line in out.getvalue().splitlines():
        assert "False" not in line, line  # the examples print what holds
        if "differ" in line:  # "... differ by 1e-16", "largest logit difference: 0e+00"
            assert float(line.split()[-1]) < 1e-4, line


@pytest.mark.parametrize("key", METHODS)
def test_method_has_a_complete_page(key: str) -> None:
    text = (DOCS / "methods" / f"{key}.md").read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    wanted = [
        "Formula",
        "When to use it, and when not",
        "Options",
        "Cost",
        "Source",
        "Where we differ, and what we decided",
        "Limits",
        "What is unknown",
        "Example",
    ]
    assert [h for h in headings if h in wanted] == wanted
    for part in ("facts", "options", "cost"):
        assert f"<!-- generated: {part} {key} -->" in text
    assert f"methods/{key}.md" in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.mark.parametrize("key", METHODS)
def test_options_on_a_page_are_those_of_the_config(key: str, hooks: ModuleType) -> None:
    config = plait.find(key).config
    own, common = options(hooks.part(f"options {key}")), options(hooks.part("options common"))
    internal = {f.name for f in dataclasses.fields(PeftConfig)}
    internal |= {"auto_mapping", "plait_version", "checksums"}
    assert {*own, *common} == {f.name for f in dataclasses.fields(config)} - internal
    for f in dataclasses.fields(config):
        if f.name in own:
            shown = {"null": None, "true": True, "false": False}.get(own[f.name], own[f.name])
            default = f.default_factory() if callable(f.default_factory) else f.default
            same = shown == default or shown == str(default)
            assert same, f"{f.name}: the page says {shown}, the config {default}"


def options(table: str) -> dict[str, str]:
    """Option -> default of a generated table."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    return {row[0].strip(" `"): row[2].strip(" `") for row in rows}


def test_common_options_come_with_help() -> None:
    for f in dataclasses.fields(DeltaConfig):
        if f.name not in {g.name for g in dataclasses.fields(PeftConfig)}:
            assert f.metadata.get("help"), f.name


def test_generated_part_that_does_not_exist(hooks: ModuleType) -> None:
    text = r"generated part 'optoins' is not known\. Use one of .*options"
    with pytest.raises(ValueError, match=text):
        hooks.part("optoins cola")


def test_cost_is_that_of_a_full_count(hooks: ModuleType) -> None:
    # LoRA of rank r on a square layer of side n: 4 T n^2 and 12 T r n operations.
    config = hooks.LoraConfig(r=8)
    share = hooks.arithmetic(config) / hooks.arithmetic(None)
    assert share == 1 + hooks.Fraction(12 * 8, 4 * hooks.SIDE)


def test_readme_is_up_to_date(hooks: ModuleType) -> None:
    text = README.read_text("utf-8")
    assert hooks.rewrite(text) == text, "Run: python docs/hooks.py README.md"


def test_readme_has_two_commands_and_the_quick_start() -> None:
    text = README.read_text("utf-8")
    commands = fences(README, "text")[0]
    assert re.findall(r"^\S+ \S+", commands, re.MULTILINE) == ["make demo", "make test"]
    (block,) = fences(README, "python")
    example = (ROOT / "examples" / "quickstart.py").read_text("utf-8")
    assert block.strip() in example
    assert len([line for line in block.splitlines() if line]) == 5
    for key in [*METHODS, *BASELINES]:
        assert f"`{key}`" in text


def test_links_of_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text("utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_no_page_is_unfinished() -> None:
    for page in [*PAGES, README, ROOT / "CHANGELOG.md"]:
        assert not re.search(r"TODO|FIXME|XXX|TBD", page.read_text("utf-8")), page


@pytest.mark.slow
def test_site_builds(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed. Install it with: pip install -e ".[docs]"')
    environment: dict[str, Any] = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        html = (tmp_path / page.relative_to(DOCS)).with_suffix(".html").read_text("utf-8")
        assert "--8&lt;--" not in html, page
        assert "generated:" not in html, page
        # Nothing is loaded from another host.
        assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', html), page
