"""From a trained run to a folder that needs no plait: measure, refuse what is wrong, write, check.

The order is the same for every way in. The export is made in memory. Its losses are measured: by
layer (relative Frobenius norm), on the logits of held-out rows, and, where it is not exact, on the
run's held-out metrics. They are announced. An export that a server would misread, or that loses
more than it may, is refused. Then it is written beside its place, read back without plait, compared
once more, and moved into its place.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor

from plait.core.config import DeltaConfig
from plait.core.delta import NotMergeable
from plait.core.events import PlaitWarning
from plait.options import did_you_mean
from plait.run.config import ModelConfig
from plait.run.evaluate import Progress
from plait.run.export.card import gguf_card, lora_card
from plait.run.export.fitting import MOMENT_BATCHES, distilled, training_batches
from plait.run.export.held_out import HeldOutRows
from plait.run.export.logits import (
    base_shift,
    difference,
    fresh_base,
    logits_of,
    probe,
    read_here,
    read_without_plait,
    tolerance,
)
from plait.run.export.place import MARK, check_replaceable, lock_for, mark_export
from plait.run.export.refusals import (
    ALL,
    LLAMACPP,
    check_max_rank,
    check_server,
    dependence,
    loss_refused,
    readers_of,
    refuse_misread,
)
from plait.run.export.report import ExportReport
from plait.run.folder import RunFolder, replace_dir, write_atomic
from plait.run.model import base_name
from plait.run.prepare import TrainedRun, load_run
from plait.run.serving.gguf import FILE, check_gguf, read_gguf, write_gguf
from plait.run.serving.quantised import merge_quantised
from plait.upstream.export import EXACT, TOLERATED, LoraExport, to_lora
from plait.upstream.moments import second_moments

Form = Literal["lora", "merged", "gguf"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class _Options:
    """What the callers of an export choose; see export_run."""

    to: Form
    rank: int | None = None
    energy: float | None = None
    approx: Literal["mean"] | None = None
    server: str = ALL
    compact: bool = False
    dtype: str | None = None
    lossy: bool | None = None
    command: str = ""
    weighted: bool = False
    distill: int = 0
    requantise: bool = False


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
    rank = _rank(rank, energy, max_rank, server)
    options = _Options(
        to, rank, energy, approx, server, compact, dtype, lossy, command, weighted, distill,
        requantise,
    )  # fmt: skip
    _check_options(options)
    place = _place(path, to, out, force)
    with lock_for(place, path):
        run = load_run(path, overrides)
        (report,) = _export(
            run, {task: place}, place, options, force, announce, progress, _reader(run, to)
        )
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
    max_rank: int | None = None,
    **choices: Any,
) -> tuple[Path, list[ExportReport]]:
    """Export all tasks of a run that routes by task: OUT/<task>, one folder each.

    Arguments and errors are those of export_run, and ValueError for a run without tasks. All
    folders appear together, or none.
    """
    server = choices.get("server", ALL)
    rank = _rank(choices.pop("rank", None), choices.get("energy"), max_rank, server)
    options = _Options(to, rank, **choices)
    _check_options(options)
    place = _place(path, to, out, force)
    with lock_for(place, path):
        run = load_run(path, overrides)
        tasks = _tasks(run)
        if not tasks:
            raise ValueError(
                f"--task all: {run.cfg.method.name} does not route by task. Leave out --task."
            )
        folders = _folders(place, tasks)
        reports = _export(run, folders, place, options, force, announce, progress, _reader(run, to))
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
    tasks = _tasks(run)
    folders = _folders(place, tasks) if tasks else {None: place}

    def read(written: Mapping[Any, Path], inputs: Mapping[Any, Any]) -> dict[Any, Tensor]:
        return {name: read_here(run, folder, inputs[name]) for name, folder in written.items()}

    command = "plait train, output.also: [lora]"
    return _export(
        run, folders, place, _Options("lora", command=command), True, _silent, None, read
    )


def _silent(report: ExportReport) -> None:
    """Announce nothing."""


def name_base(lora: LoraExport, model: ModelConfig) -> None:
    """Let an export name its base as a run does."""
    lora.config.base_model_name_or_path = base_name(model)
    lora.config.revision = model.revision


# Options ----------------------------------------------------------------------------------------


def _rank(rank: int | None, energy: float | None, max_rank: int | None, server: str) -> int | None:
    """The largest rank of a layer; ValueError for a max_rank that does not fit."""
    if max_rank is None:
        return rank
    if rank is not None or energy is not None:
        raise ValueError("--max-rank is a largest rank itself. Leave out --rank and --energy.")
    check_max_rank(max_rank, server)
    return max_rank


def _check_options(options: _Options) -> None:
    """Raise ValueError for options that mean nothing together."""
    if options.to == "merged":
        names = {"rank": "--rank", "energy": "--energy", "compact": "--compact", "dtype": "--dtype"}
        names |= {"weighted": "--weighted", "distill": "--distill"}
        used = [flag for name, flag in names.items() if getattr(options, name)]
        used += ["--for"] if options.server != ALL else []
        if used:
            verb = "belongs" if len(used) == 1 else "belong"
            raise ValueError(f"{' and '.join(used)} {verb} to --to lora. Leave it out.")
    elif options.requantise:
        raise ValueError("--requantise belongs to --to merged. Leave it out.")
    if options.to == "gguf" and options.server not in (ALL, LLAMACPP):
        raise ValueError(f"--to gguf is for llama.cpp alone. Leave out --for {options.server}.")
    check_server(options.server)
    if options.distill < 0:
        raise ValueError(f"--distill {options.distill}: give 0 or more steps.")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ValueError(
            f"--dtype {options.dtype} is not known. {did_you_mean(options.dtype, DTYPES)}"
        )


def _place(path: str | Path, to: str, out: str | Path | None, force: bool) -> Path:
    """The folder to write; FileExistsError if it may not be written."""
    place, own = Path(out) if out is not None else Path(path) / to, RunFolder(path)
    if place.resolve() in [part.resolve() for part in (own.adapter, own.model, own.checkpoints)]:
        raise FileExistsError(f"{place}: is a part of the run itself. Give another --out.")
    check_replaceable(place, force)
    return place


def _tasks(run: TrainedRun) -> list[str]:
    """Names of the tasks that the adapter routes by; [] without any."""
    if not isinstance(run.model, PeftModel):
        return []
    config: Any = run.model.peft_config["default"]
    return list(config.tasks) if getattr(config, "routing", None) == "task" else []


def _folders(place: Path, tasks: Sequence[str]) -> dict[str | None, Path]:
    """Task -> its folder below `place`; ValueError for a task whose name is none of a folder."""
    for task in tasks:
        if task != Path(task).name or task in ("", "..", MARK):
            raise ValueError(
                f"task {task!r} cannot name a folder. Export each with --task NAME --out DIR."
            )
    return {task: place / task for task in tasks}


# The one way of every export --------------------------------------------------------------------

Read = Callable[[Mapping[Any, Path], Mapping[Any, Any]], dict[Any, Tensor]]


def _reader(run: TrainedRun, to: str) -> Read:
    """What measures the written folders: by stock peft and transformers in a process without plait.

    A GGUF file is read back into peft here.
    """
    if to != "gguf":
        return lambda folders, inputs: read_without_plait(run, folders, to, inputs)

    def read(folders: Mapping[Any, Path], inputs: Mapping[Any, Any]) -> dict[Any, Tensor]:
        logits = {}
        for name, folder in folders.items():
            lora = read_gguf(folder / FILE, fresh_base(run))
            logits[name] = logits_of(_with_lora(run, lora), inputs[name])
        return logits

    return read


@dataclass(frozen=True)
class _Made:
    """An export in memory. model: the merged one; None for a plain LoRA, which `lora` is."""

    model: Any
    lora: LoraExport | None
    inputs: dict[str, Tensor]
    trained: Tensor
    report: ExportReport


def _export(
    run: TrainedRun,
    folders: Mapping[Any, Path],
    place: Path,
    options: _Options,
    force: bool,
    announce: Announce,
    progress: Progress | None,
    read: Read,
) -> list[ExportReport]:
    """Write the exports of some tasks (None: of no task) at or below `place`."""
    made = {}
    for task in folders:
        last = task == list(folders)[-1]
        made[task] = one = _make(run, task, options, progress, keeps=not last)
        announce(one.report)
        refused = loss_refused(one.report, run.cfg.method.name, _remedy(options))
        sized = options.rank is not None or options.energy is not None
        if refused is not None and options.lossy is None and sized:
            warnings.warn(f"{place}: {refused}", PlaitWarning, stacklevel=3)
        elif refused is not None and not options.lossy:
            raise ValueError(f"{place}: was not written: {refused}")
    reports: list[ExportReport] = []

    def write(top: Path) -> None:
        written = {task: top / folder.relative_to(place) for task, folder in folders.items()}
        for task, one in made.items():
            _write(run, written[task], one, options)
        logits = read(written, {task: one.inputs for task, one in made.items()})
        for task, one in made.items():
            error = difference(logits[task], one.trained)
            reports.append(replace(one.report, stock_error=error))
            full = run.cfg.model.dtype == "float32" and one.report.exact
            if full and not error <= tolerance(one.trained):
                raise ValueError(
                    f"{folders[task]}: stock peft reads the export with logits off by {error:.2e}. "
                    "Nothing was written; please report this with the run's config."
                )
        mark_export(top, to=options.to, **_facts(reports))
        check_replaceable(place, force)  # once more: measuring takes a while

    replace_dir(place, write)
    return reports


def _make(
    run: TrainedRun, task: str | None, options: _Options, progress: Progress | None, keeps: bool
) -> _Made:
    """Make an export in memory and measure it. keeps: whether the run's model is needed again."""
    model, cfg = run.model, run.cfg
    tasks = _tasks(run)
    if task is not None:
        run.set_task(task)
    elif tasks:
        raise NotMergeable(
            f"{cfg.method.name} has an update for each task, and a plain LoRA or a merged model "
            f"holds one. Give --task NAME ({', '.join(tasks)}), or --task all for a folder each."
        )
    inputs, data = probe(run, task)
    trained = logits_of(model, inputs)
    shift = base_shift(model, inputs, trained)
    choice = {"task": task, "approx": options.approx}
    choice = {name: value for name, value in choice.items() if value is not None}
    if options.requantise and cfg.model.quantization == "none":
        raise ValueError("--requantise: the base of this run is not quantised. Leave it out.")
    lora, readers = None, {}
    if options.to != "merged":
        try:
            lora = _as_lora(run, options, choice)
        except NotMergeable:
            raise _no_server(run, inputs, trained, shift) from None
        name_base(lora, cfg.model)
        if options.distill:
            lora = distilled(run, lora, _with_lora(run, lora), options.distill, task)
        readers = readers_of(model, lora)
        server = LLAMACPP if options.to == "gguf" else options.server
        refuse_misread(lora, readers, server, options.compact)
        if options.to == "gguf":
            check_gguf(lora, _base_of(run))
        exact = max(lora.error, lora.rounding) <= EXACT and options.approx is None
        exact = exact and not options.distill
    else:
        if options.approx is None and dependence(model) == "token":
            raise NotMergeable(
                f"{cfg.method.name} weighs its parts for each token, so no weight holds its "
                "update. Give --approx mean for equal parts, or keep the run."
            )
        exact = options.approx is None and _full_precision(run)
    split, rows = run.held_out_split, None
    # A loss by layer is refused before the metrics are measured.
    measured = options.lossy is not False or lora is None or lora.error <= TOLERATED
    if measured and not exact and data is not None and split is not None:
        rows = HeldOutRows(model, data, split, cfg, task, progress)
    forms = {"lora": _with_lora(run, lora)} if lora else _merged(run, choice, keeps)
    errors = {name: difference(logits_of(form, inputs), trained) for name, form in forms.items()}
    form = run.cfg.model.quantization if options.requantise else next(iter(forms))
    exported, error = forms[form], errors[form]
    held_out = rows.compare(exported) if rows is not None else None
    report = ExportReport(exact, [], error, shift, len(trained), held_out=held_out, task=task)
    if len(errors) > 1:
        report = replace(report, forms=errors)
    if lora is not None:
        report = replace(report, layers=lora.layers, rank=lora.rank, readers=readers)
    return _Made(exported if lora is None else None, lora, inputs, trained, report)


