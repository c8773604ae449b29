"""Copies of adapters and models: TRL's reference adapter, averaged models, casts while merged."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import plait
from plait import ChainPlan
from plait.chain import chain_of, start
from plait.core.bridge import PlaitLayer
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    deltas,
    layers,
    logits,
    relative,
    steps,
    trained,
    wrap,
)

DUAL = Case("dual_lora", {"gate_steps": 3})
DMC = Case("dual_module", {"tinit": 1, "tfinal": 3, "deltaT": 1, "total_steps": 8})
ALLOC = Case("alloc", {"first": 2, "every": 1, "rounds": 2, "init": "pissa"})
SORA = Case("sora", {})
COLA = Case("cola", {"r": 2, "init": "pissa"})
TIED = Case("tied", {})
NOLA = Case("nola", {})
each = pytest.mark.parametrize("case", [DUAL, DMC, ALLOC, SORA, COLA, TIED, NOLA], ids=str)


def train(model: Any, count: int = 6) -> None:
    """Some steps, with a development batch for methods that need one."""
    if any(gate.allocates for delta in deltas(model) for gate in delta.gates):
        plait.set_development_batch(model, batch(model, key=9))
    steps(model, adamw(model, 2e-2), count)


def copy_parameters(model: Any, of: str = "default", to: str = "ref") -> None:
    """As TRL's DPO, KTO and GRPO trainers fill their reference adapter."""
    for name, p in model.named_parameters():
        if f".{of}." in name:
            model.get_parameter(name.replace(f".{of}.", f".{to}.")).data.copy_(p.data)


def reference(model: Any) -> None:
    """As those trainers make it."""
    model.add_adapter("ref", model.peft_config["default"])
    copy_parameters(model)


def of(model: Any, name: str) -> Any:
    """The logits of one adapter; the active one is active again afterwards."""
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return logits(model)
    finally:
        model.set_adapter(before)


@each
def test_a_reference_adapter_is_the_policy_at_its_start(case: Case) -> None:
    model = wrap(case)
    train(model)
    policy = logits(model)
    assert relative(policy, base_logits(tiny.llama())) > 1e-3
    reference(model)
    with_ref = copy.deepcopy(model)
    assert torch.equal(of(model, "ref"), policy)
    train(with_ref, 2)  # the reference is first used after the policy has moved on
    assert not torch.equal(logits(with_ref), policy)
    assert torch.equal(of(with_ref, "ref"), policy)
    train(model, 2)
    assert torch.equal(of(model, "ref"), policy)
    copy_parameters(model)  # TR-DPO updates the reference now and then
    assert torch.equal(of(model, "ref"), of(model, "default"))


@each
def test_a_reference_adapter_of_a_loaded_one(case: Case, tmp_path: Path) -> None:
    model = wrap(case)
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True).eval()
    loaded.add_adapter("fresh", loaded.peft_config["default"])
    fresh = of(loaded, "fresh")  # a new adapter from that config is a fresh one
    assert relative(fresh, base_logits(tiny.llama())) < 1e-4
    reference(loaded)
    assert torch.equal(of(loaded, "ref"), expected)
    assert torch.equal(of(loaded, "fresh"), fresh)
    train(loaded, 2)
    assert torch.equal(of(loaded, "ref"), expected)


@each
def test_a_reference_adapter_is_saved_and_merged_with_its_state(case: Case, tmp_path: Path) -> None:
    model = wrap(case)
    train(model)
    expected = logits(model)
    reference(model)
    saved = copy.deepcopy(model)
    saved.save_pretrained(tmp_path, selected_adapters=["ref"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "ref").eval()
    assert torch.equal(logits(loaded), expected)
    dW = layers(model)[0].get_delta_weight("ref")
    assert torch.equal(dW, layers(model)[0].get_delta_weight("default"))


def test_the_frozen_reference_has_no_events_by_hand() -> None:
    model = wrap(DUAL)
    train(model, 2)
    reference(model)
    expected = of(model, "ref")
    model.train()
    model(**batch(model)).loss.backward()
    plait.after_step(model)
    assert deltas(model)[0].steps == 3
    assert deltas(model, "ref")[0].steps == 2
    assert torch.equal(of(model.eval(), "ref"), expected)
    model = wrap(SORA)
    alone = plait.penalty(model)
    reference(model)
    assert torch.equal(plait.penalty(model), alone)  # type: ignore[arg-type]


def test_random_adapters_keep_their_own_state() -> None:
    model = wrap(DUAL)
    train(model)
    model.add_adapter("other", DUAL.config(seed=3))
    of(model, "other")
    model(**batch(model))
    assert deltas(model, "other")[0].steps == 0


def test_a_step_that_moves_nothing_leaves_the_reference_alone() -> None:
    """Warm-up starts with the learning rate 0: the parameters stay equal, the state does not."""
    for count in (0, 2):
        model = wrap(DUAL)
        train(model, count)
        reference(model)
        expected = logits(model)
        optimizer = adamw(model, 0.0)
        optimizer.param_groups[0]["lr"] = 1e-30
        steps(model, optimizer, 1)
        assert deltas(model)[0].steps == count + 1
        assert torch.equal(of(model, "ref"), expected)
        assert deltas(model, "ref")[0].steps == count


def test_waiting_ends_when_the_weights_came(tmp_path: Path) -> None:
    text = "made from a saved config and its weights were not loaded"
    for case in (Case("cola", {"r": 2, "init": "kaiming"}), DUAL):
        model = wrap(case)
        train(model)
        expected = logits(model)
        model.save_pretrained(tmp_path / case.key)
        config = case.method.config.from_pretrained(tmp_path / case.key)
        waiting: Any = get_peft_model(tiny.llama(), config).eval()  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=text):
            logits(waiting)
        for name, p in model.named_parameters():
            waiting.get_parameter(name).data.copy_(p.data)
        if case is DUAL:  # its t did not come
            with pytest.raises(RuntimeError, match=text):
                logits(waiting)
        else:
            assert torch.equal(logits(waiting), expected)
        model.add_adapter("ref", case.method.config.from_pretrained(tmp_path / case.key))
        with pytest.raises(RuntimeError, match=text):
            of(model, "ref")
        copy_parameters(model)
        assert torch.equal(of(model, "ref"), expected)


