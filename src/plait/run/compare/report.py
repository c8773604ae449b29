"""The report of a comparison: HTML in one file, Markdown, and JSON in the form of peft's suite.

The HTML file asks for no other file, follows the reader's light or dark setting, and can be read
by keyboard and screen reader; what its pictures show stands in tables, too.
"""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from plait.core.files import write_atomic
from plait.run.compare import pictures, tables
from plait.run.compare.outcome import RESULTS
from plait.run.config.yaml import dump
from plait.run.metrics import METRICS

NAME = "report"
_WORDS = ("verdict", "served as", "arm", "rate: value on validation rows", "factors", "best rate")


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and peft_results.jsonl into a folder; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{NAME}.md", markdown(results))
    lines = "".join(json.dumps(run) + "\n" for run in peft_results(results))
    write_atomic(folder / "peft_results.jsonl", lines)
    write_atomic(folder / f"{NAME}.html", html(results))
    return folder / f"{NAME}.html"


def markdown(results: dict[str, Any], level: int = 1) -> str:
    """Return the report as Markdown; level: of its first heading."""
    mark = "#" * level
    title, *_ = table = tables.verdict_table(results)
    parts = [f"{mark} {tables.escaped(title)}", tables.as_markdown(table, _WORDS)]
    said = list(tables.conclusions(results))
    parts += [f"{mark}# What follows, and what does not", *map(tables.escaped, said)]
    for table in _more_tables(results):
        parts += [f"{mark}# {table[0]}", tables.as_markdown(table, _WORDS)]
    parts += [
        f"{mark}# How it was made",
        *[f"- {tables.escaped(line)}" for line in _conditions(results)],
    ]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace(" made\n- ", " made\n\n- ") + "\n"


def html(results: dict[str, Any]) -> str:
    """Return the report as one HTML file."""
    from jinja2 import Environment, StrictUndefined

    source = files("plait.run.compare").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    title, head, rows = tables.verdict_table(results)
    label = METRICS[results["metrics"][0]].label
    return environment.from_string(source).render(
        title=title,
        head=head,
        words=_WORDS,
        rows=[
            {"cells": cells, "kind": _kind(row)}
            for cells, row in zip(rows, results["results"], strict=True)
        ],
        paragraphs=list(tables.conclusions(results)),
        pictures=[picture for picture in _pictures(results, label) if picture["svg"] is not None],
        tables=[{"title": t, "head": h, "rows": r} for t, h, r in _more_tables(results)],
        conditions=list(_conditions(results)),
        configs=[
            {"name": arm["name"], "text": dump({**results["base"], "method": arm["method"]})}
            for arm in results["arms"]
        ],
        environment=json.dumps(results["environment"], indent=1),
    )


