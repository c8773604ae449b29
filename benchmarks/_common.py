"""What the studies share: tables, spreads, result files, versions, the folder of real data."""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core.files import write_atomic

ROOT = Path(__file__).parents[1]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], rule: str = "") -> str:
    """A Markdown table.

    Args:
        head: names of the columns.
        rows: one cell for each column.
        rule: the line below the head, such as "|---|---:|"; without it all columns are aligned to
            the left.
    """
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule or "|---" * len(head) + "|", *lines[1:]]) + "\n"


def mean_and_deviation(
    values: Sequence[float], form: str = ".3f", deviation_form: str = ".3f"
) -> str:
    """Mean ± standard deviation over repetitions; the mean alone of one value."""
    text = f"{statistics.fmean(values):{form}}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values):{deviation_form}}"


def least_to_most(values: Sequence[float], form: str) -> str:
    """Smallest and largest value."""
    return f"{min(values):{form}} to {max(values):{form}}"


def median_and_range(values: Sequence[float], form: str) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):{form}} ({least_to_most(values, form)})"


def versions(environment: Mapping[str, Any], *packages: str) -> str:
    """Packages with their versions, from what `plait.run.folder.environment` returned."""
    return ", ".join(f"{name} {environment['packages'][name]}" for name in packages)


def read_results(file: Path) -> dict[str, Any]:
    """The figures measured so far; {} if there are none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_results(file: Path, results: Mapping[str, Any], tables: str = "") -> None:
    """Write the figures as JSON, and their tables, if any, to the .md file beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(results, indent=1) + "\n")
    if tables:
        write_atomic(file.with_suffix(".md"), tables)


def data_folder() -> Path:
    """The folder of the real data sets: PLAIT_DATA, or shared/data beside the checkout.

    Raises:
        SystemExit: it does not exist.
    """
    folder = Path(os.environ.get("PLAIT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist. Set PLAIT_DATA to the folder of the data sets.")
    return folder


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself with the first line of the module's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
