"""What the runs of a comparison have in common, kept in a worker: it is loaded once.

The tokenizer, the tokenized rows, the base model and the metric before training are the same for
many runs, so starting an arm costs what its adapter costs. The results are those of separate runs:
each run gets a copy of the base model, in the state that loading it would leave, the random number
generators included.
"""

import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plait.run.config import RunConfig, config_to_dict
from plait.run.data.bundle import DataBundle, Split
from plait.run.evaluate import Progress, measure_rows, metrics_of_split
from plait.run.metrics import Rows
from plait.run.model import Base, adaptable_layers, check_ids, check_length
from plait.run.prepare import Loader, Prepared

_OF_A_RUN = ("learning_rate", "seed", "max_steps")  # of training: differ between runs of a study
_OF_DATA = ("routing", "tasks", "delta")  # options of methods that reading the rows looks at
_FIRST = 8  # rows whose outputs tell whether two models are equal before training
_MOST = 32  # models whose metric before training is kept


@dataclass
class _Start:
    """The state after loading with one seed: what differs from the kept model, generators."""

    weights: dict[str, Tensor]
    generators: list[tuple[Callable[[Any], Any], Any]]


@dataclass
class _Kept:
    """Of one data and one model. before: (first outputs, metrics) of models before training."""

    tokenizer: PreTrainedTokenizerBase
    rows: DataBundle | None = None
    model: PreTrainedModel | None = None
    missing: list[str] = field(default_factory=list)
    starts: dict[int, _Start] = field(default_factory=dict)
    before: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)


class Warm(Loader):
    """Loads what differs from the run before, and keeps it.

    measured: the split and the values of its rows that the last run was measured with after
    training. seconds: that this took.
    """

    def __init__(self) -> None:
        self._key = ""
        self._kept: _Kept  # from the first tokenizer on
        self.measured: tuple[Split, Rows] | None = None
        self.seconds = 0.0

    def tokenizer(self, cfg: RunConfig) -> PreTrainedTokenizerBase:
        """Return the tokenizer; what other rows or another base left behind is dropped."""
        self.measured, key = None, _common(cfg)
        if key != self._key:
            self._key, self._kept = key, _Kept(super().tokenizer(cfg))
        return self._kept.tokenizer

    def data(self, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DataBundle:
        """Return the rows."""
        if self._kept.rows is None:
            self._kept.rows = super().data(cfg, tokenizer)
        return self._kept.rows

    def base(self, cfg: RunConfig, data: DataBundle) -> Base:
        """Return a copy of the base model as loading with the run's seed leaves it.

        A quantised base, and one of which all weights are trained, are loaded for each run.
        """
        if cfg.method.name == "full" or cfg.model.quantization != "none":
            return super().base(cfg, data)
        kept, seed = self._kept, cfg.training["seed"]
        if seed not in kept.starts:
            loaded = super().base(cfg, data)
            if kept.model is None:
                kept.model, kept.missing = copy.deepcopy(loaded.model), loaded.missing
            known = kept.model.state_dict()
            new = {
                name: value.clone()
                for name, value in loaded.model.state_dict().items()
                if not torch.equal(value, known[name])
            }
            kept.starts[seed] = _Start(new, generators())
            return loaded
        model, start = copy.deepcopy(kept.model), kept.starts[seed]
        assert model is not None
        state = model.state_dict()
        with torch.no_grad():
            for name, value in start.weights.items():
                state[name].copy_(value)
        for restore, value in start.generators:
            restore(value)
        check_length(model, data.longest)
        check_ids(model, data.largest_id, data.tokenizer)
        return Base(model, adaptable_layers(model), kept.missing)

    def measure(
        self, occasion: str, run: Prepared, split: Split, progress: Progress | None
    ) -> dict[str, Any]:
        """Return the metrics of a run's model; see plait.run.train.measure.

        Before training they are kept for models that give the same outputs, bit for bit, for the
        first rows: those whose adapters change nothing yet.
        """
        first = _first_outputs(run, split) if occasion == "before" else None
        if first is not None:
            for outputs, metrics in self._kept.before:
                if outputs.shape == first.shape and torch.equal(outputs, first):
                    return copy.deepcopy(metrics)
        began = time.monotonic()
        values = measure_rows(run.model, run.data, split, run.cfg, progress=progress)
        metrics = metrics_of_split(run.data, split, run.cfg, values)
        if first is None:
            self.measured = (split, values)
            self.seconds = time.monotonic() - began
        elif len(self._kept.before) < _MOST:
            self._kept.before.append((first, copy.deepcopy(metrics)))
        return metrics


def _common(cfg: RunConfig) -> str:
    """Return what runs that can share rows and base model have in common."""
    raw = config_to_dict(cfg)
    del raw["output"]
    raw["method"] = {key: cfg.method.options.get(key) for key in _OF_DATA}
    raw["training"] = {k: v for k, v in raw["training"].items() if k not in _OF_A_RUN}
    return json.dumps(raw, sort_keys=True, default=str)


def generators() -> list[tuple[Callable[[Any], Any], Any]]:
    """Return (how it is restored, the state) of every generator that modules are drawn from."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states


@torch.no_grad()
def _first_outputs(run: Prepared, split: Split) -> Tensor:
    batch = run.data.batch(split, _FIRST)
    device = next(run.model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
    training = run.model.training
    run.model.eval()
    try:
        return run.model(**inputs).logits.cpu()
    finally:
        run.model.train(training)
