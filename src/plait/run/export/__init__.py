"""Export a run: as a plain LoRA for stock peft and every server, or merged into its base model.

exporting   a run -> a folder: measure, refuse, write, read back
logits      of the run, of its export, and of the folder read without plait
fitting     better lossy exports: inputs to weigh by, distillation
held_out    the run's held-out metrics, of the run and of its export
report      what is kept and lost             refusals   what is not written
card        what the folder says of itself    place      where it may be written
"""

from plait.run.export.exporting import (
    DTYPES,
    export_run,
    export_tasks,
    export_trained,
    name_base,
)
from plait.run.export.held_out import HeldOutRows
from plait.run.export.place import check_replaceable, lock_for, mark_export
from plait.run.export.refusals import (
    ALL,
    check_max_rank,
    check_server,
    dependence,
    loss_refused,
    readers_of,
    refuse_misread,
)
from plait.run.export.report import ExportReport

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
