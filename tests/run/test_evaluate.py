"""Metrics against their definitions, generation, and what a run folder gives back."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.core.events import PlaitWarning
from plait.run.card import metric_rows
from plait.run.config import RunConfig
from plait.run.data.bundle import DataBundle
from plait.run.evaluate import evaluate_model, evaluate_run
from plait.run.export import export_run
from plait.run.folder import RunFolder
from plait.run.generate import decode, generate_ids, generate_run
from plait.run.harness import harness_run
from plait.run.metrics import classification_metrics, regression_metrics
from plait.run.model import load_tokenizer
from plait.run.prepare import load_run, prepare
from plait.run.train import train
from plait_cli import main
from tests.support.runs import WORDS, copy_rows, film_rows, run_config, save_model, write_rows

CHAT = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}>{% else %}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows(tasks=True))


@pytest.fixture(scope="module")
def run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained lora run; tests that change it work on a copy."""
    return train(run_config(base, rows, tmp_path_factory.mktemp("run") / "run")).path


def loaded(cfg: RunConfig) -> tuple[Any, DataBundle]:
    prepared = prepare(cfg)
    return prepared.model, prepared.data


# -------------------------------------------------------------------------------------- metrics


def test_classification_metrics_equal_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    rng = np.random.default_rng(0)
    for classes, count in ((2, 50), (7, 40), (5, 6)):
        label, predicted = rng.integers(0, classes, (2, count))
        ours = classification_metrics({"label": label, "predicted": predicted})
        assert ours == pytest.approx(
            {
                "accuracy": accuracy_score(label, predicted),
                "macro_f1": f1_score(label, predicted, average="macro"),
                "matthews": matthews_corrcoef(label, predicted),
            }
        )
    same = np.zeros(4, dtype=int)
    assert classification_metrics({"label": same, "predicted": same})["matthews"] == 0.0


def test_regression_metrics_equal_scipy() -> None:
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 60).astype(float)  # with ties
    predicted = label + rng.normal(size=60)
    ours = regression_metrics({"label": label, "predicted": predicted})
    assert ours["mse"] == pytest.approx(((label - predicted) ** 2).mean())
    assert ours["pearson"] == pytest.approx(pearsonr(label, predicted).statistic)
    assert ours["spearman"] == pytest.approx(spearmanr(label, predicted).statistic)
    constant = regression_metrics({"label": label, "predicted": np.ones(60)})
    assert constant["pearson"] is None
    assert constant["spearman"] is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_metrics_equal_a_loop_over_tokens(kind: str, rows: Path, tmp_path: Path) -> None:
    cfg = run_config(save_model(kind, tmp_path / kind), rows, tmp_path / "run")
    model, data = loaded(cfg)
    state = torch.get_rng_state()
    metrics = evaluate_model(model, data, "train", cfg)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training

    model.eval()
    losses, hits, exact = [], [], []
    for row in data.train:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        scores = torch.log_softmax(model(ids).logits[0].double(), -1)
        for i in range(1, len(labels)):
            if labels[i] != -100:
                losses.append(-scores[i - 1, labels[i]].item())
                hits.append(scores[i - 1].argmax().item() == labels[i])
        text, prompt = "", row["input_ids"][: row["prompt_length"]]
        for _ in range(8):
            step = model(torch.tensor([prompt])).logits[0, -1].argmax().item()
            if step == data.tokenizer.eos_token_id:
                break
            prompt = [*prompt, step]
        text = decode(data.tokenizer, prompt[row["prompt_length"] :])
        exact.append(text == row["completion"])
    assert metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["exact_match"] == pytest.approx(np.mean(exact))


def test_batch_size_does_not_change_metrics(base: Path, rows: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 64):
        cfg = run_config(base, rows, tmp_path / "run", evaluation={"batch_size": size})
        metrics = evaluate_model(*loaded(cfg), "validation", cfg)
        found.append(dict(metric_rows(metrics)))
    assert found[0] == found[1] == found[2]


