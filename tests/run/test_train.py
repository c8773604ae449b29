"""Training into a run folder: what it leaves, how it stops, and that resuming changes nothing."""

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback

from plait.run.callbacks import ProgressBar
from plait.run.check import check
from plait.run.config import RunConfig, config_from_dict, dump_config
from plait.run.evaluate import evaluate_run
from plait.run.prepare import load_run, training_arguments
from plait.run.train import train
from plait.run.trainer import RunTrainer, scale_learning_rates
from plait_cli import main
from tests.support.runs import At, copy_rows, film_rows, run_config, save_model, write_rows

ADALORA = {"name": "adalora", "r": 2, "init_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows(tasks=True))


# --------------------------------------------------------------------------------- what is left


def test_run_folder(llama: Path, rows: Path, tmp_path: Path, loss_curves: None) -> None:
    method = {"name": "dual_lora", "r": 4, "gate_steps": 4}
    folder = train(run_config(llama, rows, tmp_path / "run", method=method))
    assert {p.name for p in folder.path.iterdir()} == {
        "README.md", "adapter", "checkpoints", "config.yaml", "environment.json", "eval.json",
        "loss.png", "metrics.jsonl",
    }  # fmt: skip
    logs = folder.read_metrics()
    assert [row["step"] for row in logs] == [*range(1, 11), 10]
    assert {"loss", "learning_rate", "grad_norm", "train_tokens_per_second"} <= logs[3].keys()
    evaluation = folder.read_evaluation()
    assert evaluation["split"] == "validation"
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"]
    assert set(evaluation["after"]["tasks"]) == {"copy", "turn"}
    run = folder.read_environment()["run"]
    with safe_open(folder.adapter / "adapter_model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert run["stored"] == stored
    assert (run["steps"], run["train_rows"], run["tasks"]) == (10, 32, ["copy", "turn"])
    card = folder.card.read_text()
    assert card == (folder.adapter / "README.md").read_text()
    for part in (
        "**This adapter loads only after `import plait`**",
        "import plait  # registers the method with peft",
        'model = PeftModel.from_pretrained(base, "RUN/adapter")',
        f"| trainable parameters | {run['trainable']:,} of ",
        f"| numbers stored in the file | {stored:,} |",
        "| metric | before | after |",
        "On 8 rows, validation:",
        "name: dual_lora",
    ):
        assert part in card
    from PIL import Image

    with Image.open(folder.loss_curve) as picture:
        assert picture.size == (840, 552)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50  # something is drawn


@pytest.mark.parametrize("model", ["builtin:tiny", "bert", "full"])
def test_the_code_on_the_card_runs(model: str, llama: Path, rows: Path, tmp_path: Path) -> None:
    base, data, task = Path(model), rows, "causal_lm"
    if model == "bert":
        base, task = save_model("bert", tmp_path / "bert"), "classification"
        data = write_rows(tmp_path / "films.jsonl", film_rows())
    method = {"name": "full"} if model == "full" else {"name": "shared_b", "r": 2}
    cfg = run_config(
        llama if model == "full" else base,
        data,
        tmp_path / "run",
        model={"task": task},
        method=method,
        training={"max_steps": 2},
        evaluation={"generate": False},
    )
    folder = train(cfg)
    code = folder.card.read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("RUN/", f"{folder.path}/"), names)
    wanted = load_run(folder.path).model
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(names["model"].eval()(ids).logits, wanted(ids).logits)


def test_full_fine_tuning_leaves_a_plain_checkpoint(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = train(run_config(llama, rows, tmp_path / "run", method={"name": "full"}))
    assert not folder.adapter.exists()
    AutoModelForCausalLM.from_pretrained(folder.model)
    AutoTokenizer.from_pretrained(folder.model)
    card = folder.card.read_text()
    assert 'AutoModelForCausalLM.from_pretrained("RUN/model")' in card
    assert "import plait  #" not in card


def test_pissa_is_saved_as_a_lora_of_the_whole_base(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    method = {"name": "pissa", "r": 2}
    folder = train(run_config(llama, rows, tmp_path / "run", method=method))
    saved = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (4, 32, True)


def test_adalora_prunes(llama: Path, rows: Path, tmp_path: Path) -> None:
    method = ADALORA
    folder = train(run_config(llama, rows, tmp_path / "run", method=method))
    pattern = json.loads((folder.adapter / "adapter_config.json").read_text())["rank_pattern"]
    assert len(pattern) == 14
    assert sum(sum(kept) for kept in pattern.values()) == 14 * 2  # r = 2 on average
    wrong = run_config(llama, rows, tmp_path / "other", method={**method, "total_step": 20})
    with pytest.raises(ValueError) as caught:
        train(wrong)
    assert str(caught.value) == (
        "method.total_step is 20, but training has 10 optimizer steps, so adalora's schedule would "
        "not end where training does. Set it to 10, or leave it out."
    )


def test_best_checkpoint_is_loaded_by_its_final_name(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    options = {
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 5,
        "eval_strategy": "steps", "eval_steps": 5, "save_total_limit": 1,
    }  # fmt: skip
    folder = train(run_config(llama, rows, tmp_path / "run", training=options))
    state = json.loads((folder.checkpoints / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder.checkpoints / "checkpoint-10")
    measured = [row["eval_loss"] for row in folder.read_metrics() if "eval_loss" in row]
    assert min(measured) == pytest.approx(folder.read_evaluation()["after"]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    "section", [{"training": {"bf16": True}}, {"model": {"dtype": "bfloat16"}}]
)
def test_half_precision_is_measured_as_it_is_loaded(
    section: dict[str, Any], llama: Path, rows: Path, tmp_path: Path
) -> None:
    folder = train(run_config(llama, rows, tmp_path / "run", **section))
    trained = folder.read_evaluation()["after"]
    again = evaluate_run(folder.path, "validation")
    assert again["loss"] == trained["loss"]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_base(bits: str, llama: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra plait[quant] is not installed")
    folder = train(run_config(llama, rows, tmp_path / "run", model={"quantization": bits}))
    trained = folder.read_evaluation()
    assert trained["after"]["loss"] < trained["before"]["loss"]
    again = evaluate_run(folder.path, "validation")
    assert again["loss"] == pytest.approx(trained["after"]["loss"], abs=1e-3)


def test_old_checkpoints_are_rotated(llama: Path, rows: Path, tmp_path: Path) -> None:
    options = {"save_steps": 2, "save_total_limit": 2}
    folder = train(run_config(llama, rows, tmp_path / "run", training=options))
    names = sorted(p.name for p in folder.checkpoints.iterdir())
    assert names == ["checkpoint-10", "checkpoint-8"]


@pytest.mark.parametrize(
    ("training", "method", "text"),
    [
        (
            {"push_to_hub": True},
            {"name": "lora"},
            "training.push_to_hub is true, but would upload without the model card. Upload the "
            "finished adapter/ with: hf upload REPO RUN/adapter",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps"},
            {"name": "adalora", "init_r": 12},
            "training.load_best_model_at_end does not work with adalora: peft 0.21.2 cannot load "
            "an adapter of other ranks into the one in training. Set it to false.",
        ),
    ],
)
def test_refused_training_options(
    training: dict[str, Any],
    method: dict[str, Any],
    text: str,
    llama: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError) as caught:
        train(run_config(llama, rows, tmp_path / "run", training=training, method=method))
    assert str(caught.value) == text


# --------------------------------------------------------------------------- faults while it runs


def _spoil_base(model: Any) -> None:
    model.get_base_model().lm_head.weight.data[0, 0] = float("nan")


def _spoil_adapter(model: Any) -> None:
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data[0, 0] = float("inf")


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    llama: Path, rows: Path, tmp_path: Path, loss_curves: None
) -> None:
    cfg = run_config(llama, rows, tmp_path / "run", training={"save_steps": 2})
    with pytest.raises(FloatingPointError) as caught:
        train(cfg, callbacks=[At(6, _spoil_base)])
    last = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    assert str(caught.value) == (
        f"training: the loss is nan in step 6; {last} is kept. Lower training.learning_rate, or "
        "look for rows that are wrong."
    )
    saved = load_file(last / "adapter_model.safetensors")
    assert all(torch.isfinite(t).all() for t in saved.values())
    assert (tmp_path / "run" / "loss.png").is_file()
    assert not (tmp_path / "run" / "adapter").exists()


def test_weights_that_are_not_finite_are_never_saved(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    cfg = run_config(llama, rows, tmp_path / "run", training={"save_steps": 2})
    with pytest.raises(FloatingPointError) as caught:
        train(cfg, callbacks=[At(4, _spoil_adapter, end=True)])
    assert "is not finite any more after step 4; " in str(caught.value)
    assert "checkpoint-2 is kept. Lower training.learning_rate" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()


def test_second_interrupt_stops_at_once(llama: Path, rows: Path, tmp_path: Path) -> None:
    cfg = run_config(llama, rows, tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    twice = At(3, lambda model: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt, match="in the middle of a step"):
        train(cfg, callbacks=[twice])
    assert signal.getsignal(signal.SIGINT) is before
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# -------------------------------------------------------------------------------- learning rates


def test_lr_scale_makes_parameter_groups(llama: Path, rows: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {id(p): n for n, p in kwargs["model"].named_parameters()}
            for group in kwargs["optimizer"].param_groups:
                for p in group["params"]:
                    kind = "A" if ".lora_A." in names[id(p)] else "B"
                    seen[kind] = (group["initial_lr"], group["weight_decay"])

    method = {"name": "lora", "r": 2, "lr_scale": {"B": 4}}
    options = {"weight_decay": 0.1, "max_steps": 1}
    train(
        run_config(llama, rows, tmp_path / "run", method=method, training=options),
        callbacks=[Look()],
    )
    assert seen == {"A": (0.01, 0.1), "B": (0.04, 0.025)}


def test_lr_scale_of_an_unknown_parameter() -> None:
    model = torch.nn.ParameterDict({"lora_A": torch.zeros(2), "lora_B": torch.zeros(2)})
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError) as caught:
        scale_learning_rates(optimizer, model, {"C": 2.0})
    assert str(caught.value) == ("method.lr_scale: no trained parameter is named C. Known: A, B.")


# ------------------------------------------------------------------------------ the command line


def _write(cfg: RunConfig, to: Path) -> Path:
    to.write_text(dump_config(cfg), encoding="utf-8")
    return to


def test_progress_in_a_terminal_and_elsewhere(llama: Path, rows: Path, tmp_path: Path) -> None:
    shown = {}
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120)
        cfg = run_config(llama, rows, tmp_path / str(terminal), training={"max_steps": 4})
        train(cfg, callbacks=[ProgressBar(console)])
        shown[terminal] = out.getvalue()
    for text in shown.values():
        assert "loss " in text
        assert "lr " in text
        assert "tokens/s" in text
        assert "left" in text
    assert "4/4" in shown[True]
    assert len(shown[False].splitlines()) == 4
    assert "\x1b" not in shown[False]


def test_train_verb(
    llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write(run_config(llama, rows, tmp_path / "run"), tmp_path / "run.yaml")
    assert main(["train", str(file), "training.max_steps=3", "method.r=2"]) == 0
    out = capsys.readouterr().out
    first, second, *_ = out.splitlines()  # not the 50 lines of the config
    assert first == "rows: train 32, validation 8; each has prompt and completion"
    assert second.startswith("step 1/3")
    assert "step 3/3" in out
    assert "before" in out
    assert "exact match" in out
    assert out.splitlines()[-1] == f"run folder: {tmp_path / 'run'}"
    shown = ["--verbose", "training.max_steps=1", f"output.dir={tmp_path / 'other'}"]
    assert main(["train", str(file), *shown]) == 0
    assert "max_steps: 1" in capsys.readouterr().out  # the resolved config
    assert main(["train", str(file)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_train_verb_stops_and_resumes(
    llama: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _write(run_config(llama, rows, tmp_path / "run"), tmp_path / "run.yaml")
    real, step = RunTrainer.training_step, iter(range(1, 100))

    def press(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if next(step) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", press)
    assert main(["train", str(file)]) == 130
    err = capsys.readouterr().err
    assert "stopped after step 4 of 10" in err
    assert err.splitlines()[-1] == f"Continue it with: plait train {file} --resume"
    assert main(["train", str(file), "--resume"]) == 0
    assert "run folder" in capsys.readouterr().out


def test_train_verb_says_nan_without_a_traceback(
    llama: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _write(run_config(llama, rows, tmp_path / "run"), tmp_path / "run.yaml")
    monkeypatch.setattr(
        "transformers.Trainer.training_step", lambda *a, **k: torch.tensor(float("nan"))
    )
    assert main(["train", str(file)]) == 1
    err = capsys.readouterr().err
    assert err == (
        "plait train: training: the loss is nan in step 1; there is no checkpoint yet. Lower "
        "training.learning_rate, or look for rows that are wrong.\n"
    )


def test_classification_trains_and_logs_metrics(tmp_path: Path) -> None:
    model = save_model("bert", tmp_path / "bert")
    data = write_rows(tmp_path / "films.jsonl", film_rows())
    cfg = run_config(
        model,
        data,
        tmp_path / "run",
        model={"task": "classification"},
        training={"eval_strategy": "steps", "eval_steps": 5, "max_steps": 10},
    )
    folder = train(cfg)
    held_out = [row for row in folder.read_metrics() if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [5, 10]
    assert {"eval_accuracy", "eval_macro_f1", "eval_matthews"} <= held_out[0].keys()
    assert "| labels | no, yes |" in folder.card.read_text()


@pytest.mark.parametrize(
    "section",
    [
        {"method": {"name": "lora", "r": 2, "target_modules": ["nothing"]}},
        {"method": {"name": "adalora", "r": 2, "total_step": 20}},
        {"data": {"validation": None, "max_length": 2}},
        {"training": {"push_to_hub": True}},
        {"training": {"load_best_model_at_end": True}},
    ],
)
def test_a_refused_run_leaves_no_folder(
    section: dict[str, Any], llama: Path, rows: Path, tmp_path: Path
) -> None:
    cfg = run_config(llama, rows, tmp_path / "run", **section)
    for refuse in (check, train):
        with pytest.raises(ValueError):
            refuse(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("perplexity", False), ("eval_mse", False), ("loss", False), ("accuracy", True)],
)
def test_the_best_checkpoint_is_that_of_the_better_metric(metric: str, higher: bool) -> None:
    raw: dict[str, Any] = {"metric_for_best_model": metric}
    assert training_arguments(config_from_dict({"training": raw})).greater_is_better == higher
    raw["greater_is_better"] = not higher
    assert training_arguments(config_from_dict({"training": raw})).greater_is_better != higher


def test_other_rows_than_the_model_reads(llama: Path, rows: Path, tmp_path: Path) -> None:
    folder = train(run_config(llama, rows, tmp_path / "run", training={"max_steps": 1}))
    long = write_rows(
        tmp_path / "long.jsonl", [{"prompt": "a" * 600, "completion": "b", "task": "copy"}]
    )
    with pytest.raises(ValueError, match=r"data: the longest row has \d+ tokens, the model reads"):
        evaluate_run(folder.path, overrides=[f"data.test={long}", "data.max_length=900"])
