"""What mkdocs changes in a page: the site has no marks, a full reference and no links to code."""

import posixpath
import re
from typing import Any

REFERENCE = re.compile(
    r"^<!-- begin generated: (reference|module) (\S+) (.+?) -->\n.*?^<!-- end generated -->$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"^<!-- (?:begin|end) (?:generated|code|results)\b.*? -->\n?", re.MULTILINE)
LINK = re.compile(r"\[([^\]\[]+)\]\(([^):#]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace tables of names by mkdocstrings' reference; keep only links that the site has."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        outside = target.startswith("../") or target.endswith(".py")
        return match[1] if outside else match[0]

    return LINK.sub(link, MARK.sub("", REFERENCE.sub(reference, markdown)))


def reference(match: re.Match[str]) -> str:
    """The directive that shows the docstrings of some names of a module."""
    kind, module, names = match.groups()
    lines = [f"::: {module}", "    options:", f"      members: [{', '.join(names.split())}]"]
    if kind == "reference":
        lines += ["      show_root_heading: false", "      show_root_toc_entry: false"]
    return "\n".join(lines)
