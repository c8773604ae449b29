"""`plait export` of runs: what is refused, what is lost, what training leaves beside adapter/."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import plait
from plait.run.config import RunConfig
from plait.run.export import HeldOutRows, export_run, export_tasks
from plait.run.export.held_out import noise_of
from plait.run.export.place import task_folders
from plait.run.export.read_back import reader_here
from plait.run.folder import RunFolder
from plait.run.metrics import causal_metrics
from plait.run.model import load_base
from plait.run.prepare import load_run
from plait.run.train import train
from plait_cli import main
from tests.support.runs import copy_rows, film_rows, run_config, save_model, write_rows

TARGETS = ["q_proj", "v_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "dual_lora": {"name": "dual_lora", "r": 12, "gate_steps": 2},
    "hydra": {"name": "hydra", "r": 2, "num_B": 2},
    "tasks": {"name": "shared_b", "r": 2, "routing": "task"},
    "sora": {"name": "sora", "r": 4},
    "pissa": {"name": "pissa", "r": 2},
    "lora": {"name": "lora", "r": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases and rows."""
    folder = tmp_path_factory.mktemp("export")
    save_model("llama", folder / "llama")
    save_model("bert", folder / "bert")
    write_rows(folder / "rows.jsonl", copy_rows())
    write_rows(folder / "tasks.jsonl", copy_rows(tasks=True))
    write_rows(folder / "films.jsonl", film_rows())
    return folder


def config(place: Path, name: str, run: Path, also: bool = False, **sections: Any) -> RunConfig:
    rows = "tasks.jsonl" if name == "tasks" else "rows.jsonl"
    method = {**METHODS[name], "target_modules": TARGETS}
    if also:
        sections["output"] = {"also": ["lora"]}
    return run_config(place / "llama", place / rows, run, method=method, **sections)


@pytest.fixture(scope="module")
def runs(place: Path) -> Any:
    """Name of a method -> the folder of a run, trained when it is first asked for."""
    trained: dict[str, RunFolder] = {}

    def run(name: str) -> Path:
        if name not in trained:
            also = name in ("tasks", "sora", "pissa")
            trained[name] = train(config(place, name, place / f"run_{name}", also))
        return trained[name].path

    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read exports back in this process: a new one takes seconds, and another test has it."""

    def read(run: Any, folders: Any, to: str, inputs: Any) -> Any:
        return reader_here(run)(folders, inputs)

    monkeypatch.setattr("plait.run.export.read_back.read_without_plait", read)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `plait export WORDS` prints when it ends with 2."""
    assert main(["export", *words]) == 2
    return capsys.readouterr().err


@torch.no_grad()
def logits(model: Any, inputs: Any) -> torch.Tensor:
    return model.eval()(**inputs).logits


def inputs_of(run: Any) -> dict[str, torch.Tensor]:
    batch = run.load_data("validation").batch("validation", 4)
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


# What is refused -------------------------------------------------------------------------------


