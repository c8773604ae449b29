"""The host on upstream peft: what peft's users expect, for every method."""

import copy
import io
import json
import pickle
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import plait
from plait.core import bridge
from plait.core.bridge import PlaitLayer
from plait.core.route import Rows
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.checks.precision import quantised
from plait.testing.helpers import (
    adamw,
    base_logits,
    batch,
    choices,
    deltas,
    depends_on_input,
    layers,
    logits,
    relative,
    steps,
    task_ids,
    tasks,
    trained,
    wrap,
)

DUAL = Case("dual_lora", {"gate_steps": 8})
DMC = Case("dual_module", {"tinit": 2, "tfinal": 2, "deltaT": 1})
TOKEN = Case("shared_b", {"r": 2, "num_A": 3})
TASK = Case("shared_b", {"r": 2, "routing": "task", "tasks": ["law", "care"]})
COLA = Case("cola", {"r": 2, "strategy": "random"})
ALL = [DUAL, DMC, TOKEN, TASK, COLA]
each = pytest.mark.parametrize("case", ALL, ids=str)


def peft_types() -> list[PeftType]:
    """Those that we added."""
    return [PeftType[f"PLAIT_{method.key.upper()}"] for method in plait.list_methods()]


# The enum --------------------------------------------------------------------------------------


def test_members_are_like_the_others() -> None:
    """Iteration, lookup by name and value, pickle, copies, json, hash, string: as for LORA."""
    for member in peft_types():
        name = member.value
        assert isinstance(member, PeftType)
        assert isinstance(member, str)
        assert member.name == name == str(member.value)
        assert member is PeftType(name) is PeftType[name] is getattr(PeftType, name)
        assert member in list(PeftType)
        assert name in PeftType.__members__
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is copy.copy(member) is member
        assert json.dumps(member) == f'"{name}"'
        assert {member: 1}[PeftType(name)] == 1
        assert (member == name, member != PeftType.LORA) == (True, True)
        assert repr(member) == repr(PeftType.LORA).replace("LORA", name)
        assert str(member) == str(PeftType.LORA).replace("LORA", name)
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType.__members__)


def test_adding_a_member_twice_adds_it_once() -> None:
    before = list(PeftType)
    assert bridge.add_peft_type("PLAIT_COLA") is PeftType["PLAIT_COLA"]
    assert bridge.add_peft_type("LORA") is PeftType.LORA
    assert list(PeftType) == before


def test_a_taken_type_is_not_hosted_again() -> None:
    with pytest.raises(ValueError, match="peft already hosts a method of type PLAIT_COLA"):
        bridge.host("cola", plait.ColaConfig, plait.find("cola").delta)


@each
def test_prefixes_do_not_mislead_others(case: Case) -> None:
    """Upstream and others look for "lora_" in parameter names."""
    model = wrap(case)
    for name in trained(model):
        place = name.partition(f"plait_{case.key}_delta")[0]
        assert "lora_" not in place
        assert name.startswith("base_model.model.")


# Saving and loading ----------------------------------------------------------------------------