def _as_lora(run: TrainedRun, options: _Options, choice: Mapping[str, Any]) -> LoraExport:
    """The adapter as a plain LoRA."""
    model, cfg = run.model, run.cfg
    if not isinstance(model, PeftModel):
        raise ValueError("method.name = full has no adapter. Use --to merged.")
    own = isinstance(model.peft_config["default"], DeltaConfig)
    if choice and not own:
        raise ValueError(
            f"{cfg.method.name} has no tasks and no router. Leave out "
            f"{', '.join(f'--{name}' for name in choice)}."
        )
    moments = None
    if options.weighted:
        batches = islice(training_batches(run, choice.get("task")), MOMENT_BATCHES)
        moments = second_moments(model, batches)
    try:
        return to_lora(
            model,
            rank=options.rank,
            energy=options.energy,
            compact=options.compact,
            dtype=None if options.dtype is None else DTYPES[options.dtype],
            moments=moments,
            **choice,
        )
    except NotMergeable:
        raise
    except ValueError as error:
        if own or cfg.chain is not None:
            raise
        raise ValueError(
            f"{error} The run's own {run.folder.adapter} loads in stock peft as it is."
        ) from None


def _with_lora(run: TrainedRun, lora: LoraExport) -> Any:
    """A new base model with the exported LoRA on it."""
    config = copy.copy(lora.config)  # peft writes into it where the base was loaded from
    config.base_model_name_or_path = None
    exported = get_peft_model(fresh_base(run), config)
    set_peft_model_state_dict(exported, lora.tensors)
    return exported


