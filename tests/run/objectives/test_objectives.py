"""DPO, KTO, reward models and GRPO by a run file: rows, references, tasks, rewards, resuming."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plait.core.low_rank import LowRankDelta
from plait.run.check import check
from plait.run.config import config_from_dict, load_config
from plait.run.config.plugins import import_plugin
from plait.run.data.bundle import load_data
from plait.run.evaluate import evaluate_run
from plait.run.folder import RunFolder
from plait.run.prepare import prepare
from plait.run.train import train
from tests.support.runs import (
    assert_same,
    character_tokenizer,
    copy_rows,
    crash,
    run_config,
    save_model,
    write_rows,
)

pytest.importorskip("trl", reason="the extra plait[trl] is not installed")

EXAMPLES = Path(__file__).parents[3] / "examples" / "objectives"
LN2 = math.log(2)
CHAT = (
    "{% for m in messages %}{{ '>' if m.role == 'user' else '=' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def wrong(text: str) -> str:
    return text[::-1] + "c"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, and the same rows in the forms of all objectives."""
    folder = tmp_path_factory.mktemp("objectives")
    save_model("llama", folder / "llama")
    rows = copy_rows(24, tasks=True)
    write_rows(folder / "sft.jsonl", rows)
    write_rows(
        folder / "pairs.jsonl",
        [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": wrong(r["completion"]),
             "task": r["task"]} for r in rows
        ],
    )  # fmt: skip
    write_rows(
        folder / "labelled.jsonl",
        [
            {**r, "completion": r["completion"] if i % 3 else wrong(r["completion"]),
             "label": bool(i % 3)} for i, r in enumerate(rows)
        ],
    )  # fmt: skip
    write_rows(
        folder / "prompts.jsonl",
        [{"prompt": r["prompt"], "answer": r["completion"], "task": r["task"]} for r in rows],
    )
    (folder / "judge_rows.py").write_text(
        "def length(prompts, completions, answer, **_):\n"
        "    assert len(prompts) == len(completions) == len(answer)\n"
        "    return [-abs(len(text) - 4.0) for text in completions]\n"
        "def short(completions, **_):\n    return [1.0]\n"
        "number = 3\n"
    )
    import_plugin(str(folder / "judge_rows.py"))
    return folder


ROWS = {"sft": "sft", "dpo": "pairs", "reward": "pairs", "kto": "labelled", "grpo": "prompts"}
GRPO = {"name": "grpo", "reward": "judge_rows:length", "num_generations": 2,
        "max_completion_length": 4}  # fmt: skip


def config(place: Path, to: Path, objective: Any, **sections: Any) -> Any:
    name = objective if isinstance(objective, str) else objective["name"]
    training = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    options = {
        "training": training | sections.pop("training", {}),
        "evaluation": {"generate": False, "max_new_tokens": 4},
        "objective": {"name": objective} if isinstance(objective, str) else objective,
        **sections,
    }
    return run_config(place / "llama", place / f"{ROWS[name]}.jsonl", to, **options)


# ----------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "grpo"])
def test_examples_learn(name: str, tmp_path: Path) -> None:
    import_plugin(str(EXAMPLES / "brief.py"))
    file, overrides = EXAMPLES / f"{name}.yaml", [f"output.dir={tmp_path}/run"]
    lines: list[str] = []
    folder = train(load_config(file, overrides), announce=lines.append)
    assert len(lines) == 1
    metrics = folder.read_metrics()
    evaluation = folder.read_evaluation()
    before, after = evaluation["before"], evaluation["after"]
    if name == "grpo":
        drawn = [row["reward"] for row in metrics if "reward" in row]
        assert sum(drawn[-3:]) > sum(drawn[:3]), drawn
        assert after["reward"] > before["reward"]
    else:
        losses = [row["loss"] for row in metrics if "loss" in row]
        assert losses[-1] < 0.95 * losses[0], losses
        assert after["margin"] > before["margin"]
        assert all(not name.startswith("eval_rewards") for row in metrics for name in row)
    assert not (folder.adapter / "ref").exists()
    again = evaluate_run(folder.path)
    shared = {key for key, value in after.items() if isinstance(value, float)}
    assert {key: again[key] for key in shared} == {key: after[key] for key in shared}
    assert "Trained for" in folder.card.read_text()
    assert yaml.safe_load(folder.config.read_text())["objective"]["name"] == name


