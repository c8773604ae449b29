"""Write the generated parts of the pages and of README.md, so that they cannot go stale.

    make docs-update

A part stands in the page between two marks, which say what it is:

    <!-- begin generated: options cola -->          one of PARTS, with arguments
    <!-- end generated -->

    <!-- begin code: examples/trainer.py trainer train -->      a file, or sections of it
    <!-- end code -->

A section of a file lies between `# --8<-- [start:NAME]` and `# --8<-- [end:NAME]`.
"""

import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from _generate import tables
from _generate.cost import cost

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^<!-- begin (generated|code): (.+?) -->\n.*?^<!-- end \1 -->$", re.MULTILINE | re.DOTALL
)
SECTION_MARK = re.compile(r"^ *# --8<-- \[(?:start|end):\w+\]\n", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".txt": "text"}


def file(path: str) -> str:
    """A Markdown file of results."""
    return (ROOT / path).read_text("utf-8").strip()


def report(path: str) -> str:
    """A Markdown report, its headings one level lower."""
    return re.sub(r"^#", "##", file(path), flags=re.MULTILINE)


PARTS: dict[str, Callable[..., str]] = {
    "baseline-defaults": tables.baseline_defaults,
    "baselines": tables.baselines,
    "chain-methods": tables.chain_methods,
    "command": tables.command,
    "compositions": tables.compositions,
    "cost": cost,
    "facts": tables.facts,
    "federated": tables.federated,
    "file": file,
    "matrix": tables.matrix,
    "methods": tables.methods_table,
    "module": tables.module_reference,
    "optimizer-options": tables.optimizer_options_table,
    "optimizer-support": tables.optimizer_support_table,
    "options": tables.method_options_table,
    "reference": tables.reference,
    "report": report,
    "section": tables.section,
    "starter": tables.starter,
    "training": tables.training_defaults,
}


def part(request: str) -> str:
    """One generated part, such as `options cola`; its links are relative to the repository."""
    name, *arguments = request.split()
    if name not in PARTS:
        raise ValueError(f"generated part {name!r} is not known. Use one of {', '.join(PARTS)}.")
    return PARTS[name](*arguments)


def code(request: str) -> str:
    """A fenced block with a file, or with sections of it joined by a line of three dots."""
    path, *sections = request.split()
    text = (ROOT / path).read_text("utf-8")
    parts = [section(path, text, name) for name in sections] or [SECTION_MARK.sub("", text)]
    title = f"{path}, in part" if sections else path
    body = "\n\n...\n\n".join(part.strip("\n") for part in parts)
    return f'```{LANGUAGES[Path(path).suffix]} title="{title}"\n{body}\n```'


def section(path: str, text: str, name: str) -> str:
    """One section of a file, without its indentation."""
    match = re.search(rf"\[start:{name}\]\n(.*?)^ *# --8<-- \[end:{name}\]$", text, re.M | re.S)
    if match is None:
        raise ValueError(f"{path} has no section {name!r}. Mark it with # --8<-- [start:{name}].")
    return textwrap.dedent(SECTION_MARK.sub("", match[1]))


def updated(text: str, page: Path) -> str:
    """The text of a page with all parts between marks written again."""

    def block(match: re.Match[str]) -> str:
        kind, request = match.groups()
        body = code(request) if kind == "code" else relative(part(request), page)
        return f"<!-- begin {kind}: {request} -->\n{body}\n<!-- end {kind} -->"

    return BLOCK.sub(block, text)


def relative(text: str, page: Path) -> str:
    """Turn links relative to the repository into links relative to a page."""

    def link(match: re.Match[str]) -> str:
        return f"]({Path(os.path.relpath(ROOT / match[1], page.parent)).as_posix()})"

    return re.sub(r"\]\(((?:docs|src)/[^)]*)\)", link, text)


def main(names: list[str]) -> None:
    """Update the named pages, or all of them."""
    for page in [Path(name).resolve() for name in names] or PAGES:
        text = page.read_text("utf-8")
        fresh = updated(text, page)
        if fresh != text:
            page.write_text(fresh, "utf-8")
            print(f"{page.relative_to(ROOT)} updated")


if __name__ == "__main__":
    main(sys.argv[1:])