def test_tasks_have_their_own_metrics_and_a_mean(base: Path, rows: Path, tmp_path: Path) -> None:
    cfg = run_config(base, rows, tmp_path / "run")
    model, data = loaded(cfg)
    seen: list[tuple[int, int]] = []
    metrics = evaluate_model(model, data, "train", cfg, progress=lambda *state: seen.append(state))
    of_row = data.train["task"]
    assert {t: m["rows"] for t, m in metrics["tasks"].items()} == {
        "copy": of_row.count("copy"),
        "turn": of_row.count("turn"),
    }
    losses = [m["loss"] for m in metrics["tasks"].values()]
    assert metrics["task_mean"]["loss"] == pytest.approx(sum(losses) / 2)
    assert min(losses) < metrics["loss"] < max(losses)
    assert seen[-1] == (64, 64)  # 32 rows, measured and generated
    names = [name for name, _ in metric_rows(metrics)]
    assert names[:4] == ["loss", "perplexity", "token accuracy", "exact match"]
    assert "copy: exact match" in names


def test_a_trained_model_reaches_an_exact_match_of_one(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "two.jsonl", copy_rows(4) * 4)
    cfg = run_config(
        base,
        data,
        tmp_path / "run",
        method={"name": "full"},
        training={"max_steps": 60, "lr_scheduler_type": "constant", "save_strategy": "no"},
    )
    evaluation = train(cfg).read_evaluation()
    assert evaluation["before"]["exact_match"] == 0.0
    assert evaluation["after"]["exact_match"] == 1.0
    assert evaluation["after"]["token_accuracy"] == 1.0


def test_without_an_end_token_the_text_is_cut_to_length(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "two.jsonl", copy_rows(4) * 4)
    cfg = run_config(
        base,
        data,
        tmp_path / "run",
        method={"name": "full"},
        data={"add_eos": False},
        training={"max_steps": 60, "lr_scheduler_type": "constant", "save_strategy": "no"},
    )
    assert train(cfg).read_evaluation()["after"]["exact_match"] == 1.0


def test_left_padding_does_not_change_a_generation(base: Path, rows: Path, tmp_path: Path) -> None:
    model, data = loaded(run_config(base, rows, tmp_path / "run"))
    model.eval()
    prompts = [[5], [5, 6, 14], [7] * 12, [8, 9]]
    together = generate_ids(model, data.tokenizer, prompts, 6)
    alone = [generate_ids(model, data.tokenizer, [p], 6)[0] for p in prompts]
    assert together == alone
    assert all(len(ids) <= 6 for ids in together)
    assert len(generate_ids(model, data.tokenizer, [[5] * 60], 20)[0]) <= 4  # context 64
    with pytest.raises(ValueError) as full:
        generate_ids(model, data.tokenizer, [[5] * 64], 1)
    assert str(full.value) == (
        "the prompt has 64 tokens, the model's context 64. Shorten the prompt."
    )
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generate_ids(model, data.tokenizer, [[]], 1)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *[("bert", name) for name in ("lora", "dual_lora", "dual_module", "shared_b", "cola")],
        ("bert", "full"),
        ("deberta", "lora"),
        ("deberta", "dual_module"),
    ],
)
def test_classification_comes_back_from_its_folder(kind: str, method: str, tmp_path: Path) -> None:
    rows = [{**row, "task": "a" if i % 3 else "b"} for i, row in enumerate(film_rows())]
    cfg = run_config(
        save_model(kind, tmp_path / kind),
        write_rows(tmp_path / "films.jsonl", rows),
        tmp_path / "run",
        model={"task": "classification"},
        method={"name": method} if method == "full" else {"name": method, "r": 4},
        training={"max_steps": 4},
    )
    trained = train(cfg).read_evaluation()
    assert trained["after"] != trained["before"]
    assert set(trained["after"]) == {
        "rows", "loss", "accuracy", "macro_f1", "matthews", "tasks", "task_mean",
    }  # fmt: skip
    again = evaluate_run(tmp_path / "run", "validation")
    assert dict(metric_rows(again)) == dict(metric_rows(trained["after"]))


def test_regression_and_pairs(tmp_path: Path) -> None:
    rows = [{"text": r["text"], "text_pair": "film", "label": r["score"]} for r in film_rows()]
    cfg = run_config(
        save_model("bert", tmp_path / "bert"),
        write_rows(tmp_path / "films.jsonl", rows),
        tmp_path / "run",
        model={"task": "regression"},
        method={"name": "full"},
        training={"max_steps": 60, "lr_scheduler_type": "constant"},
    )
    folder = train(cfg)
    trained = folder.read_evaluation()
    assert trained["after"]["mse"] < trained["before"]["mse"] / 2
    assert trained["after"]["pearson"] > 0.8
    assert trained["after"]["spearman"] > 0.8
    again = evaluate_run(folder.path, "validation")
    assert again["mse"] == pytest.approx(trained["after"]["mse"], rel=1e-6)


