"""Wrong answers in some train rows, to see how a method stands them."""

from random import Random
from typing import Any

from plait.run.config import DataConfig
from plait.run.data.reader import Columns

_ANSWERS = {"completion": "completion", "classification": "label", "regression": "label"}


def add_label_noise(columns: Columns, data: DataConfig) -> None:
    """Give `data.label_noise` of the train rows another answer of the train rows, in place.

    It is drawn from the answers of the row's task that differ from the row's own; a row whose task
    has one answer alone keeps it. Other splits keep their answers. More noise adds rows to those of
    less noise.

    Raises ValueError for rows without answers.
    """
    if not data.label_noise or "train" not in columns.values:
        return
    if columns.kind not in _ANSWERS:
        raise ValueError(
            f"data.label_noise is {data.label_noise:g}, and the rows are of the kind "
            f"{columns.kind}, which has no answer to exchange. Remove it, or give rows with a "
            "completion or a label."
        )
    answer, rows = _ANSWERS[columns.kind], columns.values["train"]
    places: dict[Any, dict[Any, int]] = {}  # of each answer of a task
    for row in rows:
        of_task = places.setdefault(row.get("task"), {})
        of_task.setdefault(row[answer], len(of_task))
    answers = {task: list(of_task) for task, of_task in places.items()}
    draws = Random(f"label_noise/{data.seed}")
    for row in rows:
        level, chosen = draws.random(), draws.random()
        known = answers[row.get("task")]
        if level < data.label_noise and len(known) > 1:
            place = int(chosen * (len(known) - 1))
            row[answer] = known[place + (place >= places[row.get("task")][row[answer]])]
