"""vLLM's resolver: a run, an adapter and an export are served; what cannot be served says why.

The resolver is tested against vLLM's own classes where vLLM is installed, else against classes with
the signatures of vLLM 0.33 (vllm/lora/resolver.py and vllm/lora/request.py of its wheel).
"""

import asyncio
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import shutil
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import plait
from plait.run.export import mark_export
from plait.run.serving import convert, resolve
from plait.run.serving.resolve import AdapterError, find, plain_lora
from plait.run.train import train
from plait.testing import tiny
from tests.support.runs import copy_rows, run_config, save_model, write_rows


@dataclass
class Request:
    """The arguments of vllm.lora.request.LoRARequest that the server needs."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class Resolver(ABC):
    """vllm.lora.resolver.LoRAResolver."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Request | None:
        """Return None if the adapter is not known."""


class Registry:
    """vllm.lora.resolver.LoRAResolverRegistry; a second resolver of a name replaces the first."""

    def __init__(self) -> None:
        self.resolvers: dict[str, Resolver] = {}

    def register_resolver(self, resolver_name: str, resolver: Resolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that vLLM imports."""
    if importlib.util.find_spec("vllm") is None:
        for name, values in {
            "vllm": {},
            "vllm.lora": {},
            "vllm.lora.request": {"LoRARequest": Request},
            "vllm.lora.resolver": {"LoRAResolver": Resolver, "LoRAResolverRegistry": Registry()},
        }.items():
            module = types.ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "plait.run.serving.vllm", raising=False)
    return importlib.import_module("plait.run.serving.vllm")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and, below `served`, a run, an adapter, exports and folders that are refused."""
    folder = tmp_path_factory.mktemp("resolver")
    base, served = save_model("llama", folder / "base"), folder / "served"
    rows = write_rows(folder / "rows.jsonl", copy_rows(20))
    method = {"name": "cola", "r": 2, "target_modules": ["q_proj"]}
    cfg = run_config(
        base, rows, served / "run", method=method, training={"max_steps": 2},
        evaluation={"generate": False},
    )  # fmt: skip
    train(cfg)
    shutil.copytree(served / "run/adapter", served / "adapter")
    for name, config in {
        "routed": plait.SharedBLoraConfig(r=2),
        "full-rank": plait.DualLoraConfig(r=8, gate_steps=2),
    }.items():
        config.target_modules, config.task_type = ["q_proj", "v_proj"], "CAUSAL_LM"
        config.base_model_name_or_path = str(base)
        config.init_weights = False
        model: Any = get_peft_model(tiny.llama(), config)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(str(served / name))
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions run here and not in a process of their own, which takes long to start."""

    def finish(command: list[str], environment: dict[str, str]) -> Any:
        assert command[2:4] == ["-m", "plait.run.serving.convert"]
        with contextlib.redirect_stderr(io.StringIO()) as told:
            code = convert.main(command[4:])
        return types.SimpleNamespace(returncode=code, stderr=told.getvalue())

    monkeypatch.setattr(resolve, "_finish", finish)


def resolved(plugin: Any, root: Path, name: str, cache: Path) -> Any:
    resolver = plugin.PlaitResolver(root / "served", cache)
    return asyncio.run(resolver.resolve_lora(str(root / "base"), name))


def check_resolved(
    plugin: Any, root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the LoRA that plait.to_lora gives; a second request comes from the cache."""
    live: Any = PeftModel.from_pretrained(tiny.llama(), str(root / "served/adapter"))
    export = plait.to_lora(live)
    request = resolved(plugin, root, name, tmp_path)
    assert request.lora_name == name
    assert request.lora_int_id > 0
    assert Path(request.lora_path).parent == tmp_path
    tensors = load_file(Path(request.lora_path) / "adapter_model.safetensors")
    assert tensors.keys() == export.tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, export.tensors[key])
    config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(root / "base")
    monkeypatch.setattr(resolve, "_convert", None)
    assert resolved(plugin, root, name, tmp_path).lora_path == request.lora_path


