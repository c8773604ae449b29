"""Export of federated runs: stock peft computes what each client's federated model does."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from plait.federated.state import MissingState
from plait.run import stock_check
from plait.run.data import load_data
from plait.run.evaluate import evaluate_model
from plait.run.federated.config import load_federate_config
from plait.run.federated.engines import simulate
from plait.run.federated.export import Choices, export_clients
from plait.run.federated.folder import read_rounds
from plait.run.folder import RunFolder
from plait.run.model import load_base, load_tokenizer, source_of
from plait.testing import tiny
from plait.upstream.export import to_lora
from plait_cli import main
from tests.support.federated_runs import config
from tests.support.federation import federation, het

TWO = {"rounds": 2, "steps": 2, "batch_size": 4, "learning_rate": 1e-2}
LORA = {"name": "lora", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
RANKS = {"client-0": 1, "client-1": 2, "client-2": 3}


def ran(folder: Path, key: str, **changes: Any) -> RunFolder:
    """A small run, evaluated once, at its end."""
    given = {"method": LORA, "federated": {"method": key}, "local": TWO}
    return simulate(config(folder, given | {"evaluation": {"every": 9}} | changes))


def unequal(method: str, **options: Any) -> dict[str, Any]:
    return {"federated": {"method": method, "ranks": RANKS, "options": options}}


HET = {"name": "fedalora_het", "common_rank": 2, "target_modules": ["q_proj"], "r": None}
METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "central": {},
    "fedit": {"method": LORA | {"use_rslora": True}},
    "ffa": {},
    "fedsa": {},
    "fedalora": {"federated": {"method": "fedalora", "options": {"private_policy": "reset"}}},
    "zeropad": unequal("zeropad"),
    "hetlora": unequal("hetlora"),
    "flexlora": unequal("flexlora"),
    "flora": unequal("flora"),
    "fedex": {},
    "fedalora_het": {"method": HET} | unequal("fedalora_het", common_rank=2),
    "fedavg": {
        "method": {"name": "cola", "r": None, "target_modules": ["q_proj"]},
        "federated": {"method": "fedavg", "options": {"private_names": ["A"]}},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_stock_peft_measures_what_the_run_measured(method: str, tmp_path: Path) -> None:
    folder = ran(tmp_path / "run", method, **METHODS[method])
    before = files(folder.path)
    found = export_clients(folder.path, tmp_path / "out")
    assert files(folder.path) == before
    cfg = load_federate_config(folder.config)
    data = load_data(cfg.run_config(), load_tokenizer(cfg.model))
    measured = read_rounds(folder.metrics)[-1]["clients"]
    assert [x.client for x in found] == sorted(measured)
    for x in found:
        model = PeftModel.from_pretrained(load_base(cfg.model), tmp_path / "out" / x.client)
        assert type(model.peft_config["default"]) is LoraConfig
        bundle = replace(data, test=None)
        loss = evaluate_model(model, bundle, "validation", cfg.run_config())["loss"]
        assert loss == pytest.approx(measured[x.client]["loss"], rel=1e-5)
        assert x.error < 1e-6
        assert x.logit_error < 1e-4 < x.logit_shift
        assert f"| {x.client} | " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("fedit", {}),
        ("fedsa", {}),
        ("flora", {"ranks": [1, 2, 3]}),
        ("fedex", {}),
        ("flexlora", {"ranks": [1, 2, 3]}),
        ("fedalora_het", {"ranks": [1, 2, 3], "config": het, "method": {"common_rank": 2}}),
    ],
)
def test_logits_of_each_client(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    f = federation(tmp_path, key, **changes)
    f.run()
    ids = torch.arange(3, 19).reshape(2, 8)
    for name in f.clients:
        model: Any = f.model_of(name)
        to_lora(model).write(tmp_path / "out" / name)
        stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out" / name).eval()
        with torch.no_grad():
            found, wanted = stock(input_ids=ids).logits, model(input_ids=ids).logits
        assert (found - wanted).abs().max() < 1e-5
        assert (wanted - tiny.llama()(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.slow
def test_without_plait_in_the_process(tmp_path: Path) -> None:
    folder = ran(tmp_path / "run", "flora", **METHODS["flora"])
    assert main(["federate", "export", str(folder.path), str(tmp_path / "out")]) == 0
    cfg = load_federate_config(folder.config).model
    ids = torch.arange(4, 20).reshape(2, 8)
    save_file({"input_ids": ids}, tmp_path / "inputs")
    job = {
        "model": source_of(cfg), "adapter": str(tmp_path / "out" / "client-2"), "labels": None,
        "task": "causal_lm", "dtype": "float32", "quantization": "none", "revision": None,
        "trust_remote_code": False, "inputs": str(tmp_path / "inputs"),
        "logits": str(tmp_path / "logits"),
    }  # fmt: skip
    (tmp_path / "job").write_text(json.dumps([job]))
    subprocess.run([sys.executable, "-P", str(stock_check.__file__), tmp_path / "job"], check=True)
    model = PeftModel.from_pretrained(load_base(cfg), tmp_path / "out" / "client-2").eval()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert (load_file(tmp_path / "logits")["logits"] - wanted).abs().max() < 1e-4


def test_one_client_and_a_new_head(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": {"name": "builtin:tiny", "task": "classification"},
        "data": {"columns": {"text": "prompt", "label": "task"}},
    }
    folder = ran(tmp_path / "run", "fedsa", **changes)
    (found,) = export_clients(folder.path, tmp_path / "out", "client-1")
    assert found.client == "client-1"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "client-1"]
    adapter = load_file(tmp_path / "out" / "client-1" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in adapter
    assert found.logit_error < 1e-4 < found.logit_shift
    assert "- not by llama.cpp: it reads no " in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"--for llamacpp: llama\.cpp: it reads"):
        export_clients(folder.path, tmp_path / "x", "client-1", Choices(server="llamacpp"))


def test_who_never_took_part_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ran(tmp_path / "run", "fedsa", sampling={"fraction": 0.4}, local=TWO | {"rounds": 1})
    out = tmp_path / "out"
    assert main(["federate", "export", str(folder.path), str(out)]) == 0
    (took,) = read_rounds(folder.metrics)[1]["selected"]
    other = next(c for c in RANKS if c != took)
    reason = "not exported: lora: the update is zero in every layer"
    assert f"{other}: {reason}" in capsys.readouterr().out
    assert f"| {other} | {reason}" in (out / "README.md").read_text()
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [took]
    with pytest.raises(ValueError, match=rf"client '{other}': lora: the update is zero"):
        export_clients(folder.path, tmp_path / "one", other)
    assert not (tmp_path / "one").exists()


def test_a_router_is_refused(tmp_path: Path) -> None:
    method = {"name": "hydra", "r": None, "target_modules": ["q_proj"]}
    folder = ran(tmp_path / "run", "fedavg", method=method)
    with pytest.raises(ValueError, match="client 'client-0': its update depends on the token"):
        export_clients(folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ran(tmp_path / "run", "fedsa", local=TWO | {"rounds": 1})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"client 'client-3' is none of the run's\. Did you mean"):
        export_clients(folder.path, out, "client-3")
    with pytest.raises(FileNotFoundError, match="no run is here"):
        export_clients(tmp_path, out)
    out.mkdir()
    assert main(["federate", "export", str(folder.path), str(out)]) == 2
    assert "out: exists. Give a new folder, or remove it." in capsys.readouterr().err
    out.rmdir()
    (state,) = (folder.path / "clients/run/client-1").iterdir()
    state.unlink()
    with pytest.raises(MissingState, match=r"generation 1 of client 'client-1' is missing"):
        export_clients(folder.path, out)
    (checkpoint,) = (folder.path / "server").glob("*.ckpt")
    checkpoint.unlink()
    with pytest.raises(ValueError, match="no round is complete, so there is nothing to export"):
        export_clients(folder.path, out)
    assert not out.exists()


@pytest.mark.parametrize("method", ["fedit", "flora"])
def test_a_server_alone_exports_what_it_shares(method: str, tmp_path: Path) -> None:
    """Without private factors the clients' states are not needed."""
    folder = ran(tmp_path / "run", method, **METHODS[method])
    export_clients(folder.path, tmp_path / "with")
    for state in (folder.path / "clients").rglob("*.state"):
        state.unlink()
    export_clients(folder.path, tmp_path / "without")
    for name in RANKS:
        file = f"{name}/adapter_model.safetensors"
        a, b = (load_file(tmp_path / x / file) for x in ("with", "without"))
        assert a.keys() == b.keys()
        assert all(torch.equal(x, b[key]) for key, x in a.items())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_lossy_export_of_a_client_is_refused(tmp_path: Path) -> None:
    """As that of a run; accepted, its cost on the client's held-out rows stands in the card."""
    folder = ran(tmp_path / "run", "flora", **METHODS["flora"])
    with pytest.raises(ValueError, match=r"of the update of .* is left out\. Raise or leave out"):
        export_clients(folder.path, tmp_path / "small", choices=Choices(max_rank=1))
    assert not (tmp_path / "small").exists()
    found = export_clients(folder.path, tmp_path / "small", choices=Choices(max_rank=1, lossy=True))
    assert all(x.error > 0.01 and any("loss" in text for text in x.held_out) for x in found)
    assert "On the clients' held-out rows" in (tmp_path / "small" / "README.md").read_text()


def test_logits_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN compares as neither larger nor smaller, so a careless comparison lets it pass."""
    run = ran(tmp_path / "run", "fedit")
    read = PeftModel.from_pretrained

    def damaged(*args: Any, **options: Any) -> PeftModel:
        model = read(*args, **options)
        next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
        return model

    monkeypatch.setattr("plait.run.federated.export.PeftModel.from_pretrained", damaged)
    with pytest.raises(ValueError, match="peft reads the export with logits off by nan"):
        export_clients(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
