"""A rate that is carried over: what the definition gives, and nothing else is touched."""

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("statsmodels")

from plait.run.compare import outcome, tables, transfer
from plait.run.compare.study import Study, Trial
from plait.run.compare.transfer import carried_rate, probe, solve
from plait.run.compare.tuning import tune
from plait.run.compare.warm import Warm
from plait.run.config import RunConfig, config_from_dict
from plait.run.prepare import prepare
from plait.run.train import train
from plait_cli import main
from tests.support.studies import pretended, sizes_of, study_of

RATE = 4e-3  # of the anchor
ANCHOR = {"name": "lora", "r": 4, "lora_alpha": 4}


def run_of(method: dict[str, Any], folder: Path | str = "runs/x", **changes: Any) -> dict[str, Any]:
    """Return a run file on the shipped model; changes: section -> keys."""
    sections: dict[str, Any] = {
        "model": {"name": "builtin:tiny"},
        "data": {"train": "builtin:shift?n=64"},
        "method": method,
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": RATE,
            "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        },
        "evaluation": {"generate": False},
        "output": {"dir": str(folder)},
    }  # fmt: skip
    for name, keys in changes.items():
        sections[name] = sections.get(name, {}) | keys
    return sections


def config_of(method: dict[str, Any], **changes: Any) -> RunConfig:
    return config_from_dict(run_of(method, **changes), file="other.yaml")


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of LoRA."""
    folder = tmp_path_factory.mktemp("anchor") / "run"
    train(config_from_dict(run_of(ANCHOR, folder)))
    return folder


@pytest.mark.parametrize("power", [0.7, 1.0, 1.6])
def test_two_tries_find_the_rate_of_a_power_law(power: float) -> None:
    found = solve(0.02, 1e-3, lambda rate: 5 * rate**power)
    assert math.isclose(5 * found.rate**power, 0.02, rel_tol=1e-6)
    assert len(found.tries) == 2


def test_tries_that_diverge_are_lowered() -> None:
    def change(rate: float) -> float:
        return 3 * rate if rate < 1e-2 else math.inf

    found = solve(0.025, 0.1, change)
    assert math.isclose(found.rate, 0.025 / 3, rel_tol=1e-6)
    assert all(rate < 1e-2 for rate, _ in found.tries)
    with pytest.raises(ArithmeticError, match="diverges within 5 steps"):
        solve(0.02, 1e-3, lambda rate: math.inf)
    with pytest.raises(ArithmeticError, match="changes no output"):
        solve(0.02, 1e-3, lambda rate: 0.0)


def direct(method: dict[str, Any], rate: float) -> float:
    """The definition for LoRA without hooks: dW from the factors, AdamW by hand, rows in order."""
    run = prepare(config_of(method))
    model: Any = run.model
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    first = run.data.collator([run.data.train[i] for i in range(8)])
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, out, n=n: inputs.update({n: args[0].detach()}))
        for n, layer in layers.items()
    ]
    model(**first)
    for handle in handles:
        handle.remove()
    inputs = {name: x[first["attention_mask"].bool()] for name, x in inputs.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(5):
        batch = run.data.collator([run.data.train[i] for i in range(8 * step, 8 * step + 8)])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        shares = [
            (inputs[n] @ m.get_delta_weight("default").T).norm()
            / (inputs[n] @ m.get_base_layer().weight.T).norm()
            for n, m in layers.items()
        ]
    return float(torch.stack(shares).mean())


def test_the_rate_is_what_the_definition_gives(anchor: Path) -> None:
    other = {**ANCHOR, "lora_alpha": 64}
    found = carried_rate(config_of(other), anchor)
    assert found.rate < RATE / 2  # sixteen times the scale
    target, rates = direct(ANCHOR, RATE), [RATE / 2**k for k in range(6)]
    values = [direct(other, rate) for rate in rates]
    exact = math.exp(np.interp(math.log(target), np.log(values[::-1]), np.log(rates[::-1])))
    assert values[-1] < target < values[0]
    assert 1 / 2 < found.rate / exact < 2
    assert math.isclose(found.target, target, rel_tol=0.5)
    assert math.isclose(found.tries[1][1], found.target, rel_tol=0.3)  # the second try confirms


def test_the_other_way_gives_the_rate_back() -> None:
    """From alpha 64 to alpha 4 the rate rises by about what it falls the other way."""
    loader = Warm()
    low, high = config_of(ANCHOR), config_of({**ANCHOR, "lora_alpha": 64})
    target = probe(low, RATE, loader).change
    down = solve(target, RATE, lambda rate: probe(high, rate, loader).change)
    back = probe(high, down.rate, loader).change
    up = solve(back, down.rate, lambda rate: probe(low, rate, loader).change)
    assert 1 / 1.3 < up.rate / RATE < 1.3


def state() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_probe_is_repeatable_and_touches_nothing(
    anchor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config_of({"name": "dual_lora", "r": 4}, training={"warmup_steps": 1000})
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(987)
    files, before = digests(anchor), state()
    first = carried_rate(cfg, anchor)
    assert state() == before
    assert digests(anchor) == files
    assert not list(tmp_path.iterdir())
    torch.rand(7)
    assert carried_rate(cfg, anchor) == first  # bit for bit, whatever was drawn before
    assert cfg.training["max_steps"] == 2


METHODS = [
    {"name": "full"},
    {"name": "molora", "r": 2},
    {"name": "dual_module", "r": 4},
    {"name": "shared_b", "routing": "task"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_methods_that_route_or_screen_are_measured(method: dict[str, Any]) -> None:
    cfg = config_of(method)
    low, high = (probe(cfg, rate) for rate in (1e-4, 4e-4))
    assert low.layers == high.layers == 21
    assert 0 < low.change < high.change < 1


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"name": "dual_lora", "gate_steps": 10_000}, {"name": "dual_lora", "gate_steps": 0}),
        # Of the two steps of this run, the first one closes ranks.
        ({"name": "dual_module"}, {"name": "dual_module", "tinit": 5000, "tfinal": 5000}),
    ],
    ids=["gate", "screening"],
)
def test_gates_and_schedules_are_open(early: dict[str, Any], late: dict[str, Any]) -> None:
    assert probe(config_of(early), RATE) == probe(config_of(late), RATE)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": {"train": "builtin:shift?n=65"}}, "data.train: 'builtin:shift?n=64' -> 'builtin"),
        ({"model": {"revision": "x"}}, "model.revision: None -> 'x'"),
        ({"training": {"per_device_train_batch_size": 4}}, "per_device_train_batch_size: 8 -> 4"),
        ({"training": {"optim": "sgd"}}, "training.optim is sgd, whose rates do not compare"),
        ({"optimizer": {"name": "lora_rite"}}, "optimizer.name is lora_rite, whose rates"),
        ({"model": {"quantization": "8bit"}}, "model.quantization"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    anchor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, text: str
) -> None:
    file = tmp_path / "other.yaml"
    method = {"name": "dual_lora" if "model" not in changes else "lora", "r": 4}
    file.write_text(json.dumps(run_of(method, **changes)))
    assert main(["rate", str(file), "--from", str(anchor)]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_the_verb_prints_the_rate(
    anchor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(json.dumps(run_of({"name": "lora", "r": 4, "lora_alpha": 64})))
    assert main(["rate", str(file), "--from", str(anchor)]) == 0
    printed = capsys.readouterr().out
    found = carried_rate(config_of({"name": "lora", "r": 4, "lora_alpha": 64}), anchor)
    assert f"learning rate of lora: {found.rate:.3g}" in printed
    assert main(["rate", str(file), "--from", str(tmp_path)]) == 2
    assert "no run is here" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- comparisons

TUNE = {"learning_rate": "transfer", "reference": [1e-3, 2e-3, 4e-3], "grow": 2}


def peak(at: dict[str, float]) -> Callable[[Trial], float]:
    """Chance of a right answer: greatest at each arm's own rate."""
    return lambda trial: 0.9 - 0.2 * abs(math.log10(trial.rate / at[trial.arm]))


