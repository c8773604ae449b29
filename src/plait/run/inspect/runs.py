"""Inspect runs: what did the adapters learn, layer by layer, and how alike are they?

Layers are read one at a time; the models of all runs are held together. See
plait.run.inspect.findings for the report, plait.run.inspect.pictures for what is drawn.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from plait.inspect.direction import Alignment, alignment, principal
from plait.inspect.routing import Load
from plait.inspect.similarity import chance, cosine, overlap, principal_angles
from plait.inspect.spectrum import effective_rank, numerical_rank, stable_rank
from plait.inspect.update import Update
from plait.run.data.bundle import DataBundle
from plait.run.evaluate import Progress
from plait.run.folder import replace_dir, write_atomic
from plait.run.inspect.adapted import SINGLE, Adapted, adapted_layers, place
from plait.run.inspect.findings import (
    GateReport,
    InspectReport,
    LayerReport,
    LoadReport,
    Number,
    PairReport,
    RoutingReport,
    RunReport,
    UpdateReport,
    by_module,
    by_pair,
    by_task,
)
from plait.run.model import load_base, to_device
from plait.run.prepare import TrainedRun, load_run

REPORT = "inspect.json"
_FILES = re.compile(r"inspect\.json|\w+\.(png|svg)")  # of a report, of earlier versions too
# Two bases whose weights differ by more than this, relative, are different models; what
# quantisation to 4 bits and further training change is less.
SAME_BASE = 0.5


@dataclass
class _Run:
    """A loaded run and its adapted layers."""

    label: str
    path: str
    loaded: TrainedRun
    layers: dict[str, Adapted]
    notes: list[str] = field(default_factory=list)


def inspect_runs(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    rows: int = 256,
    principal_k: int = 8,
    pictures: bool = True,
    force: bool = False,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Path, InspectReport]:
    """Inspect one run, or several of one base model side by side; write the report.

    Args:
        paths: run folders.
        out: the folder to write; None: `inspect` in the first run folder.
        rows: held-out rows for token routers; 0: none.
        principal_k: top directions of W that updates are compared with; 0: none.
        pictures: whether to draw.
        force: replace an earlier report at `out`.
        overrides: `data.x=..`: other rows for routers.
        progress: called with (layers done, layers in all).

    Raises:
        FileExistsError: something is at `out`, and it is no report or force is not given.
        FileNotFoundError: no run, or one that is not finished.
        ValueError: runs of different base models, or a number out of range.
    """
    for name, value in (("--rows", rows), ("--principal", principal_k)):
        if value < 0:
            raise ValueError(f"{name} {value} is below 0. Give 0 or more.")
    out = Path(out) if out is not None else Path(paths[0]) / "inspect"
    _check_out(out, force)
    labels = _labels(paths)
    runs = [_load(p, label, overrides) for p, label in zip(paths, labels, strict=True)]
    notes = _check_bases(runs)
    report = _report(runs, notes, rows, principal_k, progress)

    def write(folder: Path) -> None:
        write_atomic(folder / REPORT, report.text())
        if pictures:
            from plait.run.inspect.pictures import draw  # loads matplotlib

            for file, content in draw(report).items():
                write_atomic(folder / file, content)

    replace_dir(out, write)
    return out, report


# -------------------------------------------------------------------------------------- loading


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: exists. Give --force to replace it, or another --out.")
    refused = "which --force does not replace. Give another --out."
    if not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file()):
        raise FileExistsError(f"{out}: holds something else than a report, {refused}")
    for path in sorted(out.iterdir()):
        if not _FILES.fullmatch(path.name):
            raise FileExistsError(f"{out}: holds {path.name} beside a report, {refused}")


def _labels(paths: Sequence[str | Path]) -> list[str]:
    """The folders' names, or the shortest ends of their paths that differ."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(p for i, p in enumerate(paths) if parts[i] in parts[:i])
        raise ValueError(f"{twice}: given twice. Give each run once.")
    size = 1
    while len({part[-size:] for part in parts}) < len(parts):
        size += 1
    return ["/".join(part[-size:]) for part in parts]


