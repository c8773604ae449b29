"""Metrics of a model on held-out rows, and loading a run folder to take them again.

Causal models: loss per target token, perplexity, accuracy of the next token, and the share of
completions that greedy generation reproduces exactly. Encoders: accuracy, macro F1 and Matthews
correlation, or mean squared error, Pearson and Spearman correlation. With a task column each
metric is also given for each task and as the mean over tasks.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from plait.run.card import read_environment, read_evaluation, write_evaluation
from plait.run.config import RunConfig, did_you_mean
from plait.run.data import (
    IGNORED,
    DataBundle,
    Split,
    encode_chat,
    encode_prompt,
    template_columns,
)
from plait.run.folder import RunFolder
from plait.run.prepare import load_run

Progress = Callable[[int, int], None]  # rows done, rows in all
_Rows = dict[str, NDArray[Any]]  # one value a row


@torch.no_grad()
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
    progress: called with (rows done, rows in all), where generated rows count again.

    Returns `rows`, the metrics (losses in nats), and with tasks `tasks` (name -> metrics) and
    `task_mean`. A metric that is not defined on these rows is None.
    Raises ValueError when the split is not there.
    """
    rows = data.splits().get(split)
    if rows is None:
        raise ValueError(
            f"data.{split} is not set, so there is nothing to evaluate on. Set data.{split}."
        )
    generates = data.kind in ("completion", "messages") and (
        cfg.evaluation.generate if generate is None else generate
    )
    total, done = len(rows) * (1 + generates), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    was_training = model.training
    model.eval()
    try:
        if cfg.model.task == "causal_lm":
            values = _causal_rows(model, data, rows, cfg.evaluation.batch_size, advance)
            if generates:
                values["exact_match"] = _exact_matches(model, data, rows, cfg, advance)
            measure = _causal_metrics
        else:
            values = _encoder_rows(model, data, rows, cfg.evaluation.batch_size, advance)
            measure = (
                classification_metrics if cfg.model.task == "classification" else regression_metrics
            )
    finally:
        model.train(was_training)
    metrics: dict[str, Any] = {"rows": len(rows), **measure(values)}
    if data.tasks is not None:
        of_row = np.array(rows["task"])
        metrics["tasks"] = {
            task: {"rows": int((of_row == task).sum())}
            | measure({name: v[of_row == task] for name, v in values.items()})
            for task in sorted(set(of_row.tolist()))
        }
        metrics["task_mean"] = _mean([*metrics["tasks"].values()])
    return metrics


# ---------------------------------------------------------------------------------- metrics


def _causal_metrics(rows: _Rows) -> dict[str, float | None]:
    """loss and perplexity weigh every target token the same; exact_match every row."""
    tokens = rows["tokens"].sum()
    loss = rows["nll"].sum() / tokens
    metrics = {
        "loss": _finite(loss),
        "perplexity": _finite(np.exp(loss)),
        "token_accuracy": _finite(rows["correct"].sum() / tokens),
    }
    if "exact_match" in rows:
        metrics["exact_match"] = _finite(rows["exact_match"].mean())
    return metrics


def classification_metrics(rows: _Rows) -> dict[str, float | None]:
    """Accuracy, F1 averaged over the classes that occur, and Matthews correlation.

    rows: `label` and `predicted` (rows,), class indices; `nll` (rows,) where there is a loss.
    """
    true, predicted = rows["label"], rows["predicted"]
    classes = np.union1d(true, predicted)
    counts = np.zeros((len(classes), len(classes)))  # rows: true, columns: predicted
    np.add.at(counts, (np.searchsorted(classes, true), np.searchsorted(classes, predicted)), 1)
    hits, of_true, of_predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    total = counts.sum()
    covariance = hits.sum() * total - of_true @ of_predicted
    spread = (total**2 - of_true @ of_true) * (total**2 - of_predicted @ of_predicted)
    metrics = {
        "accuracy": _finite(hits.sum() / total),
        "macro_f1": _finite((2 * hits / (of_true + of_predicted)).mean()),
        "matthews": _finite(covariance / math.sqrt(spread)) if spread else 0.0,
    }
    return {"loss": _finite(rows["nll"].mean()), **metrics} if "nll" in rows else metrics


def regression_metrics(rows: _Rows) -> dict[str, float | None]:
    """Mean squared error, Pearson and Spearman correlation (None where a side is constant).

    rows: `label` and `predicted` (rows,).
    """
    import pandas

    true, predicted = rows["label"], rows["predicted"]
    ranks = [pandas.Series(side).rank().to_numpy() for side in (true, predicted)]
    return {
        "mse": _finite(((true - predicted) ** 2).mean()),
        "pearson": _correlation(true, predicted),
        "spearman": _correlation(*ranks),
    }


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return _finite(a @ b / size) if size else None