@pytest.mark.slow
def test_an_adapter_is_converted_once_in_a_process_of_its_own(
    plugin: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resolved(plugin, root, "adapter", tmp_path, monkeypatch)


@pytest.mark.usefixtures("in_process")
def test_a_run_is_converted_once(
    plugin: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resolved(plugin, root, "run", tmp_path, monkeypatch)


def test_an_exported_folder_is_served_as_it_is(plugin: Any, root: Path, tmp_path: Path) -> None:
    live: Any = PeftModel.from_pretrained(tiny.llama(), str(root / "served/adapter"))
    export = plait.to_lora(live)
    export.config.base_model_name_or_path = str(root / "base")
    export.write(root / "served/exported")
    request = resolved(plugin, root, "exported", tmp_path / "cache")
    assert Path(request.lora_path) == (root / "served/exported").resolve()
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("routed", "depends on the token.*approx"),
        ("full-rank", r"leaves out .*--to merged"),
        ("pickled", "adapter_model.safetensors is missing.*pickle can run any code"),
        ("other-base", "trained on other/model, and this server serves"),
        ("damaged", "adapter_config.json cannot be read"),
    ],
)
def test_what_cannot_be_served_says_why(
    plugin: Any, root: Path, tmp_path: Path, name: str, message: str
) -> None:
    adapter, folder = root / "served/adapter", root / "served" / name
    if name in ("pickled", "other-base", "damaged"):
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
    if name == "pickled":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif name == "other-base":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "other/model"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif name == "damaged":
        (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=f"(?s){name}: .*{message}"):
        resolved(plugin, root, name, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_a_name_leads_nowhere_but_below_the_root(plugin: Any, root: Path, tmp_path: Path) -> None:
    (root / "served/link").symlink_to(root / "base")
    (root / "base/adapter_config.json").write_text("{}")
    for name in ("", "nothing", "../base", "link", str(root / "served/adapter"), "a\0b", "."):
        assert resolved(plugin, root, name, tmp_path) is None, name
    (root / "base/adapter_config.json").unlink()


@pytest.mark.usefixtures("in_process")
def test_the_code_of_a_folder_is_not_run(root: Path, tmp_path: Path) -> None:
    """A run folder whose config asks for code of its model is refused before anything is loaded."""
    folder = root / "served/code"
    shutil.copytree(root / "served/run", folder)
    config = (folder / "config.yaml").read_text()
    assert "trust_remote_code: false" in config
    (folder / "config.yaml").write_text(
        config.replace("trust_remote_code: false", "trust_remote_code: true")
    )
    with pytest.raises(AdapterError, match="runs no code"):
        plain_lora(folder, tmp_path, str(root / "base"))


@pytest.mark.usefixtures("in_process")
def test_no_module_that_an_adapter_names_is_imported(root: Path, tmp_path: Path) -> None:
    """peft imports megatron_core where megatron_config is set."""
    with tiny.seed():
        lora = LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
        model: Any = get_peft_model(tiny.llama(), lora)
    folder = root / "served/megatron"
    model.save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"megatron_config": {"x": 1}, "megatron_core": "antigravity"}
    config["base_model_name_or_path"] = str(root / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"megatron: .*a folder runs no code"):
        plain_lora(folder, tmp_path, str(root / "base"))
    assert "antigravity" not in sys.modules


def test_registration(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls it in each process, with or without a folder of adapters."""
    registered: dict[str, Any] = {}
    registry = types.SimpleNamespace(register_resolver=registered.__setitem__)
    monkeypatch.setattr(plugin, "LoRAResolverRegistry", registry)
    monkeypatch.delenv("PLAIT_ADAPTERS", raising=False)
    plugin.register()
    assert not registered
    monkeypatch.setenv("PLAIT_ADAPTERS", str(tmp_path))
    plugin.register()
    plugin.register()
    assert registered["plait"].root == tmp_path
    monkeypatch.setenv("PLAIT_ADAPTERS", str(tmp_path / "missing"))
    with pytest.raises(NotADirectoryError, match="missing: there is no such folder"):
        plugin.register()


def test_the_interface_is_vllms(plugin: Any) -> None:
    """The entry point names the function, and the coroutine has the arguments of the base class."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]' in text
    assert 'plait = "plait.run.serving.vllm:register"' in text
    method = plugin.PlaitResolver.resolve_lora
    assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(method).parameters) == ["self", "base_model_name", "lora_name"]
    assert issubclass(plugin.PlaitResolver, plugin.LoRAResolver)
    assert find(Path("/"), "/etc") is None


def test_an_exact_export_inside_a_run_is_served(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is converted then; one that lost something is not served."""
    folder = tmp_path / "run"
    shutil.copytree(root / "served/run", folder)
    live: Any = PeftModel.from_pretrained(tiny.llama(), str(folder / "adapter"))
    plait.to_lora(live).write(folder / "lora")
    mark_export(folder / "lora", to="lora", exact=True)
    monkeypatch.setattr(resolve, "_convert", None)
    assert plain_lora(folder, tmp_path, str(root / "base")) == folder / "lora"
    mark_export(folder / "lora", to="lora", exact=False)
    with pytest.raises(TypeError):  # it is converted
        plain_lora(folder, tmp_path, str(root / "base"))
