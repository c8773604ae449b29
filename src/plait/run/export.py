"""Export a run: as a plain LoRA for stock peft and every server, or merged into its base model.

The logits of the export are measured against those of the trained run on held-out rows before
anything is put in place, and once more by stock peft and transformers in a fresh process.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait.core.config import DeltaConfig
from plait.core.delta import Delta, NotMergeable
from plait.core.events import PlaitWarning
from plait.core.files import lock
from plait.run import stock_check
from plait.run.config import ModelConfig, RunConfig
from plait.run.folder import RunFolder, read_json, replace_dir, write_atomic, write_json
from plait.run.model import base_name, context_of, load_base, quantization_options
from plait.run.prepare import TrainedRun, load_run
from plait.upstream.export import LayerExport, LoraExport, to_lora, upstream_to_lora

PROBE_ROWS = 8
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a stock model takes
TOLERANCE = 1e-3  # of the largest logit: what an exact fp32 export may differ by
_MARK, _SCHEMA = "plait_export.json", "plait.export"  # the file that tells an export


@dataclass(frozen=True)
class ExportReport:
    """What an export keeps and loses.

    exact: whether dW is held exactly. layers: rank and weight error of each layer (lora only).
    logit_error: largest difference to the run's logits. logit_shift: largest difference of the
    run's logits to the base model's, for scale. stock_error: as logit_error, measured by stock
    peft and transformers in a fresh process; None before that. rows: rows measured on.
    """

    exact: bool
    layers: list[LayerExport]
    logit_error: float
    logit_shift: float
    rows: int
    stock_error: float | None = None

    @property
    def weight_error(self) -> float:
        """Largest part of a layer's dW that is left out (relative Frobenius norm)."""
        return max((layer.error for layer in self.layers), default=0.0)


def export_run(
    path: str | Path,
    to: Literal["lora", "merged"],
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    task: str | None = None,
    approx: Literal["mean"] | None = None,
    force: bool = False,
    overrides: Sequence[str] = (),
    announce: Callable[[ExportReport], None] = lambda report: None,
) -> tuple[Path, ExportReport]:
    """Export a finished run to a folder.

    Args:
        path: the run folder.
        to: "lora", a plain peft LoRA, or "merged", a plain transformers checkpoint.
        out: the folder to write; None: `lora` or `merged` in the run folder.
        rank, energy, task, approx: as in plait.to_lora.
        force: replace an earlier export at `out`.
        overrides: other data to measure on, as in evaluate_run.
        announce: called with the measured report before anything is written.

    Raises:
        FileExistsError: something is at `out`, and it is no export or force is not given; or
            `out` is in the run folder, and another process writes there.
        NotMergeable: the update depends on the input.
        ValueError: options that do not fit; an exact export that stock peft reads differently.
    """
    out, own = Path(out) if out is not None else Path(path) / to, RunFolder(path)
    if out.resolve() in [part.resolve() for part in (own.adapter, own.model, own.checkpoints)]:
        raise FileExistsError(f"{out}: is a part of the run itself. Give another --out.")
    check_replaceable(out, force)
    with lock_for(out, path):
        return _export(path, to, out, rank, energy, task, approx, force, overrides, announce)