def _mean(metrics: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average each metric over tasks; None where a task has none."""
    names = [name for name in metrics[0] if name != "rows"]
    values = {name: [m[name] for m in metrics] for name in names}
    return {n: None if None in v else sum(v) / len(v) for n, v in values.items()}


def _finite(value: Any) -> float | None:
    """Return a float that JSON can write, None for infinite and NaN."""
    return float(value) if math.isfinite(value) else None


# --------------------------------------------------------------------------------- forwards


def _batches(rows: Dataset, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of about equal length, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _forward(model: nn.Module, data: DataBundle, rows: Dataset, batch: list[int]) -> Any:
    """Return (logits, labels) of some rows."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in data.collator([rows[i] for i in batch]).items()}
    labels = inputs.pop("labels")
    return model(**inputs).logits, labels


def _causal_rows(
    model: nn.Module, data: DataBundle, rows: Dataset, size: int, advance: Callable[[int], None]
) -> _Rows:
    """Return nll (summed over a row's target tokens), tokens and correct, each (rows,)."""
    values = {name: np.zeros(len(rows)) for name in ("nll", "tokens", "correct")}
    for batch in _batches(rows, [len(ids) for ids in rows["input_ids"]], size):
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
) -> _Rows:
    """Return label and predicted, each (rows,), and nll for classes."""
    label, predicted, nll = (np.zeros(len(rows)) for _ in range(3))
    for batch in _batches(rows, [len(ids) for ids in rows["input_ids"]], size):
        logits, targets = _forward(model, data, rows, batch)
        logits = logits.float()
        if data.labels is not None:
            nll[batch] = functional.cross_entropy(logits, targets, reduction="none").cpu().numpy()
        chosen = logits.argmax(-1) if data.labels is not None else logits.squeeze(-1)
        label[batch], predicted[batch] = targets.cpu().numpy(), chosen.cpu().numpy()
        advance(len(batch))
    values = {"label": label, "predicted": predicted}
    return values if data.labels is None else {**values, "nll": nll}


# ------------------------------------------------------------------------------- generation


def _exact_matches(
    model: nn.Module,
    data: DataBundle,
    rows: Dataset,
    cfg: RunConfig,
    advance: Callable[[int], None],
) -> NDArray[Any]:
    """Return 1 for each row whose completion greedy generation reproduces, else 0, (rows,).

    White space at both ends does not count. Without `data.add_eos` nothing tells the model where
    to stop, so the text is cut to the completion's number of tokens.
    """
    matches = np.zeros(len(rows))
    lengths = rows["prompt_length"]
    for batch in _batches(rows, lengths, cfg.evaluation.batch_size):
        prompts = [rows[i]["input_ids"][: lengths[i]] for i in batch]
        extra = {}
        if data.collator.task_ids:
            extra["task_ids"] = torch.tensor([rows[i]["task_id"] for i in batch])
        made = generate_ids(model, data.tokenizer, prompts, cfg.evaluation.max_new_tokens, **extra)
        for i, ids in zip(batch, made, strict=True):
            if not cfg.data.add_eos:
                ids = ids[: len(rows[i]["input_ids"]) - lengths[i]]
            target = rows[i]["input_ids"][lengths[i] :]
            matches[i] = decode(data.tokenizer, ids) == decode(data.tokenizer, target)
        advance(len(batch))
    return matches


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of some ids, without special tokens and outer white space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    **inputs: Tensor,
) -> list[list[int]]:
    """Continue prompts, padded on the left; return the new ids of each up to its end token.

    temperature: 0 takes the likeliest token each time, above 0 samples. inputs: further tensors
    for the model, such as task_ids (prompts,).
    Raises ValueError for an empty prompt and for prompts that leave no room in the context.
    """
    longest = max(len(ids) for ids in prompts)
    if not all(prompts):
        raise ValueError("the prompt has no tokens. Give at least one character.")
    context = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if context is None:  # models without positions, such as Bloom
        context = longest + max_new_tokens
    if longest >= context:
        raise ValueError(
            f"the prompt has {longest} tokens, the model's context {context}. Shorten the prompt."
        )
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ends = _end_ids(model, tokenizer)
    options = GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - longest),
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        pad_token_id=pad,
        eos_token_id=ends or None,
        use_cache=True,
    )
    device = next(model.parameters()).device
    inputs = {"input_ids": ids, "attention_mask": mask, **inputs}
    made = model.generate(**{k: v.to(device) for k, v in inputs.items()}, generation_config=options)
    return [_until(row, ends) for row in made[:, longest:].tolist()]


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text for the tokenizer or the model (a chat model has several)."""
    own = model.generation_config.eos_token_id
    every = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({end for end in every if isinstance(end, int)})


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Cut ids at the first end token; what follows it is padding."""
    return next((ids[:n] for n, i in enumerate(ids) if i in ends), ids)


# --------------------------------------------------------------------------------- run folders


