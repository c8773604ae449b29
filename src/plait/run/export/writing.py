"""Write exports that were made and measured: beside their place, read back, then moved into it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.run.export.card import gguf_card, lora_card
from plait.run.export.making import base_of
from plait.run.export.measuring import Yardstick
from plait.run.export.place import check_replaceable, mark_export
from plait.run.export.read_back import Read
from plait.run.export.report import ExportReport
from plait.run.export.request import Request
from plait.run.folder import replace_dir, write_atomic
from plait.run.prepare import TrainedRun
from plait.run.serving.gguf import FILE, write_gguf
from plait.upstream.export import LoraExport


@dataclass(frozen=True)
class Made:
    """An export in memory: the plain LoRA, or the merged model."""

    export: LoraExport | Any
    yardstick: Yardstick
    report: ExportReport


def write_all(
    run: TrainedRun,
    made: Mapping[Any, Made],
    folders: Mapping[Any, Path],
    place: Path,
    request: Request,
    force: bool,
    read: Read,
) -> list[ExportReport]:
    """Write the exports of some tasks (None: of no task) at or below `place`: all, or none.

    Raises:
        FileExistsError: something was put at `place` meanwhile.
        ValueError: what was written is read differently.
    """
    reports: list[ExportReport] = []

    def write(top: Path) -> None:
        written = {task: top / folder.relative_to(place) for task, folder in folders.items()}
        for task, one in made.items():
            _write(run, written[task], one, request)
        logits = read(written, {task: one.yardstick.inputs for task, one in made.items()})
        reports.extend(
            one.yardstick.checked(one.report, logits[task], str(folders[task]))
            for task, one in made.items()
        )
        mark_export(top, to=request.to, **_facts(reports))
        check_replaceable(place, force)  # once more: measuring takes a while

    replace_dir(place, write)
    return reports


def _write(run: TrainedRun, folder: Path, made: Made, request: Request) -> None:
    export = made.export
    if not isinstance(export, LoraExport):
        export.save_pretrained(str(folder))
        run.tokenizer.save_pretrained(str(folder))
        return
    if request.to == "gguf":
        write_gguf(export, base_of(run), folder / FILE)
        card = gguf_card(run, made.report, request.command)
    else:
        export.write(folder, lossy=True)  # what is refused never comes this far
        card = lora_card(run, made.report, request.command)
    write_atomic(folder / "README.md", card)


def _facts(reports: Sequence[ExportReport]) -> dict[str, Any]:
    """What plait_export.json says of the losses."""
    facts: dict[str, Any] = {
        "exact": all(report.exact for report in reports),
        "logit_error": max(report.stock_error or 0.0 for report in reports),
    }
    if reports[0].layers:
        facts["rank"] = max(report.rank for report in reports)
        facts["weight_error"] = max(report.weight_error for report in reports)
        facts["rounding"] = max(report.rounding for report in reports)
    held_out = {r.task or "": vars(r.held_out) for r in reports if r.held_out is not None}
    return {**facts, "held_out": held_out} if held_out else facts