def _base_of(run: TrainedRun) -> Any:
    """The base model inside the adapter."""
    model: Any = run.model
    return model.get_base_model()


def _merged(run: TrainedRun, choice: Mapping[str, Any], keeps: bool) -> dict[str, Any]:
    """The model with the adapter in its weights; a fully trained one as it is.

    Of a quantised base: the forms of merge_quantised, else one form.
    """
    model = run.model
    if not isinstance(model, PeftModel):
        return {"trained": model}
    if run.cfg.model.quantization != "none":
        return merge_quantised(run, choice)
    model = copy.deepcopy(model) if keeps else model
    merge: Any = model.merge_and_unload
    return {"merged": merge(safe_merge=True, **choice)}


def _full_precision(run: TrainedRun) -> bool:
    """Whether merging into the base weights rounds no more than fp32 does."""
    model = run.model
    if run.cfg.model.quantization != "none":
        return False
    if not isinstance(model, PeftModel):
        return True
    return all(p.dtype.itemsize >= 4 for p in model.parameters() if p.is_floating_point())


def _write(run: TrainedRun, folder: Path, made: _Made, options: _Options) -> None:
    if made.lora is None:
        made.model.save_pretrained(str(folder))
        run.tokenizer.save_pretrained(str(folder))
        return
    if options.to == "gguf":
        write_gguf(made.lora, _base_of(run), folder / FILE)
        write_atomic(folder / "README.md", gguf_card(run, made.report, options.command))
        return
    made.lora.write(folder, lossy=True)  # what is refused never comes this far
    write_atomic(folder / "README.md", lora_card(run, made.report, options.command))


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


