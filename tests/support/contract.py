"""The contract: what every method of plait keeps, as checks that take a method and its options.

Run them over a method of your own, registered through plait.register anywhere:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(Case("my_method", {"r": 2}))

and `fresh_process([case], folder)` for loading in a new process. A check raises AssertionError.
What a method may opt out of is a field of its Case or a class fact (`mergeable`, `exact_export`).
"""

import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import plait
from plait import DenseDelta, EventNeverFired, LowRankDelta, NotMergeable, PlaitWarning
from plait.core.bridge import PlaitLayer, keep_trainable_on_cpu
from plait.core.delta import planned
from plait.core.events import MANY_FORWARDS
from plait.core.mix import TaskTable, TokenRouter
from plait.upstream.export import to_lora
from tests.support import tiny

TARGETS = ["q_proj", "v_proj", "up_proj"]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """A method with options.

    key: in the registry. options: of its config. lr: of AdamW, for the tiny model.
    experts: parameters whose slices must differ after training. alike: those whose slices stay
    equal, by the method's mathematics. additive: options under which gradients of micro-batches
    add up. start_error: of a fresh adapter's output, relative; 0: bit-equal to the base. module:
    file that registers the method, for a new process.
    """

    key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    experts: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    additive: Mapping[str, Any] = field(default_factory=dict)
    start_error: float = 0.0
    module: Path | None = None

    @property
    def method(self) -> plait.Method:
        """The registry's row."""
        return plait.find(self.key)

    def config(self, **changes: Any) -> Any:
        """A config for the tiny Llama, with a schedule of 10 steps."""
        defaults = {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            "total_steps": 10,
        }
        return self.method.config(**{**defaults, **self.options, **changes})

    def __str__(self) -> str:
        return "-".join([self.key, *(str(v) for v in self.options.values() if isinstance(v, str))])


# Helpers ----------------------------------------------------------------------------------------


def wrap(case: Case, base: nn.Module | None = None, **changes: Any) -> Any:
    """A base model with a fresh adapter of the case, in evaluation mode."""
    return get_peft_model(base or tiny.llama(), case.config(**changes)).eval()  # type: ignore[arg-type]


def one_layer(
    case: Case, n_in: int, n_out: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Any, PlaitLayer]:
    """A model of one linear layer with the case's adapter, and its layer."""
    options = {"target_modules": ["linear"], "task_type": None, "init_weights": False, **changes}
    model = wrap(case, tiny.OneLinear(n_in, n_out, dtype), **options)
    return model, layers(model)[0]


def layers(model: nn.Module) -> list[PlaitLayer]:
    """The adapted layers."""
    return [m for m in model.modules() if isinstance(m, PlaitLayer)]


def deltas(model: nn.Module, adapter: str = "default") -> list[Any]:
    """The Deltas of an adapter."""
    return [layer.plait_delta[adapter] for layer in layers(model)]


def tasks(model: nn.Module) -> list[str] | None:
    """Names of the tasks, where the first Delta has a task table."""
    first = next(iter(layers(model)[0].plait_delta.values()))
    mix = first.mix() if isinstance(first, LowRankDelta) else None
    return list(mix.tasks) if isinstance(mix, TaskTable) else None


def batch(model: nn.Module, rows: int = 4, length: int = 8, key: int = 0) -> dict[str, Any]:
    """Inputs of the tiny Llama, with task ids where the method wants them."""
    ids = tiny.tokens(rows, length, key)
    return {"input_ids": ids, "labels": ids, **task_ids(model, rows)}


def task_ids(model: nn.Module, rows: int) -> dict[str, Tensor]:
    """`task_ids` 0, 1, .., 0, 1, .. where the method wants them."""
    names = tasks(model)
    return {} if names is None else {"task_ids": torch.arange(rows) % len(names)}


@torch.no_grad()
def logits(model: Any, **changes: Any) -> Tensor:
    """Logits of the batch, as the model's mode has them; changes: of the inputs."""
    return model(**{**batch(model), **changes}).logits


@torch.no_grad()
def base_logits(base: Any) -> Tensor:
    """Logits of a model without adapters."""
    return base(input_ids=tiny.tokens()).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module, lr: float, **kwargs: Any) -> torch.optim.AdamW:
    """AdamW over what trains."""
    return torch.optim.AdamW(trained(model).values(), lr=lr, weight_decay=0.0, **kwargs)


