"""Carry a learning rate over: the rate at which a method's layers change as much per step.

The probe makes five Adam steps at a constant rate on the run's own training rows. The change of a
layer is then the norm of the change of its output for the input that it had at the start, divided
by the norm of W x, which is its output at the start without a bias; all layers have the same weight
in their mean. A second method gets the rate at which its mean is that of the first, the anchor,
whose own rate is known to be good.

    probe          the change of a run's layers at a rate
    carried_rate   the rate of a run, from a finished one
    predicted      the rates of the arms of a comparison, from that of its reference

Only hooks on the layers are used, so methods that route rows or depend on the mode are measured as
they train. Masks and schedules that close ranks later stay open, gates that open step by step are
open, and there is no warm-up.
"""

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from plait.callback import PlaitCallback
from plait.core.events import PlaitWarning
from plait.core.files import write_atomic
from plait.run.compare.study import Study
from plait.run.compare.warm import Warm, generators
from plait.run.config import (
    PATIENCE,
    ParallelConfig,
    RunConfig,
    check_remote_code,
    config_to_dict,
    load_config,
    method_options,
)
from plait.run.folder import RunFolder, diff_configs, with_absolute_paths
from plait.run.model import adaptable_layers
from plait.run.prepare import Loader, Prepared, prepare, trained_weights
from plait.run.trainer import RunTrainer
from plait.upstream.layers import is_tuner_layer

STEPS = 5
_TOTAL = 1_000_000  # steps that a method's schedule sees: none of it begins within the probe
_ROWS, _NUMBERS = 8, 2**29  # of the batch that is measured; of inputs and outputs that are kept
_LOWER = 4  # times that a rate is lowered because the probe diverges
_ADAMS = ("default", "loraplus", "lorafa")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Keys of `training` that a probe of a few steps leaves out.
_LEFT_OUT = (
    "warmup_steps", "warmup_ratio", "lr_scheduler_kwargs", "bf16", "fp16", "eval_steps",
    "save_steps", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "eval_on_start", PATIENCE,
)  # fmt: skip
# Options of methods that open an update step by step -> the value with which it is open at once.
_OPEN = {"gate_steps": 0}
_FILE, _VERSION = "rates.json", 1


@dataclass(frozen=True)
class Probe:
    """What a probe found. change: mean over layers. layers: how many there are."""

    change: float
    layers: int


@dataclass(frozen=True)
class Carried:
    """A rate that was carried over.

    target: the anchor's change at its own rate. tries: (rate, change) of the other run, in turn.
    """

    rate: float
    target: float
    tries: list[tuple[float, float]]


# -------------------------------------------------------------------------------------- the rates


def probe(cfg: RunConfig, rate: float, loader: Loader | None = None) -> Probe:
    """Return how much the layers of a run change in five steps at a rate.

    The change is infinite if the loss or an output is not finite. Nothing is written but a
    temporary folder, and all random generators are left as they were.

    Raises what `prepare` raises, and ValueError for a run that `check_probe` refuses, or in which
    no layer can be measured.
    """
    check_probe(cfg)
    with TemporaryDirectory(prefix="plait-") as folder, _generators_kept():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlaitWarning)  # an open gate moves the start
            run = prepare(_opened(cfg, rate, folder), loader=loader)
        layers = _layers(run)
        if not layers:
            raise ValueError(
                f"{cfg.source.at('method.name')}: {cfg.method.name} adapts no layer whose output "
                "could be measured. Sweep its learning rate instead."
            )
        batch = _batch(run, layers)
        start = _Start(layers)
        with start.recording():
            _forward(run, batch)
        trainer = RunTrainer(run, RunFolder(folder), [PlaitCallback(), _Stop()])
        try:
            trainer.train()
        except FloatingPointError:
            return Probe(math.inf, len(layers))
        with start.measuring(batch.get("attention_mask")) as changes:
            _forward(run, batch)
    known = [c for c in changes.values() if c is not None]
    if not known:
        raise ValueError(f"{cfg.source.file}: the outputs of all layers are zero at the start.")
    mean = math.fsum(known) / len(known)
    return Probe(mean if math.isfinite(mean) else math.inf, len(known))


