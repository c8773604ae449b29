"""What an export keeps and loses."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.run.export.held_out import HeldOut
from plait.upstream.export import TOLERATED, LayerExport


@dataclass(frozen=True)
class ExportReport:
    """What an export keeps and loses.

    exact: whether nothing is lost but the rounding of fp32. layers: rank and errors of each layer
    (lora only). logit_error: largest difference to the run's logits. logit_shift: largest
    difference of the run's logits to the base model's, for scale. rows: that logits were measured
    on. rank: the rank in the file, of all layers unless it is compact. readers: title of each
    reader -> why it cannot read the export, [] if it reads it right. held_out: metrics of the run
    and of the export; None where it is exact or the run has no held-out rows. task: the one that
    was exported, of a run with several. stock_error: as logit_error, of the written folder as stock
    peft and transformers read it; None before that. forms: of a quantised base that was
    merged into, each form that can be written -> its logit_error.
    """

    exact: bool
    layers: list[LayerExport]
    logit_error: float
    logit_shift: float
    rows: int
    rank: int = 0
    readers: Mapping[str, list[str]] = field(default_factory=dict)
    held_out: HeldOut | None = None
    task: str | None = None
    stock_error: float | None = None
    forms: Mapping[str, float] = field(default_factory=dict)

    @property
    def weight_error(self) -> float:
        """Largest part of a layer's dW that is left out (relative Frobenius norm)."""
        return max((layer.error for layer in self.layers), default=0.0)

    @property
    def rounding(self) -> float:
        """Largest relative rounding error of a layer's dW."""
        return max((layer.rounding for layer in self.layers), default=0.0)

    @property
    def losses(self) -> list[str]:
        """What is lost beyond what an export may lose unasked; [] for a faithful export."""
        said = []
        if self.weight_error > TOLERATED:
            worst = max(self.layers, key=lambda layer: layer.error)
            said.append(f"{worst.error:.1%} of the update of {worst.name} is left out")
        if self.held_out is not None:
            said += self.held_out.said(self.held_out.moved)
        return said