def steps(
    model: Any, optimizer: torch.optim.Optimizer, count: int, key: int | None = 0
) -> list[float]:
    """Train some steps; key None: another batch in each step. Returns the losses."""
    model.train()
    losses = []
    for step in range(count):
        loss = model(**batch(model, key=step if key is None else key)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    if expected.numel() == 0:
        return 0.0
    difference = (found.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-30))


def naive(delta: Any, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """The update of x (.., in), one term at a time, in the dtype of x."""
    if isinstance(delta, DenseDelta):
        rows = delta.weight_rows(0, delta.base.out_features)
        return x @ (delta.scaling * rows).T.to(x.dtype)
    A, B = (p.to(x.dtype) for p in delta.factors())
    gate, mix = delta.gate(), delta.mix()
    if gate is not None:
        A = gate[:, None].to(x.dtype) * A
    if mix is None:
        return x @ (delta.scaling * B @ A).T
    if isinstance(mix, Tensor):
        return x @ (delta.scaling * B @ mix.to(x.dtype) @ A).T
    n = len(mix.tasks) if isinstance(mix, TaskTable) else len(mix.G)
    parts = [A] * n if A.shape[0] * n == B.shape[1] else A.unflatten(0, (n, -1))
    ups = [B] * n if B.shape[1] == len(parts[0]) else B.unflatten(1, (n, -1)).unbind(1)
    terms = [x @ (delta.scaling * up @ part).T for part, up in zip(parts, ups, strict=True)]
    if isinstance(mix, TaskTable):
        assert ids is not None
        return torch.stack([terms[int(k)][row] for row, k in enumerate(ids)])
    weights = torch.softmax(x @ mix.G.to(x.dtype).T, -1)
    if mix.top_k is not None:
        least = weights.sort(-1, descending=True).values[..., mix.top_k - 1 : mix.top_k]
        weights = weights.where(weights >= least, torch.zeros((), dtype=x.dtype))
        weights = weights / weights.sum(-1, keepdim=True)
    return sum((weights[..., i : i + 1] * term for i, term in enumerate(terms)), torch.zeros(()))


def choices(model: nn.Module) -> list[Any]:
    """What merge and export need to be told, once for each weight that the adapter holds."""
    names = tasks(model)
    return [{}] if names is None else [{"task": name} for name in names]


def depends_on_input(delta: Any) -> bool:
    """Whether no weight holds the update."""
    return isinstance(delta, LowRankDelta) and isinstance(delta.mix(), TokenRouter | TaskTable)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Assert that no global generator moved inside."""
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    yield
    assert torch.equal(torch.get_rng_state(), before[0]), "torch's global generator moved"
    assert random.getstate() == before[1], "Python's global generator moved"
    assert repr(np.random.get_state()) == before[2], "numpy's global generator moved"


# The start -------------------------------------------------------------------------------------


def start_is_the_base(case: Case) -> None:
    """C1: a fresh adapter gives the base model's output, bit for bit or to the stated rounding."""
    expected = base_logits(tiny.llama())
    model = wrap(case)
    error = relative(logits(model), expected)
    assert error <= case.start_error, f"a fresh adapter changes the output by {error}"
    for layer in layers(model):
        if not depends_on_input(layer.plait_delta["default"]):
            error = float(layer.get_delta_weight("default").abs().max() / layer.base_weight().max())
            assert error <= case.start_error, f"dW of a fresh adapter is not zero: {error}"


def random_start_differs(case: Case) -> None:
    """init_weights=False: another function than the base, another for each adapter name."""
    base = base_logits(tiny.llama())
    model = wrap(case, init_weights=False)
    assert relative(logits(model), base) > 1e-4, "init_weights=False starts at the base model"
    again = wrap(case, init_weights=False)
    assert torch.equal(logits(model), logits(again)), "a random start cannot be repeated"
    model.add_adapter("other", case.config(init_weights=False))
    first = logits(model)
    model.set_adapter("other")
    assert relative(logits(model), first) > 1e-4, "two adapters start alike"


def starts_are_reproducible(case: Case) -> None:
    """Equal seeds give equal factors; layers and other seeds differ."""
    one, two, other = wrap(case), wrap(case), wrap(case, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), f"{name} is drawn anew"
    drawn = [n for n, p in trained(one).items() if p.any()]
    differs = any(not torch.equal(trained(one)[n], trained(other)[n]) for n in drawn)
    for a, b in zip(deltas(one), deltas(other), strict=True):  # what is drawn may not be trained
        if isinstance(a, LowRankDelta):
            pairs = zip(a.factors(), b.factors(), strict=True)
            differs |= any(not torch.equal(p, q) for p, q in pairs)
    assert differs, "the seed changes nothing"


# Training --------------------------------------------------------------------------------------


def only_the_delta_trains(case: Case) -> None:
    """C2: parameters outside the Delta keep their bytes and need no gradient."""
    base = tiny.llama()
    frozen = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = wrap(case, base)
    prefix = f"plait_{case.key}_delta"
    outside = [n for n in trained(model) if prefix not in n]
    assert not outside, f"these train as well: {outside}"
    inside = {id(p) for delta in deltas(model) for p in delta.parameters()}
    assert {id(p) for p in trained(model).values()} == inside, "a Delta's parameter does not train"
    steps(model, adamw(model, case.lr), 3)
    model.get_base_model()
    now = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    for name, value in frozen.items():
        assert torch.equal(value, now[name]), f"training changed {name}"


def gradients_reach_everything(case: Case) -> None:
    """C3: within three steps every trained tensor has a non-zero gradient from the loss."""
    model = wrap(case)
    optimizer = adamw(model, case.lr)
    reached: set[str] = set()
    model.train()
    for step in range(3):
        model(**batch(model, key=step)).loss.backward()
        reached |= {n for n, p in trained(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    dead = sorted(set(trained(model)) - reached)
    assert not dead, f"no gradient in three steps: {dead}"


def loss_falls(case: Case) -> None:
    """C4: 30 steps on one batch lower its loss by 0.1 nats, and evaluation mode keeps the gain."""
    model = wrap(case, total_steps=30)
    losses = steps(model, adamw(model, case.lr), 30)
    assert losses[-1] < losses[0] - 0.1, f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in 30 steps"
    with torch.no_grad():
        final = float(model(**batch(model)).loss)
    assert final < losses[0] - 0.1, f"evaluation mode gives loss {final:.3f} after training"


def optimizers_agree(case: Case) -> None:
    """C19: fused, foreach and loop AdamW train alike; nothing stale is used after a step."""
    ends = []
    for kind in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        model = wrap(case)
        logits(model)  # fills what a method may keep between forwards
        # A larger eps: Adam makes steps of full size out of rounding where gradients are near 0.
        steps(model, adamw(model, 1e-3, eps=1e-6, **kind), 5, key=None)
        fresh = wrap(case)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(fresh)), f"{kind}: stale values after a step"
        model.train()
        fresh.train()
        assert torch.equal(logits(model), logits(fresh)), f"{kind}: stale values in training"
        ends.append(model.eval())
    for other in ends[1:]:
        for name, value in trained(ends[0]).items():
            assert relative(trained(other)[name], value) < 1e-5, f"{name} depends on the optimizer"


def micro_batches_add_up(case: Case) -> None:
    """C15: 4 micro-batches of 2 give the update of one batch of 8, penalty included."""
    found = []
    for parts in (1, 4):
        model = wrap(case, init_weights=False, **case.additive)
        inputs = batch(model, rows=8)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
        model.train()
        for part in range(parts):
            rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
            loss = model(**{name: value[rows] for name, value in inputs.items()}).loss
            (loss / parts).backward()
        optimizer.step()
        found.append({n: p.grad for n, p in trained(model).items()})
    for name, grad in found[0].items():
        assert relative(found[1][name], grad) < 1e-5, f"{name}: accumulation is not one batch"


def resume_is_exact(case: Case) -> None:
    """C16: 5 steps, save, load, 5 steps give the bits of 10 steps, inside a schedule too."""
    whole = wrap(case)
    steps(whole, adamw(whole, case.lr), 10, key=None)
    half = wrap(case)
    optimizer = adamw(half, case.lr)
    steps(half, optimizer, 5, key=None)
    with TemporaryDirectory() as folder:
        half.save_pretrained(folder)
        resumed = PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    second = adamw(resumed, case.lr)
    second.load_state_dict(optimizer.state_dict())
    resumed.train()
    for step in range(5, 10):
        resumed(**batch(resumed, key=step)).loss.backward()
        second.step()
        second.zero_grad()
    resumed.eval()
    end = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, end[name]), f"{name} differs after a resume"
    assert torch.equal(logits(whole), logits(resumed))


def events_fire(case: Case) -> None:
    """C17: each optimizer step is counted once; training without events is refused."""
    model = wrap(case)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    steps(model, optimizer, 3)
    declared = [d for d in deltas(model) if d.t is not None or d.needs_events]
    for delta in declared:
        assert delta.stepped, "no event came in three steps"
        assert delta.t is None or int(delta.t) == 3, f"t = {int(delta.t)} after three steps"
    if not declared:
        return

    model = wrap(case)
    model.train()
    one = {k: v[:1, :4] if v.ndim > 1 else v[:1] for k, v in batch(model).items()}
    for n in range(MANY_FORWARDS + 1):
        model(**one).loss.backward()
        if n == 0:
            with pytest.warns(PlaitWarning, match=f"{case.key}: 1 training forwards, 0 optimizer"):
                model.state_dict()
    with pytest.raises(EventNeverFired, match=f"{case.key}: .*call plait.after_step"):
        model.state_dict()
    plait.after_step(model)
    model.state_dict()


def experts_part(case: Case) -> None:
    """C20: slices of what is called an expert differ after training, or stay equal as declared."""
    model = wrap(case)
    steps(model, adamw(model, case.lr), 9, key=None)
    for delta in deltas(model):
        for name in case.experts:
            slices = delta.get_parameter(name)
            for i in range(len(slices)):
                for j in range(i):
                    assert relative(slices[i], slices[j]) > 1e-6, f"{name}[{i}] equals {name}[{j}]"
        for name in case.alike:
            slices = delta.get_parameter(name)
            assert all(torch.equal(s, slices[0]) for s in slices), f"{name} parted"


def storages_are_distinct(case: Case) -> None:
    """C22: no two parameters, and no two slices of one, share memory."""
    model = wrap(case)
    seen: dict[int, str] = {}
    for name, p in trained(model).items():
        assert p.untyped_storage().nbytes() >= p.numel() * p.element_size(), f"{name} is expanded"
        assert p.is_contiguous(), f"{name} is not contiguous"
        for i, part in enumerate(p if p.ndim > 2 else [p]):
            place = f"{name}[{i}]"
            assert part.data_ptr() not in seen, (
                f"{place} shares memory with {seen[part.data_ptr()]}"
            )
            seen[part.data_ptr()] = place


def random_state_is_kept(case: Case) -> None:
    """C18: construction, evaluation, events, save and load leave the global generators alone."""
    base, again = tiny.llama(), tiny.llama()
    with TemporaryDirectory() as folder:
        with random_state_kept():
            model = wrap(case, base)
        with random_state_kept():
            logits(model)
        optimizer = adamw(model, case.lr)
        model.train()
        for step in range(3):
            model(**batch(model, key=step)).loss.backward()
            with random_state_kept():
                optimizer.step()
        with random_state_kept():
            model.save_pretrained(folder)
            PeftModel.from_pretrained(again, folder)


# What dW is ------------------------------------------------------------------------------------


def forward_is_weight(case: Case, n_in: int = 7, n_out: int = 5) -> None:
    """C5: the forward applies weight(), in fp64; a router equals the loop over its terms."""
    model, layer = one_layer(case, n_in, n_out)
    delta: Any = layer.plait_delta["default"]
    x = tiny.numbers(6, n_in)
    base = layer.base_layer(x)
    with torch.no_grad():
        found = model(x, **task_ids(model, 6)) - base
        if not depends_on_input(delta):
            assert relative(found, x @ delta.weight().T) < 1e-12, "forward is not weight()"
            assert torch.equal(layer.get_delta_weight("default"), delta.weight())
        for index, choice in enumerate(choices(model) if tasks(model) else []):
            ids = torch.full((6,), index)
            one = model(x, task_ids=ids) - base
            assert relative(one, x @ delta.weight(**choice).T) < 1e-12, f"{choice}: not weight()"
        ids = task_ids(model, 6).get("task_ids")
        assert relative(found, naive(delta, x, ids)) < 1e-12, "forward is not the loop over terms"


def fast_is_naive(
    case: Case, n_in: int = 7, n_out: int = 5, rows: int = 3, tiles: Sequence[int] = (1, 2, 7, 20)
) -> None:
    """C6: outputs and all gradients of the fast form equal autograd through the naive one, fp64."""
    model, layer = one_layer(case, n_in, n_out)
    delta: Any = layer.plait_delta["default"]
    model.train()
    x0, dy = tiny.numbers(rows, 2, n_in), tiny.numbers(rows, 2, n_out, key=1)
    ids = task_ids(model, rows)

    def run(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = x0.clone().requires_grad_()
        y = forward(x)
        grads = torch.autograd.grad(y, [x, *delta.parameters()], dy, allow_unused=True)
        return [y, *(torch.zeros(()) if g is None else g for g in grads)]

    names = ["output", "x", *(n for n, _ in delta.named_parameters())]
    expected = run(lambda x: layer.base_layer(x) + naive(delta, x, ids.get("task_ids")))
    forms = {"as it is": lambda x: model(x, **ids)}
    if isinstance(delta, DenseDelta):
        forms["split"] = lambda x: layer.base_layer(x) + delta(x)
    for height in tiles if isinstance(delta, DenseDelta) else (None,):
        delta.tile = height
        for form, forward in forms.items():
            for name, found, wanted in zip(names, run(forward), expected, strict=True):
                assert relative(found, wanted) < 1e-12, f"{form}, tile {height}: {name} differs"


def shapes_are_free(case: Case) -> None:
    """C13: inputs of 2, 3 and 4 axes, one token, no row at all."""
    model, _ = one_layer(case, 7, 5)
    model.train()
    x = tiny.numbers(4, 3, 2, 7)
    with torch.no_grad():
        whole = model(x, **task_ids(model, 4))
        for row in range(4):
            ids = {k: v[row : row + 1] for k, v in task_ids(model, 4).items()}
            for i in range(3):
                for j in range(2):
                    one = model(x[row : row + 1, i, j], **ids)
                    assert relative(one[0], whole[row, i, j]) < 1e-12, "4 axes differ from 2"
            three = model(x[row : row + 1, 0], **ids)
            assert relative(three[0], whole[row, 0]) < 1e-12, "3 axes differ from 4"
    for empty in (tiny.numbers(0, 3, 7), tiny.numbers(2, 0, 7)):
        y = model(empty.requires_grad_(), **task_ids(model, len(empty)))
        assert y.shape == (*empty.shape[:-1], 5), "a batch without tokens has another shape"
        y.sum().backward()
        assert empty.grad is not None
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained(model).values())


def rows_are_independent(case: Case) -> None:
    """C12: a row alone equals the row in a batch; a position does not see later tokens."""
    model, _ = one_layer(case, 7, 5)
    x = tiny.numbers(4, 3, 7)
    ids = task_ids(model, 4)
    with torch.no_grad():
        whole = model(x, **ids)
        for row in range(4):
            alone = model(x[row : row + 1], **{k: v[row : row + 1] for k, v in ids.items()})
            assert relative(alone[0], whole[row]) < 1e-12, "a row depends on its batch"
        changed = x.clone()
        changed[:, 2] += 1
        assert relative(model(changed, **ids)[:, :2], whole[:, :2]) < 1e-12, "later tokens are seen"
    llama = wrap(case, init_weights=False)
    inputs = batch(llama)
    with torch.no_grad():
        whole = llama(**inputs).logits
        one = llama(**{k: v[1:2] for k, v in inputs.items()}).logits
        assert relative(one[0], whole[1]) < 1e-5, "a row of the model depends on its batch"
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][:, -1] = 3
        assert relative(llama(**inputs).logits[:, :-1], whole[:, :-1]) < 1e-5, "not causal"


