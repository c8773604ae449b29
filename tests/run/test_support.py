"""The support matrix: every cell is tried, those that say no as well."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora

import plait
from plait.core.config import DeltaConfig
from plait.run.config import RunConfig, method_names
from plait.run.folder import RunFolder
from plait.run.prepare import prepare
from plait.run.support import FEATURES, matrix, tables, why_not
from plait.run.train import train
from plait.upstream.table import BASELINES
from plait_cli import main
from tests.support.runs import copy_rows, run_config, save_model, write_rows

# Small enough for the tiny model, schedules short enough for four steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "alloc": {"r": 2, "first": 1, "every": 1, "rounds": 1},
    "dual_module": {"r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "nola": {"r": 2, "num_basis_A": 8, "num_basis_B": 8},
    "shared_b": {"r": 2, "lora_dropout": 0.0},
    "hydra": {"r": 2, "num_B": 2, "lora_dropout": 0.0},
    "molora": {"r": 2, "num_experts": 2},
    "droplora": {"r": 2, "lora_dropout": 0.0},
    "vera": {"r": 4},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2},
    "unilora": {"r": 2, "theta_d_length": 64},
    "adalora": {"r": 2, "init_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "full": {},
}
OPTIMIZER_OPTIONS = {"loraplus": {"loraplus_lr_ratio": 4}}
CHAINS: dict[str, dict[str, Any]] = {"xgb": {"steps_per_link": 2}}  # others: two links
QUIET = {"generate": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows on disk."""
    folder = tmp_path_factory.mktemp("support")
    save_model("llama", folder / "base")
    write_rows(folder / "rows.jsonl", copy_rows(20))
    return folder


def config(place: Path, run: Path, key: str, **sections: Any) -> RunConfig:
    """A run of four steps of a method; sections add to it."""
    own = {"name": key, **OPTIONS.get(key, {"r": 2}), **sections.pop("method", {})}
    training = {"max_steps": 4, **sections.pop("training", {})}
    return run_config(
        place / "base",
        place / "rows.jsonl",
        run,
        method=own,
        training=training,
        evaluation=QUIET,
        **sections,
    )


def built(cfg: RunConfig) -> Any:
    """The model of a run, its update away from zero."""
    model = prepare(cfg).model
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    return model.eval()


def attempt(feature: str, method: str, place: Path, run: Path) -> None:
    """Do what a cell is about; raises where it cannot be done."""
    group, _, name = feature.partition(" ")
    if feature in ("merge", "export merged"):
        model = built(config(place, run, method))
        if isinstance(model, PeftModel):
            plain: Any = model.merge_and_unload()
            assert not [n for n, _ in plain.named_parameters() if "plait" in n or "lora_" in n]
    elif feature == "export lora":
        model = built(config(place, run, method))
        if not isinstance(model, PeftModel):
            raise ValueError("full fine-tuning has no adapter")
        if isinstance(model.peft_config["default"], DeltaConfig):
            export = plait.to_lora(model)
            if export.error:
                raise ValueError("approximate")
        elif method == "adalora":
            assert plait.to_lora(model).error == 0
        elif model.peft_config["default"].peft_type != "LORA" or method == "dora":
            convert_to_lora(model, 2)
            raise ValueError("approximate")
    elif group == "gate":
        train(config(place, run, method, method={"gates": [gate(name)]}))
    elif feature == "init pissa":
        options = {} if method == "pissa" else {"init": "pissa"}
        train(config(place, run, method, method=options))
    elif group == "optimizer":
        chosen = {"name": name, **OPTIMIZER_OPTIONS.get(name, {})}
        train(config(place, run, method, optimizer=chosen))
    elif group == "chain":
        plan = {"plan": name, **CHAINS.get(name, {"links": 2})}
        train(config(place, run, method, chain=plan, training={"max_steps": 8}))
    else:
        train(config(place, run, method, model={"quantization": feature}))


def gate(name: str) -> dict[str, Any]:
    """A gate with a schedule of few steps."""
    short = {"alloc": {"first": 1, "every": 1, "rounds": 1}, "droplora": {"scope": "step"}}
    return {"name": name, **short.get(name, {})}


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("feature", FEATURES)
def test_cell(feature: str, method: str, place: Path, tmp_path: Path) -> None:
    if feature in ("8bit", "4bit"):
        pytest.importorskip("bitsandbytes", reason="the extra plait[quant] is not installed")
    reason = why_not(method, feature)
    if reason is None:
        attempt(feature, method, place, tmp_path / "run")
        if (tmp_path / "run").exists():
            assert RunFolder.open(tmp_path / "run").card.is_file()
    else:
        with pytest.raises(ValueError) as caught:
            attempt(feature, method, place, tmp_path / "run")
        assert "Traceback" not in str(caught.value)
        assert not list((tmp_path / "run").glob("adapter")), "refused, and trained all the same"


def test_every_method_and_feature_has_a_cell() -> None:
    found = matrix()
    assert set(found) == {m.key for m in plait.list_methods()} | set(BASELINES)
    assert all(set(row) == set(FEATURES) for row in found.values())
    groups = {f.group for f in FEATURES.values()}
    assert groups == {"method", "optimizer", "chain", "base", "export"}
    assert any(v is None for row in found.values() for v in row.values())


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["methods", "--matrix"]) == 0
    out = capsys.readouterr().out
    groups, notes = tables()
    for method in method_names():
        assert len(re.findall(rf"^{method} ", out, re.MULTILINE)) == len(groups)
    for number, note in enumerate(notes, 1):
        assert f"no {number}: {note}" in out
    assert main(["methods", "lora", "--matrix"]) == 2


def test_compositions_of_the_examples_are_supported() -> None:
    """What the run files combine is what the matrix allows."""
    from plait.run.config import load_config

    files = sorted((Path(__file__).parents[2] / "examples" / "compositions").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        cfg = load_config(file)
        for spec in cfg.method.options.get("gates") or ():
            name = spec if isinstance(spec, str) else spec["name"]
            assert why_not(cfg.method.name, f"gate {name}") is None, file
        assert json.dumps(cfg.method.options)