# ------------------------------------------------------------------------------------ run folder


@pytest.mark.parametrize("method", ["pissa", "adalora", "vera", "dual_lora", "cola", "shared_b"])
def test_a_causal_run_comes_back_from_its_folder(
    method: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"name": method, "r": 4}
    if method == "shared_b":
        options |= {"routing": "task"}
    folder = train(run_config(base, rows, tmp_path / "run", method=options))
    trained = folder.read_evaluation()["after"]
    again = evaluate_run(folder.path, "validation")
    assert again["loss"] == pytest.approx(trained["loss"], abs=1e-5)
    assert again["exact_match"] == trained["exact_match"]
    assert folder.read_evaluation()["validation"]["loss"] == again["loss"]


def test_evaluate_other_rows(run: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", copy_rows(6, tasks=True))
    before = RunFolder(run).read_evaluation()
    metrics = evaluate_run(run, overrides=[f"data.test={other}"])
    assert (metrics["split"], metrics["rows"]) == ("test", 6)
    assert RunFolder(run).read_evaluation() == before
    with pytest.raises(ValueError) as refused:
        evaluate_run(run, overrides=["method.r=2"])
    assert str(refused.value) == (
        "command line: 'method.r=2' cannot be changed after training. Override data.* or "
        "evaluation.*."
    )
    with pytest.raises(ValueError) as absent:
        evaluate_run(run, "test")
    assert str(absent.value) == (
        "data.test is not set, so there is nothing to evaluate on. Set data.test."
    )


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


def test_missing_adapter(copied: Path) -> None:
    shutil.rmtree(copied / "adapter")
    with pytest.raises(FileNotFoundError) as caught:
        load_run(copied)
    assert str(caught.value) == (
        f"{copied}: adapter/ is missing, so training did not finish. Continue it: plait train FILE "
        "--resume"
    )


def test_pickle_is_refused(copied: Path) -> None:
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(ValueError) as caught:
        load_run(copied)
    assert str(caught.value) == (
        f"{copied}/adapter/adapter_model.bin: is a pickle, which can run any code when it is read. "
        "Save the adapter as safetensors."
    )


@pytest.mark.parametrize("keep", [0.5, 0.001])
def test_truncated_weights(keep: float, copied: Path) -> None:
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(keep * weights.stat().st_size)])
    with pytest.raises(ValueError) as caught:
        load_run(copied)
    assert str(caught.value).startswith(f"{weights}: damaged or cut off (")
    assert str(caught.value).endswith("). Copy it again, or train again.")


def test_adapter_of_another_method(copied: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    other = train(run_config(base, rows, tmp_path / "run", method={"name": "vera"}))
    shutil.rmtree(copied / "adapter")
    shutil.copytree(other.adapter, copied / "adapter")
    with pytest.raises(ValueError) as caught:
        load_run(copied)
    assert str(caught.value) == (
        f"{copied}/adapter/adapter_config.json: the adapter is of type VERA, the run's config.yaml "
        "asks for LORA. Put the adapter of this run back, or correct method.name."
    )


def test_adapter_of_an_unknown_type(copied: Path) -> None:
    file = copied / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PLAIT_NEWER"}))
    with pytest.raises(ValueError) as caught:
        load_run(copied)
    assert str(caught.value) == (
        f"{file}: the adapter is of type PLAIT_NEWER, the run's config.yaml asks for LORA. That "
        "type is not known here; install what made it."
    )
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_run(copied)


def test_adapter_of_a_newer_plait(base: Path, rows: Path, tmp_path: Path) -> None:
    method = {"name": "cola", "r": 2}
    training = {"max_steps": 1}
    folder = train(run_config(base, rows, tmp_path / "run", method=method, training=training))
    file = folder.adapter / "adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "plait_version": "99.0"}))
    with pytest.raises(ValueError) as newer:
        load_run(folder.path)
    assert str(newer.value).startswith(f"{file}: This adapter was written by plait 99.0; ")
    file.write_text(json.dumps({**saved, "num_C": 2}))
    with pytest.raises(ValueError, match=r"num_C is not known to plait .*Did you mean num_"):
        load_run(folder.path)


def test_adapter_of_another_shape(copied: Path) -> None:
    weights = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, name: torch.zeros(4, 7)}, weights)
    with pytest.raises(ValueError) as caught:
        load_run(copied)
    text = str(caught.value)
    assert text.startswith(f"{weights}: does not fit the base model (1 tensors of another shape): ")
    assert "[4, 7]" in text
    assert text.endswith("Use the base model and options that it was trained with.")