def carried_rate(cfg: RunConfig, anchor: str | Path) -> Carried:
    """Return the rate of a run at which its layers change as much as those of a finished run.

    cfg: of a run on the same base and rows. anchor: the folder of the finished run, whose own
    learning rate is good. Nothing in it is written.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: the two cannot be compared, with the first key that differs; and what `probe`
            and `solve` raise.
    """
    folder = RunFolder.open(anchor)
    other = load_config(folder.config)
    check_remote_code(other.model, folder.config, ())
    if not trained_weights(folder, other).is_dir():
        raise FileNotFoundError(
            f"{anchor}: this run has not finished. Continue it: plait train FILE --resume"
        )
    check_comparable(cfg, other, str(anchor))
    check_probe(other)
    loader, rate = Warm(), float(other.training["learning_rate"])
    return _carry(cfg, other, rate, loader)


def predicted(study: Study, cell: str, rate: float) -> dict[str, float]:
    """Return the rate of each arm but the reference, carried over from that of the reference.

    cell: of the study. rate: the reference's best one. What was found is kept in the folder of the
    comparison for the next call.

    Raises as `carried_rate`, and ValueError for a damaged file.
    """
    file = study.folder / _FILE
    known = _read(file)
    anchor = study.tuning(study.reference, cell, rate)[0]
    loader, found, target = Warm(), dict[str, float](), None
    for arm in study.others:
        key = f"{anchor.key} {study.tuning(arm, cell, rate)[0].key}"
        if key not in known:
            cfg = study.config(arm, cell, rate, study.seeds[0], tuning=True)
            if target is None:
                target = _target(anchor.config, rate, loader)
            known[key] = _carry(cfg, anchor.config, rate, loader, target).rate
            content = {"schema": "plait.rates", "version": _VERSION, "rates": known}
            write_atomic(file, json.dumps(content, indent=1) + "\n")
        found[arm] = known[key]
    return found


def _read(file: Path) -> dict[str, float]:
    if not file.is_file():
        return {}
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))["rates"]
        return {str(key): float(rate) for key, rate in rates.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}). Remove it.") from None


def _target(anchor: RunConfig, rate: float, loader: Loader) -> float:
    """Return the change of the anchor at its own rate."""
    target = probe(anchor, rate, loader).change
    if not 0 < target < math.inf:
        what = "diverges" if target else "changes no layer"
        raise ValueError(
            f"{anchor.source.file}: {anchor.method.name} {what} within {STEPS} steps at its rate "
            f"{rate:g}, so no rate can be carried over from it. Give a run that trains."
        )
    return target


def _carry(
    cfg: RunConfig, anchor: RunConfig, rate: float, loader: Loader, target: float | None = None
) -> Carried:
    if target is None:
        target = _target(anchor, rate, loader)
    try:
        return solve(target, rate, lambda tried: probe(cfg, tried, loader).change)
    except ArithmeticError as error:
        raise ValueError(f"{cfg.source.file}: {cfg.method.name} {error}") from None


# ------------------------------------------------------------------------------------ two tries