def test_a_reference_of_a_chain_is_refused() -> None:
    model = wrap(Case("cola", {}), total_steps=None)
    start(model, ChainPlan.chain(3), 6)
    steps(model, adamw(model, 2e-2), 3)
    reference(model)
    text = r"adapter 'ref' is a copy of 'default', which is a chain: its finished links were not"
    with pytest.raises(RuntimeError, match=text):
        of(model, "ref")


# One config object --------------------------------------------------------------------------------


def test_one_config_object_makes_two_adapters() -> None:
    """Trained together, each has its own penalty, schedule and budget."""

    def moved(same: bool) -> list[float]:
        one = SORA.config(xi=0.0, l1_weight=4.0)
        model: Any = get_peft_model(tiny.llama(), one, "a")  # type: ignore[arg-type]
        model.add_adapter("b", one if same else SORA.config(xi=0.0, l1_weight=4.0))
        model.base_model.set_adapter(["a", "b"])
        gates = {n: p.detach().clone() for n, p in trained(model).items() if n.endswith(".g")}
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        model.train()
        model(**batch(model), adapter_names=["a", "b", "a", "b"]).loss.backward()
        optimizer.step()
        return [float((model.get_parameter(n) - g).abs().max()) for n, g in gates.items()]

    def kept(same: bool) -> list[int]:
        options = {"r": 8, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_steps": 6}
        one = DMC.config(**options)
        model: Any = get_peft_model(tiny.llama(), one, "a")  # type: ignore[arg-type]
        model.add_adapter("b", one if same else DMC.config(**options))
        model.base_model.set_adapter(["a", "b"])
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        model.train()
        for _ in range(6):
            model(**batch(model), adapter_names=["a", "b", "a", "b"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [sum(int(d.keep.sum()) for d in deltas(model, n)) for n in ("a", "b")]

    assert moved(same=True) == moved(same=False)
    budget = 2 * len(layers(wrap(DMC)))
    assert kept(same=True) == kept(same=False) == [budget, budget]


def test_what_a_run_fills_into_a_config_stays_in_its_model() -> None:
    for case in (DMC, NOLA):
        config = case.config(total_steps=None)
        before = copy.deepcopy(config)
        first, second = (get_peft_model(tiny.llama(), config) for _ in range(2))  # type: ignore
        plait.callback.set_total_steps(first, 6)
        plait.set_micro_batches(first, 3)
        if case is DMC:
            assert deltas(first)[0].total_steps == 6
            plait.callback.set_total_steps(second, 20)
            assert deltas(second)[0].total_steps == 20
        assert vars(config) == vars(before)
        assert deltas(first)[0].adapter is first.peft_config["default"]
        assert deltas(second)[0].adapter.micro_batches is None


def test_an_adapter_around_another_keeps_its_config() -> None:
    inner: Any = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    outer: Any = get_peft_model(inner, DUAL.config(target_modules=["v_proj"], task_type=None))
    assert outer.peft_config["default"] is deltas(outer)[0].adapter
    assert isinstance(inner.peft_config["default"], LoraConfig)


# Copies of whole models ---------------------------------------------------------------------------


@each
def test_averaged_models(case: Case) -> None:
    """torch's AveragedModel, created at the start, through all schedules."""
    model = wrap(case)
    averaged, mean = AveragedModel(model), {}
    optimizer = adamw(model, 2e-2)
    if any(gate.allocates for gate in deltas(model)[0].gates):
        plait.set_development_batch(model, batch(model, key=9))
    for step in range(8):
        steps(model, optimizer, 1)
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            mean[name] = p.detach().clone() + mean.get(name, 0)
        later = AveragedModel(model)  # created at any other time, too
        later.update_parameters(model)
        assert torch.equal(logits(later.module.eval()), logits(model)), step
    for mine, theirs in zip(deltas(averaged.module), deltas(model), strict=True):
        assert mine.steps == theirs.steps
    expected = copy.deepcopy(model)
    for name, p in expected.named_parameters():
        p.data.copy_(mean[name] / 8)
    assert relative(logits(averaged.module.eval()), logits(expected)) < 1e-5


def test_dropped_averages_stay_out_of_files_and_come_back_at_a_restart(tmp_path: Path) -> None:
    model = wrap(DMC)
    count = len(list(model.buffers()))
    full = set(model.state_dict())
    train(model)
    delta = deltas(model)[0]
    assert delta.Ibar_E is None
    assert len(list(model.buffers())) == count
    assert {k.rpartition(".")[2] for k in full - set(model.state_dict())} == {
        f"{m}_{n}" for m in ("Ibar", "Ubar") for n in ("A_e", "B_e", "E")
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(b.is_meta for b in loaded.buffers())
    delta.restart(torch.Generator().manual_seed(0))
    assert delta.Ibar_E is not None
    assert "Ibar_E" in delta.state_dict()
    assert "Ibar_E_dropped" not in dict(delta.named_buffers())


def test_a_copy_of_a_running_chain_runs() -> None:
    for case in (Case("cola", {}), DMC):
        model = wrap(case, total_steps=None)
        start(model, ChainPlan.chain(2), 16)
        steps(model, adamw(model, 2e-2), 4)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), logits(model))
        for one in (model, twin):
            steps(one, adamw(one, 2e-2), 12)
        mine, theirs = chain_of(twin), chain_of(model)
        assert mine is not None
        assert theirs is not None
        assert mine is not theirs
        assert mine.ties == theirs.ties == 1
        mine.finish()
        assert torch.equal(logits(twin), logits(model))


# Casts while merged -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each
def test_a_cast_while_merged_holds_after_unmerging(case: Case, dtype: torch.dtype) -> None:
    class Net(nn.Sequential):
        pass

    def net() -> Any:
        with tiny.seed():
            base = Net(nn.Linear(8, 8), nn.Linear(8, 8))
        options = {"target_modules": ["0"], "task_type": None, "init_weights": False}
        return get_peft_model(base, case.config(**options)).eval()  # type: ignore[arg-type]

    model, plain = net(), net().to(dtype)
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    x = tiny.numbers(3, 8).to(dtype)
    for name, p in plain.named_parameters():
        assert model.get_parameter(name).dtype == p.dtype
        assert torch.equal(model.get_parameter(name), p), name
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("storage", ["stack", "merge"])
def test_a_cast_of_a_chain_holds_after_it_is_removed(storage: Any) -> None:
    model = wrap(Case("cola", {}), total_steps=None)
    start(model, ChainPlan.chain(2, storage=storage), 4)
    steps(model, adamw(model, 2e-2), 4)
    model.to(torch.bfloat16)
    plait.chain.remove(model)
    expected = tiny.llama().to(torch.bfloat16)
    for layer in layers(model):
        weight: Any = layer.get_base_layer().weight
        assert torch.equal(weight, expected.get_submodule(layer.name).weight)
    logits(model)


# Files and targets ---------------------------------------------------------------------------


def test_pickles_are_neither_written_nor_read(tmp_path: Path) -> None:
    model = wrap(COLA, init_weights=False)
    with pytest.raises(ValueError, match=r"safe_serialization=False\) writes a pickle, which can"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.raises(ValueError, match="writes a pickle"):
        model.save_pretrained(tmp_path / "a", False)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "a" / "adapter_model.bin")
    for load in (
        lambda: PeftModel.from_pretrained(tiny.llama(), tmp_path / "a"),
        lambda: model.load_adapter(tmp_path / "a", "other"),
        lambda: copy.deepcopy(model).load_adapter(str(tmp_path), "other", subfolder="a"),
    ):
        with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, which can run any"):
            load()
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.args[0] is twin


def test_all_linear_says_how_many_experts_it_leaves_out() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=64, **sizes, **heads))
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    left = 2 * 4 * (2 * 40 * 24 + 24 * 40)
    text = rf"adapts 8 linear layers and leaves out 4 fused expert weights with {left:,} of the"
    with pytest.warns(plait.PlaitWarning, match=text):
        model: Any = get_peft_model(base, COLA.config(**options))  # type: ignore[arg-type]
    assert sum(isinstance(m, PlaitLayer) for m in model.modules()) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error", plait.PlaitWarning)
        for stacked in (Case("hydra", {}), COLA):
            get_peft_model(tiny.llama(), stacked.config(**options))  # type: ignore[arg-type]
        get_peft_model(
            nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)),  # type: ignore[arg-type]
            COLA.config(target_modules="all-linear", task_type=None),
        )