def counts_are_the_formula(case: Case) -> None:
    """C11: trainable parameters follow the method's formula; rank(dW) is within rank()."""
    model = wrap(case)
    delta_cls = case.method.delta
    expected = planned(
        (delta_cls, layer.plait_delta["default"].config, layer.in_features, layer.out_features)
        for layer in layers(model)
    )
    found = sum(p.numel() for p in trained(model).values())
    assert found == expected, f"{found} parameters train, the formula says {expected}"
    narrow, layer = one_layer(case, 20, 17, r=2)
    delta: Any = layer.plait_delta["default"]
    for choice in choices(narrow):
        if not isinstance(delta, LowRankDelta) or not isinstance(delta.mix(), TokenRouter):
            rank = int(torch.linalg.matrix_rank(delta.weight(**choice)))
            assert rank <= delta.rank(), f"rank {rank} of dW is above the stated {delta.rank()}"


# Merge, save, several adapters, export ---------------------------------------------------------


def merge_is_exact(case: Case) -> None:
    """C7: merged equals unmerged, unmerge restores every bit; what depends on the input refuses."""
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
        own: dict[str, Any] = {"task_ids": torch.full((4,), index)} if router else {}
        expected = logits(model, **own)
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe, **choice)
            merged = logits(model)
            assert relative(merged, expected) < 1e-5, f"merged differs {choice}"
            assert not torch.equal(layers(model)[0].get_base_weight(), weights[0]), "nothing merged"
            model.unmerge_adapter()
            for layer, weight in zip(layers(model), weights, strict=True):
                assert torch.equal(layer.get_base_weight(), weight), "unmerge is not exact"
            assert torch.equal(logits(model, **own), expected), "unmerge changed the model"
        plain = copy.deepcopy(model).merge_and_unload(safe_merge=True, **choice)
        assert not layers(plain), "a layer of plait is left after merge_and_unload"
        assert relative(base_logits(plain), expected) < 1e-5