def solve(target: float, start: float, change: Callable[[float], float]) -> Carried:
    """Return the rate at which a rising function has a value, from two tries.

    The first try is at `start`. The second assumes that the change is proportional to the rate. It
    confirms the assumption, or gives the slope between logarithms by which the result is corrected.

    Args:
        target: positive value.
        start: rate of the first try.
        change: rate -> value; infinite where training diverges.

    Raises:
        ArithmeticError: nothing changes, or training diverges at all rates tried.
    """
    tries: list[tuple[float, float]] = []

    def tried(rate: float, lower: float) -> float:
        """Try a rate, or the geometric mean of it and a lower one until the change is finite."""
        for _ in range(_LOWER):
            value = change(rate)
            if math.isfinite(value):
                if value <= 0:
                    raise ArithmeticError(
                        f"changes no output of a layer within {STEPS} steps at the rate {rate:g}. "
                        "Sweep its learning rate instead."
                    )
                tries.append((rate, value))
                return value
            rate = math.sqrt(rate * lower)
        raise ArithmeticError(
            f"diverges within {STEPS} steps, down to the rate {rate:g}. Sweep lower rates."
        )

    tried(start, start / 100)
    first, at_first = tries[0]
    tried(first * target / at_first, first)
    second, at_second = tries[1]
    octaves, rise = math.log(second / first), math.log(at_second / at_first)
    slope = min(max(rise / octaves, 0.5), 2.0) if abs(octaves) > 0.05 else 1.0
    return Carried(second * (target / at_second) ** (1 / slope), target, tries)


# ------------------------------------------------------------------------------- what is refused


def check_probe(cfg: RunConfig) -> None:
    """Raise ValueError for a run whose steps cannot be compared with those of another."""
    optim = str(cfg.training.get("optim", "adamw_torch"))
    name = cfg.optimizer.name
    if name not in _ADAMS or (name == "default" and not optim.startswith("adam")):
        key = "optimizer.name" if name not in _ADAMS else "training.optim"
        raise ValueError(
            f"{cfg.source.at(key)} is {name if name not in _ADAMS else optim}, whose rates do not "
            "compare with those of Adam. Use the default AdamW, or sweep its learning rate."
        )
    if cfg.objective.name != "sft":
        raise ValueError(
            f"{cfg.source.at('objective')} is {cfg.objective.name}, and rates are carried over "
            "between supervised runs. Sweep the learning rate instead."
        )
    if cfg.model.quantization != "none":
        raise ValueError(
            f"{cfg.source.at('model.quantization')} is {cfg.model.quantization}, and the outputs "
            "of a quantised base are rounded by more than a few steps change them. Set "
            "model.quantization=none for the probe, or sweep the learning rate."
        )


def check_comparable(cfg: RunConfig, anchor: RunConfig, name: str) -> None:
    """Raise ValueError if a run has another base, other rows or another batch than the anchor.

    name: of the anchor, for the error.
    """
    differences = diff_configs(_common(anchor), _common(cfg))
    if differences:
        more = "" if len(differences) == 1 else f", and {len(differences) - 1} more"
        raise ValueError(
            f"{cfg.source.file}: cannot be compared with {name}, which differs in what decides a "
            f"step: {differences[0]}{more}. Give the same in both, such as by section.key=value "
            "after the file."
        )


def _common(cfg: RunConfig) -> dict[str, Any]:
    """Return what two runs must have in common."""
    raw = config_to_dict(with_absolute_paths(cfg))
    del raw["model"]["dtype"], raw["model"]["trust_remote_code"]
    for split in ("validation", "test"):
        if not isinstance(raw["data"].get(split), float):  # a fraction is taken from train
            raw["data"].pop(split, None)
    batch = {key: cfg.training.get(key, 1) for key in _BATCH}
    batch["processes"] = cfg.parallel.processes or 1
    return {"model": raw["model"], "data": raw["data"], "training": batch}


# ------------------------------------------------------------------------------------- the probe


def _opened(cfg: RunConfig, rate: float, folder: str) -> RunConfig:
    """Return the config of the probe: no warm-up, schedules far away, fp32, one process."""
    training = {key: value for key, value in cfg.training.items() if key not in _LEFT_OUT}
    gathered = training.get("gradient_accumulation_steps", 1) * (cfg.parallel.processes or 1)
    training |= {
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": _TOTAL,
        "gradient_accumulation_steps": gathered,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
    }
    opened = copy.copy(cfg)
    opened.training, opened.parallel, opened.chain = training, ParallelConfig(), None
    known = _OPEN.keys() & method_options(cfg.method.name).keys()
    options = cfg.method.options | {key: _OPEN[key] for key in known}
    opened.method = dataclasses.replace(cfg.method, options=options)
    opened.model = dataclasses.replace(cfg.model, dtype="float32")
    opened.output = dataclasses.replace(cfg.output, dir=folder, also=[])
    return opened


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the random generators as they were."""
    before = generators()
    try:
        yield
    finally:
        for restore, state in before:
            restore(state)


class _Stop(TrainerCallback):
    """Ends training after the steps of a probe."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when they are made."""
        control.should_training_stop = state.global_step >= STEPS