# What is refused --------------------------------------------------------------------------------


def _remedy(options: _Options) -> str:
    """What to do instead of a lossy export."""
    if options.to == "merged":
        return "Export a plain LoRA instead (--to lora)"
    sized = options.rank is not None or options.energy is not None
    more = "raise or leave out --rank, --energy or --max-rank" if sized else "give a larger --rank"
    return f"Export it merged instead (--to merged), which holds the whole update; {more}"


def _no_server(
    run: TrainedRun,
    inputs: Mapping[str, Tensor],
    trained: Tensor,
    shift: float,
) -> NotMergeable:
    """The error of an update that depends on the input, with what the remedy costs."""
    model: Any = run.model
    text = (
        f"{run.cfg.method.name} weighs its parts for each token, so no plain LoRA holds its update "
        "and no server (vLLM, SGLang, llama.cpp) nor stock peft reads it. Serve it with plait; or "
        "take the router as uniform, --approx mean"
    )
    try:
        lora = to_lora(model, approx="mean")
    except ValueError:
        return NotMergeable(f"{text}.")
    off = difference(logits_of(_with_lora(run, lora), inputs), trained)
    return NotMergeable(
        f"{text}, which changes the logits by up to {off:.2g} on {len(trained)} rows, where the "
        f"adapter itself moves them by up to {shift:.2g}."
    )
