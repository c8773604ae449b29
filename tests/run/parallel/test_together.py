"""Two processes in one group train what one process trains, and agree on how it ends."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from plait.run.config import config_from_dict
from plait.run.folder import RunFolder
from plait.run.train import train
from tests.support import ROOT, parallel, together, warm
from tests.support.runs import assert_same, copy_rows, film_rows, save_model, weights, write_rows

LONG = bool(os.environ.get("PLAIT_PARALLEL"))
SIZES = (2, 4) if LONG else (2,)
FEW = ("lora", "cola-random", "dual_module")  # in each run of the tests
QUICK = {"generate": False, "batch_size": 4}
STEPS = 8


def options_of(name: str) -> dict[str, Any]:
    """The method section of a case of tests/support/parallel.py."""
    if name not in parallel.CASES:
        adalora = {"init_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1, "target_r": 2}
        return {"name": name, **(adalora if name == "adalora" else {"r": 4})}
    case = parallel.CASES[name]
    options = {"r": 4, "lora_dropout": 0.0, **case.options}
    if "tasks" in options:
        options["tasks"] = ["copy", "turn"]
    if "balance" in options:  # its mean over processes is not that over all rows
        options |= {"balance": "none", "balance_weight": 0.0}
    return {"name": case.key, **options}


NAMES = [n for n in (*parallel.CASES, *parallel.CONTROLS) if LONG or n in FEW]


def job(base: Path, rows: Path, to: Path, name: str, size: int, **more: Any) -> dict[str, Any]:
    """A job of `size` processes with 12 rows in a step; the last step of an epoch has 1."""
    sections = {key: more.pop(key) for key in tuple(more) if key in ("method", "data", "training")}
    config = {
        "model": {"name": str(base)},
        "method": sections.get("method") or options_of(name),
        "data": {"train": str(rows), "validation": 0.2, "limit": 25, **sections.get("data", {})},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 12 // size,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "use_cpu": True,
            **sections.get("training", {}),
        },
        "evaluation": QUICK,
        "output": {"dir": str(to)},
    }
    return {"config": config, **more}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("bert", tmp_path_factory.mktemp("bert"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows(tasks=True))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("films") / "films.jsonl", film_rows(31))


Make = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def make(
    llama: Path, bert: Path, rows: Path, films: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Make the job of a name for a number of processes."""
    root = tmp_path_factory.mktemp("runs")

    def of(name: str, size: int) -> dict[str, Any]:
        to = root / f"{name}-{size}"
        dropout = {"name": "lora", "r": 4, "lora_dropout": 0.1}
        if name == "bert":
            data = {"columns": {"text": "text", "label": "label"}, "limit": 25, "validation": None}
            made = job(bert, films, to, "lora", size, data=data)
            made["config"]["model"]["task"] = "classification"
            return made
        if name == "accumulated":
            steps = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4 // size}
            return job(llama, rows, to, "lora", size, training=steps)
        kind, _, what = name.rpartition("-")
        if what in STOPS:
            made = job(llama, rows, to, "lora", size, method=dropout)
            if kind:
                made["config"] |= {"parallel": {"kind": "fsdp2"}}
                made["shard"] = True
            if what != "whole":
                made["config"]["output"]["dir"] = str(root / f"{kind}-stopped-{size}")
            return (
                made
                | {
                    "whole": {},
                    "stopped": {"rank": size - 1, "step": 5, "act": "stop"},
                    "continued": {"resume": True},
                }[what]
            )
        if name == "nan":
            return job(llama, rows, to, "lora", size) | {"rank": size - 1, "step": 3, "act": "nan"}
        if name == "refused":
            wrong = {str(size - 1): {"data": {"max_length": 2}}}
            return job(llama, rows, to, "lora", size) | {"only": wrong}
        if name == "early":
            steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
            steps |= {"early_stopping_patience": 1, "learning_rate": 0.05}
            return job(llama, rows, to, "lora", size, training=steps)
        if name == "best":
            steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
            steps |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
            steps |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first
            return job(llama, rows, to, "lora", size, training=steps)
        kind, _, method = name.rpartition(":")
        made = job(llama, rows, to, method, size)
        if kind:
            made["config"] |= {"parallel": {"kind": "fsdp2"}}
            made["config"]["output"]["also"] = ["lora"] if method == "lora" else []
            made["shard"] = kind == "fsdp"
        return made

    return of


STOPS = ("whole", "stopped", "continued")
SHARDED = [f"fsdp:{name}" for name in NAMES if name not in ("tied", "adalora")]
OTHERS = ["bert", "accumulated", "best", "nan", "refused", "early", *STOPS]
OTHERS += [*SHARDED, *(f"fsdp-{what}" for what in STOPS), "silent:lora"]
Ends = dict[int, dict[str, list[str | None]]]