@each
def test_auto_model(case: Case, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoPeftModelForCausalLM.from_pretrained  # reads the base's name from the adapter
    from transformers import LlamaForCausalLM

    model = wrap(case, LlamaForCausalLM.from_pretrained(tmp_path / "base"), init_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(base(tmp_path / "adapter").eval()), logits(model))


@each
def test_transformers_adapters(case: Case, tmp_path: Path) -> None:
    """add_adapter, load_adapter, set_adapter, disable_adapters, delete_adapter of the base."""
    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers {version('transformers')} asks for peft {MIN_PEFT_VERSION}.")
    model = wrap(case, init_weights=False)
    model.save_pretrained(tmp_path)
    expected, base = logits(model), base_logits(tiny.llama())
    plain: Any = tiny.llama()
    plain.load_adapter(str(tmp_path), adapter_name="loaded")
    plain.eval()
    assert torch.equal(logits(plain), expected)
    plain.disable_adapters()
    assert torch.equal(base_logits(plain), base)
    plain.enable_adapters()
    assert torch.equal(logits(plain), expected)
    plain.add_adapter(case.config(init_weights=False, seed=5), adapter_name="fresh")
    plain.set_adapter("fresh")
    assert not torch.equal(logits(plain), expected)
    plain.set_adapter("loaded")
    assert torch.equal(logits(plain), expected)
    plain.delete_adapter("fresh")
    assert torch.equal(logits(plain), expected)


@each
def test_inject_without_a_peft_model(case: Case) -> None:
    model = wrap(case, init_weights=False)
    plain = inject_adapter_in_model(case.config(), tiny.llama()).eval()
    found = set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    assert not found.unexpected_keys
    assert torch.equal(logits(plain), logits(model))
    prefix = "base_model.model."
    expected = {n.removeprefix(prefix) for n in get_peft_model_state_dict(model)}
    assert set(get_peft_model_state_dict(plain)) == expected


@each
def test_a_saved_config_alone_makes_no_adapter(case: Case, tmp_path: Path) -> None:
    """Weights that never came would be a silent start from zeros."""
    wrap(case, init_weights=False).save_pretrained(tmp_path)
    config = case.method.config.from_pretrained(tmp_path)
    model: Any = get_peft_model(tiny.llama(), config)
    text = "made from a saved config and its weights were not loaded. Use PeftModel.from_pretrained"
    with pytest.raises(RuntimeError, match=text):
        logits(model)


@each
def test_pickled_and_copied_models(case: Case) -> None:
    model = wrap(case, init_weights=False)
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    steps(copied, adamw(copied, 1e-2), 2)
    assert torch.equal(logits(model), expected), "a copy shares its factors"
    assert not torch.equal(logits(copied), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded), expected)
    names = ["default", "__base__", "default", "__base__"]
    mixed = logits(model, adapter_names=names)
    assert torch.equal(logits(copy.deepcopy(model), adapter_names=names), mixed)


def test_corrupt_and_foreign_files(tmp_path: Path) -> None:
    wrap(COLA, init_weights=False).save_pretrained(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, options = path.read_bytes(), json.loads(config.read_text(encoding="utf-8"))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"SafetensorError|incomplete|buffer|header"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    path.write_bytes(whole)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny.llama(hidden_size=32), tmp_path)
    for change, text in (
        (
            {"plait_version": "99.0"},
            r"written by plait 99\.0; .* is installed\. Install that version",
        ),
        ({"strateggy": "full"}, r"strateggy is not known to plait .*Did you mean strategy\?"),
        ({"peft_type": "PLAIT_DUAL_LORA"}, "DualLoraConfig: .* is not known"),
    ):
        config.write_text(json.dumps({**options, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=text):
            PeftModel.from_pretrained(tiny.llama(), tmp_path)
    config.write_text(json.dumps(options), encoding="utf-8")
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path, metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert any("missing" in str(w.message).lower() for w in seen)


# Targets ---------------------------------------------------------------------------------------


def names(model: nn.Module) -> list[str]:
    """Short names of the adapted layers."""
    return [layer.name for layer in layers(model)]


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "deberta", "llama"])
@each
def test_architectures(case: Case, architecture: str) -> None:
    """all-linear on four shapes of model: a step of training, merge, equal after it."""
    build = {"gpt2": tiny.gpt2, "bert": tiny.bert, "deberta": tiny.deberta, "llama": tiny.llama}
    kind = "CAUSAL_LM" if architecture in ("gpt2", "llama") else "SEQ_CLS"
    plain = build[architecture]()
    head = "score" if architecture == "llama" else "classifier"
    base = base_logits(plain)
    # Relative positions pass through these without rows: no task, no mixed batch there.
    shared = (
        ["pos_query_proj", "pos_key_proj"] if (case, architecture) == (TASK, "deberta") else None
    )
    options: Any = {"target_modules": "all-linear", "exclude_modules": shared}
    model = wrap(case, plain, task_type=kind, **options)
    assert not [n for n in names(model) if n.endswith(("lm_head", head))]
    assert len(layers(model)) >= 8
    assert all(layer.transposed == (architecture == "gpt2") for layer in layers(model))
    ids, extra = tiny.tokens(), task_ids(model, 4)
    with torch.no_grad():
        assert relative(model(input_ids=ids, **extra).logits, base) < 1e-6
    optimizer = adamw(model, 1e-2)
    model.train()
    for _ in range(3):
        labels = ids if kind == "CAUSAL_LM" else torch.tensor([0, 1, 2, 0])
        model(input_ids=ids, labels=labels, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for index, choice in enumerate(choices(model)):
        if case is TOKEN:
            break
        if extra:
            extra["task_ids"] = torch.full((4,), index)
        with torch.no_grad():
            expected = model(input_ids=ids, **extra).logits
            dW = layers(model)[0].get_delta_weight("default", **choice)
            assert dW.shape == layers(model)[0].get_base_weight().shape
            model.merge_adapter(**choice)
            assert relative(model(input_ids=ids, **extra).logits, expected) < 1e-5
            model.unmerge_adapter()
        assert not relative(expected, base) < 1e-6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": r".*\.1\..*(k|v)_proj"}, ["1.self_attn.k_proj", "1.self_attn.v_proj"]),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, 2),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]}, 4),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "down_proj"]}, 10),
        ({"target_modules": "all-linear", "exclude_modules": r".*self_attn.*"}, 6),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": None}, ["0.self_attn.q_proj", "0.self_attn.v_proj"] * 2),
    ],
)
def test_targets(options: dict[str, Any], expected: Any) -> None:
    found = names(wrap(DUAL, **options))
    if isinstance(expected, int):
        assert len(found) == expected
    elif options["target_modules"] is None:
        assert sorted({n.rpartition(".")[2] for n in found}) == ["q_proj", "v_proj"]
    else:
        assert [n.removeprefix("model.layers.") for n in found] == expected


