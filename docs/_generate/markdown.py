"""Markdown: tables and their cells."""

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: int = 0) -> str:
    """A Markdown table; the last `right` columns are numbers."""
    align = ["---"] * (len(head) - right) + ["---:"] * right
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def code(text: object) -> str:
    """Inline code for a table cell; a bar is escaped, since it would end the cell."""
    return f"`{text}`".replace("|", "\\|") if str(text) else ""


def yes(fact: bool) -> str:
    """A fact in words."""
    return "yes" if fact else "no"


def paper(source: str) -> str:
    """An arXiv id as a link; the name of a venue as it is."""
    if re.fullmatch(r"\d{4}\.\d{5}", source):
        return f"[{source}](https://arxiv.org/abs/{source})"
    return source
