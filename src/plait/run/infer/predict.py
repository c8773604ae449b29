"""Predict each row of a file with a finished run, and write the rows with their predictions.

The columns are those that the run was trained on; answers may be missing. A prediction is a class
with the probabilities of all classes, a number, or a text.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plait.core.files import write_atomic
from plait.options import did_you_mean, shown
from plait.run.data.reader import read_inputs
from plait.run.data.rows import Row, read_file
from plait.run.data.tokens import Collator, encode_chat, encode_prompt, encode_texts
from plait.run.evaluate import Progress
from plait.run.generate import continue_all
from plait.run.model import check_ids, context_of, positions_of
from plait.run.prepare import TrainedRun, load_run

PREDICTION, PROBABILITIES = "prediction", "probabilities"  # keys of the rows that are written


def predict_run(
    path: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    force: bool = False,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> int:
    """Predict the rows of a file and write them as JSON lines; return their number.

    Each line is the row with `prediction`: the name of a class, beside `probabilities` by class
    name; a number; or the text that continues the prompt, greedily unless the `evaluation` section
    says otherwise. The file is complete or not there.

    Args:
        path: the run folder.
        source: the file of rows, in any format of data.train; a name without one: JSON lines.
        out: the file to write.
        task: of all rows, for a run that routes by task; None: each row names its own.
        batch_size: rows at a time; None: evaluation.batch_size.
        max_new_tokens: of a text; None: evaluation.max_new_tokens.
        force: replace a file at `out`.
        overrides: as in load_run.
        progress: called with (rows done, rows in all).

    Raises:
        FileExistsError: there is a file at `out`, and force is not given.
        FileNotFoundError: no such run or file, or no folder for `out`.
        ValueError: a row that cannot be used, with file and line; what load_run raises.
    """
    source, out = Path(source), Path(out)
    _check_paths(source, out, force)
    run = load_run(path, overrides)
    if batch_size is not None:
        cfg = replace(run.cfg, evaluation=replace(run.cfg.evaluation, batch_size=batch_size))
        run = replace(run, cfg=cfg)
    rows = read_file(source, run.cfg.data)
    inputs = read_inputs(run.cfg.data, run.cfg.model.task, rows, run.facts)
    for row in rows:
        for key in (PREDICTION, PROBABILITIES):
            if key in row.values:
                raise ValueError(
                    f"{row.where}: there is a column {key!r} already, which the output would "
                    "replace. Rename it."
                )
    task_ids = _task_ids(run, rows, inputs, task)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(rows))

    if run.cfg.model.task == "causal_lm":
        prompts = _prompts(run, rows, inputs)
        texts = continue_all(run, prompts, max_new_tokens, task_ids=task_ids, advance=advance)
        predictions = [{PREDICTION: text} for text in texts]
    else:
        if max_new_tokens is not None:
            raise ValueError(
                f"{path}: --max-new-tokens is of generated text, and model.task is "
                f"{run.cfg.model.task}. Leave it out."
            )
        predictions = _scores(run, rows, inputs, task_ids, advance)
    lines = [
        _line({**row.values, **prediction})
        for row, prediction in zip(rows, predictions, strict=True)
    ]
    write_atomic(out, "".join(lines))
    return len(rows)


def _check_paths(source: Path, out: Path, force: bool) -> None:
    """Refuse an output that cannot or must not be written, before the work."""
    if not source.is_file():
        raise FileNotFoundError(f"--input {source}: there is no such file. Correct the path.")
    if out.is_dir():
        raise IsADirectoryError(f"--output {out}: is a folder. Give the name of a file.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--output {out}: there is no folder {out.parent}. Make it first.")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--output {out}: the folder cannot be written to. Give another one.")
    if out.exists():
        if out.samefile(source):
            raise FileExistsError(f"--output {out}: is the input itself. Give another file.")
        if not force:
            raise FileExistsError(
                f"--output {out}: exists. Give --force to replace it, or another file."
            )


def _task_ids(
    run: TrainedRun, rows: list[Row], inputs: list[dict[str, Any]], task: str | None
) -> list[int] | None:
    """Return the index of each row's task; None for a run that does not route."""
    if task is not None or not run.routed:
        run.set_task(task)
    if not run.routed:
        return None
    known = run.tasks
    for row, values in zip(rows, inputs, strict=True):
        name = values.get("task") if task is None else task
        if name is None:
            raise ValueError(
                f"{row.where}: the row has no task, and this run routes by task. Add the column, "
                f"or give --task, one of {', '.join(known)}."
            )
        if name not in known:
            raise ValueError(
                f"{row.where}: the task is {shown(name)}, which this run does not know. "
                f"{did_you_mean(name, known)}"
            )
        values["task"] = name
    return [known.index(values["task"]) for values in inputs]


