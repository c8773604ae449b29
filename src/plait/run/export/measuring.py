"""What an export keeps of a run: the run's own values first, then those of the export."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from plait.core.delta import NotMergeable
from plait.run.data.bundle import DataBundle
from plait.run.evaluate import Progress
from plait.run.export.held_out import HeldOutRows
from plait.run.export.logits import base_shift, difference, logits_of, probe, tolerance
from plait.run.export.making import with_lora
from plait.run.export.report import ExportReport
from plait.run.prepare import TrainedRun
from plait.upstream.export import LoraExport, to_lora


@dataclass(frozen=True)
class Yardstick:
    """The logits of a run on a few rows, which its exports are compared with.

    inputs: of the rows. trained: the run's logits on them. shift: how far the adapter moves those
    of the base model. data: the run's held-out rows; None where they cannot be read.
    """

    run: TrainedRun
    task: str | None
    inputs: dict[str, Tensor]
    trained: Tensor
    shift: float
    data: DataBundle | None

    @classmethod
    def of(cls, run: TrainedRun, task: str | None) -> "Yardstick":
        """Measure a run, with its task set."""
        inputs, data = probe(run, task)
        trained = logits_of(run.model, inputs)
        return cls(run, task, inputs, trained, base_shift(run.model, inputs, trained), data)

    def held_out(self, progress: Progress | None) -> HeldOutRows | None:
        """Measure the run on its held-out rows; None without any."""
        split = self.run.held_out_split
        if self.data is None or split is None:
            return None
        return HeldOutRows(self.run.model, self.data, split, self.run.cfg, self.task, progress)

    def report(self, exact: bool, forms: Mapping[str, Any], chosen: str) -> ExportReport:
        """Compare exported models with the run.

        Args:
            exact: whether nothing is lost but the rounding of fp32.
            forms: name -> the model of each form that could be written.
            chosen: the name of the one that is.
        """
        errors = {name: self.error_of(model) for name, model in forms.items()}
        report = ExportReport(
            exact, [], errors[chosen], self.shift, len(self.trained), task=self.task
        )
        return replace(report, forms=errors) if len(errors) > 1 else report

    def error_of(self, model: Any) -> float:
        """Return the largest difference of a model's logits to the run's."""
        return difference(logits_of(model, self.inputs), self.trained)

    def checked(self, report: ExportReport, written: Tensor, name: str) -> ExportReport:
        """Return the report with the error of the written export.

        Args:
            written: logits of the written export on `inputs`. name: of its folder.

        Raises:
            ValueError: an exact export of a run in fp32 is read differently.
        """
        error = difference(written, self.trained)
        full = self.run.cfg.model.dtype == "float32" and report.exact
        if full and not error <= tolerance(self.trained):
            raise ValueError(
                f"{name}: stock peft reads the export with logits off by {error:.2e}. Nothing was "
                "written; please report this with the run's config."
            )
        return replace(report, stock_error=error)

    def no_server(self) -> NotMergeable:
        """The error of an update that depends on the input, with what the remedy would change."""
        text = (
            f"{self.run.cfg.method.name} weighs its parts for each token, so no plain LoRA holds "
            "its update and no server (vLLM, SGLang, llama.cpp) nor stock peft reads it. Serve it "
            "with plait; or take the router as uniform, --approx mean"
        )
        model: Any = self.run.model
        try:
            lora: LoraExport = to_lora(model, approx="mean")
        except ValueError:
            return NotMergeable(f"{text}.")
        off = self.error_of(with_lora(self.run, lora))
        return NotMergeable(
            f"{text}, which changes the logits by up to {off:.2g} on {len(self.trained)} rows, "
            f"where the adapter itself moves them by up to {self.shift:.2g}."
        )
