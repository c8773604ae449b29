"""From a trained run to a folder that needs no plait: measure, refuse what is wrong, write, check.

The order is the same for every way in. The run is measured on a few rows. The export is made in
memory, and its losses are measured: by layer (relative Frobenius norm), on the logits of these
rows, and, where it is not exact, on the run's held-out metrics. They are announced. An export that
a server would misread, or that loses more than it may, is refused. Then it is written beside its
place, read back without plait, compared once more, and moved into its place.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from plait.core.delta import NotMergeable
from plait.core.events import PlaitWarning
from plait.run.evaluate import Progress
from plait.run.export.making import as_lora, base_of, merged, merges_exactly, with_lora
from plait.run.export.measuring import Yardstick
from plait.run.export.place import lock_for, place_for, task_folders
from plait.run.export.read_back import Read, reader, reader_here
from plait.run.export.refusals import (
    check_task,
    dependence,
    loss_refused,
    readers_of,
    refuse_misread,
)
from plait.run.export.report import ExportReport
from plait.run.export.request import ALL, LLAMACPP, Form, Request
from plait.run.export.writing import Made, write_all
from plait.run.prepare import TrainedRun, load_run
from plait.run.serving.gguf import check_gguf
from plait.upstream.export import EXACT, TOLERATED, LoraExport

Announce = Callable[[ExportReport], None]


def export_run(
    path: str | Path,
    to: Form,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    task: str | None = None,
    approx: Literal["mean"] | None = None,
    server: str = ALL,
    compact: bool = False,
    dtype: str | None = None,
    lossy: bool | None = None,
    requantise: bool = False,
    force: bool = False,
    overrides: Sequence[str] = (),
    announce: Announce = lambda report: None,
    progress: Progress | None = None,
    command: str = "",
    weighted: bool = False,
    distill: int = 0,
) -> tuple[Path, ExportReport]:
    """Export a finished run to a folder.

    Args:
        path: the run folder.
        to: "lora", a plain peft LoRA, "merged", a plain transformers checkpoint, or "gguf", the
            plain LoRA as llama.cpp loads it.
        out: the folder to write; None: the folder of this name in the run folder.
        rank, energy, task, approx, compact: as in plait.to_lora.
        max_rank: the largest rank that the server takes; as rank, and checked against its rules.
        server: "peft", "vllm", "sglang" or "llamacpp", whose rules are checked and which refuses
            what it would read wrong; "all": the report says what each of them makes of it.
        dtype: "bf16", "fp16" or "fp32"; None: that of the factors, which is fp32.
        lossy: write what loses more than an export may. None: warn instead of refusing it where
            rank, energy or max_rank was given.
        requantise: pack the weights merged into a quantised base as the base was; else they are
            written with 16 bits.
        force: replace an earlier export at `out`.
        overrides: other data to measure on, as in evaluate_run.
        announce: called with the measured report before anything is written or refused for a loss.
        progress: called while a held-out metric is taken.
        command: the command line, for the card.
        weighted: where ranks are cut, leave out what changes the layers' outputs least on training
            rows, instead of what is smallest.
        distill: steps in which the exported factors are trained to give the logits of the run's
            model on training rows.

    Raises:
        FileExistsError: something is at `out`, and it is no export or force is not given; or
            `out` is in the run folder, and another process writes there.
        ImportError: the package gguf, or bitsandbytes, is needed and not installed.
        NotMergeable: the update depends on the input.
        ValueError: options that do not fit; an export that the server would read wrong; one that
            leaves out more than 1 % of a layer's update, or moves a held-out metric by more than
            its noise, without lossy; an exact export that stock peft reads differently.
    """
    request = Request.of(
        to,
        max_rank=max_rank,
        rank=rank,
        energy=energy,
        approx=approx,
        server=server,
        compact=compact,
        dtype=dtype,
        lossy=lossy,
        command=command,
        weighted=weighted,
        distill=distill,
        requantise=requantise,
    )
    place = place_for(path, to, out, force)
    with lock_for(place, path):
        run = load_run(path, overrides)
        read = reader(run, to)
        (report,) = _export(run, {task: place}, place, request, force, read, announce, progress)
    return place, report


def export_tasks(
    path: str | Path,
    to: Form,
    out: str | Path | None = None,
    *,
    force: bool = False,
    overrides: Sequence[str] = (),
    announce: Announce = lambda report: None,
    progress: Progress | None = None,
    **choices: Any,
) -> tuple[Path, list[ExportReport]]:
    """Export all tasks of a run that routes by task: OUT/<task>, one folder each.

    Arguments and errors are those of export_run, and ValueError for a run without tasks. All
    folders appear together, or none.
    """
    request = Request.of(to, **choices)
    place = place_for(path, to, out, force)
    with lock_for(place, path):
        run = load_run(path, overrides)
        if not run.routed:
            raise ValueError(
                f"--task all: {run.cfg.method.name} does not route by task. Leave out --task."
            )
        folders, read = task_folders(place, run.tasks), reader(run, to)
        reports = _export(run, folders, place, request, force, read, announce, progress)
    return place, reports


def export_trained(run: TrainedRun) -> list[ExportReport]:
    """Write the plain LoRA of a run that has just been trained to `lora` in its folder.

    The folder is locked by the caller. It is read back by peft in this process.

    Args:
        run: its model is the one that was trained, unless that holds a part of the base weight.

    Raises:
        ValueError: as export_run.
    """
    place = run.folder.lora
    folders = task_folders(place, run.tasks) if run.routed else {None: place}
    request = Request("lora", command="plait train, output.also: [lora]")
    return _export(run, folders, place, request, True, reader_here(run))


def _export(
    run: TrainedRun,
    folders: Mapping[Any, Path],
    place: Path,
    request: Request,
    force: bool,
    read: Read,
    announce: Announce = lambda report: None,
    progress: Progress | None = None,
) -> list[ExportReport]:
    """Export some tasks (None: no task) to their folders, at or below `place`."""
    if request.requantise and run.cfg.model.quantization == "none":
        raise ValueError("--requantise: the base of this run is not quantised. Leave it out.")
    made = {}
    for task in folders:
        check_task(run, task)
        if task is not None:
            run.set_task(task)
        yardstick = Yardstick.of(run, task)
        if request.to == "merged":
            keeps = task != list(folders)[-1]
            made[task] = _merge(run, request, yardstick, progress, keeps)
        else:
            made[task] = _convert(run, request, yardstick, progress)
        announce(made[task].report)
        _check_loss(run, made[task].report, request, place)
    return write_all(run, made, folders, place, request, force, read)


def _convert(
    run: TrainedRun, request: Request, yardstick: Yardstick, progress: Progress | None
) -> Made:
    """Make and measure the plain LoRA of a task; refuse what its server would misread."""
    try:
        lora = as_lora(run, request, yardstick.task)
    except NotMergeable:
        raise yardstick.no_server() from None
    readers = readers_of(run.model, lora)
    if request.to == "gguf":
        refuse_misread(lora, readers, LLAMACPP, request.compact, "--to gguf")
        check_gguf(lora, base_of(run))
    else:
        refuse_misread(lora, readers, request.server, request.compact)
    exact = _exact(lora) and request.approx is None and not request.distill
    # A loss by layer is refused before the metrics are measured.
    measured = not exact and (request.lossy is not False or lora.error <= TOLERATED)
    rows = yardstick.held_out(progress) if measured else None
    exported = with_lora(run, lora)
    report = replace(
        yardstick.report(exact, {"lora": exported}, "lora"),
        layers=lora.layers,
        rank=lora.rank,
        readers=readers,
        held_out=None if rows is None else rows.compare(exported),
    )
    return Made(lora, yardstick, report)


def _exact(lora: LoraExport) -> bool:
    return max(lora.error, lora.rounding) <= EXACT


def _merge(
    run: TrainedRun,
    request: Request,
    yardstick: Yardstick,
    progress: Progress | None,
    keeps: bool,
) -> Made:
    """Make and measure the merged model of a task. keeps: the run's model is needed again."""
    if request.approx is None and dependence(run.model) == "token":
        raise NotMergeable(
            f"{run.cfg.method.name} weighs its parts for each token, so no weight holds its "
            "update. Give --approx mean for equal parts, or keep the run."
        )
    exact = request.approx is None and merges_exactly(run)
    rows = None if exact else yardstick.held_out(progress)  # merging changes the run's model
    forms = merged(run, request, yardstick.task, keeps)
    chosen = run.cfg.model.quantization if request.requantise else next(iter(forms))
    report = replace(
        yardstick.report(exact, forms, chosen),
        held_out=None if rows is None else rows.compare(forms[chosen]),
    )
    return Made(forms[chosen], yardstick, report)


def _check_loss(run: TrainedRun, report: ExportReport, request: Request, place: Path) -> None:
    """Refuse, or warn of, an export that loses more than it may."""
    refused = loss_refused(report, run.cfg.method.name, request.remedy)
    if refused is None or request.lossy:
        return
    if request.lossy is None and request.sized:
        warnings.warn(f"{place}: {refused}", PlaitWarning, stacklevel=4)
    else:
        raise ValueError(f"{place}: was not written: {refused}")