def evaluate_run(
    path: str | Path,
    split: Split | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run on a split (None: test, else validation) and write eval.json.

    The metrics stand in eval.json under the split's name; with overrides of the data, which are
    not what the run was trained with, they are only returned.
    Raises what load_run and load_data raise, and ValueError when there is no such split.
    """
    run = load_run(path, overrides)
    data = run.load_data()
    split = split or data.held_out_split
    if split is None:
        raise ValueError(
            f"{path}: data.validation and data.test are not set. Give rows: "
            f"plait evaluate {path} data.test=FILE"
        )
    metrics = evaluate_model(run.model, data, split, run.cfg, progress=progress)
    if not overrides:
        write_evaluation(run.folder, **{split: metrics})
    return {"split": split, **metrics}


# --------------------------------------------------------------------------------- the harness


def harness_run(
    path: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Run tasks of the EleutherAI evaluation harness on a causal run; write eval.json.

    tasks: names that lm_eval knows, or that are in include_path (a folder with task files).
    limit: only the first rows of each task, for a quick look.
    Returns task -> metric -> value, as lm_eval names them; they stand under `harness` in
    eval.json. Raises ImportError without lm_eval, ValueError for an unknown task.
    """
    try:
        harness: Any = importlib.import_module("lm_eval")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
        task_files: Any = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise ImportError(
            f'--harness needs lm_eval ({error}). Install it with: pip install "plait[eval]"'
        ) from error
    run = load_run(path)
    if run.cfg.model.task != "causal_lm":
        raise ValueError(
            f"{path}: the harness needs a causal language model, model.task is "
            f"{run.cfg.model.task}. "
            "Evaluate it without --harness."
        )
    # Indexing lm_eval's own task files takes long; tasks of include_path alone do without.
    where = None if include_path is None else str(include_path)
    manager = task_files.TaskManager(include_path=where, include_defaults=False)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        manager = task_files.TaskManager(include_path=where)
        unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"--harness: {unknown[0]} is no task of lm_eval. "
            + did_you_mean(unknown[0], manager.all_tasks)
        )
    # HFLM reads its context length and device off the model; the class it wants is the base's.
    wrapped = models.HFLM(
        pretrained=run.model,
        tokenizer=run.tokenizer,
        batch_size=run.cfg.evaluation.batch_size,
    )
    found = harness.simple_evaluate(
        wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
    )
    results = {
        task: {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in found["results"].items()
    }
    known = read_evaluation(run.folder).get("harness", {})
    write_evaluation(run.folder, harness=known | results)
    return results


# ------------------------------------------------------------------------------ one generation


def generate_run(
    path: str | Path,
    prompt: str | None = None,
    fields: Mapping[str, str] | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continue one prompt with a run, put into the same template as in training.

    prompt: the text; where data.prompt_template has one column, it fills that column. fields:
    column -> text for templates with several. task: for a run that routes by task.
    Raises ValueError for an encoder run, a prompt that does not fill the template, a task that
    is missing or unknown.
    """
    run = load_run(path)
    cfg: RunConfig = run.cfg
    if cfg.model.task != "causal_lm":
        raise ValueError(
            f"{path}: model.task is {cfg.model.task}, which generates no text. "
            f"Use: plait evaluate {path}"
        )
    ids = _prompt_ids(path, cfg, run.tokenizer, prompt, fields or {})
    routed = cfg.method.options.get("routing") == "task"
    if routed and task is None:
        known = ", ".join(read_environment(RunFolder.open(path))["run"]["tasks"])
        raise ValueError(f"{path}: this run routes by task. Give --task, one of {known}.")
    if task is not None:
        if not routed:
            raise ValueError(f"{path}: --task {task}: this run does not route. Leave --task out.")
        select_task: Any = run.model.set_task  # a method of the adapter's tuner
        select_task(task)
    torch.manual_seed(seed)
    wanted = cfg.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
    made = generate_ids(run.model, run.tokenizer, [ids], wanted, temperature)
    return decode(run.tokenizer, made[0])


def _prompt_ids(
    path: str | Path,
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    fields: Mapping[str, str],
) -> list[int]:
    """Return the ids of a prompt in the run's template."""
    template = cfg.data.prompt_template
    columns: list[str] = []
    if template is not None:
        columns = list(dict.fromkeys(template_columns(template, "data.prompt_template")))
    if len(columns) == 1 and prompt is not None:
        fields = {columns[0]: prompt, **fields}
        prompt = None
    if template is not None:
        if prompt is not None or sorted(fields) != sorted(columns):
            asked = " ".join(f"--field {name}=TEXT" for name in columns)
            raise ValueError(f"{path}: data.prompt_template is {template!r}. Give {asked}.")
        return encode_prompt(tokenizer, template.format(**fields))
    if prompt is None or fields:
        raise ValueError(f"{path}: this run has no prompt template. Give --prompt TEXT alone.")
    if read_environment(RunFolder.open(path))["run"]["kind"] == "messages":
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return encode_prompt(tokenizer, prompt)