def _load(path: str | Path, label: str, overrides: Sequence[str]) -> _Run:
    loaded = load_run(path, overrides)
    cfg, model = loaded.cfg, loaded.model
    base, notes = None, []
    if isinstance(model, PeftModel):
        saved = model.peft_config[model.active_adapters[0]].to_dict().get("modules_to_save")
        if saved:
            notes.append(f"trained whole and not inspected: {', '.join(saved)}")
    else:
        outputs = None if cfg.model.task == "causal_lm" else model.config.num_labels
        base = to_device(load_base(cfg.model, outputs), cfg)
        notes.append("trained as well and not inspected: embeddings, norms, biases, output layer")
    layers: dict[str, Adapted] = {}
    for layer in adapted_layers(model, base):
        if layer.weight().ndim == 2:
            layers[layer.name] = layer
        else:
            notes.append(f"left out: {layer.name}, whose weight is no matrix")
    return _Run(label, str(path), loaded, layers, notes)


def _check_bases(runs: Sequence[_Run]) -> list[str]:
    """Raise for different base models; return what does not compare."""
    first, notes = runs[0], []
    for run in runs[1:]:
        common = [name for name in first.layers if name in run.layers]
        if not common:
            raise ValueError(
                f"{run.path}: no adapted layer is also adapted in {first.path}. Inspect them one "
                "by one."
            )
        shapes = [(n, *(tuple(r.layers[n].weight().shape) for r in (first, run))) for n in common]
        wrong = [(n, a, b) for n, a, b in shapes if a != b]
        if wrong:
            name, a, b = wrong[0]
            raise ValueError(
                f"{run.path}: {len(wrong)} of {len(common)} layers have another shape than in "
                f"{first.path}, such as {name}: {b}, there {a}. The base models differ; inspect "
                "them one by one."
            )
        gaps = {n: _gap(first.layers[n].weight(), run.layers[n].weight()) for n in common}
        worst = max(gaps, key=lambda name: gaps[name])
        differ = sum(gap > 0 for gap in gaps.values())
        if gaps[worst] > SAME_BASE:
            raise ValueError(
                f"{run.path}: the base weights of {differ} of {len(common)} layers differ from "
                f"those of {first.path}, by {gaps[worst]:.0%} in {worst}. The base models differ; "
                "inspect them one by one."
            )
        if differ:
            notes.append(
                f"{run.label} and {first.label}: the base weights of {differ} layers differ, by "
                f"up to {gaps[worst]:.2g} of their norm"
            )
        for one, other in ((first, run), (run, first)):
            alone = [name for name in one.layers if name not in other.layers]
            if alone:
                notes.append(
                    f"adapted in {one.label} and not in {other.label}: {_some(alone)}; common "
                    "layers are compared"
                )
    return notes


def _gap(W: Tensor, other: Tensor) -> float:
    size = float(torch.linalg.norm(W))
    gap = float(torch.linalg.norm(W - other.to(W.device)))
    return gap / size if size else gap