def save_and_load(case: Case) -> None:
    """C8: a saved adapter is loaded bit for bit, without a decomposition of the base weight."""
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
    """C9: switch, disable, delete: no adapter changes another one or the base."""
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
    names = ["default", "__base__", "other", "default"]
    for training in (False, True):
        model.train(training)
        mixed = logits(model, adapter_names=names)
        for name in ("default", "other"):
            model.set_adapter(name)
            own = [i for i, n in enumerate(names) if n == name]
            assert relative(mixed[own], logits(model)[own]) < 1e-5, f"rows of {name} differ"
        with model.disable_adapter():
            assert relative(mixed[1], logits(model)[1]) < 1e-5, "rows of __base__ differ"
        model.set_adapter("default")
    unknown = "non-existing adapter.*nobody"
    with pytest.raises(ValueError, match=unknown):
        logits(model, adapter_names=["nobody"] * 4)


def export_is_as_declared(case: Case) -> None:
    """C10: stock LoRA layers give the same output where export is exact; else an error is given."""
    model = wrap(case, init_weights=False)
    delta = deltas(model)[0]
    router = isinstance(delta, LowRankDelta) and isinstance(delta.mix(), TokenRouter)
    if depends_on_input(delta):
        assert not case.method.exact_export, "the class fact `exact_export` is wrong"
        with pytest.raises(NotMergeable, match="cannot be merged"):
            to_lora(model)
    told: list[Any] = [{"approx": "mean"}] if router else choices(model)
    for index, choice in enumerate(told):
        own: dict[str, Any] = {"task_ids": torch.full((4,), index)} if tasks(model) else {}
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
                found = stock(input_ids=tiny.tokens()).logits
            assert relative(found, logits(model, **own)) < 1e-4, f"the export differs {choice}"