def peft_results(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each compared run in the form of peft's method_comparison.

    Its app reads `test accuracy`: that is the metric that decides, where it is a share.
    """
    arms = {arm["name"]: arm for arm in results["arms"]}
    base, packages = results["base"], results["environment"].get("packages", {})
    training = base["training"]
    for row in results["results"]:
        arm = arms[row["arm"]]
        method = arm["method"]
        name = " ".join(filter(None, (row["arm"], row["cell"])))
        for run in row["runs"]:
            accuracy = run["metrics"].get("accuracy", run["metrics"].get("exact_match"))
            measured = {f"test {key}": value for key, value in run["metrics"].items()}
            failed = run["diverged"] is not None
            yield {
                "run_info": {
                    "created_at": None,
                    "total_time": run["wall"],
                    "experiment_name": f"{name}/seed{run['seed']}",
                    "peft_branch": None,
                    "train_config": {
                        "model_id": base["model"]["name"],
                        "dtype": base["model"]["dtype"],
                        "max_seq_length": base["data"]["max_length"],
                        "batch_size": training.get("per_device_train_batch_size"),
                        "max_steps": run["steps"],
                        "seed": run["seed"],
                        "optimizer_type": str(training.get("optim", "AdamW")),
                        "optimizer_kwargs": {"lr": row["rate"]},
                        "lr_scheduler": training.get("lr_scheduler_type"),
                    },
                    "peft_config": {
                        "peft_type": str(method.get("name", "lora")).upper(),
                        **{key: value for key, value in method.items() if key != "name"},
                    },
                    "error_msg": run["diverged"] or "",
                },
                "train_info": {
                    "accelerator_memory_max": run["peak_memory"],
                    "train_time": run["seconds"],
                    "file_size": run["stored"],
                    "num_trainable_params": run["trainable"] or arm["parameters"],
                    "status": "failed" if failed else "success",
                    "metrics": [{"step": run["steps"], "test accuracy": accuracy, **measured}],
                },
                "meta_info": {
                    "package_info": {f"{k}-version": v for k, v in packages.items()},
                    "system_info": {"accelerator": results["environment"].get("device")},
                },
            }


def _more_tables(results: dict[str, Any]) -> Iterator[tables.Table]:
    for table in (
        tables.facts_table(results),
        tables.rates_table(results),
        tables.others_table(results),
    ):
        if table is not None:
            yield table


def _pictures(results: dict[str, Any], label: str) -> Iterator[dict[str, Any]]:
    yield {
        "title": "Differences",
        "text": "The interval of each arm's difference. The ticks are the smallest differences "
        "that the study detects in 80 % of the cases; the line at 0 is no difference.",
        "svg": pictures.forest(results),
    }
    yield {
        "title": "Learning rates",
        "text": f"{tables.capital(label)} on the validation rows at each rate that was tried; a "
        "ring marks the chosen one. A rate that is missing diverged.",
        "svg": pictures.rates(results),
    }
    for cost, title in (
        ("trainable", "parameters"),
        ("seconds", "time"),
        ("peak_memory", "memory"),
    ):
        yield {
            "title": f"{tables.capital(label)} against {title}",
            "text": "The line joins the arms that no other arm beats in both.",
            "svg": pictures.pareto(results, cost),
        }
    yield {
        "title": "Losses",
        "text": "The training loss of the first seed, and the validation loss where it was taken "
        "(marks).",
        "svg": pictures.curves(results),
    }


def _conditions(results: dict[str, Any]) -> Iterator[str]:
    """Yield lines on what was compared with what: data, steps, seeds, tuning, versions."""
    base, tune = results["base"], results["tune"]
    data = base["data"]
    yield f"Model: {base['model']['name']}, {results['task']}."
    yield f"Rows: train from {data['train']}, validation {data['validation']}, test {data['test']}."
    for cell in results["cells"]:
        rows = ", ".join(f"{count:,} {split}" for split, count in results["rows"][cell].items())
        yield f"{cell or 'Each run'}: {results['steps'][cell]:,} steps; rows: {rows}."
    rates = ", ".join(f"{rate:g}" for rate in tune["learning_rate"])
    if tune.get("transfer"):
        yield (
            f"Rates of {results['reference']}: {rates}; the other arms: three around the rate that "
            f"is carried over from its best one; budget {tune['budget']}, {tune['seeds']} seeds "
            f"each, chosen on validation rows; up to {tune['grow']} more where the best one was at "
            "an end. The reference may have another number of trials than the others."
        )
    elif len(tune["learning_rate"]) > 1:
        yield (
            f"Rates: {rates}, budget {tune['budget']}, {tune['seeds']} seeds each, chosen on "
            f"validation rows; up to {tune['grow']} more where the best one was at an end, as many "
            "for each arm."
        )
    else:
        yield f"Rate: {rates}, not tuned, so an arm may be undervalued."
    match = {"none": "nothing", "rank": "rank", "parameters": "trained parameters"}
    yield f"Matched: {match.get(results['match'], results['match'])}."
    for arm in results["arms"]:
        yield (
            f"{arm['name']}: {arm['parameters']:,} trained parameters, {arm['gap']:+.1%} against "
            "the reference."
        )
    yield f"Seeds: {', '.join(map(str, results['seeds']))}; test rows are measured once for each."
    packages = results["environment"].get("packages", {})
    if packages:
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        yield f"Versions: {versions}."
    known = results["environment"]
    if "device" in known:
        yield (
            f"Hardware: {known['device']}, {known.get('cpu_count')} cores, "
            f"{known.get('torch_threads')} threads a run, {known.get('platform')}."
        )
    yield f"Everything shown here is in {RESULTS}."


def _kind(row: dict[str, Any]) -> str:
    made = row["comparison"]
    return "reference" if made is None else made["verdict"]
