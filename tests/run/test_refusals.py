"""`plait check` refuses what `plait train` refuses, in the same words; nothing is written."""

import json
from pathlib import Path

import pytest

from plait_cli import main
from tests.support.runs import copy_rows, film_rows, save_model, write_rows

# What is wrong -> (overrides of a run file that is right, what the error says).
CASES: dict[str, tuple[list[str], str]] = {
    "a tracker that is not installed": (
        ["training.report_to=[dvclive]"],
        "training.report_to: DVCLiveCallback requires dvclive to be installed.",
    ),
    "an unknown tracker": (["training.report_to=[nobody]"], "nobody is not supported, only"),
    "push_to_hub": (["training.push_to_hub=true"], "training.push_to_hub is true"),
    "a deepspeed file": (["training.deepspeed=missing.json"], "training: "),
    "the best model without validation": (
        ["training.load_best_model_at_end=true", "data.validation=null"],
        "training.load_best_model_at_end is True, and data.validation is not set.",
    ),
    "evaluation without validation": (
        ["training.eval_strategy=steps", "data.validation=null"],
        "training.eval_strategy is 'steps', and data.validation is not set.",
    ),
    "the best checkpoint of no metric": (
        ["training.save_strategy=best"],
        "training: `args.metric_for_best_model` must be provided",
    ),
    "saves that miss the evaluations": (
        ["training.load_best_model_at_end=true", "training.save_strategy=steps"],
        "training: --load_best_model_at_end requires the save and eval strategy to match",
    ),
    "a learning rate for nothing": (
        ["method.lr_scale={C: 2.0}"],
        "method.lr_scale: no trained parameter is named C.",
    ),
    "an option of the optimizer": (
        ["optimizer.name=loraplus", "optimizer.loraplus_lr_ratio=0.5"],
        "optimizer.loraplus_lr_ratio is 0.5. Give 1 or more",
    ),
    "an optimizer that is not installed": (["training.optim=galore_adamw"], "training: "),
    "an unknown optimizer": (["training.optim=adam_with_a_twist"], "training"),
    "an option of the schedule": (
        ["training.lr_scheduler_kwargs={nope: 1}"],
        "training: ",
    ),
    "a schedule that cannot restart": (
        ["chain.plan=chain", "chain.links=2", "training.lr_scheduler_type=polynomial"],
        "training.lr_scheduler_type is polynomial, which cannot restart",
    ),
    "prefetching by nobody": (["training.dataloader_prefetch_factor=2"], "training: "),
    "a kernel that is not installed": (["training.use_liger_kernel=true"], "training: "),
    "sharding in one process": (["training.fsdp=full_shard"], "training: "),
    "rows longer than data.max_length": (["data.max_length=5"], "data.max_length is 5 tokens"),
    "a split by a column, and no split": (
        ["data.split_by=prompt", "data.validation=null"],
        "data.split_by is 'prompt', and data.validation is no fraction of train.",
    ),
    "a split by no column": (
        ["data.split_by=promt"],
        "line 1: data.split_by is 'promt', and the columns are prompt, completion. Did you mean "
        "prompt?",
    ),
    "a file for a folder": (["output.dir=rows.jsonl"], "rows.jsonl: is a file."),
    "a file above a folder": (["output.dir=rows.jsonl/a/b"], "rows.jsonl: is a file."),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    for kind in ("llama", "gpt2", "bert"):
        save_model(kind, folder / kind)
    write_rows(folder / "rows.jsonl", copy_rows(20))
    write_rows(folder / "films.jsonl", film_rows(16))
    run = {
        "model": {"name": "llama"},
        "data": {"train": "rows.jsonl", "validation": 0.2},
        "training": {"use_cpu": True, "max_steps": 1},
        "output": {"dir": "run"},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder


def messages(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str]]:
    """Exit code and error of both verbs, without the verb's name."""
    made = []
    for verb in ("check", "train"):
        code = main([verb, "run.yaml", *overrides])
        made.append((code, capsys.readouterr().err.replace(f"plait {verb}: ", "plait: ")))
    return made


@pytest.mark.parametrize("case", CASES)
def test_both_verbs_refuse(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.chdir(folder)
    overrides, text = CASES[case]
    before = sorted(folder.rglob("*"))
    check, train = messages(overrides, capsys)
    assert check == train
    code, error = check
    assert code == 2
    assert text in error
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("kind", "limit"), [("gpt2", 64), ("bert", 64)])
def test_both_verbs_refuse_rows_that_the_model_cannot_read(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    limit: int,
) -> None:
    """GPT-2 names its context n_positions."""
    monkeypatch.chdir(folder)
    if kind == "gpt2":
        write_rows(folder / "long.jsonl", [{"prompt": "ab>", "completion": "a" * limit}] * 8)
        overrides = ["model.name=gpt2"]
    else:
        rows = [{"text": "good " * (limit + 4), "label": i % 2} for i in range(8)]
        write_rows(folder / "long.jsonl", rows)
        overrides = ["model.name=bert", "model.task=classification"]
    check, train = messages([*overrides, "data.train=long.jsonl"], capsys)
    assert check == train
    longest = limit + 4
    assert check == (
        2,
        f"plait: data: the longest row has {longest} tokens, the model reads {limit}. Set "
        f"data.max_length: {limit} and data.truncate: true.\n",
    )