def _some(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ------------------------------------------------------------------------------------ measuring


def _report(
    runs: Sequence[_Run], notes: list[str], rows: int, k: int, progress: Progress | None
) -> InspectReport:
    layers: list[LayerReport] = []
    pairs: list[PairReport] = []
    loads = {run.label: _routing(run, rows) for run in runs}
    names = list(dict.fromkeys(name for run in runs for name in run.layers))
    for done, name in enumerate(names, 1):
        here = {run.label: run.layers[name] for run in runs if name in run.layers}
        updates = {label: layer.updates() for label, layer in here.items()}
        W, parts = torch.empty(0), None
        for label, layer in here.items():
            before, W = W, layer.weight()
            if k and not torch.equal(before, W):  # runs of one base share its singular vectors
                parts = principal(W, min(k, *W.shape))
            layers.append(_layer(label, layer, W, updates[label], parts, loads[label].get(name)))
        pairs += _pairs(name, here, updates, len(runs) > 1)
        if progress is not None:
            progress(done, len(names))
    return InspectReport(
        format=1,
        principal=k,
        runs=[
            RunReport(
                label=run.label,
                path=run.path,
                method=run.loaded.cfg.method.name,
                model=run.loaded.cfg.model.name,
                layers=len(run.layers),
                updates=next(iter(run.layers.values())).kind,
                notes=run.notes,
            )
            for run in runs
        ],
        notes=notes,
        modules=by_module(layers),
        similarity=by_pair(pairs),
        loads=by_task(layers),
        layers=layers,
        pairs=pairs,
    )


def _layer(
    run: str,
    layer: Adapted,
    W: Tensor,
    updates: Mapping[str, tuple[Update, int]],
    parts: tuple[Tensor, Tensor, Tensor] | None,
    routing: RoutingReport | None,
) -> LayerReport:
    size = float(torch.linalg.norm(W))
    gate = layer.gate()
    block, module = place(layer.name)
    return LayerReport(
        run=run,
        name=layer.name,
        block=block,
        module=module,
        shape=(W.shape[0], W.shape[1]),
        weight_norm=size,
        updates=[_update(n, dW, rank, size, parts, W) for n, (dW, rank) in updates.items()],
        gate=None if gate is None else GateReport(_list(gate), int((gate != 0).sum()), len(gate)),
        routing=routing,
    )


def _update(
    name: str,
    dW: Update,
    rank: int,
    size: float,
    parts: tuple[Tensor, Tensor, Tensor] | None,
    W: Tensor,
) -> UpdateReport:
    s = dW.singular_values()
    norm = float(torch.linalg.norm(s))
    turned = Alignment(None, None, None) if parts is None else alignment(dW, parts)
    return UpdateReport(
        name=name,
        norm=norm,
        relative=norm / size if size else None,
        rank=rank,
        stable_rank=stable_rank(s),
        effective_rank=effective_rank(s),
        numerical_rank=numerical_rank(s, tuple(W.shape)),
        untouched=dW.untouched(),
        left=turned.left,
        right=turned.right,
        cosine=turned.cosine,
        spectrum=_list(s),
    )


def _pairs(
    name: str,
    here: Mapping[str, Adapted],
    updates: Mapping[str, Mapping[str, tuple[Update, int]]],
    several: bool,
) -> Iterator[PairReport]:
    """All pairs of factors with one letter, and of updates, within and between the runs."""
    block, module = place(name)
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    terms: dict[str, Update] = {}
    for run, layer in here.items():
        for label, factor in layer.factors().items():
            full = f"{run}: {label}" if several else label
            # Columns span what the factor reads (rows of A, C) or writes (columns of B, D).
            factors[label[0]][full] = factor.T if label[0] in "AC" else factor
        for label, (dW, _) in updates[run].items():
            full = run if label == SINGLE else f"{run}: {label}"
            terms[full if several else label] = dW
    for kind, alike in sorted(factors.items()):
        for a, b in combinations(alike, 2):
            x, y = alike[a], alike[b].to(alike[a].device)
            angles = principal_angles(x, y)
            yield PairReport(
                layer=name,
                block=block,
                module=module,
                kind=kind,
                a=a,
                b=b,
                cosine=cosine(x, y),
                overlap=overlap(angles),
                chance=chance(x, y),
                angles=_list(angles.rad2deg()),
            )
    for a, b in combinations(terms, 2):
        likeness = cosine(terms[a], terms[b])
        yield PairReport(name, block, module, "dW", a, b, likeness, None, None, None)


# -------------------------------------------------------------------------------------- routing


def _routing(run: _Run, most: int) -> dict[str, RoutingReport]:
    """Route held-out rows; return what each router did, by layer."""
    routed = {name: router for name, v in run.layers.items() if (router := v.router()) is not None}
    if not routed:
        return {}
    if not most:
        run.notes.append("routing left out: --rows 0")
        return {}
    split = run.loaded.held_out_split
    if split is None:
        run.notes.append(
            "routing left out: data.validation and data.test are not set. Give rows: plait "
            f"inspect {run.path} data.test=FILE"
        )
        return {}
    data = run.loaded.load_data(split)
    rows = data.splits()[split]
    order = _spread(rows, most, data.tasks is not None)
    run.notes.append(f"routing measured on {len(order)} of {len(rows)} {split} rows")
    whole = {name: Load(len(router.G)) for name, (_, router) in routed.items()}
    by_task: dict[tuple[str, str], Load] = {}
    unknown: set[str] = set()

    def count(name: str, w: Tensor, mask: Tensor, batch: list[int]) -> None:
        lead = w.shape[:-1]
        if lead.numel() == mask.numel():  # a token each
            kept = mask.flatten()
            of_row = torch.arange(len(batch)).repeat_interleave(mask.shape[1])
        elif lead == mask.shape[:1]:  # a row each, as in a pooler
            kept, of_row = torch.ones(len(batch), dtype=torch.bool), torch.arange(len(batch))
        else:
            unknown.add(name)
            return
        w, of_row = w.reshape(-1, w.shape[-1]).cpu()[kept], of_row[kept]
        whole[name].add(w)
        if data.tasks is None:
            return
        tasks = [rows[i]["task"] for i in batch]
        for task in sorted(set(tasks)):
            mine = torch.tensor([t == task for t in tasks])[of_row]
            by_task.setdefault((name, task), Load(w.shape[-1])).add(w[mine])

    _forward(run, data, rows, order, {name: delta for name, (delta, _) in routed.items()}, count)
    if unknown:
        run.notes.append(
            f"routing left out where the input has no tokens of the rows: {_some(sorted(unknown))}"
        )
    return {
        name: RoutingReport(
            **vars(_load_report(load)),
            tasks={t: _load_report(one) for (n, t), one in sorted(by_task.items()) if n == name},
        )
        for name, load in whole.items()
        if load.tokens
    }


@torch.no_grad()
def _forward(
    run: _Run,
    data: DataBundle,
    rows: Dataset,
    order: list[int],
    deltas: Mapping[str, Any],
    count: Callable[[str, Tensor, Tensor, list[int]], None],
) -> None:
    """Run rows through the model; give each router's weights, the padding mask and the rows."""
    device = next(run.loaded.model.parameters()).device
    size = run.loaded.cfg.evaluation.batch_size
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        inputs = {k: v.to(device) for k, v in data.collator([rows[i] for i in batch]).items()}
        inputs.pop("labels")
        mask = inputs["attention_mask"].bool().cpu()

        def see(name: str, delta: Any, x: Tensor, mask: Tensor = mask, batch: Any = batch) -> None:
            count(name, delta.mix().weights(x), mask, batch)

        with _watched(deltas, see):
            run.loaded.model(**inputs)


@contextmanager
def _watched(deltas: Mapping[str, Any], see: Callable[[str, Any, Tensor], None]) -> Iterator[None]:
    """Call `see(name, delta, x)` before each forward of a Delta, with its un-dropped input."""
    handles = [
        delta.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args[0]))
        for name, delta in deltas.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(rows: Dataset, most: int, tasks: bool) -> list[int]:
    """The first rows of each task in turn, `most` in all."""
    seen: dict[Any, int] = defaultdict(int)
    keyed = []
    for i, task in enumerate(rows["task"] if tasks else [None] * len(rows)):
        keyed.append((seen[task], i))
        seen[task] += 1
    return sorted(i for _, i in sorted(keyed)[:most])


def _load_report(load: Load) -> LoadReport:
    return LoadReport(
        tokens=load.tokens,
        load=_list(load.load),
        first=_list(load.first),
        entropy=load.entropy,
        load_entropy=load.load_entropy,
    )


def _list(values: Tensor) -> list[Number]:
    return values.tolist()