def test_the_other_arms_start_around_what_is_carried_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, asked = study_of(tmp_path, tune=TUNE, seeds=2), list[tuple[str, float]]()

    def carry(study: Study, cell: str, rate: float) -> dict[str, float]:
        asked.append((cell, rate))
        return {"dual": 10 * rate}

    run = pretended(study, peak({"lora": 2e-3, "dual": 5e-2}))
    tuned = tune(study, run, {}, carry)
    assert asked == [("", 2e-3)]
    assert tuned["lora", ""].rate == 2e-3
    assert tuned["lora", ""].carried is None
    assert list(tuned["lora", ""].values) == [1e-3, 2e-3, 4e-3]
    dual = tuned["dual", ""]
    assert dual.carried == 2e-2
    assert list(dual.values) == [0.00667, 0.02, 0.06, 0.18]  # 0.06 was an end
    assert dual.rate == 0.06
    monkeypatch.setattr(transfer, "predicted", lambda study, cell, rate: {"dual": 1e-3})
    results = outcome.conduct(study, sizes_of(study), run)
    row = next(row for row in results["results"] if row["arm"] == "dual")
    assert row["carried"] == 1e-3
    said = " ".join(tables.conclusions(results))
    assert "dual: the best rate" in said
    assert "more than 4 times off the one that was carried over, 0.001" in said


def test_a_prediction_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run_of({}, training={"seed": 1})
    base = {k: v for k, v in base.items() if k not in ("method", "output")}
    base["data"] |= {"validation": 0.2, "test": "builtin:shift?n=8"}
    arms = {"lora": ANCHOR, "high": {**ANCHOR, "lora_alpha": 64}}
    study = study_of(tmp_path, arms, base, tune=TUNE)
    study.folder.mkdir()
    first = transfer.predicted(study, "", RATE)
    assert RATE / 40 < first["high"] < RATE / 4
    monkeypatch.setattr(transfer, "probe", lambda *_: pytest.fail("probed again"))
    assert transfer.predicted(study, "", RATE) == first
    (study.folder / "rates.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rates\.json: damaged"):
        transfer.predicted(study, "", RATE)


def test_keys_of_transfer_are_checked(tmp_path: Path) -> None:
    assert study_of(tmp_path, tune={"learning_rate": "transfer"}).rates == [1e-4, 2e-4, 4e-4]
    with pytest.raises(ValueError, match=r"tune\.reference: one rate"):
        study_of(tmp_path, tune={"learning_rate": "transfer", "reference": [1e-3]})
    with pytest.raises(ValueError, match=r"tune\.reference: is read with"):
        study_of(tmp_path, tune={"learning_rate": [1e-3], "reference": [1e-3]})
    with pytest.raises(ValueError, match=r"tune\.learning_rate"):
        study_of(tmp_path, tune={"learning_rate": "transfers"})
    with pytest.raises(ValueError, match=r"tune\.learning_rate"):
        study_of(tmp_path, tune={"learning_rate": [0.0]})