def test_an_export_that_ruins_the_adapter_is_refused(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """dual_lora has full rank; the error names the loss, merging, and the way to accept it."""
    folder = runs("dual_lora")
    assert main(["export", str(folder), "--to", "lora"]) == 2
    out, error = capsys.readouterr()
    assert "weight error" in out
    assert "of the update of model.layers." in error
    assert "is left out. Export it merged instead (--to merged)" in error
    assert "(--lossy)" in error
    assert not (folder / "lora").exists()


@pytest.mark.usefixtures("here")
def test_a_lossy_export_is_measured_on_held_out_rows(runs: Any, tmp_path: Path) -> None:
    """The card says what it is, and the mark keeps the figures."""
    out, report = export_run(runs("dual_lora"), "lora", tmp_path / "lora", lossy=True)
    assert report.weight_error > 0.01
    assert report.held_out is not None
    assert {"loss", "exact_match"} <= {*report.held_out.before}
    card = (out / "README.md").read_text()
    assert "**It is not the model that was trained: " in card
    assert "| loss " in card
    mark = json.loads((out / "plait_export.json").read_text())
    assert mark["held_out"][""]["after"] == report.held_out.after
    assert mark["weight_error"] == report.weight_error


def test_metrics_that_move_beyond_their_noise(runs: Any, place: Path) -> None:
    """An update that is three times too large moves the loss; the same model moves nothing."""
    run = load_run(runs("lora"))
    data = run.load_data("validation")
    rows = HeldOutRows(run.model, data, "validation", run.cfg)
    same = rows.compare(run.model)
    assert same.moved == []
    assert same.before == same.after
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if "lora_B" in name:
                p.mul_(30)
    moved = rows.compare(run.model)
    assert "loss" in moved.moved
    assert moved.said(["loss"])[0].startswith("loss ")


def test_noise_is_the_standard_error_and_at_least_a_row() -> None:
    matches = torch.arange(400).remainder(4).eq(0).double().numpy()
    values = {"nll": matches + 1, "tokens": 0 * matches + 1, "correct": 0 * matches}
    noise = noise_of({**values, "exact_match": matches}, causal_metrics)
    expected = (0.25 * 0.75 / 400) ** 0.5
    assert noise["exact_match"] == pytest.approx(expected, rel=0.2)
    assert noise["token_accuracy"] == 1 / 400


def test_by_token_the_error_names_the_approximation_and_its_cost(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, str(runs("hydra")), "--to", "lora")
    assert "hydra weighs its parts for each token, so no plain LoRA holds its update" in error
    assert "no server (vLLM, SGLang, llama.cpp) nor stock peft reads it" in error
    assert "--approx mean, which changes the logits by up to " in error


def test_options_that_do_not_fit(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sora, lora = str(runs("sora")), ["--to", "lora"]
    error = fails(capsys, sora, *lora, "--out", "x", "--for", "vllm", "--max-rank", "12")
    assert "vLLM's --max-lora-rank is one of 1, 8, 16, 32" in error
    error = fails(capsys, sora, *lora, "--out", "x", "--max-rank", "0")
    assert "--max-rank 0: give 1 or more" in error
    error = fails(capsys, sora, "--to", "merged", "--for", "vllm", "--compact")
    assert "--compact and --for belong to --to lora" in error
    error = fails(capsys, sora, *lora, "--out", "x", "--task", "all")
    assert "--task all: sora does not route by task" in error
    error = fails(capsys, str(runs("tasks")), *lora, "--out", "x")
    assert "Give --task NAME (copy, turn), or --task all for a folder each" in error
    with pytest.raises(SystemExit):
        main(["export", sora, *lora, "--max-rank", "8", "--rank", "4"])
    assert not Path("x").exists()


def test_a_server_that_would_misread_it_is_named(
    runs: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(runs("sora"))
    model: Any = load_run(run).model
    gates = [d.g for layer in model.base_model.plait_layers() for d in layer.plait_delta.values()]
    with torch.no_grad():
        for i, g in enumerate(gates):
            g[: i % 4] = 0
    model.save_pretrained(str(tmp_path / "adapter"))
    other = tmp_path / "run"
    other.mkdir()
    for name in ("config.yaml", "environment.json"):
        (other / name).write_bytes((run / name).read_bytes())
    (tmp_path / "adapter").rename(other / "adapter")
    for server in ("sglang", "llamacpp"):
        error = fails(capsys, str(other), "--to", "lora", "--compact", "--for", server)
        assert "it drops rank_pattern and alpha_pattern, so scales would be wrong" in error
        assert "Leave out --compact" in error
    cfg = run_config(
        place / "bert",
        place / "films.jsonl",
        tmp_path / "films",
        model={"task": "classification"},
        method={"name": "lora", "r": 2},
    )
    folder = train(cfg).path
    error = fails(capsys, str(folder), "--to", "lora", "--for", "llamacpp")
    assert "it reads no base_model.model.classifier." in error
    assert "Use --to merged." in error


# What is written -------------------------------------------------------------------------------


def test_training_leaves_a_plain_lora_beside_the_adapter(runs: Any) -> None:
    """Verified in the process; the first lines of the card say whom to hand which folder."""
    folder = RunFolder(runs("sora"))
    config = json.loads((folder.lora / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    assert config["use_rslora"] is False
    assert config["base_model_name_or_path"] == str(load_run(folder.path).cfg.model.name)
    run = load_run(folder.path)
    stock = PeftModel.from_pretrained(load_base(run.cfg.model), str(folder.lora))
    assert type(stock.peft_config["default"]) is LoraConfig
    inputs = inputs_of(run)
    torch.testing.assert_close(logits(stock, inputs), logits(run.model, inputs), rtol=0, atol=1e-4)
    first = (folder.card.read_text()).split("---\n", 2)[2].splitlines()[0]
    assert first.startswith("**To hand on:** `lora/` to everyone")
    card = (folder.lora / "README.md").read_text()
    assert "| read right by | stock peft, vLLM >= 0.33, older vLLM, SGLang, llama.cpp |" in card
    assert "--max-lora-rank 8 --lora-modules NAME=FOLDER" in card


def test_pissa_leaves_the_lora_of_the_whole_base(runs: Any) -> None:
    """Its live base holds the residual, so the export starts from the saved adapter."""
    run = load_run(runs("pissa"))
    stock = PeftModel.from_pretrained(load_base(run.cfg.model), str(run.folder.lora))
    inputs = inputs_of(run)
    torch.testing.assert_close(logits(stock, inputs), logits(run.model, inputs), rtol=0, atol=1e-4)


def test_all_tasks_in_one_call(runs: Any, tmp_path: Path) -> None:
    """One folder each, after training and by `--task all`, which reads all in one new process."""
    folder = RunFolder(runs("tasks"))
    out, reports = export_tasks(folder.path, "lora", tmp_path / "lora")
    assert [report.task for report in reports] == ["copy", "turn"]
    assert all(report.stock_error is not None and report.exact for report in reports)
    run = load_run(folder.path)
    inputs = inputs_of(run)
    for task in ("copy", "turn"):
        run.model.set_task(task)  # type: ignore[operator]
        for place in (folder.lora, out):
            stock = PeftModel.from_pretrained(load_base(run.cfg.model), str(place / task))
            expected = logits(run.model, inputs)
            torch.testing.assert_close(logits(stock, inputs), expected, rtol=0, atol=1e-4)
    assert sorted(p.name for p in out.iterdir()) == ["copy", "plait_export.json", "turn"]


@pytest.mark.usefixtures("here")
def test_a_smaller_dtype_is_measured(runs: Any, tmp_path: Path) -> None:
    out, report = export_run(runs("sora"), "lora", tmp_path / "lora", dtype="bf16", max_rank=8)
    assert 0 < report.rounding < 0.01
    assert report.weight_error == 0
    assert report.held_out is not None
    assert not report.held_out.moved
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({"name": "dual_lora"}, "no plain LoRA holds the update of dual_lora; plait export RUN"),
        ({"name": "molora"}, "no plain LoRA holds the update of molora. Set output"),
        ({"name": "dora"}, "no plain LoRA holds the update of dora"),
        ({"name": "full"}, "full fine-tuning has no adapter"),
        ({"name": "cola", "bias": "all"}, r"the adapter trains biases \(bias = 'all'\)"),
    ],
)
def test_also_is_refused_before_training(
    method: dict[str, Any], text: str, place: Path, tmp_path: Path
) -> None:
    cfg = run_config(
        place / "llama",
        place / "rows.jsonl",
        tmp_path / "run",
        method=method,
        output={"also": ["lora"]},
    )
    with pytest.raises(ValueError, match=rf"output\.also: {text}"):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_an_update_of_zero_keeps_the_run(place: Path, tmp_path: Path) -> None:
    """Nothing can be exported; the trained run stays, with a warning."""
    training = {"learning_rate": 0.0, "max_steps": 2}
    cfg = config(place, "lora", tmp_path / "run", also=True, training=training)
    with pytest.warns(plait.PlaitWarning, match=r"lora/ was not written.*the update is zero"):
        folder = train(cfg)
    assert folder.adapter.is_dir()
    assert not folder.lora.exists()
    assert "To hand on" not in folder.card.read_text()


def test_a_smaller_rank_is_one_rank_in_all_layers(runs: Any, tmp_path: Path, here: None) -> None:
    """By the command it is refused where it loses much; in Python, asking for it is enough."""
    words = ["export", str(runs("dual_lora")), "--to", "lora", "--out", str(tmp_path / "x")]
    assert main([*words, "--rank", "3"]) == 2
    with pytest.warns(plait.PlaitWarning, match="would not be the model that was trained"):
        out, report = export_run(runs("dual_lora"), "lora", tmp_path / "lora", rank=3)
    assert report.held_out is not None
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    assert {len(t) for n, t in tensors.items() if "lora_A" in n} == {3} == {config["r"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_distillation_brings_a_lossy_export_nearer(runs: Any, tmp_path: Path, here: None) -> None:
    """On held-out rows; the training rows alone are read for it."""
    gaps = []
    for name, options in {"plain": {}, "better": {"weighted": True, "distill": 40}}.items():
        place = tmp_path / name
        _, report = export_run(runs("dual_lora"), "lora", place, rank=1, lossy=True, **options)
        assert report.held_out is not None
        assert not report.exact
        gaps.append(report.logit_error)
    assert gaps[1] < 0.7 * gaps[0]
    words = ["export", str(runs("dual_lora")), "--to", "lora", "--out", str(tmp_path / "x")]
    assert main([*words, "--distill", "-1"]) == 2


class Stop(Exception):
    """Ends an export when its losses are known."""


def test_merging_is_measured_too(runs: Any, place: Path, tmp_path: Path) -> None:
    """In half precision on the held-out rows; of several tasks each from the unmerged model."""
    reports = []

    def note(report: Any) -> None:
        reports.append(report)
        if report.task != "copy":
            raise Stop

    half = config(place, "dual_lora", tmp_path / "run", model={"dtype": "bfloat16"})
    with pytest.raises(Stop):
        export_run(train(half).path, "merged", announce=note)
    assert not reports[0].exact
    assert reports[0].held_out is not None
    with pytest.raises(Stop):
        export_tasks(runs("tasks"), "merged", announce=note)
    assert [report.task for report in reports[1:]] == ["copy", "turn"]
    assert all(report.exact and report.logit_error < 1e-5 for report in reports[1:])
    assert all(report.logit_shift > 1e-3 for report in reports[1:])


@pytest.mark.parametrize("task", ["a/b", "..", "", "plait_export.json"])
def test_a_task_that_cannot_name_a_folder(task: str) -> None:
    with pytest.raises(ValueError, match=r"cannot name a folder\. Export each with --task NAME"):
        task_folders(Path("out"), ["copy", task])
