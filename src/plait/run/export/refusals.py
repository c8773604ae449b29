"""What is not exported: what a server would misread, and what would not be the trained model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plait.core.delta import Delta
from plait.options import did_you_mean
from plait.run.export.report import ExportReport
from plait.upstream.export import LoraExport
from plait.upstream.servers import READERS, SERVERS, VLLM_RANKS, max_lora_rank

ALL = "all"  # --for: no server in particular
LLAMACPP = "llamacpp"


def dependence(model: nn.Module) -> str | None:
    """What decides the update of a model's adapter besides its weights: token or task, or None."""
    return next((m.depends_on for m in model.modules() if isinstance(m, Delta)), None)


def check_server(server: str) -> None:
    """Raise ValueError for a server that plait does not know."""
    if server not in (ALL, *SERVERS):
        raise ValueError(f"--for {server} is not known. {did_you_mean(server, (ALL, *SERVERS))}")


def check_max_rank(max_rank: int, server: str) -> None:
    """Raise ValueError for a largest rank that a server cannot be started with."""
    if max_rank < 1:
        raise ValueError(f"--max-rank {max_rank}: give 1 or more.")
    if server == "vllm" and max_rank not in VLLM_RANKS:
        known = ", ".join(map(str, VLLM_RANKS))
        raise ValueError(f"--max-rank {max_rank}: vLLM's --max-lora-rank is one of {known}.")


def readers_of(model: Any, lora: LoraExport) -> dict[str, list[str]]:
    """Title of each reader -> why it cannot read an export; [] if it reads it right.

    model: that the export is of.
    """
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return {r.title: r.reasons(lora.config, lora.tensors, tied) for r in READERS}


def refuse_misread(
    lora: LoraExport, readers: Mapping[str, list[str]], server: str, compact: bool
) -> None:
    """Raise ValueError if the server that was asked for would read an export wrong."""
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
    raise ValueError(f"--for {server}: {reader.title}: {'; '.join(reasons)}. {remedy}.")


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
