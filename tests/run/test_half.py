"""On a half-precision base all that trains is fp32: it moves, saves and loads as it should."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import plait
from plait.core.precision import keep_wide
from plait.run import export
from plait.run.config import method_names, method_options
from plait.run.evaluate import evaluate_run
from plait.run.export import read_back
from plait.run.folder import RunFolder
from plait.run.prepare import load_run, prepare
from plait.run.train import train
from plait.testing import tiny
from tests.support.runs import (
    assert_same,
    copy_rows,
    film_rows,
    interrupt,
    run_config,
    save_model,
    weights,
    write_rows,
)

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK = {"generate": False}
# Short schedules for ten steps of small layers.
SHORT: dict[str, dict[str, Any]] = {"vblora": {"vector_length": 4}, "alloc": {"rounds": 0}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "bert", "deberta"):
        save_model(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("films") / "films.jsonl", film_rows())


# --------------------------------------------------------------------------------- every method


def everything(name: str) -> dict[str, Any]:
    """A method with all that it can train beside its layers."""
    method: dict[str, Any] = {"name": name, **SHORT.get(name, {})}
    known = method_options(name)
    if "modules_to_save" in known:
        method["modules_to_save"] = ["ln_f"]
    if "trainable_token_indices" in known:
        method["trainable_token_indices"] = {"wte": [4, 5]}
    if "bias" in known:
        method["bias"] = "all"
    return method


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in method_names()), ("lora", "float16"), ("full", "float16")],
)
def test_all_that_trains_is_fp32(
    name: str, dtype: str, models: Path, rows: Path, tmp_path: Path
) -> None:
    cfg = run_config(
        models / "gpt2", rows, tmp_path / "run", model={"dtype": dtype}, method=everything(name)
    )
    run = prepare(cfg)
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    out = run.model(**run.data.batch("train", 4))
    assert out.logits.dtype == HALF[dtype]
    out.loss.backward()
    missing = {n for n, p in trained.items() if p.grad is None}
    assert not {n for n in missing if "modules_to_save" in n or n.endswith("bias")}
    if isinstance(run.model, PeftModel):
        with run.model.disable_adapter(), torch.no_grad():
            run.model(**run.data.batch("train", 4))


# ------------------------------------------------------------------------------- how far it moves


CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {  # model, task, method, what is watched
    "head": ("bert", "classification", {"name": "lora", "r": 2}, "classifier"),
    "head, ours": ("bert", "regression", {"name": "sora", "r": 2}, "classifier"),
    "score": ("llama", "classification", {"name": "dora", "r": 2}, "score"),
    "dense head": ("deberta", "classification", {"name": "hydra", "r": 2}, "pooler"),
    "embedding": (
        "llama", "causal_lm", {"name": "lora", "r": 2, "modules_to_save": ["embed_tokens"]},
        "embed_tokens",
    ),
    "output": (
        "llama", "causal_lm", {"name": "tied", "r": 2, "modules_to_save": ["lm_head", "norm"]},
        "modules_to_save",
    ),
    "tokens": (
        "llama", "causal_lm", {"name": "dual_lora", "trainable_token_indices": [4, 5, 18]},
        "trainable_tokens_delta",
    ),
    "biases": ("bert", "classification", {"name": "lora", "r": 2, "bias": "all"}, "bias"),
    "biases, ours": (
        "gpt2", "causal_lm", {"name": "molora", "r": 2, "bias": "plait_only"}, "base_layer.bias",
    ),
    "full": ("llama", "causal_lm", {"name": "full"}, "proj"),
    "full encoder": ("bert", "regression", {"name": "full"}, "query"),
}  # fmt: skip


def case(
    name: str, dtype: str, models: Path, rows: Path, films: Path, to: Path, **training: Any
) -> Any:
    kind, task, method, _ = CASES[name]
    causal = task == "causal_lm"
    return run_config(
        models / kind,
        rows if causal else films,
        to,
        model={"task": task, "dtype": dtype},
        data={} if task != "regression" else {"columns": {"label": "score"}},
        method=method,
        training={"max_steps": 30, "learning_rate": 2e-5, "warmup_steps": 0, **training},
        evaluation=QUICK,
    )


class Runs:
    """Finished runs of the cases, each made once."""

    def __init__(self, *where: Path) -> None:
        self.where = where
        self.done: dict[tuple[str, str], tuple[RunFolder, dict[str, torch.Tensor]]] = {}

    def __call__(self, name: str, dtype: str) -> tuple[RunFolder, dict[str, torch.Tensor]]:
        """The folder of a run, and the parameters that it began with."""
        if (name, dtype) not in self.done:
            *rest, to = self.where
            cfg = case(name, dtype, *rest, to / f"{name} {dtype}")
            start = {n: p.detach().clone() for n, p in prepare(cfg).model.named_parameters()}
            self.done[name, dtype] = train(cfg), start
        return self.done[name, dtype]


@pytest.fixture(scope="module")
def runs(models: Path, rows: Path, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(models, rows, films, tmp_path_factory.mktemp("runs"))


def moved(runs: Runs, name: str, dtype: str) -> float:
    """How far what a case watches has moved on average."""
    folder, start = runs(name, dtype)
    ends = {
        n: p.detach()
        for n, p in load_run(folder.path).model.named_parameters()
        if CASES[name][3] in n and not any(x in n for x in ("original_module", "lora_", "plait_"))
    }
    assert {p.dtype for p in ends.values()} == {torch.float32}
    return float(torch.cat([(p - start[n]).abs().flatten() for n, p in ends.items()]).mean())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in CASES), ("head", "float16"), ("full", "float16")],
)
def test_moves_as_far_as_on_an_fp32_base(name: str, dtype: str, runs: Runs) -> None:
    assert moved(runs, name, dtype) == pytest.approx(moved(runs, name, "float32"), rel=0.1)


# -------------------------------------------------------------------------- save, load, go on


@pytest.mark.parametrize("name", CASES)
def test_comes_back_as_it_was_trained(name: str, runs: Runs) -> None:
    folder, _ = runs(name, "bfloat16")
    saved = weights(folder)
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}
    model = load_run(folder.path).model
    loaded = {
        n.replace(".modules_to_save.default.", ".").replace(".default", ""): p
        for n, p in model.state_dict().items()
    }
    watched = [key for key in saved if CASES[name][3] in key or "classifier" in key]
    assert all(torch.equal(saved[key], loaded[key]) for key in watched if key in loaded)
    assert any(key in loaded for key in watched) or name == "output"
    trained = folder.read_evaluation()["after"]
    again = evaluate_run(folder.path, "validation")
    assert again == {"split": "validation", **trained}


@pytest.mark.parametrize("name", ["head", "biases, ours", "full"])
def test_resume_gives_the_same_weights(
    name: str, models: Path, rows: Path, films: Path, tmp_path: Path
) -> None:
    def config(to: str) -> Any:
        return case(
            name, "bfloat16", models, rows, films, tmp_path / to, max_steps=10, learning_rate=1e-2
        )

    whole = train(config("a"))
    with pytest.raises(KeyboardInterrupt):
        train(config("b"), callbacks=[interrupt(5)])
    assert_same(whole, train(config("b"), resume=True))


@pytest.mark.parametrize(("name", "to"), [("head", "lora"), ("full", "merged")])
def test_export_says_what_the_run_says(
    name: str, to: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = runs(name, "bfloat16")
    if name == "full":  # the check in a fresh process is that of the other one
        skipped = lambda run, folders, *_: dict.fromkeys(folders, torch.zeros(()))  # noqa: E731
        monkeypatch.setattr(read_back, "read_without_plait", skipped)
    out, report = export.export_run(folder.path, to)
    assert report.logit_error < 0.02
    file = out / ("model.safetensors" if name == "full" else "adapter_model.safetensors")
    saved, trained = load_file(file), weights(folder)
    if name == "full":
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[key], trained[key]) for key in saved)
    else:
        assert report.stock_error is not None
        assert report.stock_error < 0.03
        key = next(key for key in saved if key.endswith("classifier.weight"))
        assert torch.equal(saved[key], trained[key])


def test_a_head_saved_in_half_precision_still_loads(
    models: Path, films: Path, rows: Path, tmp_path: Path
) -> None:
    folder = train(case("head", "bfloat16", models, rows, films, tmp_path / "run", max_steps=2))
    file = folder.adapter / "adapter_model.safetensors"
    tensors = {n: t.bfloat16() if "classifier" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    evaluate_run(folder.path, "validation")
    model = load_run(folder.path).model
    head = next(p for n, p in model.named_parameters() if "classifier.modules_to_save" in n)
    assert head.dtype == torch.float32


# ---------------------------------------------------------------------------------- without runs


class Two(nn.Module):
    """A layer and an embedding with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.layer.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(ids))


