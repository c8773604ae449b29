"""ChainCallback under transformers' Trainer, and `plait train` with a chain section."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import plait
from plait import ChainPlan, EventNeverFired
from plait.chain import Ledger, chain_of
from plait.run import train as train_module
from plait.run.check import check
from plait.run.config import check_method, config_from_dict, config_to_dict, load_config
from plait.run.evaluate import evaluate_run
from plait.run.export import export_run
from plait.run.folder import RunFolder
from plait.run.generate import generate_run
from plait.run.train import train
from plait.testing import tiny
from plait_cli.check import _facts
from tests.support import chains as toys
from tests.support.runs import assert_same, copy_rows, interrupt, run_config, save_model, write_rows

ROWS = [{"input_ids": row, "labels": row} for row in tiny.tokens(40, 8)]


def lora(r: int = 2, **options: Any) -> Any:
    """A tiny Llama with LoRA, with dropout to see the random state."""
    options = {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1, **options}
    return toys.wrap(tiny.llama(), r=r, task_type="CAUSAL_LM", **options)


def dual_module() -> Any:
    """A tiny Llama with a method that has a schedule."""
    config = plait.DualModuleLoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], tinit=1, tfinal=1, deltaT=1,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    from peft import get_peft_model

    return get_peft_model(tiny.llama(), config)


def trainer(model: Any, plan: Any, to: Path, **options: Any) -> Trainer:
    """A Trainer of 10 steps with the plan's schedule."""
    given = {"max_steps": 10, "save_strategy": "steps", "save_steps": 100, **options}
    args = TrainingArguments(
        output_dir=str(to),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    callback = plait.ChainCallback(plan)
    made = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=[callback])  # type: ignore[arg-type]
    if plan.lr == "restart":
        optimizer = made.create_optimizer()
        made.lr_scheduler = plait.chain_schedule(plan, optimizer, given["max_steps"])
    return made


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


PLANS = {
    "chain": ChainPlan.chain(steps_per_link=4, warmup_steps=1),
    "rac": ChainPlan.rac(steps_per_link=4),
    "xgb": ChainPlan.xgb(steps_per_link=4, blocks_per_link=1),
    "merge": ChainPlan.chain(steps_per_link=4, storage="merge"),
    "dual_module": ChainPlan.chain(3, lr="global"),
}


@pytest.mark.parametrize("name", PLANS)
def test_resume_is_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    """Golden 8 under Trainer: from step 4, a boundary, and 6, in the middle of a link."""
    plan = PLANS[name]
    build = dual_module if name == "dual_module" else lora
    whole = trainer(build(), plan, tmp_path, save_steps=2)
    whole.train()
    chain = chain_of(whole.model)  # type: ignore[arg-type]
    assert chain is not None
    assert chain.ties == 2
    end = tmp_path / "checkpoint-10"
    for step in (4, 6):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
        again = trainer(build(), plan, tmp_path / "again", save_steps=10)
        again.train(resume_from_checkpoint=str(tmp_path / "again" / f"checkpoint-{step}"))
        folder = tmp_path / "again" / "checkpoint-10"
        ours, theirs = adapter(folder), adapter(end)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        for file in ("chain.json", "chain.safetensors"):
            assert (folder / file).read_bytes() == (end / file).read_bytes()


def test_the_rate_restarts_with_the_link(tmp_path: Path) -> None:
    """Golden 4, 15: the first step of a link has the new link's rate, and it is above zero."""
    plan = ChainPlan.chain(2, warmup_steps=1)
    made, seen = trainer(lora(), plan, tmp_path, max_steps=20), []

    class See(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs["optimizer"].param_groups[0]["lr"])

    made.add_callback(See())
    made.train()
    assert seen == pytest.approx([1e-2 * f for f in plan.factors(20, "linear")])
    assert seen[0] == seen[10]
    assert seen[9] < 0.2 * seen[10]


def test_the_best_checkpoint_brings_its_links(tmp_path: Path) -> None:
    plan = ChainPlan.chain(steps_per_link=3, lr="global")
    made = trainer(
        lora(), plan, tmp_path, save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="fake", greater_is_better=True,
    )  # fmt: skip
    values = iter([0.1, 0.2, 0.9, 0.3, 0.4])
    original = made.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {**original(*args, **kwargs), "eval_fake": next(values)}
        return metrics

    made.evaluate = evaluate  # type: ignore[method-assign]
    made.train()
    best = tmp_path / "checkpoint-6"
    assert made.state.best_model_checkpoint == str(best)
    model: Any = made.model
    chain = chain_of(model)
    assert chain is not None
    assert chain.ledger.link == 2
    fresh = PeftModel.from_pretrained(tiny.llama(), str(best))
    plait.chain.load(fresh, best)
    with torch.no_grad():
        ids = tiny.tokens()
        assert torch.equal(model.eval()(ids).logits, fresh.eval()(ids).logits)