def test_incomplete_adapter(copied: Path) -> None:
    weights = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(ValueError) as caught:
        load_run(copied)
    assert str(caught.value) == (
        f"{weights}: lacks {name} and 0 more. The adapter is of another model or another method's "
        "options; use the run's own."
    )


def test_new_modules_of_an_encoder_are_saved(tmp_path: Path) -> None:
    """DeBERTa's pooler is not in the checkpoint: without it the adapter would be worthless."""
    cfg = run_config(
        save_model("deberta", tmp_path / "deberta"),
        write_rows(tmp_path / "films.jsonl", film_rows()),
        tmp_path / "run",
        model={"task": "classification"},
        training={"max_steps": 2},
    )
    folder = train(cfg)
    model, _ = loaded(cfg)  # the seed makes the same start
    torch.manual_seed(99)
    again = load_run(folder.path).model
    torch.manual_seed(7)
    third = load_run(folder.path).model
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(again(ids).logits, third(ids).logits)
    assert not torch.equal(again(ids).logits, model.eval()(ids).logits)


# ------------------------------------------------------------------------------------ generation


def test_generate_uses_the_template_of_training(base: Path, tmp_path: Path) -> None:
    rows = [{"question": r["prompt"][:-1], "answer": r["completion"]} for r in copy_rows(4)] * 4
    cfg = run_config(
        base,
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        method={"name": "full"},
        data={"prompt_template": "{question}>", "completion_template": "{answer}"},
        training={"max_steps": 60, "lr_scheduler_type": "constant", "save_strategy": "no"},
    )
    train(cfg)
    question = rows[1]["question"]
    assert generate_run(tmp_path / "run", question) == question
    assert generate_run(tmp_path / "run", fields={"question": question}) == question
    assert len(generate_run(tmp_path / "run", question, max_new_tokens=1)) == 1
    hot = [generate_run(tmp_path / "run", question, temperature=50.0, seed=s) for s in range(6)]
    assert len(set(hot)) > 1
    assert hot[0] == generate_run(tmp_path / "run", question, temperature=50.0, seed=0)
    with pytest.raises(ValueError) as caught:
        generate_run(tmp_path / "run", "ab", fields={"answer": "ab"})
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: data.prompt_template is '{{question}}>'. Give --field question=TEXT."
    )


