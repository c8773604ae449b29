"""Measure a model on held-out rows.

Causal models: loss per target token, perplexity, accuracy of the next token, and the share of
completions that greedy generation reproduces exactly. Encoders: accuracy, macro F1 and Matthews
correlation, or mean squared error, Pearson and Spearman correlation. With a task column each
metric is also given for each task and as the mean over tasks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from plait.core.files import unwritten
from plait.run.config import REMOTE_CODE, RunConfig
from plait.run.data.bundle import DataBundle, Split
from plait.run.data.tokens import IGNORED
from plait.run.generate import decode, generate_ids
from plait.run.metrics import Rows, mean_metrics, measures, metrics_of_rows
from plait.run.objectives.rewards import reward_rows
from plait.run.parallel import ranks
from plait.run.parallel.sharded import is_sharded
from plait.run.prepare import load_run

Progress = Callable[[int, int], None]  # rows done, rows in all


def evaluate_run(
    path: str | Path,
    split: Split | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run on a split (None: test, else validation) and write eval.json.

    Class and task indices are those of the run, and only the rows of that split are read.
    eval.json keeps the metrics under the split's name. With overrides of data or evaluation, which
    are not what the run was trained with, they are only returned.

    Raises what load_run and load_data raise, ValueError when there is no such split or eval.json is
    damaged, and OSError, which holds the metrics, when it cannot be written.
    """
    run = load_run(path, overrides)
    split = split or run.held_out_split
    if split is None:
        raise ValueError(
            f"{path}: data.validation and data.test are not set. Give rows: "
            f"plait evaluate {path} data.test=FILE"
        )
    keeps = all(text.startswith(REMOTE_CODE) for text in overrides)
    if keeps:
        run.folder.read_evaluation()  # a damaged file is refused before the work
    data = run.load_data(split)
    metrics = evaluate_model(run.model, data, split, run.cfg, progress=progress)
    if keeps:
        try:
            run.folder.write_evaluation(**{split: metrics})
        except (OSError, ValueError) as error:
            reason = str(error).rstrip(".")
            text = f"{run.folder.evaluation}: could not be written ({reason}). Put this into it: "
            raise unwritten(text + json.dumps({split: metrics}), error) from error
    return {"split": split, **metrics}


