"""A run means the same from every working folder, and its files name the base as a user does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from plait.federated.server import RoundRecord
from plait.run.export import export_run
from plait.run.federated.engines import simulate
from plait.run.federated.export import export_clients
from plait.run.train import train
from plait_cli import main
from tests.support.federated_runs import config, lines
from tests.support.runs import (
    assert_same,
    character_tokenizer,
    copy_rows,
    interrupt,
    run_config,
    save_model,
    write_rows,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a model and rows, and `elsewhere`, from which no relative path leads."""
    folder = tmp_path / "home"
    (folder / "elsewhere").mkdir(parents=True)
    save_model("llama", folder / "models" / "tiny")
    write_rows(folder / "rows.jsonl", copy_rows())
    monkeypatch.chdir(folder)
    return folder


def base_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base in an adapter's config."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    return saved["base_model_name_or_path"], saved["revision"]


def relative(run: str, **sections: Any) -> Any:
    """A config whose paths are relative."""
    return run_config(Path("models/tiny"), Path("rows.jsonl"), Path(run), **sections)


def test_a_run_of_relative_paths_works_from_another_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluate, generate and export; the export leads to the base, in its revision."""
    cfg = relative(
        "run",
        model={"revision": "v1.2"},
        method={"name": "cola", "r": 2},
        training={"max_steps": 2, "save_strategy": "no"},
        evaluation={"generate": False},
    )
    train(cfg)
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["model"]["name"] == str(home / "models" / "tiny")
    assert stored["data"]["train"] == str(home / "rows.jsonl")
    assert stored["data"]["validation"] == 0.2
    assert (cfg.model.name, cfg.data.train) == ("models/tiny", "rows.jsonl")  # as it was given
    monkeypatch.chdir(home / "elsewhere")
    assert main(["evaluate", "../run"]) == 0
    assert main(["generate", "../run", "--prompt", "ab>"]) == 0
    for force in ([], ["--force"]):  # the second replaces the first
        assert main(["export", "../run", "--to", "lora", *force]) == 0
    assert "--force" not in capsys.readouterr().err
    for folder in ("adapter", "lora"):
        assert base_of(home / "run" / folder) == (str(home / "models" / "tiny"), "v1.2")
    assert not [p for p in (home / "run").iterdir() if p.name.startswith(".")]


def test_a_run_is_resumed_from_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"training": {"max_steps": 4}, "evaluation": {"generate": False}}
    whole = train(relative("whole", **options))
    whole_path = home / "whole"
    cfg = relative("run", **options)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[interrupt(2)])
    # plait 0.1 kept the paths as they were written.
    stored = home / "run" / "config.yaml"
    absolute = stored.read_text()
    stored.write_text(absolute.replace(f"{home}/", ""))
    with pytest.raises(KeyboardInterrupt):
        train(cfg, resume=True, callbacks=[interrupt(3)])
    assert stored.read_text() == absolute
    monkeypatch.chdir(home / "elsewhere")
    assert main(["train", "../run/config.yaml", "--resume", "output.dir=../run"]) == 0
    monkeypatch.chdir(home)
    assert whole.path.absolute() == whole_path
    assert_same(whole, type(whole)("run"))


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("rows.jsonl", "{home}/rows.jsonl"),
        ("./rows.jsonl", "{home}/rows.jsonl"),
        ("elsewhere/../rows.jsonl", "{home}/rows.jsonl"),
        ("lists.json#part", "{home}/lists.json#part"),
        ("odd#name.jsonl", "{home}/odd#name.jsonl"),
        ("nobody/nothing", "nobody/nothing"),
        ("builtin:shift?n=8", "builtin:shift?n=8"),
        (["rows.jsonl", "lists.json#a"], ["{home}/rows.jsonl", "{home}/lists.json#a"]),
    ],
)
def test_what_is_a_path(source: Any, kept: Any, home: Path) -> None:
    from plait.run.folder import with_absolute_paths

    for name in ("lists.json", "odd#name.jsonl"):
        (home / name).write_text("[]")
    cfg = relative("run", data={"train": source, "validation": None})
    made = with_absolute_paths(cfg).data.train
    expected = [kept] if isinstance(kept, str) else kept
    assert ([made] if isinstance(made, str) else made) == [x.format(home=home) for x in expected]
    assert cfg.data.train == source


def test_a_built_in_base_is_named_and_not_placed(tmp_path: Path) -> None:
    """adapter_config.json tells nothing of where plait is installed."""
    cfg = run_config(
        Path("builtin:tiny"),
        Path("builtin:shift?n=12"),
        tmp_path / "run",
        method={"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        training={"max_steps": 1, "save_steps": 1},
        evaluation={"generate": False},
    )
    run = train(cfg)
    for folder in (run.adapter, run.checkpoints / "checkpoint-1"):
        assert base_of(folder) == ("builtin:tiny", None)
    clients = simulate(config(tmp_path / "clients", {"local": {"rounds": 1}}))
    export_clients(clients.path, tmp_path / "out", "client-0")
    assert base_of(tmp_path / "out" / "client-0") == ("builtin:tiny", None)


def test_the_stock_check_packs_the_base_as_the_run_does(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    tokenizer = character_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape, **heads)
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    cfg = run_config(
        tmp_path / "base",
        write_rows(tmp_path / "rows.jsonl", copy_rows()),
        tmp_path / "run",
        model={"quantization": "4bit"},
        method={"name": "droplora", "r": 2},
        training={"max_steps": 4, "save_strategy": "no"},
        evaluation={"generate": False},
    )
    train(cfg)
    _, report = export_run(tmp_path / "run", "lora")
    assert report.stock_error is not None
    assert report.stock_error < 1e-3 * max(1.0, report.logit_shift)


def test_a_federated_run_is_resumed_from_another_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints hold a hash of the config, so the paths have to mean the same."""
    changes: dict[str, dict[str, Any]] = {
        "model": {"name": "models/tiny"},
        "data": {"train": "rows.jsonl", "validation": None},
    }
    whole = simulate(config(home / "whole", changes))

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config(Path("cut"), changes), done=stop)
    stored = yaml.safe_load((home / "cut" / "config.yaml").read_text())
    assert stored["model"]["name"] == str(home / "models" / "tiny")
    assert stored["data"]["train"] == str(home / "rows.jsonl")
    assert stored["output"]["dir"] == "cut"
    monkeypatch.chdir(home / "elsewhere")
    assert main(["federate", "resume", "../cut"]) == 0
    cut = type(whole)(home / "cut")
    assert lines(cut) == lines(whole)
    states = [(f.path / "server" / "round-000002.ckpt").read_bytes() for f in (whole, cut)]
    assert states[0] == states[1]
    monkeypatch.chdir(home)
    other = config(Path("cut"), {**changes, "data": {"train": "rows.jsonl", "limit": 8}})
    with pytest.raises(ValueError, match="another config"):
        simulate(other, resume=True)
    assert os.listdir("elsewhere") == []