def test_a_wide_module_computes_as_the_rounded_one() -> None:
    with tiny.seed():
        half = Two().bfloat16()
    wide, memo, ids = copy.deepcopy(half), {}, torch.tensor([[0, 3, 5]])
    for module in wide.modules():
        keep_wide(module, [*module._parameters], memo)
    assert wide.layer.weight is wide.table.weight
    assert wide.layer.weight.dtype == torch.float32
    assert torch.equal(wide(ids), half(ids))
    wide(ids).float().sum().backward()
    assert wide.table.weight.grad is not None
    assert wide.table.weight.grad.dtype == torch.float32
    assert "weight" not in vars(wide.layer)
    again = copy.deepcopy(wide)
    with torch.no_grad():
        again.layer.weight.add_(1)
    assert torch.equal(wide(ids), half(ids))
    assert not torch.equal(again(ids), half(ids))
    with pytest.raises(RuntimeError):  # the weight is visible again after an error
        wide.layer(torch.ones(1, 3))
    assert wide.layer.weight is wide.table.weight
    assert wide.layer(torch.ones(1, 4)).dtype == torch.float32  # as in mixed precision


def test_plaits_methods_are_wide_without_a_run() -> None:
    base = tiny.bert().bfloat16()
    config = plait.SoraConfig(r=2, task_type="SEQ_CLS", bias="all", target_modules=["query"])
    model = get_peft_model(base, config)
    model.add_adapter("other", plait.SoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    ids = tiny.tokens(4)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or name.endswith("bias"):
                parameter.add_(0.1)
        alone = {}
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            alone[adapter] = model(ids).logits
        names = ["default", "other", "__base__", "default"]
        mixed = model(ids, adapter_names=names).logits
        with model.disable_adapter():
            alone["__base__"] = model(ids).logits
    for row, adapter in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[adapter][row], atol=2e-2, rtol=2e-2)
    narrow = get_peft_model(tiny.bert().bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.bfloat16}


def test_an_fp32_base_is_left_as_it_is() -> None:
    model = get_peft_model(
        tiny.bert(), LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    )
    assert plait.core.bridge.keep_masters(model) == []
    assert not any("plait_dtype" in vars(module) for module in model.modules())
