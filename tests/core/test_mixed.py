"""Mixed batches outside the adapted layers: each row gets what its own adapter trains."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import logits, relative, trained, wrap

DUAL = Case("dual_lora", {"gate_steps": 8})
DMC = Case("dual_module", {"tinit": 2, "tfinal": 2, "deltaT": 1})
SORA = Case("sora", {})
COLA = Case("cola", {"r": 2, "strategy": "random"})
NAMES = ["__base__", "default", "other", "default"]
CLASSIFIER = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
each = pytest.mark.parametrize("case", [DUAL, DMC, SORA, COLA], ids=str)


def two(case: Case, base: nn.Module, other: dict[str, Any] | None = None, **options: Any) -> Any:
    """A model with two adapters, whose trained tensors are all random."""
    model = wrap(case, base, init_weights=False, **options)
    options = {**options, **(other or {})}
    model.add_adapter("other", case.config(init_weights=False, seed=3, **options))
    for key, (name, p) in enumerate(model.named_parameters()):
        if "modules_to_save" in name or "trainable_tokens" in name:
            p.data = tiny.numbers(*p.shape, key=key, dtype=p.dtype)
    return model.eval()


def alone(model: Any, name: str, ids: Tensor) -> Tensor:
    """The logits of one adapter for all rows."""
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(input_ids=ids).logits
        model.set_adapter(name)
        return model(input_ids=ids).logits


def assert_rows(model: Any, active: tuple[str, ...] = ("default", "other")) -> None:
    """Every row of a mixed batch is that of its adapter alone, whatever adapter is active."""
    ids = tiny.tokens()
    expected = [alone(model, name, ids)[i] for i, name in enumerate(NAMES)]
    for name in active:
        model.set_adapter(name)
        with torch.no_grad():
            mixed = model(input_ids=ids, adapter_names=NAMES).logits
            again = model(input_ids=ids).logits
        for row, one in zip(mixed, expected, strict=True):
            assert relative(row, one) < 1e-5
        assert torch.equal(again, alone(model, name, ids)), "a later forward is mixed, too"


@each
def test_each_row_has_its_own_head(case: Case) -> None:
    model = two(case, tiny.bert(), **CLASSIFIER)
    heads = [p for n, p in model.named_parameters() if "modules_to_save" in n and "weight" in n]
    assert len(heads) == 2
    assert not torch.equal(*heads)
    assert_rows(model)


@each
def test_each_row_has_its_own_saved_modules(case: Case) -> None:
    """A linear layer, an embedding, a norm, and a module of several layers."""
    assert_rows(two(case, tiny.llama(), modules_to_save=["lm_head", "embed_tokens", "norm"]))
    options = {"target_modules": ["query"], "task_type": None}
    assert_rows(two(case, tiny.bert(), modules_to_save=["pooler"], **options))


@each
def test_an_adapter_without_a_saved_module_uses_the_base_models(case: Case) -> None:
    model = two(case, tiny.llama(), {"modules_to_save": None}, modules_to_save=["lm_head"])
    assert_rows(model)
    model = two(case, tiny.llama(), {"modules_to_save": ["lm_head"]}, modules_to_save=["norm"])
    assert_rows(model)


@each
def test_each_row_has_its_own_trained_tokens(case: Case) -> None:
    ids = tiny.tokens().flatten().tolist()
    other = {"trainable_token_indices": ids[9:14]}
    assert_rows(two(case, tiny.llama(), other, trainable_token_indices=ids[:6]))
    assert_rows(two(case, tiny.llama(), {"trainable_token_indices": None}, **other))
    tied = tiny.llama(tie_word_embeddings=True)
    assert_rows(two(case, tied, other, trainable_token_indices=ids[:6]))


@pytest.mark.parametrize("bias", ["all", "plait_only"])
@each
def test_trained_biases_are_those_of_their_adapter(case: Case, bias: str) -> None:
    options = {"target_modules": ["query", "dense"], "task_type": None}
    model = two(case, tiny.bert(), {"bias": "none"}, bias=bias, **options)
    plain = two(case, tiny.bert(), **options)
    untouched = tiny.bert()
    biases = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
    assert biases
    for key, (name, p) in enumerate(biases):
        if bias == "all" or ".base_layer." in name:
            p.data += tiny.numbers(*p.shape, key=key, dtype=p.dtype)
    ids = tiny.tokens()
    with torch.no_grad():
        moved = alone(model, "default", ids)
        assert relative(moved, alone(plain, "default", ids)) > 1e-2
        assert relative(alone(model, "__base__", ids), untouched(input_ids=ids).logits) < 1e-6
        assert relative(alone(model, "other", ids), alone(plain, "other", ids)) < 1e-5
        assert torch.equal(alone(model, "default", ids), moved)
    assert_rows(model)


@each
def test_gradients_reach_the_heads_of_their_rows_alone(case: Case) -> None:
    model = two(case, tiny.bert(), **CLASSIFIER)
    model.base_model.set_adapter("default")
    for name, p in model.named_parameters():
        p.requires_grad_("modules_to_save" in name)
    ids = tiny.tokens()
    model(input_ids=ids, adapter_names=NAMES).logits[[1, 3]].sum().backward()
    grads = {n: p.grad for n, p in trained(model).items()}
    assert all(g is None or not g.any() for n, g in grads.items() if ".other." in n)
    own = {n: g for n, g in grads.items() if ".default." in n}
    assert all(g is not None and g.any() for g in own.values())
    model.zero_grad()
    model.set_adapter("default")
    model.zero_grad()
    model(input_ids=ids[[1, 3]]).logits.sum().backward()
    for name, grad in own.items():
        assert relative(grad, model.get_parameter(name).grad) < 1e-5  # type: ignore[arg-type]


def test_copies_and_pickles_of_a_model_that_ran_mixed() -> None:
    model = two(DUAL, tiny.bert(), {"bias": "none"}, bias="all", **CLASSIFIER)
    assert_rows(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            twin.get_submodule("base_model.model.classifier").modules_to_save["other"].weight += 1
        assert_rows(twin)
        ids = tiny.tokens()
        assert not torch.equal(alone(twin, "other", ids), alone(model, "other", ids))


def test_what_cannot_be_split_is_refused() -> None:
    base = tiny.bert()
    model = two(DUAL, base, modules_to_save=["LayerNorm"], target_modules=["query"], task_type=None)
    assert_rows(model)
    options = {"target_modules": ["query"], "task_type": None}
    model = two(DUAL, tiny.bert(), modules_to_save=["output"], **options)
    with pytest.raises(
        ValueError, match=r"adapter_names: .*output has a copy for each adapter and"
    ):
        model(input_ids=tiny.tokens(), adapter_names=NAMES)
    model = two(DUAL, tiny.llama(), trainable_token_indices=[3, 4])
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter_names cannot be used while adapters are merged"):
        logits(model, adapter_names=NAMES)


# Weighted sums ---------------------------------------------------------------------------------


@each
def test_weighted_sums_of_unlike_heads_are_refused(case: Case) -> None:
    model = two(case, tiny.bert(), **CLASSIFIER)
    text = r"classifier is in modules_to_save and differs between default, other"
    with pytest.raises(ValueError, match=text):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "other"}
    one = two(case, tiny.llama(), {"modules_to_save": None}, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is in modules_to_save and differs"):
        one.add_weighted_adapter(["other", "default"], [0.5, 0.5], "sum")
    tokens = two(case, tiny.llama(), trainable_token_indices=[3, 4])
    with pytest.raises(ValueError, match=r"train tokens of model\.embed_tokens, which a sum"):
        tokens.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    options = {"target_modules": ["query"], "task_type": None}
    biased = two(case, tiny.bert(), {"bias": "none"}, bias="all", **options)
    with pytest.raises(ValueError, match="default trains biases of the base model"):
        biased.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


@each
def test_a_weighted_sum_keeps_the_head_that_its_adapters_share(case: Case) -> None:
    model = two(case, tiny.bert(), **CLASSIFIER)
    saved = model.get_submodule("base_model.model.classifier").modules_to_save
    saved["other"].load_state_dict(saved["default"].state_dict())
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum")
    ids = tiny.tokens()
    assert relative(alone(model, "sum", ids), alone(model, "default", ids)) < 1e-5
    assert not any(p.requires_grad for p in saved["sum"].parameters())