@each
def test_rank_and_alpha_patterns(case: Case, tmp_path: Path) -> None:
    ranks = {"q_proj": 6, r"layers\.1\..*v_proj": 8}
    options = {"rank_pattern": ranks, "alpha_pattern": {"q_proj": 30.0}, "init_weights": False}
    model = wrap(case, target_modules=["q_proj", "v_proj"], **options)
    default = case.config()
    for layer in layers(model):
        delta: Any = layer.plait_delta["default"]
        q = layer.name.endswith("q_proj")
        r = 6 if q else 8 if ".1." in layer.name else default.r
        alpha = 30.0 if q else default.lora_alpha
        assert (delta.config.r, delta.config.lora_alpha) == (r, alpha)
        found = sum(p.numel() for p in delta.parameters())
        assert found == delta.count(delta.config, layer.in_features, layer.out_features)
        assert delta.scaling == pytest.approx(alpha / (r / 2 if case is DUAL else r))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_ranks_above_the_layer(tmp_path: Path) -> None:
    """Allowed: the spare ranks start as in LoRA, and the start is still the base model."""
    base = base_logits(tiny.llama())
    for case in ALL:
        model = wrap(case, r=40)
        assert relative(logits(model), base) < 1e-6
        losses = steps(model, adamw(model, 1e-2), 5)
        assert losses[-1] < losses[0]
        assert all(d.rank() <= min(d.base.in_features, d.base.out_features) for d in deltas(model))


def test_wrong_targets() -> None:
    with pytest.raises(ValueError, match=r"qproj.*Linear layers of this model: .*q_proj.*v_proj"):
        wrap(DUAL, target_modules=["qproj"])
    with pytest.raises(
        ValueError, match=r"embed_tokens is a Embedding; plait adapts torch\.nn\.Lin"
    ):
        wrap(DUAL, target_modules=["embed_tokens"])
    with pytest.raises(
        ValueError, match="layers_to_transform cannot be used with target_modules as"
    ):
        wrap(DUAL, target_modules=".*q_proj", layers_to_transform=[0])


# Beside the deltas -----------------------------------------------------------------------------


@each
def test_modules_to_save(case: Case, tmp_path: Path) -> None:
    options = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["pooler"]}
    model = wrap(case, tiny.bert(), **options)
    train = {n for n in trained(model) if f"plait_{case.key}" not in n}
    assert train
    assert all("classifier" in n or "pooler" in n for n in train)
    optimizer = adamw(model, 1e-2)
    ids, labels = tiny.tokens(), torch.tensor([0, 1, 2, 0])
    extra = task_ids(model, 4)
    model.train()
    for _ in range(2):
        model(input_ids=ids, labels=labels, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.bert(), tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, **extra).logits
        assert torch.equal(loaded(input_ids=ids, **extra).logits, expected)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("plait_only", 2), ("all", None)])
