"""A run folder or an adapter that came from somebody else: what is in it is checked, never run."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from plait.run.adapter import load_adapter
from plait.run.check import check
from plait.run.config import load_config, peft_config
from plait.run.folder import RunFolder
from plait.run.model import load_base, load_tokenizer
from plait.run.prepare import load_run
from plait.run.train import train
from plait_cli import main
from tests.support.runs import copy_rows, run_config, save_model, write_rows

VERBS = {
    "evaluate": ["evaluate"],
    "generate": ["generate", "--prompt", "ab>"],
    "export": ["export", "--to", "lora"],
    "inspect": ["inspect", "--no-pictures"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_config(
        base, rows, tmp_path_factory.mktemp("run") / "run", training={"max_steps": 2}
    )
    return train(config).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A copy of the trained run, to be spoilt."""
    return RunFolder(shutil.copytree(trained, tmp_path / "received"))


def refused(run: RunFolder, verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one error of a verb that writes nothing."""
    before = sorted(run.path.rglob("*"))
    name, *options = VERBS[verb]
    assert main([name, str(run.path), *options]) == 2
    assert sorted(run.path.rglob("*")) == before
    return capsys.readouterr().err


def spoil_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[RunFolder], None]:
    def spoil(run: RunFolder) -> None:
        file = run.adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        name = sorted(tensors)[0]
        save_file(tensors | {name: change(tensors[name])}, file)

    return spoil


def spoil_config(**values: Any) -> Callable[[RunFolder], None]:
    def spoil(run: RunFolder) -> None:
        file = run.adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def spoil_file(text: str) -> Callable[[RunFolder], None]:
    def spoil(run: RunFolder) -> None:
        (run.adapter / "adapter_config.json").write_text(text)

    return spoil


SPOILT = {
    "NaN": (spoil_tensor(lambda x: x * float("nan")), "has NaN or infinite values"),
    "infinite": (spoil_tensor(lambda x: x / 0), "has NaN or infinite values"),
    "int64": (spoil_tensor(lambda x: x.to(torch.int64)), "is int64, the method has float32"),
    "bool": (spoil_tensor(lambda x: x > 0), "is bool, the method has float32"),
    "alpha NaN": (spoil_config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha": (spoil_config(lora_alpha=64), "lora_alpha is 64, the run's config.yaml has 16"),
    "rank": (spoil_config(r=2), "r is 2, the run's config.yaml has 4"),
    "no mapping": (
        spoil_config(alpha_pattern=None),
        "alpha_pattern is None, the run's config.yaml has {}",
    ),
    "a list": (spoil_file("[1]"), "is [1], no object. Save the adapter again."),
    "nested": (spoil_file("[" * 100_000), "is not JSON (maximum recursion depth"),
    "scaling": (spoil_config(use_rslora=True), "use_rslora is True, the run's config.yaml has"),
    "imports": (
        spoil_config(megatron_core="antigravity"),
        "megatron_core is 'antigravity', the run's config.yaml has 'megatron.core'",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_adapter_is_refused(
    run: RunFolder, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, text = SPOILT[fault]
    spoil(run)
    for verb in ("evaluate", "generate", "export") if fault == "NaN" else ("export",):
        assert text in refused(run, verb, capsys)


ODD_VALUES: list[Any] = [
    *(None, True, -1, 10**30, 0.5, "", "x", "../x", "(a+)+$", "(", [], [None], [[1]], {}, ["x"]),
    *({"": None, "0": None}, {"x": {"x": 1}}, {"auto": {"class": "x"}}, [0, "x"], "pissa"),
]


@pytest.mark.parametrize("method", [{}, {"name": "lora"}], ids=str)
def test_each_option_of_an_adapter_is_read_as_it_is_or_refused(
    base: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """No value of any key of an adapter_config.json ends otherwise, or makes another update."""
    config = run_config(base, tmp_path / "unread", tmp_path / "run", method=method)
    expected = peft_config(config.method, "causal_lm")
    assert expected is not None
    plain = load_base(config.model)
    model = get_peft_model(copy.deepcopy(plain), copy.copy(expected))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(file.read_text())
    inputs = torch.arange(8)[None]
    wanted = model.eval()(inputs).logits
    refusals: list[str] = []
    for name in saved:
        for value in ODD_VALUES:
            file.write_text(json.dumps(saved | {name: value}))
            try:
                loaded = load_adapter(copy.deepcopy(plain), tmp_path / "adapter", expected)
            except (ValueError, FileNotFoundError) as error:
                refusals.append(str(error))
            else:
                torch.testing.assert_close(loaded.eval()(inputs).logits, wanted)
    assert len(refusals) > 10 * len(saved)
    assert all(str(file.parent) in text for text in refusals)


# Code that a model brings along -------------------------------------------------------------------


@pytest.fixture
def custom(base: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the base of the run one that brings code along; return the file that the code writes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, model = tmp_path / "executed", tmp_path / "custom"
    shutil.copytree(base, model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "brought",
        "auto_map": {
            "AutoConfig": "brought.BroughtConfig",
            "AutoModelForCausalLM": "brought.BroughtModel",
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "brought.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class BroughtConfig(LlamaConfig):\n"
        "    model_type = 'brought'\n"
        "class BroughtModel(LlamaForCausalLM):\n"
        "    config_class = BroughtConfig\n"
    )
    text = run.config.read_text().replace(f"name: {base}", f"name: {model}")
    run.config.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert load_config(run.config).model.trust_remote_code
    return mark


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_folder_executes_no_code_of_its_model(
    run: RunFolder, custom: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        f"{run.config}: model.trust_remote_code is true, and the config of a run folder runs no "
        "code. If you trust the code that"
    ) in refused(run, verb, capsys)
    assert not custom.exists()


def test_the_command_line_allows_code(
    run: RunFolder, custom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = "model.trust_remote_code=true"
    with pytest.raises(ValueError, match="trust_remote_code"):  # transformers': it needs the code
        load_run(run.path, ["model.trust_remote_code=false"])
    assert not custom.exists()
    assert load_run(run.path, [allowed]).cfg.model.trust_remote_code
    assert custom.exists()
    for verb in ("evaluate", "generate", "inspect"):
        name, *options = VERBS[verb]
        assert main([name, str(run.path), *options, allowed]) == 0, capsys.readouterr().err
    assert "test" not in run.read_evaluation()
    assert "validation" in run.read_evaluation(), "it is measured as the run was trained"


# What a config may ask for ------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "gradient norm": ({"training": {"max_grad_norm": -1}}, "training.max_grad_norm is -1"),
    "smoothing": (
        {"training": {"label_smoothing_factor": 5}},
        "training.label_smoothing_factor is 5",
    ),
    "epochs": ({"training": {"num_train_epochs": -2}}, "training.num_train_epochs is -2"),
    "no batch": (
        {"training": {"per_device_train_batch_size": 0}},
        "training.per_device_train_batch_size is 0",
    ),
    "no accumulation": (
        {"training": {"gradient_accumulation_steps": 0}},
        "training.gradient_accumulation_steps is 0",
    ),
    "rate": ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is nan"),
    "endless rate": ({"training": {"learning_rate": float("inf")}}, "learning_rate is inf"),
    "seed": ({"training": {"seed": -1}}, "training.seed is -1"),
    "dropout": ({"method": {"lora_dropout": -0.5}}, "method.lora_dropout is -0.5"),
    "dropout of vera": (
        {"method": {"name": "vera", "vera_dropout": 1.0}},
        "method.vera_dropout is 1.0",
    ),
    "alpha": ({"method": {"lora_alpha": float("nan")}}, "method.lora_alpha is nan"),
    "imports": (
        {"method": {"megatron_config": {}, "megatron_core": "antigravity"}},
        "cannot be set: it imports a module",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_config_is_refused_while_it_is_read(
    base: Path, rows: Path, tmp_path: Path, fault: str
) -> None:
    sections, text = WRONG[fault]
    with pytest.raises(ValueError) as caught:
        run_config(base, rows, tmp_path / "run", **sections)
    assert text in str(caught.value)


@pytest.mark.parametrize("act", [check, train])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"modules_to_save": ["nope"]}, "method.modules_to_save: 'nope' matches no module"),
        ({"target_modules": r"(\w+\.?)+X"}, "method.target_modules has"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"rank_pattern": {r"(\w+\.?)+X": 2}}, "method.rank_pattern has"),
        ({"r": 65_536}, "method.r is 65536, and the widest layer of this model has"),
    ],
)
def test_check_and_train_refuse_alike_before_a_folder_exists(
    base: Path,
    rows: Path,
    tmp_path: Path,
    act: Callable[[Any], object],
    options: dict[str, Any],
    text: str,
) -> None:
    method = {"name": "lora", "r": 4} | options
    config = run_config(base, rows, tmp_path / "run", method=method)
    with pytest.raises(ValueError) as caught:
        act(config)
    assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_catastrophic_expression_in_a_run_folder_is_refused(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run.config.read_text().replace(
        "method:\n", "method:\n  target_modules: '(\\w+\\.?)+X'\n"
    )
    run.config.write_text(text)
    assert "takes more than 3 s on the names of this model's layers" in refused(
        run, "evaluate", capsys
    )


def test_the_tokenizer_of_the_run_is_still_its_own(run: RunFolder) -> None:
    loaded = load_run(run.path)
    assert loaded.tokenizer.get_vocab() == load_tokenizer(loaded.cfg.model).get_vocab()