# ---------------------------------------------------------------------------------- reference

# Options of methods whose training is as their evaluation at the first step.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "vera": {},
    "dual_lora": {"gate_steps": 3},
    "dual_module": {},
    "cola": {},
    "sora": {"xi": 0.3},
    "hydra": {},
    "shared_b": {"routing": "task"},
}


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Path]:
    """SFT runs of a few steps, made when a test asks for one."""
    runs: dict[str, Path] = {}

    class Runs(dict[str, Path]):
        def __missing__(self, method: str) -> Path:
            options = {"name": method, **METHODS[method]}
            cfg = config(place, place / f"sft-{method}", "sft", method=options,
                         training={"max_steps": 6})  # fmt: skip
            self[method] = train(cfg).path
            return self[method]

    return Runs(runs)


@pytest.mark.parametrize("method", METHODS)
def test_dpo_starts_at_ln_2_on_a_trained_adapter(
    method: str, place: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    """Also where the output depends on buffers, and where dropout would tell them apart."""
    cfg = config(
        place, tmp_path / "run", "dpo", method={"name": method, **METHODS[method]},
        model={"adapter": str(trained[method])},
    )  # fmt: skip
    assert train(cfg).read_metrics()[0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "dual_module", "shared_b"])
def test_dpo_starts_at_ln_2_on_a_new_adapter(method: str, place: Path, tmp_path: Path) -> None:
    options = {"name": method, **METHODS[method]}
    cfg = config(place, tmp_path / "run", "dpo", method=options)
    assert train(cfg).read_metrics()[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_kto_starts_at_a_half(place: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    cfg = config(
        place, tmp_path / "run", "kto", model={"adapter": str(trained["cola"])},
        method={"name": "cola"},
    )  # fmt: skip
    assert train(cfg).read_metrics()[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_an_adapter_to_go_on_from(place: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    """Training starts where the other run ended; another method or place is refused."""
    run = trained["cola"]
    adapter = {"adapter": str(run / "adapter")}
    cfg = config(place, tmp_path / "run", "sft", method={"name": "cola"}, model=adapter)
    folder = train(cfg)
    before = folder.read_evaluation()["before"]
    assert before == RunFolder(run).read_evaluation()["after"]
    cfg = config(place, tmp_path / "no", "sft", method={"name": "sora"}, model=adapter)
    with pytest.raises(ValueError, match="the adapter is of type PLAIT_COLA"):
        train(cfg)
    missing = {"adapter": str(tmp_path / "gone")}
    with pytest.raises(FileNotFoundError, match=r"^model.adapter: there is no folder"):
        train(config(place, tmp_path / "no", "sft", model=missing))
    with pytest.raises(ValueError, match="full fine-tuning has no adapter"):
        train(config(place, tmp_path / "no", "sft", method={"name": "full"}, model=adapter))
    assert not (tmp_path / "no").exists()


# -------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "grpo"])
def test_tasks_reach_a_method_that_routes_by_them(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []
    forward = LowRankDelta.forward

    def spy(self: Any, x: Any, rows: Any = None) -> Any:
        if torch.is_grad_enabled():
            assert rows is not None
            seen.append((len(x), rows.task_ids.tolist()))
        return forward(self, x, rows)

    monkeypatch.setattr(LowRankDelta, "forward", spy)
    monkeypatch.setattr(LowRankDelta, "joins", lambda *_: False)
    sections: dict[str, Any] = {"method": {"name": "shared_b", "routing": "task"}}
    if name == "reward":
        sections["model"] = {"task": "regression"}
    if name == "grpo":  # two prompts a step
        sections["training"] = {"max_steps": 3}
    train(config(place, tmp_path / "run", GRPO if name == "grpo" else name, **sections))
    assert seen
    assert all(rows == len(ids) for rows, ids in seen)
    ids = seen[0][1]
    if name in ("dpo", "reward"):  # the chosen answers of all rows, then the rejected
        assert len(ids) == 8
        assert ids[:4] == ids[4:]
    assert {task for _, ids in seen for task in ids} == {0, 1}


# ------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, place: Path, tmp_path: Path) -> None:
    def made(to: str) -> Any:
        training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        objective = {**GRPO, "beta": 0.1} if name == "grpo" else name
        return config(place, tmp_path / to, objective, training=training)

    whole = train(made("whole"))
    with pytest.raises(MemoryError):
        train(made("stopped"), callbacks=[crash(4)])
    assert not list((tmp_path / "stopped").rglob("ref"))
    assert_same(train(made("stopped"), resume=True), whole)


# --------------------------------------------------------------------------------------- rows


def load(objective: Any, rows: list[Any], folder: Path, **data: Any) -> Any:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    (folder / "a.jsonl").write_text(text)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    raw = {"objective": objective, "data": {"train": str(folder / "a.jsonl"), **data}}
    return load_data(config_from_dict(raw), tokenizer)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_pairs_have_the_same_tokens_in_every_form(tmp_path: Path) -> None:
    forms = [
        {"prompt": ">ab=", "chosen": "ab", "rejected": "ba"},
        {"prompt": [user("ab")], "chosen": [bot("ab")], "rejected": [bot("ba")]},
        {"chosen": [user("ab"), bot("ab")], "rejected": [user("ab"), bot("ba")]},
    ]
    made = [load("dpo", [row] * 2, tmp_path).train[0] for row in forms]
    assert made[0]["rejected_ids"] == character_tokenizer()("ba</s>")["input_ids"]
    for row in made[1:]:
        for name in ("input_ids", "labels", "prompt_length", "rejected_ids"):
            assert row[name] == made[0][name], name
    kto = load("kto", [{"prompt": "a", "completion": "b", "label": x} for x in (True, 0, "false")],
               tmp_path)  # fmt: skip
    assert kto.train["desired"] == [True, False, False]
    assert kto.summary == "rows: train 3; each has prompt, completion and label"
    renamed = {"chosen": "good", "rejected": "bad"}
    row = {"prompt": ">ab=", "good": "ab", "bad": "ba"}
    again = load("dpo", [row] * 2, tmp_path, columns=renamed).train[0]
    assert again["rejected_ids"] == made[0]["rejected_ids"]


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TALK = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
LABELLED = {"prompt": "a", "completion": "b", "label": True}
BROKEN: list[tuple[str, dict[str, Any], list[tuple[Any, str]]]] = [
    ("dpo", PAIR, [
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        ({"prompt": "a", "rejected": "b"}, "no column 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
        (PAIR | {"chosen": ""}, "chosen is empty"),
        (PAIR | {"rejected": ""}, "rejected is empty"),
        (PAIR | {"chosen": None}, "column 'chosen' is None, not text"),
        (PAIR | {"rejected": [bot("b")]}, "column 'rejected' is .*, not text"),
        (PAIR | {"rejected": True}, "column 'rejected' is true, not text"),
        (PAIR | {"prompt": {"a": 1}}, "column 'prompt' is .*, not text"),
        (PAIR | {"chosen": "\ud800"}, "half of a surrogate pair"),
        ('{"prompt": "a", "chosen": "b"', "not valid JSON"),
    ]),
    ("dpo", TALK, [
        (TALK | {"chosen": "b"}, "chosen is 'b'. Give a list of"),
        (TALK | {"rejected": None}, "rejected is None. Give a list of"),
        (TALK | {"chosen": []}, r"chosen is \[\]. It is one message of the role assistant"),
        (TALK | {"chosen": [bot("a"), bot("b")]}, "It is one message of the role assistant"),
        (TALK | {"rejected": [user("a")]}, "It is one message of the role assistant"),
        (TALK | {"prompt": []}, "the prompt has no messages"),
        (TALK | {"prompt": "a"}, "prompt is 'a'. Give a list of"),
        (TALK | {"chosen": [bot(3)]}, "message 2: the content is 3, not text"),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("b")]}, "two prompts"),
        ({"prompt": [user("a")], "chosen": [bot("b")]}, "no column 'rejected'"),
    ]),
    ("kto", LABELLED, [
        ({"prompt": "a", "completion": "b"}, "no column 'label'"),
        ({"prompt": "a", "label": True}, "no column 'completion'"),
        ({"completion": "a", "label": True}, "no column 'prompt'"),
        (LABELLED | {"label": "good"}, "the label is 'good'. Give true"),
        (LABELLED | {"label": None}, "the label is None. Give true"),
        (LABELLED | {"label": 2}, "the label is 2. Give true"),
        (LABELLED | {"label": 0.5}, "the label is 0.5. Give true"),
        (LABELLED | {"label": [True]}, "the label is .True.. Give true"),
        (LABELLED | {"completion": ""}, "the completion is empty"),
        (LABELLED | {"completion": 3.5, "prompt": None}, "column 'prompt' is None, not text"),
    ]),
    ("grpo", {"prompt": "a"}, [
        ({"question": "a"}, "no column 'prompt'"),
        ({"prompt": None}, "column 'prompt' is None, not text"),
        ({"prompt": True}, "column 'prompt' is true, not text"),
        ({"prompt": {"a": 1}}, "column 'prompt' is .*, not text"),
        ({"prompt": [user("a")]}, "column 'prompt' is .*, not text"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ('{"prompt": "a", "prompt": "b"}', "is given twice"),
        ('{"prompt": NaN}', "column 'prompt' is nan, not text"),
        ('{"prompt"}', "not valid JSON"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "broken"), BROKEN, ids=["pairs", "talks", "kto", "grpo"])
def test_broken_rows_are_refused_with_file_and_line(
    name: str, good: dict[str, Any], broken: list[tuple[Any, str]], tmp_path: Path
) -> None:
    objective = {"name": "grpo", "reward": "judge_rows:length"} if name == "grpo" else name
    load(objective, [good, good], tmp_path)
    assert len(broken) >= 10
    for row, expected in broken:
        with pytest.raises(ValueError, match=f"a.jsonl: line 3: .*{expected}"):
            load(objective, [good, good, row], tmp_path)


def test_long_pairs_are_counted_and_cut(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "a", "chosen": "b", "rejected": "cdefg"}]
    with pytest.raises(ValueError, match=r"1 of 2 train rows .* are longer, the longest 7"):
        load("dpo", rows, tmp_path, max_length=4)
    cut = load("dpo", rows, tmp_path, max_length=4, truncate=True)
    assert (cut.longest, len(cut.train[1]["rejected_ids"])) == (4, 3)
    with pytest.raises(ValueError, match="no token of its rejected answer within 1 tokens"):
        load("dpo", rows, tmp_path, max_length=1, truncate=True)


# ------------------------------------------------------------------------------------ refusals


def test_what_an_objective_refuses(place: Path, tmp_path: Path) -> None:
    to = tmp_path / "run"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("dpo", {"chain": {"links": 1}}, "objective: dpo does not work with a chain"),
        ("dpo", {"method": {"name": "full"}}, "full fine-tuning has no adapter"),
        ("dpo", {"method": {"name": "adalora"}}, "dpo does not work with adalora: peft"),
        ("dpo", {"model": {"task": "classification"}}, "model.task is classification. Set model"),
        ("reward", {}, "trains a head with one output, and model.task is causal_lm"),
        ("dpo", {"training": {"metric_for_best_model": "loss"}}, "loss is not measured by a dpo"),
        ({"name": "grpo"}, {}, "objective.reward is '', which|objective.reward is ''"),
        ({**GRPO, "reward": "judge_rows:gone"}, {}, "judge_rows has no such function"),
        ({**GRPO, "reward": "judge_rows:number"}, {}, "judge_rows has no such function"),
        ({**GRPO, "reward": "judge_rows:short"}, {}, "returned 1 rewards"),
        ({**GRPO, "num_generations": 3}, {}, "must be divisible by num_generations"),
        (
            {**GRPO, "vllm": True},
            {"method": {"name": "sora", "scaling": 1}},
            "objective.vllm|no option|not an option",
        ),
    ]
    for objective, sections, expected in cases:
        with pytest.raises(ValueError, match=expected):
            train(config(place, to, objective, **sections))
        assert not to.exists() or not [p for p in to.iterdir() if p.name != ".lock"], expected


def test_options_are_checked_with_the_nearest_name() -> None:
    for raw, expected in (
        ({"objective": "dpos"}, "objective is 'dpos', which is not an objective. Did you mean dpo"),
        ({"objective": {"name": "dpo", "bta": 1}}, "objective.bta .*Did you mean beta"),
        ({"objective": {"name": "dpo", "beta": 0}}, "objective.beta is 0. It should be greater"),
        ({"objective": {"name": "dpo", "loss_type": "x"}}, "objective.loss_type is 'x'"),
        ({"objective": {**GRPO, "reward": "x"}}, "objective.reward is 'x'. Name an importable"),
        ({"objective": {**GRPO, "reward_weights": [1, 2]}}, "has 2 numbers, and .* names 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            config_from_dict(raw)


def test_a_reward_of_a_received_folder_is_not_called(place: Path, tmp_path: Path) -> None:
    """Not even one of a module that happens to be loaded."""
    folder = train(config(place, tmp_path / "run", GRPO))
    assert evaluate_run(folder.path)["reward"] == folder.read_evaluation()["after"]["reward"]
    text = folder.config.read_text()
    folder.config.write_text(text.replace("judge_rows:length", "os:system"))
    with pytest.raises(ValueError, match=r"objective.reward names os:system, and os is not import"):
        evaluate_run(folder.path)


def test_check_shows_pairs_and_prompts(place: Path, tmp_path: Path) -> None:
    for objective in ("dpo", GRPO):
        report = check(config(place, tmp_path / "run", objective))
        assert report.form in ("prompt, chosen and rejected", "prompt")
        assert not report.memory.traced


# --------------------------------------------------------------------------------------- vLLM


def test_the_policy_reaches_another_engine_as_a_plain_lora(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that loads what it gets with stock peft computes what the policy computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from plait.run.objectives import grpo

    got: list[tuple[int, bool]] = []

    class Engine:
        def draw(self, prompts: Any, lora: Path | None, version: int) -> list[list[int]]:
            got.append((version, lora is not None))
            base: Any = AutoModelForCausalLM.from_pretrained(place / "llama").eval()
            if lora is not None:
                kind = json.loads((lora / "adapter_config.json").read_text())["peft_type"]
                assert kind == "LORA"
                base = PeftModel.from_pretrained(base, lora).eval()
            ids = torch.tensor([prompts[0]])
            with torch.no_grad():
                policy.eval()
                assert torch.allclose(base(ids).logits, policy(ids).logits, atol=1e-5)
                policy.train()
            return [[4] * (1 + i % 2) + [2] for i in range(len(prompts))]

    def opened(run: Any) -> Engine:
        nonlocal policy
        policy = run.model
        return Engine()

    policy: Any = None
    monkeypatch.setattr(grpo, "open_vllm", opened)
    cfg = config(
        place, tmp_path / "run", {**GRPO, "vllm": True}, method={"name": "lora", "r": 2},
        training={"max_steps": 3, "warmup_steps": 0},
    )  # fmt: skip
    train(cfg)
    assert got == [(1, False), (2, True), (3, True)]  # the first adapter changes nothing


def test_vllm_that_is_not_installed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'objective.vllm needs vLLM .*pip install "plait'):
        train(config(place, tmp_path / "run", {**GRPO, "vllm": True}))


def test_trl_that_is_not_installed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'objective: dpo needs TRL: pip install "plait.trl."'):
        prepare(config(place, tmp_path / "run", "dpo"))