def test_bias(bias: str, count: int | None, tmp_path: Path) -> None:
    model = wrap(DMC, tiny.bert(), target_modules=["query"], bias=bias, task_type=None)
    biases = [n for n in trained(model) if n.endswith("bias")]
    every = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert len(biases) == (len(every) if count is None else count)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    ids = tiny.tokens()
    model.train()
    model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.bert(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_trainable_tokens(tmp_path: Path) -> None:
    model = wrap(COLA, trainable_token_indices=[3, 4])
    assert any("token_adapter" in n for n in trained(model))
    steps(model, adamw(model, 1e-2), 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@each
def test_inference_mode_and_printed_counts(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert not trained(wrap(case, inference_mode=True))
    model = wrap(case)
    model.print_trainable_parameters()
    count = sum(p.numel() for p in trained(model).values())
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    assert f"r={case.config().r}" in repr(model)


# Mixed batches ---------------------------------------------------------------------------------


def two(case: Case, **options: Any) -> Any:
    """A model with two random adapters, both trainable."""
    model = wrap(case, init_weights=False, **options)
    model.add_adapter("other", case.config(init_weights=False, seed=3, **options))
    model.base_model.set_adapter(["default", "other"])
    return model


NAMES = ["default", "__base__", "other", "default"]


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not"])
@each
def test_mixed_batches_train(case: Case, checkpointing: bool | None, task_type: str | None) -> None:
    """Each adapter's gradient is that of its own rows; also when layers are recomputed."""
    model = two(case, task_type=task_type)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing}
        )
        model.enable_input_require_grads()
    model.train()
    inputs = batch(model)
    model(**inputs, adapter_names=NAMES).logits.square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in trained(model).items() if p.grad is not None}
    model.zero_grad()
    for name in ("default", "other"):
        own = [i for i, n in enumerate(NAMES) if n == name]
        model.set_adapter(name)
        model(**{k: v[own] for k, v in inputs.items()}).logits.square().sum().backward()
    model.base_model.set_adapter(["default", "other"])
    alone = {n: p.grad for n, p in trained(model).items() if p.grad is not None}
    assert set(alone) == set(mixed)
    for n, grad in alone.items():
        assert relative(mixed[n], grad) < 1e-4, n


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_two_routes_is_refused(reentrant: bool) -> None:
    """Their backward cannot know which route a layer had."""
    model = two(COLA)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    inputs = batch(model)
    one = model(**inputs, adapter_names=NAMES).loss
    two_ = model(**inputs, adapter_names=NAMES[::-1]).loss
    with pytest.raises(RuntimeError, match="Two forwards with different adapter_names or task_ids"):
        (one + two_).backward()
    model.zero_grad()
    for route in (NAMES, NAMES[::-1]):  # a backward after each forward
        model(**inputs, adapter_names=route).loss.backward()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", [DUAL, TOKEN, TASK], ids=str)
