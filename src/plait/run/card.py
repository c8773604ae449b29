"""Pictures and texts about one run: the loss curve, the table before / after, the model card."""

import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from plait.run.config import RunConfig
from plait.run.folder import RunFolder, write_atomic
from plait.run.metrics import HEADLINES, METRICS
from plait.upstream.table import BASELINES


def write_loss_curve(folder: RunFolder, title: str) -> None:
    """Draw training loss, held-out loss and learning rate over the steps as loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = folder.read_metrics()
    train = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    held_out = [(r["step"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    evaluation = folder.read_evaluation()
    total = max((r["step"] for r in rows), default=0)
    if evaluation.get("split") == "validation":
        for name, step in (("before", 0), ("after", total)):
            measured = evaluation.get(name, {})
            loss = measured.get("loss", measured.get("mse"))
            if loss is not None and step not in [s for s, _ in held_out]:
                held_out.append((step, loss))
    rate = [(r["step"], r["learning_rate"]) for r in rows if r.get("learning_rate") is not None]

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    marker = "." if len(train) < 40 else ""
    if train:
        top.plot(*zip(*train, strict=True), marker=marker, color="C0", label="training")
    if held_out:
        top.plot(
            *zip(*sorted(held_out), strict=True),
            marker="o",
            ls="--",
            color="C1",
            label="validation",
        )
    if train or held_out:
        top.legend(frameon=False)
    top.set_ylabel("loss")
    top.set_title(title, fontsize=10)
    top.grid(alpha=0.3)
    if rate:
        bottom.plot(*zip(*rate, strict=True), color="C2", marker=marker)
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    bottom.set_ylabel("learning rate", fontsize=8)
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(folder.loss_curve, picture.getvalue())


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) for each metric of one evaluation.

    For each task and for the mean over tasks only the headline.
    """
    rows = [
        (metric.label, f"{metrics[key]:.4g}")
        for key, metric in METRICS.items()
        if metrics.get(key) is not None
    ]
    parts = {"mean over tasks": metrics.get("task_mean", {}), **metrics.get("tasks", {})}
    for part, values in parts.items():
        key = next((name for name in HEADLINES if values.get(name) is not None), None)
        if key is not None:
            rows.append((f"{part}: {METRICS[key].label}", f"{values[key]:.4g}"))
    return rows


def comparison_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (metric, before, after) for eval.json; "-" for a value that is missing."""
    before = dict(metric_rows(evaluation.get("before", {})))
    after = dict(metric_rows(evaluation.get("after", {})))
    names = [*before, *(name for name in after if name not in before)]
    return [(name, before.get(name, "-"), after.get(name, "-")) for name in names]


def kept_step(run: Mapping[str, Any]) -> str | None:
    """Say which step's weights a run kept, from its facts; None if it was the last step's."""
    kept = run.get("kept")
    if kept is None:
        return None
    metric = METRICS.get(kept["metric"])
    label = kept["metric"] if metric is None else metric.label
    return f"step {kept['step']}, best validation {label} {kept['value']:.4g}"


def early_stop(run: Mapping[str, Any]) -> str | None:
    """Say after which step a run stopped early, from its facts; None if it made all steps."""
    planned = run.get("planned_steps")
    if planned is None:
        return None
    best = run.get("best_step")
    since = "" if best is None else f" since step {best}"
    return f"step {run['steps']} of {planned}, no better validation{since}"


def write_card(folder: RunFolder, cfg: RunConfig) -> str:
    """Write the model card README.md from the run's other files; return its text."""
    from jinja2 import Environment, StrictUndefined

    if cfg.method.name in BASELINES:
        method = BASELINES[cfg.method.name]
    else:
        from plait.core.registry import find

        method = find(cfg.method.name)
    causal = cfg.model.task == "causal_lm"
    source = files("plait.run").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    # Markdown, not HTML: nothing is escaped.
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(source)
    environment, evaluation = folder.read_environment(), folder.read_evaluation()
    run, builtin = environment["run"], cfg.model.name.startswith("builtin:")
    text = template.render(
        cfg=cfg,
        config=folder.config.read_text(encoding="utf-8"),
        sources=[cfg.data.train] if isinstance(cfg.data.train, str) else cfg.data.train,
        method=method,
        of_plait=cfg.method.name not in BASELINES,
        full=cfg.method.name == "full",
        auto_class="AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification",
        builtin=builtin,
        has_lora=folder.lora.is_dir(),
        by_task=cfg.method.options.get("routing") == "task",
        base_path="tiny_model_dir()" if builtin else repr(cfg.model.name),
        num_labels=len(run["labels"] or ()) if causal or run["labels"] else 1,
        environment=environment,
        run=run,
        kept=kept_step(run),
        stopped=early_stop(run),
        split=evaluation.get("split"),
        rows=evaluation.get("after", {}).get("rows"),
        comparison=comparison_rows(evaluation),
    )
    write_atomic(folder.card, text)
    return text