def evaluate_model(
    model: nn.Module,
    data: DataBundle,
    split: Split,
    cfg: RunConfig,
    generate: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model on one split; the mode (train, eval) is put back and no RNG is used.

    generate: whether to take exact match by generation; None: as `evaluation.generate` says.
    progress: called with (rows done, rows in all); rows that are also generated count twice.

    Returns `rows`, the metrics (losses in nats), and with tasks `tasks` (name -> metrics) and
    `task_mean`. A metric that is not defined on these rows is None.
    Raises ValueError when the split is not there.
    """
    return metrics_of_split(
        data, split, cfg, measure_rows(model, data, split, cfg, generate, progress)
    )


def metrics_of_split(
    data: DataBundle, split: Split, cfg: RunConfig, values: Rows
) -> dict[str, Any]:
    """Return what `evaluate_model` returns; values: of `measure_rows`."""
    metrics: dict[str, Any] = {"rows": len(getattr(data, split))}
    metrics |= metrics_of_rows(measures(cfg), values)
    if data.tasks is not None:
        of_row = np.array(getattr(data, split)["task"])
        metrics["tasks"] = {
            task: {"rows": int((of_row == task).sum())}
            | metrics_of_rows(
                measures(cfg), {name: v[of_row == task] for name, v in values.items()}
            )
            for task in sorted(set(of_row.tolist()))
        }
        metrics["task_mean"] = mean_metrics([*metrics["tasks"].values()])
    return metrics


@torch.no_grad()
def measure_rows(
    model: nn.Module,
    data: DataBundle,
    split: Split,
    cfg: RunConfig,
    generate: bool | None = None,
    progress: Progress | None = None,
) -> Rows:
    """Return what the metrics are computed from: name -> one value for each row of a split.

    Several processes measure a part of the batches each, and all return the values of all rows.
    Arguments and errors are those of `evaluate_model`.
    """
    rows = getattr(data, split)
    if rows is None:
        raise ValueError(
            f"data.{split} is not set, so there is nothing to evaluate on. Set data.{split}."
        )
    generates = data.kind in ("completion", "messages") and (
        cfg.evaluation.generate if generate is None else generate
    )
    generates &= cfg.objective.name not in ("reward", "grpo")  # these have no completion to match
    pairs = cfg.objective.name in ("dpo", "reward")
    total, done = len(rows) * (1 + generates + pairs), 0
    parts = ranks.size() if splits(model) else 1

    def advance(count: int) -> None:
        nonlocal done
        done = min(total, done + count * parts)
        if progress is not None:
            progress(done, total)

    was_training = model.training
    model.eval()
    try:
        if cfg.objective.name == "grpo":
            return {"reward": _rewards(model, data, rows, cfg, advance)}
        if cfg.objective.name == "reward":
            return _scored_rows(model, data, rows, cfg.evaluation.batch_size, advance)
        if cfg.model.task != "causal_lm":
            values = _encoder_rows(model, data, rows, cfg.evaluation.batch_size, advance)
        else:
            values = _causal_rows(model, data, rows, cfg.evaluation.batch_size, advance)
            if cfg.objective.name == "dpo":
                others = rejected_rows(rows)
                of_others = _causal_rows(model, data, others, cfg.evaluation.batch_size, advance)
                values["rejected"] = -of_others["nll"]
            if cfg.objective.name == "kto":
                values["desired"] = np.array(rows["desired"])
            if generates:
                values["exact_match"] = _exact_matches(model, data, rows, cfg, advance)
        return ranks.add_up(values) if splits(model) else values
    finally:
        model.train(was_training)


# --------------------------------------------------------------------------------- forwards


def batches(rows: Dataset, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of about equal length, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def splits(model: nn.Module) -> bool:
    """Whether processes measure different batches; a sharded model's forward takes them all."""
    return not is_sharded(model)


def own_batches(
    model: nn.Module, rows: Dataset, lengths: Sequence[int], size: int
) -> Iterator[list[int]]:
    """Yield the row numbers of the batches that this process measures."""
    every = batches(rows, lengths, size)
    return islice(every, ranks.rank(), None, ranks.size()) if splits(model) else every


def _forward(model: nn.Module, data: DataBundle, rows: Dataset, batch: list[int]) -> Any:
    """Return (logits, labels) of some rows."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in data.collator([rows[i] for i in batch]).items()}
    labels = inputs.pop("labels")
    return model(**inputs).logits, labels


def _causal_rows(
    model: nn.Module, data: DataBundle, rows: Dataset, size: int, advance: Callable[[int], None]
) -> Rows:
    """Return nll (summed over a row's target tokens), tokens and correct, each (rows,)."""
    values = {name: np.zeros(len(rows)) for name in ("nll", "tokens", "correct")}
    for batch in own_batches(model, rows, [len(ids) for ids in rows["input_ids"]], size):
        logits, labels = _forward(model, data, rows, batch)
        for i, scores, targets in zip(batch, logits[:, :-1], labels[:, 1:], strict=True):
            kept = targets != IGNORED
            scores, targets = scores[kept].float(), targets[kept]  # (tokens, vocabulary)
            values["nll"][i] = functional.cross_entropy(scores, targets, reduction="sum").item()
            values["tokens"][i] = len(targets)
            values["correct"][i] = (scores.argmax(-1) == targets).sum().item()
        advance(len(batch))
    return values


def _encoder_rows(
    model: nn.Module, data: DataBundle, rows: Dataset, size: int, advance: Callable[[int], None]
) -> Rows:
    """Return label and predicted, each (rows,), and nll for classes."""
    label, predicted, nll = (np.zeros(len(rows)) for _ in range(3))
    for batch in own_batches(model, rows, [len(ids) for ids in rows["input_ids"]], size):
        logits, targets = _forward(model, data, rows, batch)
        logits = logits.float()
        if data.labels is not None:
            nll[batch] = functional.cross_entropy(logits, targets, reduction="none").cpu().numpy()
        chosen = logits.argmax(-1) if data.labels is not None else logits.squeeze(-1)
        label[batch], predicted[batch] = targets.cpu().numpy(), chosen.cpu().numpy()
        advance(len(batch))
    values = {"label": label, "predicted": predicted}
    return values if data.labels is None else {**values, "nll": nll}


def rejected_rows(rows: Dataset) -> Dataset:
    """Return pairs with the rejected answers in the place of the chosen ones."""

    def other(row: dict[str, Any]) -> dict[str, Any]:
        start, answer = row["prompt_length"], row["rejected_ids"]
        ids = row["input_ids"][:start] + answer
        labels = [IGNORED] * start + answer
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}

    kept = ("prompt_length", "task_id", "sample_type")
    return Dataset.from_list(
        [other(row) | {name: row[name] for name in kept if name in row} for row in rows]  # type: ignore[call-overload]
    )


def _scored_rows(
    model: nn.Module, data: DataBundle, rows: Dataset, size: int, advance: Callable[[int], None]
) -> Rows:
    """Return what a reward model gives to the chosen and to the rejected answers, (rows,)."""
    values = {}
    others = rejected_rows(rows).remove_columns("labels")
    for name, part in (("score", rows), ("rejected", others)):
        values[name] = np.zeros(len(part))
        for batch in batches(part, [len(ids) for ids in part["input_ids"]], size):
            device = next(model.parameters()).device
            inputs = data.collator([part[i] for i in batch])
            scores = model(**{k: v.to(device) for k, v in inputs.items()}).logits
            values[name][batch] = scores.float().squeeze(-1).cpu().numpy()
            advance(len(batch))
    return values


def _rewards(
    model: nn.Module,
    data: DataBundle,
    rows: Dataset,
    cfg: RunConfig,
    advance: Callable[[int], None],
) -> NDArray[Any]:
    """Return the reward of what generation answers to each prompt, (rows,)."""
    made = dict(_generated(model, data, rows, cfg, advance))
    answers = [made[i] for i in range(len(rows))]
    texts = [decode(data.tokenizer, ids) for ids in answers]
    return reward_rows(
        cfg.objective, [json.loads(given) for given in rows["given"]], texts, answers
    )


def _exact_matches(
    model: nn.Module,
    data: DataBundle,
    rows: Dataset,
    cfg: RunConfig,
    advance: Callable[[int], None],
) -> NDArray[Any]:
    """Return 1 for each row whose completion generation reproduces, else 0, (rows,).

    It is greedy unless the `evaluation` section says otherwise. White space at both ends is
    ignored. Without `data.add_eos` the model never learned to stop, so the text is cut to the
    completion's number of tokens.
    """
    matches = np.zeros(len(rows))
    lengths = rows["prompt_length"]
    for i, ids in _generated(model, data, rows, cfg, advance):
        target = rows[i]["input_ids"][lengths[i] :]
        if not cfg.data.add_eos:
            ids = ids[: len(target)]
        matches[i] = decode(data.tokenizer, ids) == decode(data.tokenizer, target)
    return matches


def _generated(
    model: nn.Module,
    data: DataBundle,
    rows: Dataset,
    cfg: RunConfig,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of each row of this process and what generation answers to its prompt."""
    lengths, evaluation = rows["prompt_length"], cfg.evaluation
    for batch in own_batches(model, rows, lengths, evaluation.batch_size):
        prompts, extra = [rows[i]["input_ids"][: lengths[i]] for i in batch], {}
        if data.collator.task_ids:
            extra["task_ids"] = torch.tensor([rows[i]["task_id"] for i in batch])
        most, decoding = evaluation.max_new_tokens, evaluation.decoding
        made = generate_ids(model, data.tokenizer, prompts, most, decoding=decoding, **extra)
        yield from zip(batch, made, strict=True)
        advance(len(batch))
