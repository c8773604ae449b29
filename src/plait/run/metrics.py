"""The metrics of a run: their names, and their values from what a model said of each row.

To add a metric, compute it in the function of its task and give it a row in METRICS.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.run.config import RunConfig

Rows = dict[str, NDArray[Any]]  # name -> one value for each row


@dataclass(frozen=True)
class Metric:
    """label: its name in tables and pictures. higher_is_better: which of two values wins."""

    label: str
    higher_is_better: bool


METRICS = {  # in the order of tables
    "loss": Metric("loss", False),
    "perplexity": Metric("perplexity", False),
    "token_accuracy": Metric("token accuracy", True),
    "exact_match": Metric("exact match", True),
    "accuracy": Metric("accuracy", True),
    "macro_f1": Metric("macro F1", True),
    "matthews": Metric("Matthews correlation", True),
    "mse": Metric("mean squared error", False),
    "pearson": Metric("Pearson correlation", True),
    "spearman": Metric("Spearman correlation", True),
    "pair_accuracy": Metric("pairs in the right order", True),
    "margin": Metric("margin of the better answers", True),
    "reward": Metric("reward", True),
}
METRICS_OF = {  # task -> what its validation measures; the Trainer minimises `loss`
    "causal_lm": ("loss", "perplexity", "token_accuracy", "exact_match"),
    "classification": ("loss", "accuracy", "macro_f1", "matthews"),
    "regression": ("loss", "mse", "pearson", "spearman"),
    # Objectives other than sft, see `measures`.
    "dpo": ("pair_accuracy", "margin", "perplexity", "token_accuracy", "exact_match"),
    "kto": ("margin", "perplexity", "token_accuracy", "exact_match"),
    "reward": ("loss", "pair_accuracy", "margin"),
    "grpo": ("reward",),
}
HEADLINES = (
    "reward",
    "pair_accuracy",
    "exact_match",
    "accuracy",
    "mse",
    "loss",
)  # the first one there stands for a task


def causal_metrics(rows: Rows) -> dict[str, float | None]:
    """Loss, perplexity and accuracy of the next token over tokens; exact match over rows.

    rows: `nll`, summed over the row's target tokens, `tokens` and `correct`, their numbers;
    `exact_match` if the completions were generated. Each (rows,).
    """
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


def classification_metrics(rows: Rows) -> dict[str, float | None]:
    """Accuracy, F1 averaged over the classes that occur, and Matthews correlation.

    rows: `label` and `predicted` (rows,), class indices; `nll` (rows,) if there is a loss.
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


def regression_metrics(rows: Rows) -> dict[str, float | None]:
    """Mean squared error, Pearson and Spearman correlation (None if a side is constant).

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


def measures(cfg: RunConfig) -> str:
    """Return the key of METRICS_OF for a run: its objective, or for sft its task."""
    return cfg.model.task if cfg.objective.name == "sft" else cfg.objective.name


def pair_metrics(rows: Rows) -> dict[str, float | None]:
    """Share of pairs in the right order, and the mean difference of their scores.

    rows: `score` and `rejected`, what the model gives to the better and to the worse answer: the
    log-probability, or a reward. Each (rows,).
    """
    difference = rows["score"] - rows["rejected"]
    return {
        "pair_accuracy": _finite((difference > 0).mean()),
        "margin": _finite(difference.mean()),
    }


def _dpo_metrics(rows: Rows) -> dict[str, float | None]:
    causal = causal_metrics(rows)
    del causal["loss"]  # not what is trained
    return pair_metrics({**rows, "score": -rows["nll"]}) | causal


def _kto_metrics(rows: Rows) -> dict[str, float | None]:
    """As those of a causal model on the rows that are desired; margin: over the others, a token."""
    desired = rows["desired"] > 0
    parts = [causal_metrics(_of(rows, of)) if of.any() else {} for of in (desired, ~desired)]
    losses = [part.pop("loss", None) for part in parts]
    names = ("perplexity", "token_accuracy", *(["exact_match"] if "exact_match" in rows else []))
    margin = None if None in losses else losses[1] - losses[0]  # type: ignore[operator]
    return {"margin": margin, **{name: parts[0].get(name) for name in names}}


def _of(rows: Rows, chosen: NDArray[Any]) -> Rows:
    return {name: values[chosen] for name, values in rows.items()}


def _reward_metrics(rows: Rows) -> dict[str, float | None]:
    losses = np.logaddexp(0, rows["rejected"] - rows["score"])  # -log sigmoid of the difference
    return {"loss": _finite(losses.mean()), **pair_metrics(rows)}


def metrics_of_rows(kind: str, rows: Rows) -> dict[str, float | None]:
    """Return the metrics of a key of METRICS_OF."""
    if kind in ("dpo", "kto", "reward"):
        return {"dpo": _dpo_metrics, "kto": _kto_metrics, "reward": _reward_metrics}[kind](rows)
    if kind == "grpo":
        return {"reward": _finite(rows["reward"].mean())}
    task = kind
    if task == "classification":
        return classification_metrics(rows)
    return regression_metrics(rows) if task == "regression" else causal_metrics(rows)


def mean_metrics(metrics: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average each metric over tasks; None if a task has none."""
    names = [name for name in metrics[0] if name != "rows"]
    values = {name: [m[name] for m in metrics] for name in names}
    return {n: None if None in v else sum(v) / len(v) for n, v in values.items()}


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return _finite(a @ b / size) if size else None


def _finite(value: Any) -> float | None:
    """Return a float that JSON can write, None for infinite and NaN."""
    return float(value) if math.isfinite(value) else None