def test_mixed_batches_generate(case: Case, beams: int, task_type: str | None) -> None:
    model = two(case, task_type=task_type).eval()
    with torch.no_grad():
        for p in trained(model).values():
            p.mul_(3)
    prompt, extra = tiny.tokens(4, 4), task_ids(model, 4)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    mixed = model.generate(input_ids=prompt, adapter_names=NAMES, **extra, **options)
    for i, name in enumerate(NAMES):
        one = {k: v[i : i + 1] for k, v in {"input_ids": prompt, **extra}.items()}
        if name == "__base__":
            base: Any = tiny.llama()
            alone = base.generate(input_ids=prompt[i : i + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(**one, **options)
        assert torch.equal(mixed[i, : alone.shape[1]], alone[0]), name


def test_mixed_batches_are_checked() -> None:
    model = two(DUAL)
    inputs = batch(model)
    with pytest.raises(
        ValueError, match=r"non-existing adapter\(s\): nobody\. This model has: .*def"
    ):
        model(**inputs, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match=r"adapter_names has 3 entries, the batch at .* has 4 row"):
        model(**inputs, adapter_names=["default"] * 3)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter_names cannot be used while adapters are merged"):
        model(**inputs, adapter_names=NAMES)
    model.unmerge_adapter()
    model(**inputs, adapter_names=NAMES)


def test_layers_that_see_no_rows() -> None:
    """DeBERTa sends its relative positions, one for all rows, through pos_query_proj."""
    remedy = "leave layers without rows, such as those of relative positions, out of target_modules"
    options = {"target_modules": ["pos_query_proj"], "task_type": None, "init_weights": False}
    ids = tiny.tokens()
    with pytest.raises(ValueError, match=rf"task_ids has shape \(4,\).*{remedy}"):
        wrap(TASK, tiny.deberta(), **options)(input_ids=ids, task_ids=torch.zeros(4).long())
    with pytest.raises(ValueError, match=rf"adapter_names has 4 entries.*{remedy}"):
        wrap(DUAL, tiny.deberta(), **options)(input_ids=ids, adapter_names=["default"] * 4)


def test_a_failed_forward_leaves_no_route() -> None:
    model = two(DUAL).eval()
    model.set_adapter("default")
    expected = logits(model)
    with pytest.raises(ValueError):
        model(**batch(model), adapter_names=["default"] * 3)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[999]]), adapter_names=["other"])
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_task_ids_under_gradient_checkpointing(task_type: str | None) -> None:
    grads = []
    for checkpointing in (False, True):
        model = wrap(TASK, task_type=task_type, init_weights=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for key in range(2):  # accumulation over batches of other tasks
            inputs = batch(model, key=key)
            inputs["task_ids"] = (inputs["task_ids"] + key) % 2
            model(**inputs).loss.backward()
        grads.append({n: p.grad for n, p in trained(model).items()})
    for n, grad in grads[0].items():
        assert torch.equal(grads[1][n], grad), n


# Several models and methods --------------------------------------------------------------------


def test_two_methods_on_disjoint_layers(tmp_path: Path) -> None:
    """A PeftModel wrapped again: both train, both act, each is saved."""
    first = wrap(DUAL, target_modules=["q_proj"], task_type=None, init_weights=False)
    inner = logits(first)
    both: Any = get_peft_model(first, COLA.config(target_modules=["up_proj"], task_type=None))
    both.eval()
    assert relative(logits(both), inner) < 1e-6
    for layer in layers(both):  # peft froze the inner adapter
        for delta in layer.plait_delta.values():
            delta.requires_grad_(True)
    losses = steps(both, adamw(both, 1e-2), 5)
    assert losses[-1] < losses[0]
    kinds = {type(next(iter(layer.plait_delta.values()))).__name__ for layer in layers(both)}
    assert kinds == {"DualLora", "Cola"}
    expected = logits(both)
    both.save_pretrained(tmp_path / "outer")
    first.save_pretrained(tmp_path / "inner")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "inner")
    again = PeftModel.from_pretrained(again, tmp_path / "outer")  # type: ignore[arg-type]
    assert torch.equal(logits(again.eval()), expected)


def test_task_ids_with_two_models() -> None:
    """Routes of an inner and an outer tuner get the same ids."""
    first = wrap(TASK, target_modules=["q_proj"], task_type=None, init_weights=False)
    outer = TASK.config(target_modules=["up_proj"], task_type=None, init_weights=False)
    both: Any = get_peft_model(first, outer).eval()
    ids = tiny.tokens()
    with torch.no_grad():
        one, two = (both(input_ids=ids, task_ids=torch.full((4,), k)).logits for k in range(2))
        mixed = both(input_ids=ids, task_ids=torch.tensor([0, 1, 0, 1])).logits
    assert relative(mixed[0], one[0]) < 1e-5
    assert relative(mixed[1], two[1]) < 1e-5


def test_beside_stock_lora() -> None:
    """Our layers and upstream's in one model."""
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    model: Any = get_peft_model(lora, DUAL.config(target_modules=["v_proj"], task_type=None))
    losses = steps(model, adamw(model, 1e-2), 3)
    assert losses[-1] < losses[0]


def test_weighted_sums() -> None:
    """sum_i w_i dW_i, for a dense method and a stacked one; merged and exported as any other."""
    for case in (DUAL, DMC, COLA):
        model = two(case).eval()
        model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "sum")
        model.set_adapter("sum")
        layer = layers(model)[0]
        dW = 0.7 * layer.get_delta_weight("default") - 0.2 * layer.get_delta_weight("other")
        assert relative(layer.get_delta_weight("sum"), dW) < 1e-5
        expected = logits(model)
        x = tiny.numbers(3, layer.in_features, dtype=torch.float32)
        assert relative(layer(x) - layer.base_layer(x), x @ dW.T) < 1e-4
        model.merge_adapter()
        assert relative(logits(model), expected) < 1e-5
        model.unmerge_adapter()
        model.delete_adapter("sum")