def test_generate_opens_a_chat_turn(base: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(base, tmp_path / "chat")
    tokenizer = load_tokenizer(run_config(base, base, base).model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(chat)
    rows = [
        {
            "messages": [
                {"role": "user", "content": r["completion"]},
                {"role": "assistant", "content": r["completion"]},
            ]
        }
        for r in copy_rows(4)
    ] * 4
    cfg = run_config(
        chat,
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        method={"name": "full"},
        training={"max_steps": 60, "lr_scheduler_type": "constant", "save_strategy": "no"},
    )
    assert train(cfg).read_evaluation()["after"]["exact_match"] == 1.0
    text = rows[1]["messages"][0]["content"]
    assert generate_run(tmp_path / "run", text) == text


def test_generate_for_one_task(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = {"name": "shared_b", "r": 2, "routing": "task"}
    run = train(run_config(base, rows, tmp_path / "run", method=method)).path
    assert isinstance(generate_run(run, "ab>", task="copy"), str)
    with pytest.raises(ValueError) as caught:
        generate_run(run, "ab>")
    assert str(caught.value) == f"{run}: this run routes by task. Give --task, one of copy, turn."
    with pytest.raises(ValueError, match="cpoy"):
        generate_run(run, "ab>", task="cpoy")


def test_generate_verb(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "ab>", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.strip()) <= 3
    for arguments, text in (
        ([], "this run has no prompt template. Give --prompt TEXT alone."),
        (["--prompt", "ab>", "--task", "copy"], "--task copy: this run does not route."),
        (["--field", "ab"], "--field 'ab' is not NAME=TEXT. Write --field question=..."),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0 is out of range."),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 is below 1."),
    ):
        assert main(["generate", str(run), *arguments]) == 2
        assert text in capsys.readouterr().err


def test_generate_refuses_an_encoder(tmp_path: Path) -> None:
    cfg = run_config(
        save_model("bert", tmp_path / "bert"),
        write_rows(tmp_path / "films.jsonl", film_rows()),
        tmp_path / "run",
        model={"task": "classification"},
        training={"max_steps": 1},
    )
    train(cfg)
    with pytest.raises(ValueError) as caught:
        generate_run(tmp_path / "run", "good")
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: model.task is classification, which generates no text. Use: plait "
        f"evaluate {tmp_path / 'run'}"
    )


# ---------------------------------------------------------------------------------------- verbs


def test_evaluate_verb(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--split", "train", "evaluation.generate=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train, 32 rows"
    assert lines[1].split()[0] == "loss"
    assert main(["evaluate", str(run), "--limit", "3"]) == 2
    assert "belong to --harness" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--harness", "x", "--split", "test"]) == 2
    assert "--harness brings its own data" in capsys.readouterr().err


def test_harness_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError) as caught:
        harness_run(run, ["arc_easy"])
    assert str(caught.value).endswith('Install it with: pip install "plait[eval]"')


@pytest.mark.slow
def test_harness_on_a_local_task(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval", reason="the extra plait[eval] is not installed")
    rows = [{"question": "ab>", "choices": ["ab", "ba"], "answer": i % 2} for i in range(6)]
    data = write_rows(tmp_path / "task.jsonl", rows)
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    results = harness_run(run, ["tiny_choice"], include_path=tmp_path)
    assert results["tiny_choice"]["acc,none"] == 0.5  # the same question with either answer
    assert RunFolder(run).read_evaluation()["harness"] == results

    class Index:
        def __init__(self, **options: Any):
            self.all_tasks = ["tiny_choice"]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--harness", "tiny_choise"]) == 2
    assert capsys.readouterr().err == (
        "plait evaluate: --harness: tiny_choise is no task of lm_eval. Did you mean tiny_choice?\n"
    )


# ------------------------------------------------------------------------------- the run's own


@pytest.mark.parametrize("change", ["a class less", "gone"])
def test_labels_and_tasks_are_those_of_the_run(change: str, tmp_path: Path) -> None:
    classes = {"ant": "good", "bee": "bad", "cat": "fine"}
    rows = [
        {"text": f"{word} {WORDS[4 + i % 3]}", "label": label, "task": f"t{i % 2}"}
        for i in range(8)
        for label, word in classes.items()
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = [row for row in rows if row["label"] != "ant" and row["task"] == "t1"]
    test = write_rows(tmp_path / "test.jsonl", held_out)
    cfg = run_config(
        save_model("bert", tmp_path / "bert"), data, tmp_path / "run",
        model={"task": "classification"}, data={"test": str(test), "validation": None},
        method={"name": "shared_b", "r": 2, "routing": "task"},
        training={"max_steps": 40, "learning_rate": 3e-2},
    )  # fmt: skip
    folder = train(cfg)
    trained = folder.read_evaluation()["after"]
    if change == "gone":
        data.unlink()
    else:
        write_rows(data, held_out)
    again = evaluate_run(folder.path)
    assert dict(metric_rows(again)) == dict(metric_rows(trained))
    other = evaluate_run(folder.path, overrides=[f"data.train={test}"])
    assert other["accuracy"] == trained["accuracy"]


def test_export_needs_no_training_file(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", copy_rows())
    folder = train(run_config(base, data, tmp_path / "run"))
    data.unlink()
    with pytest.warns(PlaitWarning, match="measured on random tokens instead"):
        report = export_run(folder.path, "lora")[1]
    assert report.exact
    assert report.stock_error is not None
    assert report.stock_error < 1e-4