def _layers(run: Prepared) -> dict[str, nn.Module]:
    """Return the layers that a run adapts, by name; of full fine-tuning all linear layers."""
    if run.cfg.method.name == "full":
        return adaptable_layers(run.model)
    return {name: m for name, m in run.model.named_modules() if is_tuner_layer(m)}


def _batch(run: Prepared, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return training rows without labels, as few as memory asks for."""
    weights = [getattr(_base(layer), "weight", None) for layer in layers.values()]
    row = run.data.longest * sum(sum(w.shape[-2:]) for w in weights if isinstance(w, Tensor))
    batch = run.data.batch("train", max(1, min(_ROWS, _NUMBERS // max(1, row))))
    device = next(run.model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}


@torch.no_grad()
def _forward(run: Prepared, batch: dict[str, Tensor]) -> None:
    run.model.eval()
    try:
        run.model(**batch)
    finally:
        run.model.train()


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if is_tuner_layer(layer) else layer


class _Start:
    """The inputs and outputs of layers at the start, call by call, and what became of them."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.inputs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in layers}
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what each layer reads and gives in a forward."""

        def note(name: str, args: Any, kwargs: Any, output: Any) -> None:
            self.inputs[name].append((args, kwargs))
            self.outputs[name].append(_tensor(output).detach().clone())

        with _hooks(
            [
                layer.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: note(name, args, kwargs, output),
                    with_kwargs=True,
                )
                for name, layer in self.layers.items()
            ]
        ):
            yield

    @contextmanager
    def measuring(self, mask: Tensor | None) -> Iterator[dict[str, float | None]]:
        """Give each layer the inputs of the start again; yield its change, None for no output.

        mask: (batch, tokens), of padding, which does not count.
        """
        calls = dict.fromkeys(self.layers, 0)
        sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in self.layers}
        changes: dict[str, float | None] = {}

        def again(name: str, args: Any) -> tuple[Any, Any]:
            known = self.inputs[name][calls[name] :]
            if not known or _shapes(known[0][0]) != _shapes(args):
                raise ValueError(
                    f"{name}: gets other rows than at the start, as an expert of a router does, so "
                    "its outputs cannot be compared. Sweep the learning rate instead."
                )
            return known[0]

        def compare(name: str, output: Any) -> None:
            before, after = self.outputs[name][calls[name]], _tensor(output)
            calls[name] += 1
            bias = getattr(_base(self.layers[name]), "bias", None)
            plain = before - bias if isinstance(bias, Tensor) else before
            moved = after - before
            if mask is not None and before.shape[:2] == mask.shape:
                moved, plain = moved[mask.bool()], plain[mask.bool()]
            sums[name][0] += float(moved.double().square().sum())
            sums[name][1] += float(plain.double().square().sum())

        hooks = []
        for name, layer in self.layers.items():
            hooks += [
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: again(name, args), with_kwargs=True
                ),
                layer.register_forward_hook(
                    lambda _, args, output, name=name: compare(name, output)
                ),
            ]
        with _hooks(hooks):
            yield changes
        for name, (moved, plain) in sums.items():
            changes[name] = math.sqrt(moved / plain) if plain else None


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            with suppress(KeyError):
                handle.remove()


def _shapes(args: Any) -> list[Any]:
    return [x.shape if isinstance(x, Tensor) else None for x in args]


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"a layer gives {type(output).__name__}, not a tensor, so its change cannot be "
            "measured. Sweep the learning rate instead."
        )
    return output