def test_weighted_sum_of_tasks() -> None:
    model = two(TASK).eval()
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    parts = []
    rows = Rows(task_ids=torch.tensor([0, 1, 1, 0]))
    layer = layers(model)[0]
    with torch.no_grad():
        x = tiny.numbers(4, layer.in_features, dtype=torch.float32)
        for name in ("default", "other"):
            delta: Any = layer.plait_delta[name]
            parts.append(delta(x, rows))
        total: Any = layer.plait_delta["sum"]
        assert relative(total(x, rows), 0.5 * parts[0] + 0.5 * parts[1]) < 1e-5
    model.set_adapter("sum")
    logits(model)


def test_refused_features() -> None:
    """What upstream has for LoRA only says so."""
    with pytest.raises(TypeError, match="target_parameters"):
        DUAL.config(target_parameters=["mlp.experts"])
    with pytest.raises(TypeError, match="use_dora"):
        DUAL.config(use_dora=True)
    with pytest.raises(
        ValueError, match=r"PLAIT_DUAL_LORA.* is not compatible with the `PeftMixedModel`"
    ):
        get_peft_model(tiny.llama(), DUAL.config(), mixed=True)


# Bases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@each
def test_quantised_bases(case: Case, bits: int, tmp_path: Path) -> None:
    """Save and load, mixed batches, dW from the dequantised weight, merge refused."""
    model = wrap(case, quantised(bits))
    steps(model, adamw(model, 1e-2), 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(bits), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    if case is TOKEN:
        return
    mixed = logits(model, adapter_names=["default", "__base__"] * 2)
    assert relative(mixed[::2], logits(model)[::2]) < 1e-5
    layer = layers(model)[0]
    for choice in choices(model):
        dW = layer.get_delta_weight("default", **choice)
        assert dW.dtype == torch.float32
        assert dW.shape == (layer.out_features, layer.in_features)
        text = (
            r"q_proj is Linear(4bit|8bitLt): merging needs a dequantised base\. Export to plain L"
        )
        with pytest.raises(plait.NotMergeable, match=text):
            model.merge_adapter(**choice)


def test_start_on_a_quantised_base_takes_the_dequantised_weight() -> None:
    from plait.core.init import svd_start

    for bits in (8, 4):
        model = wrap(COLA, quantised(bits), svd="exact", strategy="full")
        layer = layers(model)[0]
        delta: Any = layer.plait_delta["default"]
        W = layer.base_weight().float()
        assert W.shape == (layer.out_features, layer.in_features)
        A0, B0 = svd_start(W, 2, delta.scaling, "exact", torch.Generator())
        assert relative(delta.B0 @ delta.A0, B0 @ A0) < 1e-5


@each
def test_double_base(case: Case) -> None:
    model = wrap(case, tiny.llama().double(), init_weights=False)
    assert {p.dtype for p in trained(model).values()} == {torch.float64}
    assert logits(model).dtype == torch.float64
    before = [p.detach().clone() for p in trained(model).values()]
    assert all(x == x for x in steps(model, adamw(model, 1e-2), 2))
    assert all(not torch.equal(a, b) for a, b in zip(before, trained(model).values(), strict=True))


@each
def test_bf16_base_and_dtype_of_the_factors(case: Case, tmp_path: Path) -> None:
    base = tiny.llama().bfloat16()
    model = wrap(case, base, init_weights=False)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    if case is not TOKEN:
        weight = layers(model)[0].get_base_weight().clone()
        for choice in choices(model):
            model.merge_adapter(**choice)
            assert layers(model)[0].get_base_weight().dtype == torch.bfloat16
            model.unmerge_adapter()
            assert torch.equal(layers(model)[0].get_base_weight(), weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama().bfloat16(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    plain: Any = tiny.llama().bfloat16()
    narrow: Any = get_peft_model(plain, case.config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(narrow).values()} == {torch.bfloat16}
    loss = narrow(**batch(narrow)).loss
    loss.backward()
    assert loss.isfinite()


@each
def test_counters_survive_a_cast_of_the_model(case: Case) -> None:
    """A step counter in bf16 would stop at 256."""
    model = wrap(case)
    steps(model, adamw(model, 1e-3), 3)
    model.to(torch.bfloat16)
    for delta in deltas(model):
        assert delta.t is None or (delta.t.dtype == torch.int64 and int(delta.t) == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    """Outputs in the autocast dtype, gradients in fp32; the joint form obeys autocast too."""
    options: Any = {"ste": "identity"} if case is DUAL else {}
    model = wrap(case, init_weights=False, **options).train()
    with torch.autocast("cpu", dtype):
        out = model(**batch(model))
        layer = layers(model)[0]
        if case is not TASK:
            assert layer(torch.randn(2, layer.in_features)).dtype == dtype
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in trained(model).values())
    with torch.no_grad():
        expected = float(model(**batch(model)).loss)
    assert float(out.loss.detach()) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("case", [DUAL, COLA, TOKEN], ids=str)
def test_compiled_layer(case: Case) -> None:
    """torch.compile of a layer: the same output, gradients too (backend without a compiler)."""
    model = wrap(case, init_weights=False).train()
    layer = layers(model)[0]
    x = tiny.numbers(3, layer.in_features, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")
    expected = torch.autograd.grad(layer(x).square().sum(), list(trained(layer).values()))
    found = torch.autograd.grad(compiled(x).square().sum(), list(trained(layer).values()))
    assert relative(compiled(x), layer(x)) < 1e-5
    for ours, wanted in zip(found, expected, strict=True):
        assert relative(ours, wanted) < 1e-5


# Merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [DUAL, DMC, COLA], ids=str)
def test_merge_of_several_and_again(case: Case) -> None:
    model = two(case).eval()
    expected = logits(model)
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="adapters were merged default. You are now additionally"):
        model.merge_adapter(adapter_names=["default", "other"])
    assert layers(model)[0].merged_adapters == ["default", "other"]
    assert relative(logits(model), expected) < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits(tiny.llama()))
    assert not layers(model)[0].merged


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = wrap(COLA, init_weights=False)
    broken = layers(model)[1]
    with torch.no_grad():
        next(broken.plait_delta["default"].parameters()).view(-1)[0] = float("nan")
    weight = broken.get_base_weight().clone()
    with pytest.raises(ValueError, match=r"v_proj: NaNs detected in the merged weights.*unchanged"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(broken.get_base_weight(), weight)


@each
def test_saving_while_merged_keeps_the_adapter(case: Case, tmp_path: Path) -> None:
    model = wrap(case, init_weights=False)
    if depends_on_input(deltas(model)[0]):
        return
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), expected)


def test_tied_weights_are_noticed() -> None:
    """lm_head shares its weight with the embedding: merging into it would change both."""
    with pytest.warns(UserWarning, match="tie|tied"):
        wrap(DUAL, tiny.llama(tie_word_embeddings=True), target_modules=["lm_head"])


def test_layer_without_delta_of_the_adapter() -> None:
    """Adapters on different layers: each leaves the other's layers alone."""
    model = wrap(DUAL, target_modules=["q_proj"], init_weights=False)
    first = logits(model)
    model.add_adapter("other", DUAL.config(target_modules=["up_proj"], init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    mixed = logits(model, adapter_names=["default", "other", "__base__", "other"])
    assert relative(mixed[0], first[0]) < 1e-5
    assert relative(mixed[1], second[1]) < 1e-5
    assert relative(mixed[2], base_logits(tiny.llama())[2]) < 1e-5
    model.merge_adapter()
    assert relative(logits(model), second) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), second)


def test_wrong_input() -> None:
    model, layer = wrap(COLA), None
    layer = layers(model)[0]
    with pytest.raises((TypeError, RuntimeError)):
        layer(torch.ones(2, layer.in_features, dtype=torch.long))


def test_tasks_of_a_plain_tensor_input() -> None:
    """A base model called with a tensor, without keyword arguments."""
    assert tasks(wrap(TASK)) == ["law", "care"]
    net = nn.Sequential(nn.Linear(5, 4))
    config = TASK.config(target_modules=["0"], task_type=None, init_weights=False)
    model: Any = get_peft_model(net, config)  # type: ignore[arg-type]
    x: Tensor = tiny.numbers(2, 5, dtype=torch.float32)
    both = model(x, task_ids=torch.tensor([0, 1]))
    assert relative(both[1], model(x, task_ids=torch.tensor([1, 1]))[1]) < 1e-6
    assert isinstance(layers(model)[0], PlaitLayer)
