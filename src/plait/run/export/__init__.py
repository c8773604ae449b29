"""Export a run: as a plain LoRA for stock peft and every server, or merged into its base model.

exporting   the way of every export: measure, make, refuse, write, read back
request     what is asked for               place      where it may be written
making      the export in memory            fitting    better lossy exports: weighing, distillation
measuring   the run, then its export: on logits, and (held_out) on the run's metrics
refusals    what is not written             report     what is kept and lost
writing     the folder                      card       what it says of itself
read_back   the folder read without plait   logits     of a model, and how far apart they may be
"""

from plait.run.export.exporting import export_run, export_tasks, export_trained
from plait.run.export.held_out import HeldOutRows
from plait.run.export.making import name_base
from plait.run.export.place import check_replaceable, lock_for, mark_export
from plait.run.export.refusals import dependence, loss_refused, readers_of, refuse_misread
from plait.run.export.report import ExportReport
from plait.run.export.request import ALL, DTYPES, check_max_rank, check_server

__all__ = [
    "ALL",
    "DTYPES",
    "ExportReport",
    "HeldOutRows",
    "check_max_rank",
    "check_replaceable",
    "check_server",
    "dependence",
    "export_run",
    "export_tasks",
    "export_trained",
    "lock_for",
    "loss_refused",
    "mark_export",
    "name_base",
    "readers_of",
    "refuse_misread",
]