def _export(
    path: str | Path,
    to: Literal["lora", "merged"],
    out: Path,
    rank: int | None,
    energy: float | None,
    task: str | None,
    approx: Literal["mean"] | None,
    force: bool,
    overrides: Sequence[str],
    announce: Callable[[ExportReport], None],
) -> tuple[Path, ExportReport]:
    run = load_run(path, overrides)
    cfg, model = run.cfg, run.model
    batch = _probe(run)
    inputs = {name: tensor for name, tensor in batch.items() if name in _INPUTS}
    run.set_task(task)
    if approx is None and dependence(model) == "token":
        raise NotMergeable(
            f"{path}: {cfg.method.name} mixes its factors anew for each token, so no plain LoRA or "
            "weight holds the update. Give --approx mean for equal weights, or keep the run."
        )
    trained = _logits(model, inputs)
    shift = _base_shift(model, inputs, trained)
    choice: dict[str, Any] = {"task": task, "approx": approx}
    choice = {name: value for name, value in choice.items() if value is not None}

    if to == "lora":
        lora = _as_lora(model, cfg, rank, energy, choice)
        exact, layers = lora.error == 0 and approx is None, lora.layers
        name_base(lora, cfg.model)
        exported = _with_lora(cfg, model, lora)

        def write(folder: Path) -> None:
            lora.write(folder)
            card = (
                f"# A plain LoRA\n\nLoad it with stock peft on {cfg.model.name}, without plait.\n"
            )
            write_atomic(folder / "README.md", card)
    else:
        if rank is not None or energy is not None:
            raise ValueError("--rank and --energy belong to --to lora. Leave them out.")
        exact, layers = approx is None, []
        exported = _merged(model, cfg, choice)

        def write(folder: Path) -> None:
            exported.save_pretrained(str(folder))
            run.tokenizer.save_pretrained(str(folder))

    error = _difference(_logits(exported, inputs), trained)
    report = ExportReport(exact, layers, error, shift, len(trained))
    announce(report)

    def write_and_check(folder: Path) -> None:
        nonlocal report
        write(folder)
        mark_export(folder, to=to)
        stock_error = _difference(_stock_logits(run, folder, to, inputs), trained)
        report = replace(report, stock_error=stock_error)
        scale = TOLERANCE * max(float(trained.abs().max()), 1.0)
        if exact and cfg.model.dtype == "float32" and not stock_error <= scale:
            raise ValueError(
                f"{out}: stock peft reads the export with logits off by {stock_error:.2e}. Nothing "
                "was written; please report this with the run's config."
            )
        check_replaceable(out, force)  # once more: measuring takes a while

    replace_dir(out, write_and_check)
    return out, report


def dependence(model: nn.Module) -> str | None:
    """What decides the update of a model's adapter besides its weights: token or task, or None."""
    return next((m.depends_on for m in model.modules() if isinstance(m, Delta)), None)


def _probe(run: TrainedRun) -> dict[str, Tensor]:
    """Return the rows to measure on: held-out rows, else training rows, else random tokens."""
    split = run.held_out_split or "train"
    try:
        return run.load_data(split).batch(split, PROBE_ROWS)
    except FileNotFoundError as error:
        warnings.warn(
            f"{error} The export is measured on random tokens instead.", PlaitWarning, stacklevel=3
        )
    special = {*run.tokenizer.all_special_ids}
    embedding: Any = run.model.get_input_embeddings()
    rows = min(len(run.tokenizer), embedding.num_embeddings)
    ids = torch.tensor([i for i in range(rows) if i not in special])
    length = min(16, context_of(run.model) or 16)
    drawn = torch.randint(
        len(ids), (PROBE_ROWS, length), generator=torch.Generator().manual_seed(0)
    )
    return {"input_ids": ids[drawn], "attention_mask": torch.ones_like(drawn)}


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**{k: v.to(model.device) for k, v in inputs.items()}).logits.float().cpu()


def _base_shift(model: Any, inputs: dict[str, Tensor], trained: Tensor) -> float:
    if not isinstance(model, PeftModel):
        return 0.0
    with model.disable_adapter():
        return _difference(_logits(model, inputs), trained)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _as_lora(
    model: Any, cfg: RunConfig, rank: int | None, energy: float | None, choice: dict[str, Any]
) -> LoraExport:
    """The adapter as a plain LoRA: ours through core, upstream's through peft's conversion."""
    if not isinstance(model, PeftModel):
        raise ValueError("method.name = full has no adapter. Use --to merged.")
    if isinstance(model.peft_config["default"], DeltaConfig) or cfg.chain is not None:
        return to_lora(model, rank=rank, energy=energy, **choice)
    if choice:
        raise ValueError(
            f"{cfg.method.name} has no tasks and no router. Leave out {', '.join(choice)}."
        )
    return upstream_to_lora(model, rank, energy)


