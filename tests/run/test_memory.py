"""The memory that `plait check` estimates, against what torch's profiler counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from plait.run.check.memory import Allocations, Memory, estimate_memory
from plait.run.evaluate import evaluate_model
from plait.run.prepare import Prepared
from plait.run.trainer import rehearse
from tests.support.runs import character_tokenizer, run_config, word_tokenizer, write_rows

HIDDEN, CONTEXT = 64, 128


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose logits, blocks and weights each decide the memory of one."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2000, hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        ),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=CONTEXT,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        ),
        "bert": BertModel(
            BertConfig(
                vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=256, max_position_embeddings=CONTEXT,
            )
        ),
    }  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer = word_tokenizer() if name == "bert" else character_tokenizer()
        tokenizer.save_pretrained(folder / name)
    return folder


def most_held(act: Callable[[], Any]) -> int:
    """The most bytes at a time that torch's allocator hands out while `act` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = act()
    del kept
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


CASES: dict[str, dict[str, Any]] = {
    "logits": {"base": "llama"},
    "blocks and generation": {"base": "gpt2", "method": {"name": "dual_lora", "r": 4}},
    "an encoder": {"base": "bert", "method": {"name": "cola", "r": 4}},
    "all weights, bf16": {
        "base": "llama",
        "method": {"name": "full"},
        "training": {"bf16": True},
    },
    "a router, recomputed": {
        "base": "gpt2",
        "method": {"name": "molora", "r": 2, "num_experts": 4},
        "training": {"gradient_checkpointing": True},
    },
}


@pytest.fixture(scope="module", params=CASES)
def estimated(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Prepared, torch.optim.Optimizer, Memory]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("run")
    classifier = case["base"] == "bert"
    rows: list[dict[str, Any]] = [
        {"text": "good film " * 30, "label": i % 2}
        if classifier
        else {"prompt": "abc>" * 6, "completion": "abcdefgh" * 5}
        for i in range(32)
    ]
    config = run_config(
        models / case["base"], write_rows(folder / "rows.jsonl", rows), folder / "out",
        model={"task": "classification" if classifier else "causal_lm"},
        method=case.get("method", {"name": "lora", "r": 4}),
        data={"validation": 0.5},
        training={"per_device_train_batch_size": 8, **case.get("training", {})},
        evaluation={"batch_size": 16, "max_new_tokens": 40},
    )  # fmt: skip
    run, optimizer = rehearse(config)
    before = [p.detach().clone() for p in run.model.parameters()]
    memory = estimate_memory(run, optimizer)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert not optimizer.state
    return run, optimizer, memory


def step(run: Prepared, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = run.data.batch("train", run.arguments.per_device_train_batch_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.arguments.bf16):
        loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_traced_step_takes_what_a_real_one_takes(estimated: Any) -> None:
    run, optimizer, memory = estimated
    assert memory.traced
    if run.arguments.activation_checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    step(run, run.model, optimizer)  # makes the optimizer's state
    state = sum(
        t.numel() * t.element_size()
        for values in optimizer.state.values()
        for t in values.values()
        if isinstance(t, torch.Tensor)
    )
    assert memory.optimizer == pytest.approx(state, rel=0.01)
    measured = most_held(lambda: step(run, run.model, optimizer))
    assert memory.gradients + memory.activations == pytest.approx(measured, rel=0.15)


def test_a_traced_evaluation_takes_what_a_real_one_takes(estimated: Any) -> None:
    run, _, memory = estimated
    if run.arguments.bf16:
        pytest.skip("evaluation is in bf16 inside the Trainer only")
    measured = most_held(lambda: evaluate_model(run.model, run.data, "validation", run.cfg))
    assert memory.evaluation == pytest.approx(measured, rel=0.15)


def test_what_is_saved_for_the_gradient_is_within_the_estimate(
    models: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "abcdefgh" * 8}] * 8)
    config = run_config(models / "llama", rows, tmp_path / "out", data={"validation": None})
    run, optimizer = rehearse(config)
    memory = estimate_memory(run, optimizer)
    assert memory.evaluation is None
    assert memory.evaluating is None
    weights = {t.untyped_storage()._cdata for t in run.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.model(**run.data.batch("train", 4)).loss
    assert loss.requires_grad
    assert sum(saved.values()) < memory.activations < 3 * sum(saved.values())


def test_allocations_are_counted_until_they_are_freed() -> None:
    before = torch.zeros(100)
    with Allocations([before]) as counted:
        a = before + 1
        view = a[:10]
        before.add_(1)
        assert counted.now == 400
        b = a.double()
        assert counted.most == counted.now == 1200
        del b
        assert (counted.now, counted.most) == (400, 1200)
        del a
        assert counted.now == 400  # the view holds it
        del view
        assert counted.now == 0
        counted.restart()
        assert counted.most == 0


def test_a_model_that_cannot_be_traced_gets_a_rule_of_thumb(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "abcdefgh" * 8}] * 8)
    run, optimizer = rehearse(run_config(models / "llama", rows, tmp_path / "out"))
    traced = estimate_memory(run, optimizer)
    forward = LlamaForCausalLM.forward

    def by_numbers(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["input_ids"].sum().item() >= 0  # a fake tensor has no numbers
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", by_numbers)
    memory = estimate_memory(run, optimizer)
    assert traced.traced
    assert not memory.traced
    assert memory.weights == traced.weights
    assert memory.optimizer == pytest.approx(traced.optimizer, rel=0.01)
    assert 0.2 < memory.training / traced.training < 5