# Precision, checkpointing, quantised bases -----------------------------------------------------


def half_precision_is_bounded(case: Case) -> None:
    """C14: on a bf16 base the error is at most 1.5 times that of plain bf16, plus 1e-3."""
    _, exact = one_layer(case, 40, 56)
    model, half = one_layer(case, 40, 56, torch.bfloat16)
    exact.base_layer.load_state_dict(half.base_layer.state_dict())
    delta: Any = half.plait_delta["default"]
    assert {p.dtype for p in delta.parameters()} == {torch.float32}, "factors are not fp32"
    exact.plait_delta.load_state_dict(half.plait_delta.state_dict())
    x0, dy = tiny.numbers(16, 40).bfloat16(), tiny.numbers(16, 56, key=1).bfloat16()
    ids = task_ids(model, 16)
    if ids:
        ids = {"task_ids": torch.zeros(16, dtype=torch.long)}

    def run(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = x0.to(dtype).requires_grad_()
        y = forward(x)
        return y, torch.autograd.grad(y, x, dy.to(dtype))[0]

    def through(layer: PlaitLayer) -> Callable[[Tensor], Tensor]:
        deltas = layer.plait_delta["default"]
        return lambda x: layer.base_layer(x) + naive(deltas, x, ids.get("task_ids"))

    truth = run(through(exact), torch.float64)
    plain = run(through(half), torch.bfloat16)
    found = run(lambda x: model(x, **ids), torch.bfloat16)
    for name, y, ours, reference in zip(("output", "dx"), truth, found, plain, strict=True):
        assert ours.dtype == torch.bfloat16, f"{name} is {ours.dtype}"
        bound = 1.5 * float((reference.double() - y).detach().norm() / y.detach().norm()) + 1e-3
        error = float((ours.double() - y).detach().norm() / y.detach().norm())
        assert error <= bound, f"{name}: relative error {error:.4f} in bf16, bound {bound:.4f}"


def half_precision_trains(case: Case) -> None:
    """C14: a bf16 base and autocast: fp32 factors, finite numbers, nearly the fp32 loss."""
    model = wrap(case)
    expected = steps(model, adamw(model, 1e-3), 3)
    half = wrap(case, tiny.llama().bfloat16())
    losses = steps(half, adamw(half, 1e-3), 3)
    assert logits(half).dtype == torch.bfloat16
    cast = wrap(case)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = steps(cast, adamw(cast, 1e-3), 3)
    for p in (*trained(half).values(), *trained(cast).values()):
        assert p.dtype == torch.float32, f"a factor became {p.dtype}"
        assert p.isfinite().all(), "training in bf16 gave numbers that are not finite"
    for found in (losses, autocast):
        assert found == pytest.approx(expected, rel=2e-2), "bf16 losses are far from those of fp32"


def checkpointing_changes_nothing(case: Case) -> None:
    """C14: gradients under gradient checkpointing have the bits of those without, dropout too."""
    grads = []
    for checkpointing in (False, True):
        model = wrap(case, init_weights=False, lora_dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model.train()
        with tiny.seed(5):
            model(**batch(model)).loss.backward()
        grads.append({n: p.grad for n, p in trained(model).items()})
    for name, grad in grads[0].items():
        same = grad is grads[1][name] is None or torch.equal(grad, grads[1][name])
        assert same, f"{name}: another gradient under gradient checkpointing"


def quantised_bases_work(case: Case) -> None:
    """8-bit and 4-bit bases: exact start, training, dW; merge refused with the remedy."""
    for bits in (8, 4):
        base = quantised(bits)
        expected = base_logits(base)
        model = wrap(case, base)
        assert all(layer.quantization_backend is not None for layer in layers(model))
        error = relative(logits(model), expected)
        assert error <= case.start_error, f"{bits} bit: a fresh adapter changes it by {error}"
        before = [p.detach().clone() for p in trained(model).values()]
        steps(model, adamw(model, case.lr), 3)
        for p in trained(model).values():
            assert p.dtype == torch.float32
            assert p.isfinite().all(), f"{bits} bit: not finite"
        assert any(
            not torch.equal(o, p) for o, p in zip(before, trained(model).values(), strict=True)
        )
        assert not torch.equal(logits(model), expected), f"{bits} bit: training changes nothing"
        with model.disable_adapter():
            assert torch.equal(logits(model), expected), f"{bits} bit: the base changed"
        layer = layers(model)[0]
        for choice in choices(model):
            if not isinstance(deltas(model)[0], LowRankDelta) or not isinstance(
                deltas(model)[0].mix(), TokenRouter
            ):
                dW = layer.get_delta_weight("default", **choice)
                assert dW.shape == (layer.out_features, layer.in_features)
                with pytest.raises(NotMergeable, match="merging needs a dequantised base"):
                    model.merge_adapter(**choice)


_quantised: dict[int, Any] = {}


def quantised(bits: int) -> Any:
    """The tiny Llama quantised by bitsandbytes to 8 or 4 bits."""
    if bits not in _quantised:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
            _quantised[bits] = LlamaForCausalLM.from_pretrained(
                folder,
                quantization_config=BitsAndBytesConfig(
                    load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
                ),
            ).eval()
            keep_trainable_on_cpu(_quantised[bits])  # else its first evaluation takes other kernels
    return copy.deepcopy(_quantised[bits])


# Configs ---------------------------------------------------------------------------------------


def config_is_strict(case: Case) -> None:
    """C21: a round trip keeps every option; wrong keys, types, ranks, targets are named."""
    config = case.config(seed=3, rank_pattern={"q_proj": 6}, layers_to_transform=[0])
    cls = case.method.config
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for read in (cls, PeftConfig):
            again = read.from_pretrained(folder)
            for option in fields(config):
                kept = getattr(again, option.name) == getattr(config, option.name)
                assert kept, f"{option.name} was lost on the way to the file"
        path = Path(folder, "adapter_config.json")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for change, text in (
            ({"lora_alhpa": 3}, r"lora_alhpa is not known to plait .* Did you mean lora_alpha\?"),
            ({"plait_version": "999.0"}, r"was written by plait 999.0; .* is installed"),
            ({"peft_type": "LORA"}, rf"is of type LORA, not PLAIT_{case.key.upper()}"),
        ):
            path.write_text(json.dumps({**saved, **change}), encoding="utf-8")
            with pytest.raises(ValueError, match=text):
                cls.from_pretrained(folder)
    for change, text in (
        ({"r": 0}, "r = 0 is out of range. Give 1 or more"),
        ({"r": -2}, "r = -2 is out of range"),
        ({"r": "8"}, "r = '8' is not a whole number"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is out of range. Give more than 0"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"bias": "some"}, "bias = 'some' is not known. Use one of 'none', 'all', 'plait_only'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] = 0 is out of range"),
    ):
        with pytest.raises(ValueError, match=text):
            case.config(**change)
    with pytest.raises(TypeError, match="rr"):
        case.config(rr=2)
    with pytest.raises(ValueError, match=r"no_such_layer.*q_proj"):
        wrap(case, target_modules=["no_such_layer"])


CHECKS = [
    start_is_the_base,
    random_start_differs,
    starts_are_reproducible,
    only_the_delta_trains,
    gradients_reach_everything,
    loss_falls,
    optimizers_agree,
    micro_batches_add_up,
    resume_is_exact,
    events_fire,
    experts_part,
    storages_are_distinct,
    random_state_is_kept,
    forward_is_weight,
    fast_is_naive,
    shapes_are_free,
    rows_are_independent,
    counts_are_the_formula,
    merge_is_exact,
    save_and_load,
    two_adapters_coexist,
    mixed_batch_is_separate_runs,
    export_is_as_declared,
    half_precision_is_bounded,
    half_precision_trains,
    checkpointing_changes_nothing,
    quantised_bases_work,
    config_is_strict,
]


# A new process ---------------------------------------------------------------------------------


def load(path: Path) -> Any:
    """Import a file that registers a method."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fresh_process(cases: Sequence[Case], folder: Path) -> dict[str, str]:
    """C8, C10: trained adapters in a new process; their exports through peft without plait.

    Args:
        cases: all go through one process, for importing the libraries takes most of the time.
        folder: an empty one to work in.

    Returns:
        What is wrong, by case; empty if nothing is.
    """
    tiny.llama().save_pretrained(folder / "base")
    save_file({"input_ids": tiny.tokens()}, folder / "inputs.safetensors")
    places = [folder / f"case{number}" for number in range(len(cases))]
    for place, case in zip(places, cases, strict=True):
        model = wrap(case)
        steps(model, adamw(model, case.lr), 3)
        model.save_pretrained(place / "adapter")
        saved = {"logits": logits(model), **task_ids(model, 4)}
        if case.method.exact_export or tasks(model):
            to_lora(model, **choices(model)[0]).write(place / "export")
            own = {k: torch.zeros_like(v) for k, v in task_ids(model, 4).items()}
            saved["exported"] = logits(model, **own)
        save_file({k: v.contiguous() for k, v in saved.items()}, place / "saved.safetensors")
    modules = [str(case.module) for case in cases if case.module is not None]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fresh.py", folder, *modules],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    types = json.loads(done.stdout.splitlines()[-1])
    problems = {}
    for place, case in zip(places, cases, strict=True):
        found, saved = (load_file(place / f"{n}.safetensors") for n in ("found", "saved"))
        if types[place.name] != f"PLAIT_{case.key.upper()}":
            problems[str(case)] = f"loaded as {types[place.name]}"
        elif not torch.equal(found["logits"], saved["logits"]):
            problems[str(case)] = "differs in a new process"
        elif "exported" in saved:
            error = float((found["exported"] - saved["exported"]).abs().max())
            if error >= 1e-4:
                problems[str(case)] = f"the export is off by {error} in stock peft"
    return problems