def _with_lora(cfg: RunConfig, model: Any, lora: LoraExport) -> Any:
    """A new base model with the exported LoRA on it."""
    labels = None if cfg.model.task == "causal_lm" else model.config.num_labels
    base = load_base(cfg.model, labels, None)
    exported = get_peft_model(base, lora.config)
    set_peft_model_state_dict(exported, lora.tensors)
    return exported


def _merged(model: Any, cfg: RunConfig, choice: dict[str, Any]) -> Any:
    """The model with the adapter in its weights; a fully trained one as it is."""
    if not isinstance(model, PeftModel):
        return model
    if cfg.model.quantization != "none":
        raise ValueError(
            f"model.quantization = {cfg.model.quantization}: merging needs a dequantised base. "
            "Export to plain LoRA instead (--to lora)."
        )
    return model.merge_and_unload(safe_merge=True, **choice)


def _stock_logits(run: TrainedRun, folder: Path, to: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the written folder, by stock peft and transformers in a fresh process."""
    cfg = run.cfg.model
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: str(Path(scratch) / name) for name in ("job", "inputs", "logits")}
        save_file(inputs, files["inputs"])
        job = {
            "model": str(folder.resolve()) if to == "merged" else run.source,
            "adapter": str(folder.resolve()) if to == "lora" else None,
            "task": cfg.task,
            "labels": None if cfg.task == "causal_lm" else run.model.config.num_labels,
            "dtype": cfg.dtype,
            "quantization": quantization_options(cfg),
            "trust_remote_code": cfg.trust_remote_code,
            "revision": cfg.revision if to == "lora" else None,
            "pad": None if cfg.task == "causal_lm" else run.tokenizer.pad_token_id,
            "inputs": files["inputs"],
            "logits": files["logits"],
        }
        Path(files["job"]).write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            # -P: or the folder of the script would hide modules of the standard library.
            [sys.executable, "-P", str(stock_check.__file__), files["job"]],
            capture_output=True,
            text=True,
            cwd=scratch,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{folder}: stock peft could not load the export: {last}")
        return load_file(files["logits"])["logits"]


def name_base(lora: LoraExport, model: ModelConfig) -> None:
    """Let an export name its base as a run does."""
    lora.config.base_model_name_or_path = base_name(model)
    lora.config.revision = model.revision


# The folder of an export ------------------------------------------------------------------------


def lock_for(out: Path, run: str | Path) -> AbstractContextManager[None]:
    """Return the lock of a run folder if `out` is inside it, else a lock of nothing."""
    folder = RunFolder.open(run).path
    inside = out.resolve().is_relative_to(folder.resolve())
    return lock(folder) if inside else nullcontext()


def mark_export(folder: Path, **facts: Any) -> None:
    """Note in an export that plait wrote it, and its files: `check_replaceable` asks for both.

    facts: what else the note says.
    """
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    write_json(folder / _MARK, _SCHEMA, {**facts, "files": files})


def check_replaceable(out: Path, force: bool) -> None:
    """Raise FileExistsError unless an export may be put at `out`.

    force: an earlier export may be replaced, if it holds no files but its own.
    """
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: exists. Give --force to replace it, or another --out.")
    refused = "--force replaces an earlier export alone. Remove it yourself, or give another --out."
    if not out.is_dir():
        raise FileExistsError(f"{out}: is a file. {refused}")
    if not any(out.iterdir()):
        return
    if not (out / _MARK).is_file():
        raise FileExistsError(f"{out}: is no export (it has no {_MARK}). {refused}")
    files = read_json(out / _MARK, _SCHEMA, refused).get("files")
    known = {_MARK, *files} if isinstance(files, list) else {_MARK}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            raise FileExistsError(f"{out}: holds {name}, which no export wrote. {refused}")