@pytest.fixture(scope="module")
def ends(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """Number of processes -> job -> the error of each process."""
    root, found = tmp_path_factory.mktemp("jobs"), {}
    for size in SIZES:
        names = [*NAMES, *OTHERS]
        file = root / f"jobs{size}.json"
        file.write_text(json.dumps([make(name, size) for name in names]), encoding="utf-8")
        done = warm.python(together.__file__, file, size, peft=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        errors = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(size)]
        found[size] = dict(zip(names, map(list, zip(*errors, strict=True)), strict=True))
    return found


@pytest.fixture(scope="module")
def alone(make: Make) -> Callable[[str], RunFolder]:
    """The run of a job in one process."""
    made: dict[str, RunFolder] = {}

    def of(name: str) -> RunFolder:
        if name not in made:
            made[name] = train(config_from_dict(make(name, 1)["config"]))
        return made[name]

    return of


def folder_of(made: dict[str, Any]) -> RunFolder:
    return RunFolder.open(made["config"]["output"]["dir"])


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.read_metrics() if "loss" in row]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*NAMES, *SHARDED, "bert", "accumulated", "best", "early"])
def test_processes_train_what_one_trains(
    name: str, size: int, ends: Ends, alone: Callable[[str], RunFolder], make: Make
) -> None:
    assert ends[size][name] == [None] * size
    one, several = alone(name.removeprefix("fsdp:")), folder_of(make(name, size))
    assert losses(several) == pytest.approx(losses(one), abs=1e-5)
    assert len(losses(one)) > 1
    first, second = weights(one), weights(several)
    assert first.keys() == second.keys()
    filled = [k for k in first if first[k].numel()]
    worst = max(float((first[k].float() - second[k].float()).abs().max()) for k in filled)
    print(f"{name} x {size}: {worst:.1e}")
    assert worst < 1e-4
    before, after = one.read_evaluation(), several.read_evaluation()
    assert before.keys() == after.keys()
    for when in before.keys() - {"split"}:
        assert after[when]["rows"] == before[when]["rows"]
        assert after[when]["loss"] == pytest.approx(before[when]["loss"], abs=1e-4)
    facts = several.read_facts()
    assert (facts["processes"], facts["steps"]) == (size, one.read_facts()["steps"])
    assert facts.get("kept", {}).get("step") == one.read_facts().get("kept", {}).get("step")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["", "fsdp-"])
def test_a_signal_to_one_stops_all_and_resuming_gives_the_same_bits(
    kind: str, size: int, ends: Ends, make: Make
) -> None:
    whole, stopped, continued = (f"{kind}{what}" for what in STOPS)
    assert ends[size][whole] == ends[size][continued] == [None] * size
    (error,) = set(ends[size][stopped])
    assert error is not None
    assert "KeyboardInterrupt: training: stopped after step 5 of 8" in error
    assert_same(folder_of(make(whole, size)), folder_of(make(continued, size)))


@pytest.mark.parametrize("size", SIZES)
def test_a_sharded_run_exports_in_one_process(size: int, ends: Ends, make: Make) -> None:
    assert ends[size]["fsdp:lora"] == [None] * size
    adapter, lora = folder_of(make("fsdp:lora", size)), folder_of(make("fsdp:lora", size)).lora
    exported, trained = load_file(lora / "adapter_model.safetensors"), weights(adapter)
    assert exported.keys() == trained.keys()
    assert (lora / "README.md").is_file()


@pytest.mark.parametrize("size", SIZES)
def test_sharding_that_would_not_happen_is_refused(size: int, ends: Ends, make: Make) -> None:
    (error,) = set(ends[size]["silent:lora"])
    assert error == (
        "ValueError: config: parallel.kind is fsdp2, and accelerate would train with MULTI_CPU. It "
        "shards a model on GPUs only; set parallel.kind: ddp."
    )
    assert not Path(make("silent:lora", size)["config"]["output"]["dir"]).exists()


@pytest.mark.parametrize("size", SIZES)
def test_a_loss_that_is_not_finite_on_one_ends_all(size: int, ends: Ends, make: Make) -> None:
    *others, broken = ends[size]["nan"]
    assert broken is not None
    assert broken.startswith("FloatingPointError: training: the loss is nan in step 3")
    for error in others:
        assert error is not None
        assert "the loss is not finite in another process in step 3" in error
    assert not folder_of(make("nan", size)).adapter.exists()


@pytest.mark.parametrize("size", SIZES)
def test_what_one_refuses_all_refuse_and_nothing_is_left(size: int, ends: Ends, make: Make) -> None:
    *others, own = ends[size]["refused"]
    assert own is not None
    assert own.startswith("ValueError: data.max_length is 2 tokens")
    assert others == [own.replace("ValueError: ", f"ValueError: process {size - 1}: ")] * (size - 1)
    assert not Path(make("refused", size)["config"]["output"]["dir"]).exists()
