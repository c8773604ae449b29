"""What is not exported: what a server would misread, and what would not be the trained model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plait.core.delta import Delta, NotMergeable
from plait.run.export.report import ExportReport
from plait.run.prepare import TrainedRun
from plait.upstream.export import LoraExport
from plait.upstream.servers import READERS, VLLM_RANKS, Base, max_lora_rank


def dependence(model: nn.Module) -> str | None:
    """What decides the update of a model's adapter besides its weights: token or task, or None."""
    return next((m.depends_on for m in model.modules() if isinstance(m, Delta)), None)


def check_task(run: TrainedRun, task: str | None) -> None:
    """Raise NotMergeable for a run that routes by task, if no task is given."""
    if task is None and run.routed:
        raise NotMergeable(
            f"{run.cfg.method.name} has an update for each task, and a plain LoRA or a merged "
            f"model holds one. Give --task NAME ({', '.join(run.tasks)}), or --task all for a "
            "folder each."
        )


def readers_of(model: Any, lora: LoraExport) -> dict[str, list[str]]:
    """Title of each reader -> why it cannot read an export; [] if it reads it right.

    model: that the export is of.
    """
    base = Base.of(model.get_base_model())
    return {r.title: r.reasons(lora.config, lora.tensors, base) for r in READERS}


def refuse_misread(
    lora: LoraExport, readers: Mapping[str, list[str]], server: str, compact: bool, flag: str = ""
) -> None:
    """Raise ValueError if the server that was asked for would read an export wrong.

    flag: how the server was asked for, if not by --for.
    """
    reader = next((reader for reader in READERS if reader.key == server), None)
    reasons = readers[reader.title] if reader is not None else []
    if reader is None or not reasons:
        return
    if compact:
        remedy = "Leave out --compact, or use --to merged"
    elif server == "vllm" and max_lora_rank(lora.rank) is None:
        remedy = f"Give --max-rank {VLLM_RANKS[-1]}, or use --to merged"
    else:
        remedy = "Use --to merged"
    asked = flag or f"--for {server}"
    raise ValueError(f"{asked}: {reader.title}: {'; '.join(reasons)}. {remedy}.")


def loss_refused(report: ExportReport, method: str, remedy: str) -> str | None:
    """Why an export is refused without --lossy; None if it is faithful.

    remedy: a clause that says what else to do.
    """
    if not report.losses:
        return None
    return (
        f"the export of {method} would not be the model that was trained: "
        f"{'; '.join(report.losses)}. {remedy}; or accept the loss (--lossy), which is then "
        "measured on the held-out rows and stands in the card."
    )