def test_plain_lora_under_trainer_is_a_chain_of_one_link(tmp_path: Path) -> None:
    """Golden 17."""
    made = trainer(lora(), ChainPlan.chain(1, lr="global"), tmp_path / "a")
    made.train()
    plain = trainer(lora(), ChainPlan.chain(1, lr="global"), tmp_path / "b")
    plain.remove_callback(plait.ChainCallback)
    plain.train()
    ours, theirs = adapter(tmp_path / "a/checkpoint-10"), adapter(tmp_path / "b/checkpoint-10")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_what_the_callback_refuses(tmp_path: Path) -> None:
    made = trainer(lora(), ChainPlan.chain(2, lr="global"), tmp_path)
    made.remove_callback(plait.ChainCallback)
    made.add_callback(plait.ChainCallback(ChainPlan.chain(2)))
    with pytest.raises(ValueError) as caught:
        made.train()
    assert str(caught.value) == (
        'chain: lr = "restart", but the Trainer\'s schedule does not restart. Pass '
        "optimizers=(optimizer, plait.chain_schedule(plan, optimizer, 10)), or set "
        'lr="global".'
    )
    made = trainer(lora(), ChainPlan.chain(2), tmp_path)
    made.remove_callback(plait.ChainCallback)
    made.add_callback(plait.ChainCallback(ChainPlan.chain(5)))
    with pytest.raises(
        ValueError, match=r"schedule was made for links of \[5, 5\] restart 100, the"
    ):
        made.train()
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    made = trainer(lora(), ChainPlan.chain(2, lr="global"), tmp_path)
    made.optimizer = other
    with pytest.raises(ValueError, match="the optimizer holds none of the adapter's parameters"):
        made.train()
    plan = ChainPlan.chain(2)
    trainer(lora(), plan, tmp_path, save_steps=3).train()
    (tmp_path / "checkpoint-3" / "chain.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3: chain.json is missing, so the fin"):
        trainer(lora(), plan, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_run_whose_events_never_come_raises(tmp_path: Path) -> None:
    """Golden 13 under Trainer."""

    class Deaf(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            chain = chain_of(kwargs["model"])
            assert chain is not None
            chain.follows = False

    made = trainer(lora(), ChainPlan.chain(2), tmp_path)
    made.add_callback(Deaf())
    with pytest.raises(EventNeverFired, match=r"with 0 of 1 ties. Train 10 steps with a torch opt"):
        made.train()


def test_stopping_early_is_no_error(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    made = trainer(lora(), ChainPlan.chain(2), tmp_path)
    made.add_callback(Stop())
    made.train()
    chain = chain_of(made.model)  # type: ignore[arg-type]
    assert chain is not None
    assert (chain.ties, chain.ledger.step) == (0, 3)


# plait train -------------------------------------------------------------------------------------

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"name": "lora", "r": 2, "lora_dropout": 0.1}, {"steps_per_link": 4}),
    "rac": ({"name": "rslora", "r": 2}, {"plan": "rac", "steps_per_link": 4}),
    "xgb": ({"name": "lora", "r": 1}, {"plan": "xgb", "steps_per_link": 3, "blocks_per_link": 1}),
    "dual_module": (
        {"name": "dual_module", "r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1},
        {"links": 2},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


def config(base: Path, rows: Path, to: Path, name: str, **chain: Any) -> Any:
    method, section = RUNS[name]
    quick = {"generate": False}
    made = config_to_dict(run_config(base, rows, to, method=method, evaluation=quick))
    return config_from_dict({**made, "chain": {**section, **chain}})


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_chain(name: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """Train, resume at a boundary and in a link, evaluate, export: all see the same model."""
    whole = train(config(base, rows, tmp_path / "a", name))
    ledger = Ledger.load(whole.adapter)
    assert ledger.link == len(ledger.plan.lengths(10)) - 1
    assert "plait.chain.load(model" in whole.card.read_text()
    for stop in {"lora": (4,), "rac": (5,), "xgb": (6,), "dual_module": (6,)}[name]:
        cfg = config(base, rows, tmp_path / f"b{stop}", name)
        with pytest.raises(KeyboardInterrupt):
            train(cfg, callbacks=[interrupt(stop)])
        folder = RunFolder.open(tmp_path / f"b{stop}")
        assert Ledger.load(folder.checkpoints / f"checkpoint-{stop}").step == stop
        assert_same(whole, train(cfg, resume=True))
        for file in ("chain.json", "chain.safetensors"):
            assert (folder.adapter / file).read_bytes() == (whole.adapter / file).read_bytes()
    after = whole.read_evaluation()["after"]
    assert evaluate_run(whole.path)["loss"] == after["loss"]
    assert after["loss"] < whole.read_evaluation()["before"]["loss"]
    if name == "rac":
        assert isinstance(generate_run(whole.path, "ab>", max_new_tokens=3), str)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual_module", "xgb"])
def test_export_of_a_run(name: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """As one plain LoRA and merged, read back by stock peft in a fresh process."""
    folder = train(config(base, rows, tmp_path / "a", name))
    ways: tuple[Any, ...] = ("lora", "merged")
    for to in ways:
        report = export_run(folder.path, to)[1]
        assert report.exact
        assert report.stock_error is not None
        assert report.stock_error < 1e-5
        assert report.logit_shift > 0.01


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "compositions").glob("chain_*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_train(file: Path, tmp_path: Path) -> None:
    """On the shipped model and data, shortened."""
    short = ["training.max_steps=9", "data.limit=64", "data.validation_limit=16"]
    cfg = load_config(file, [*short, f"output.dir={tmp_path / 'run'}"])
    facts = dict(_facts(check(cfg)))
    assert facts["chain"] == "chain, 3 links of 3, 3, 3 steps"
    folder = train(cfg)
    found = folder.read_evaluation()
    assert found["after"]["loss"] < found["before"]["loss"]
    assert Ledger.load(folder.adapter).link == 2


def test_resume_after_the_last_step_brings_the_links(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(base, rows, tmp_path / "a", "lora"))
    cfg = config(base, rows, tmp_path / "b", "lora")

    def killed(model: Any) -> None:
        raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "check_events", killed)
        with pytest.raises(MemoryError):
            train(cfg)
    assert_same(whole, train(cfg, resume=True))
    assert Ledger.load(tmp_path / "b" / "adapter").link == 2


def test_a_run_without_its_ledger_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    folder = train(config(base, rows, tmp_path / "a", "lora"))
    (folder.adapter / "chain.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"chain.safetensors is missing, so the finished"):
        evaluate_run(folder.path)


@pytest.mark.parametrize(
    ("section", "method", "text"),
    [
        ({"link": 3}, "lora", "config: chain.link is not known. Did you mean links?"),
        (
            {"links": 0},
            "lora",
            "config: chain.links is 0. It should be greater than or equal to 1.",
        ),
        (
            {"plan": "boost"},
            "lora",
            "config: chain.plan is 'boost', which is not a plan. Known: chain, rac, xgb.",
        ),
        ({"freeze": "A"}, "lora", "config: chain: chain: freeze is no option of the plan chain."),
        (
            {"links": 2, "steps_per_link": 2},
            "lora",
            "config: chain: chain: links = 2 and steps_per",
        ),
        ({}, "dora", "config: chain.plan: chain: dora rescales the rows of the whole weight"),
        ({"plan": "rac"}, "cola", "config: chain.plan: rac: cola has no single pair of which one"),
        ({}, "full", "config: chain.plan: chain: full fine-tuning has no adapter. Use lora."),
    ],
)
def test_the_section_is_checked(section: dict[str, Any], method: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_method(config_from_dict({"method": {"name": method}, "chain": section}))
    assert str(caught.value).startswith(text)


def test_the_section_comes_back(base: Path, rows: Path, tmp_path: Path) -> None:
    for name in RUNS:
        cfg = config(base, rows, tmp_path, name)
        assert config_from_dict(config_to_dict(cfg)) == cfg
    assert "chain" not in config_to_dict(config_from_dict({}))
    ranks = config_from_dict({"chain": {"links": 2, "ranks": [2, 1]}})
    assert ranks.chain is not None
    assert ranks.chain.build() == ChainPlan.chain(2, ranks=[2, 1])


def test_a_schedule_that_cannot_restart(base: Path, rows: Path, tmp_path: Path) -> None:
    cfg = config(base, rows, tmp_path / "a", "lora")
    cfg.training["lr_scheduler_type"] = "polynomial"
    with pytest.raises(ValueError) as caught:
        train(cfg)
    assert str(caught.value) == (
        "training.lr_scheduler_type is polynomial, which cannot restart with each link of a "
        "chain. Use one of constant, linear, cosine, or set chain.lr: global."
    )
    free = config(base, rows, tmp_path / "b", "lora", lr="global")
    free.training["lr_scheduler_type"] = "polynomial"
    train(free)