def _prompts(run: TrainedRun, rows: list[Row], inputs: list[dict[str, Any]]) -> list[list[int]]:
    """Return the ids that each row's text continues."""
    tokenizer, context, prompts = run.tokenizer, context_of(run.model), []
    for row, values in zip(rows, inputs, strict=True):
        if "messages" in values:
            ids = encode_chat(tokenizer, values["messages"], row.where, values.get("tools"))
        else:
            ids = encode_prompt(tokenizer, values["prompt"])
        if not ids:
            raise ValueError(f"{row.where}: the prompt has no tokens. Remove the row.")
        if context is not None and len(ids) >= context:
            raise ValueError(
                f"{row.where}: the prompt has {len(ids):,} tokens, and the model reads "
                f"{context:,}. Shorten it."
            )
        prompts.append(ids)
    check_ids(run.model, max(map(max, prompts)), tokenizer)
    return prompts


@torch.no_grad()
def _scores(
    run: TrainedRun,
    rows: list[Row],
    inputs: list[dict[str, Any]],
    task_ids: list[int] | None,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Return the class and the probabilities of each row, or the number predicted."""
    encoded = encode_texts(inputs, rows, run.cfg.data, run.tokenizer)
    limit = positions_of(run.model)
    for i, (row, item) in enumerate(zip(rows, encoded, strict=True)):
        tokens = len(item["input_ids"])
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{row.where}: the text has {tokens:,} tokens, and the model reads {limit:,}. "
                f"Shorten it, or add data.truncate=true data.max_length={limit} to the command."
            )
        if task_ids is not None:
            item["task_id"] = task_ids[i]
    check_ids(run.model, max(max(item["input_ids"]) for item in encoded), run.tokenizer)
    collate, device = Collator(run.tokenizer, False, run.routed), run.model.device
    predictions: list[dict[str, Any]] = [{} for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]["input_ids"]))
    size, labels = run.cfg.evaluation.batch_size, run.facts["labels"]
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        tensors = {k: v.to(device) for k, v in collate([encoded[i] for i in batch]).items()}
        logits = run.model(**tensors).logits.float().cpu()
        for i, scores in zip(batch, logits, strict=True):
            if not torch.isfinite(scores).all():
                raise ValueError(
                    f"{rows[i].where}: the model's output is NaN or infinite. Use a wider "
                    "model.dtype in training."
                )
            predictions[i] = _prediction(scores.tolist(), labels)
        advance(len(batch))
    return predictions


def _prediction(scores: list[float], labels: list[str] | None) -> dict[str, Any]:
    """Return the number of a regression, or the likeliest class and each one's softmax."""
    if labels is None:
        return {PREDICTION: scores[0]}
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    shares = {name: weight / total for name, weight in zip(labels, weights, strict=True)}
    return {PREDICTION: labels[scores.index(top)], PROBABILITIES: shares}


def _line(values: dict[str, Any]) -> str:
    """Return a row as a line of JSON; what JSON has no form for, such as a date, as text."""
    text = json.dumps(values, ensure_ascii=False, default=str) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a column that the model does not read
        text = json.dumps(values, default=str) + "\n"
    return text
