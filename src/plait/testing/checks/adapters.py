"""Checks of adapters as a whole: merging, saving, several adapters in one model, export."""

import copy
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel

from plait import DenseDelta, LowRankDelta, NotMergeable
from plait.core.mix import TokenRouter
from plait.core.route import BASE
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    base_logits,
    choices,
    deltas,
    depends_on_input,
    layers,
    logits,
    relative,
    steps,
    tasks,
    trained,
    wrap,
)
from plait.upstream.export import to_lora


def merge_is_exact(case: Case) -> None:
    """The merged model equals the unmerged one, and unmerging restores every bit.

    A method whose update depends on the input raises NotMergeable and changes nothing.
    """
    model = wrap(case, init_weights=False)
    weights = [layer.get_base_weight().clone() for layer in layers(model)]
    expected = logits(model)
    router = depends_on_input(deltas(model)[0])
    assert router == (not case.method.mergeable), "the class fact `mergeable` is wrong"
    if router:
        with pytest.raises(NotMergeable, match=rf"{case.key} cannot be merged: .*merge\("):
            model.merge_adapter()
        with pytest.raises(NotMergeable):
            model.merge_and_unload()
        for layer, weight in zip(layers(model), weights, strict=True):
            assert torch.equal(layer.get_base_weight(), weight), "a refused merge changed a weight"
        assert torch.equal(logits(model), expected), "a refused merge changed the model"
        if not tasks(model):
            return
    for index, choice in enumerate(choices(model)):
        task_inputs: dict[str, Any] = {"task_ids": torch.full((4,), index)} if router else {}
        expected = logits(model, **task_inputs)
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe, **choice)
            merged = logits(model)
            assert relative(merged, expected) < 1e-5, f"merged differs {choice}"
            assert not torch.equal(layers(model)[0].get_base_weight(), weights[0]), "nothing merged"
            model.unmerge_adapter()
            for layer, weight in zip(layers(model), weights, strict=True):
                assert torch.equal(layer.get_base_weight(), weight), "unmerge is not exact"
            assert torch.equal(logits(model, **task_inputs), expected), "unmerge changed the model"
        plain = copy.deepcopy(model).merge_and_unload(safe_merge=True, **choice)
        assert not layers(plain), "a layer of plait is left after merge_and_unload"
        assert relative(base_logits(plain), expected) < 1e-5


def save_and_load(case: Case) -> None:
    """A loaded adapter equals the saved one bit for bit; loading decomposes no base weight."""
    model = wrap(case)
    steps(model, adamw(model, case.lr), 3)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(os.listdir(folder))
        saved = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        assert saved["peft_type"] == f"PLAIT_{case.key.upper()}"
        assert "adapter_model.safetensors" in files
        assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))], "a pickle was written"
        refuse = mock.Mock(side_effect=AssertionError("a decomposition at load"))
        with mock.patch("torch.linalg.svd", refuse), mock.patch("torch.linalg.qr", refuse):
            loaded = PeftModel.from_pretrained(tiny.llama(), folder)
            lean = PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=True)
    for other in (loaded, lean):
        assert torch.equal(logits(other), logits(model)), "the loaded adapter differs"
        assert not trained(other), "an adapter loaded for inference trains"
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), f"{name} differs after loading"


def two_adapters_coexist(case: Case) -> None:
    """Switching, disabling and deleting adapters changes neither another adapter nor the base."""
    base = base_logits(tiny.llama())
    model = wrap(case, init_weights=False)
    first = logits(model)
    model.add_adapter("other", case.config(init_weights=False, seed=3))
    assert torch.equal(logits(model), first), "adding an adapter changed the active one"
    model.set_adapter("other")
    second = logits(model)
    steps(model, adamw(model, case.lr), 2)
    assert not torch.equal(logits(model), second), "the second adapter does not train"
    model.set_adapter("default")
    assert torch.equal(logits(model), first), "training one adapter changed the other"
    with model.disable_adapter():
        assert torch.equal(logits(model), base), "disable_adapter is not the base model"
    assert torch.equal(logits(model), first), "disable_adapter changed the adapter"
    model.base_model.set_adapter(["default", "other"])
    x = tiny.numbers(3, layers(model)[0].in_features, dtype=torch.float32)
    if not depends_on_input(deltas(model)[0]):
        layer = layers(model)[0]
        summed = x @ (layer.get_delta_weight("default") + layer.get_delta_weight("other")).T
        assert relative(layer(x) - layer.base_layer(x), summed) < 1e-4, "active adapters do not add"
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first), "deleting an adapter changed the other"
    assert all(list(layer.plait_delta) == ["default"] for layer in layers(model))


def mixed_batch_is_separate_runs(case: Case) -> None:
    """A batch with an adapter for each row equals separate runs, in evaluation and in training."""
    model = wrap(case, init_weights=False)
    model.add_adapter("other", case.config(init_weights=False, seed=3))
    names = ["default", BASE, "other", "default"]
    for training in (False, True):
        model.train(training)
        mixed = logits(model, adapter_names=names)
        for name in ("default", "other"):
            model.set_adapter(name)
            rows = [i for i, n in enumerate(names) if n == name]
            assert relative(mixed[rows], logits(model)[rows]) < 1e-5, f"rows of {name} differ"
        with model.disable_adapter():
            assert relative(mixed[1], logits(model)[1]) < 1e-5, "rows of __base__ differ"
        model.set_adapter("default")
    unknown = "non-existing adapter.*nobody"
    with pytest.raises(ValueError, match=unknown):
        logits(model, adapter_names=["nobody"] * 4)


def export_is_as_declared(case: Case) -> None:
    """An export loaded by stock peft gives the same output; one that is not exact has an error."""
    model = wrap(case, init_weights=False)
    delta = deltas(model)[0]
    router = isinstance(delta, LowRankDelta) and isinstance(delta.mix(), TokenRouter)
    if depends_on_input(delta):
        assert not case.method.exact_export, "the class fact `exact_export` is wrong"
        with pytest.raises(NotMergeable, match="cannot be merged"):
            to_lora(model)
    export_choices: list[Any] = [{"approx": "mean"}] if router else choices(model)
    for index, choice in enumerate(export_choices):
        task_inputs: dict[str, Any] = {"task_ids": torch.full((4,), index)} if tasks(model) else {}
        export = to_lora(model, **choice)
        full = export if export.error == 0 else to_lora(model, rank=1000, **choice)
        with TemporaryDirectory() as folder:
            full.write(folder)
            stock = PeftModel.from_pretrained(tiny.llama(), folder).eval()
        assert not layers(stock)
        for layer in full.layers:
            assert layer.error < 1e-5, f"{layer.name}: full rank leaves {layer.error} out"
        if case.method.exact_export:
            assert export.error == 0, "an exact export reports an error"
        elif isinstance(delta, DenseDelta):
            assert 0 < export.error < 1, "an export that is not exact reports no error"
        if not router:
            with torch.no_grad():
                exported = stock(input_ids=tiny.tokens()).logits
            error = relative(exported, logits(model, **task_inputs))
            assert error < 1e-4, f"the export differs {choice}"
