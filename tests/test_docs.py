"""The documentation: its examples run, its generated parts are current, it builds."""

import dataclasses
import importlib
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftConfig

import plait
from plait.core import DeltaConfig
from plait.run.config import schema
from plait.upstream.table import BASELINES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^<!-- begin code: (\S+).*? -->\n(.*?)^<!-- end code -->$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
METHODS = [m.key for m in plait.list_methods()]


@pytest.fixture(scope="module")
def update() -> Iterator[ModuleType]:
    """docs/update.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("update")


def name_of(page: Path) -> str:
    """Path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def fences(text: str, language: str) -> list[str]:
    """The code blocks of a text in one language."""
    return [body for name, _, body in FENCE.findall(text) if name == language]


def included() -> list[str]:
    """The example files that pages include."""
    paths = {path for page in PAGES for path, _ in CODE.findall(page.read_text("utf-8"))}
    return sorted(path for path in paths if path.endswith(".py"))


@pytest.mark.parametrize("page", [*PAGES, README], ids=name_of)
def test_page_is_up_to_date(page: Path, update: ModuleType) -> None:
    text = page.read_text("utf-8")
    if "begin generated: command" in text and sys.version_info >= (3, 13):
        pytest.skip("argparse of Python 3.13 writes options in another form.")
    assert update.updated(text, page) == text, "Run: make docs-update"


def test_schema_of_options_is_up_to_date() -> None:
    def unordered(text: str) -> str:
        """The order of a Union depends on what was imported first."""
        return re.sub(r'"([^"\n]+ \| [^"\n]+)"', lambda m: str(sorted(m[1].split(" | "))), text)

    stored = schema.FILE.read_text("utf-8")
    assert unordered(stored) == unordered(schema.text()), "Run: make docs-update"
    stale = stored.replace('"default": 8', '"default": 9', 1)
    assert unordered(stale) != unordered(stored)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("<!-- begin generated: options cola -->", "| `strategy` |"),
        ("<!-- begin code: examples/methods/cola.py -->", "import torch"),
    ],
)
def test_stale_part_of_a_page_is_noticed(part: str, change: str, update: ModuleType) -> None:
    page = DOCS / "methods" / "cola.md"
    text = page.read_text("utf-8")
    before, mark, after = text.partition(part)
    assert change in after
    stale = before + mark + after.replace(change, "something old", 1)
    assert stale != text
    assert update.updated(stale, page) == text


@pytest.mark.parametrize("page", [*PAGES, README], ids=name_of)
def test_page_has_no_open_mark(page: Path, update: ModuleType) -> None:
    rest = update.BLOCK.sub("", page.read_text("utf-8"))
    assert not re.search(r"<!-- (?:generated|begin code|begin generated)", rest)
    assert not re.search(r"<!-- end (?:generated|code)|--8<--|^:::", rest, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_on_a_page_is_a_part_of_an_example(page: Path) -> None:
    rest = CODE.sub("", page.read_text("utf-8"))
    for body in fences(rest, "python"):
        pytest.fail(f"{page.name}: this code is not included from examples/: {body}")


def test_code_of_a_section_that_does_not_exist(update: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"examples/trainer\.py has no section 'trian'"):
        update.code("examples/trainer.py trian")


@pytest.mark.parametrize("path", sorted({*included(), "examples/quickstart.py"}))
def test_example_runs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path in ("examples/custom_method.py", "examples/test_custom_method.py"):
        pytest.skip("It registers a method for the whole process; the contract tests run it.")
    if path == "examples/objectives/brief.py":
        pytest.skip("It is a reward, which the objective's test runs.")
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
        assert f"<!-- begin generated: {part} {key} -->" in text
    assert f"methods/{key}.md" in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.mark.parametrize("key", METHODS)
def test_options_on_a_page_are_those_of_the_config(key: str, update: ModuleType) -> None:
    config = plait.find(key).config
    own, common = options(update.part(f"options {key}")), options(update.part("options common"))
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


def test_generated_part_that_does_not_exist(update: ModuleType) -> None:
    text = r"generated part 'optoins' is not known\. Use one of .*options"
    with pytest.raises(ValueError, match=text):
        update.part("optoins cola")


@pytest.mark.usefixtures("update")
def test_cost_is_that_of_a_full_count() -> None:
    # LoRA of rank r on a square layer of side n: 4 T n^2 and 12 T r n operations.
    cost = importlib.import_module("_generate.cost")
    share = cost.arithmetic(cost.LoraConfig(r=8)) / cost.arithmetic(None)
    assert share == 1 + cost.Fraction(12 * 8, 4 * cost.SIDE)
    dual = cost.arithmetic(plait.DualLoraConfig(r=8)) / cost.arithmetic(None)
    assert dual == cost.Fraction(3, 2) + cost.Fraction(8 * 8, 4 * cost.TOKENS)
    nola = cost.arithmetic(plait.NolaConfig(r=8)) / cost.arithmetic(None)
    assert nola == share + cost.Fraction((256 + 256) * 8, cost.TOKENS * cost.SIDE)


def test_readme_has_two_commands_and_the_quick_start() -> None:
    text = README.read_text("utf-8")
    commands = fences(text, "text")[0]
    assert re.findall(r"^\S+ \S+", commands, re.MULTILINE) == ["make demo", "make test"]
    (block,) = fences(text, "python")
    example = (ROOT / "examples" / "quickstart.py").read_text("utf-8")
    assert block.strip() in example
    assert len([line for line in block.splitlines() if line]) == 10
    for key in [*METHODS, *BASELINES]:
        assert f"`{key}`" in text


def dead_links(page: Path, text: str) -> list[str]:
    """The relative links of a text on a page that lead nowhere."""
    targets = [t.partition("#")[0] for t in LINK.findall(FENCE.sub("", text))]
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def test_links_of_readme_lead_somewhere() -> None:
    assert not dead_links(README, README.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert not dead_links(page, page.read_text("utf-8"))


def missing_paths(text: str) -> list[str]:
    """The files and folders in code on the design page that do not exist."""
    paths = re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+)`", text)
    return [path for path in paths if not (ROOT / path).exists()]


def test_paths_of_the_design_page_exist() -> None:
    text = (DOCS / "design.md").read_text("utf-8")
    assert len(re.findall(r"\]\(\.\./(?:src|tests)/", text)) > 30
    assert not missing_paths(text)


def test_missing_paths_and_links_are_noticed() -> None:
    assert missing_paths("`src/plait/core/delta.py`, `src/plait/nowhere.py`") == [
        "src/plait/nowhere.py"
    ]
    assert dead_links(README, "[a](docs/index.md#x) [b](docs/nowhere.md)") == ["docs/nowhere.md"]


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
        assert not re.search(r"(?:begin|end) (?:generated|code)", html), page
        # Nothing is loaded from another host.
        assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', html), page
