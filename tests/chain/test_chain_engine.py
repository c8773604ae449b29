"""The engine on upstream LoRA: ties, restarts, trunks, merging, the three recipes."""

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import plait
from plait import ChainPlan, EventNeverFired, NotMergeable, PlaitWarning
from plait.chain import chain_of, start
from plait.core.init import kaiming, seeded
from plait.core.trunk import trunk_of
from plait.testing import tiny
from tests.support import chains as toys

PLANS: dict[str, Any] = {
    "chain": ChainPlan.chain(3),
    "rac-A": ChainPlan.rac(3),
    "rac-B": ChainPlan.rac(3, freeze="B"),
    "xgb": ChainPlan.xgb(3),
    "merge": ChainPlan.chain(3, storage="merge"),
}


def run(plan: Any, steps: int = 12, total: int = 12, **options: Any) -> Any:
    """A model after some steps of a plan."""
    model = toys.wrap(**options)
    optimizer = toys.adamw(model)
    start(model, plan, total)
    toys.train(model, optimizer, steps)
    return model


@pytest.mark.parametrize("name", PLANS)
def test_nothing_changes_at_a_tie(name: str) -> None:
    """Golden 1, 2: before the tie, after it and after the restart the model is the same."""
    model = run(PLANS[name], steps=3)
    before = toys.output(model)
    weight = toys.dense(model)
    chain = chain_of(model)
    assert chain is not None
    assert chain.ties == 0
    chain.tie(toys.adamw(model))
    assert chain.ties == 1
    torch.testing.assert_close(toys.output(model), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(toys.dense(model), weight, rtol=0, atol=1e-6)
    live = toys.layer(model)
    assert not (live.lora_B["default"].weight @ live.lora_A["default"].weight).any()
    assert chain.ledger.records  # it did move, or the test shows nothing
    assert weight.abs().max() > 1e-3 or name == "xgb"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rslora", [False, True])
def test_live_equals_stacked_equals_merged_equals_dense(
    name: str, rslora: bool, tmp_path: Any
) -> None:
    """Golden 3, 12: all links active == stacked adapter through stock peft == merged model."""
    model = run(PLANS[name], use_rslora=rslora, r=3).eval()
    live = toys.output(model)
    base = toys.Blocks()
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight += toys.dense(model, path).float()
    torch.testing.assert_close(toys.output(base), live, rtol=0, atol=2e-6)
    for compact in (False, True):
        folder = tmp_path / str(compact)
        plait.chain.save_stacked(model, folder, compact=compact)
        stock = PeftModel.from_pretrained(toys.Blocks(), str(folder))  # type: ignore[arg-type]
        config: Any = stock.peft_config["default"]
        assert not config.use_rslora
        assert bool(config.rank_pattern) == (name == "xgb" and compact)
        assert config.rank_pattern == config.alpha_pattern
        assert config.lora_alpha == config.r
        torch.testing.assert_close(toys.output(stock), live, rtol=0, atol=1e-6)
    merged = plait.chain.merge(copy.deepcopy(model))
    assert type(merged) is toys.Blocks
    torch.testing.assert_close(toys.output(merged), live, rtol=0, atol=1e-6)
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():  # nothing is left behind: the weights alone hold the links
        torch.testing.assert_close(
            merged.layers[0]["up"].weight, base.layers[0]["up"].weight, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["chain", "merge"])
def test_merging_and_unmerging_around_a_trunk(name: str) -> None:
    model = run(PLANS[name]).eval()
    live = toys.output(model)
    model.merge_adapter()
    torch.testing.assert_close(toys.output(model), live, rtol=0, atol=1e-6)
    both = copy.deepcopy(model).unload()  # merged before, then unloaded: the links are inside
    torch.testing.assert_close(toys.output(both), live, rtol=0, atol=1e-6)
    assert not both.layers[0]["up"]._forward_hooks
    model.unmerge_adapter()
    torch.testing.assert_close(toys.output(model), live, rtol=0, atol=1e-6)
    pristine = copy.deepcopy(model).unload()
    torch.testing.assert_close(toys.output(pristine), toys.output(toys.Blocks()), rtol=0, atol=1e-6)


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    model = run(PLANS["chain"]).eval()
    with torch.no_grad():
        toys.layer(model).lora_B["default"].weight[0] = torch.inf
    weight = toys.layer(model).base_layer.weight.clone()
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. A link of the chain"
    ):
        plait.chain.merge(model)
    assert torch.equal(toys.layer(model).base_layer.weight, weight)


@pytest.mark.parametrize("name", ["chain", "rac-B", "xgb"])
def test_a_disabled_adapter_is_the_base_bit_for_bit(name: str) -> None:
    model = run(PLANS[name]).eval()
    with model.disable_adapter():
        assert torch.equal(toys.output(model), toys.output(toys.Blocks()))
    assert not torch.equal(toys.output(model), toys.output(toys.Blocks()))
    for module in model.unload().modules():
        assert not module._forward_hooks


def test_merge_storage_keeps_the_start_and_puts_it_back() -> None:
    model = run(PLANS["merge"]).eval()
    assert not torch.equal(
        toys.layer(model).base_layer.weight, toys.Blocks().layers[0]["up"].weight
    )
    assert not toys.layer(model).base_layer._forward_hooks
    base = copy.deepcopy(model).unload()
    assert torch.equal(toys.output(base), toys.output(toys.Blocks()))
    plait.chain.remove(model)
    assert torch.equal(toys.layer(model).base_layer.weight, toys.Blocks().layers[0]["up"].weight)
    assert chain_of(model) is None


def test_the_trunk_belongs_to_its_adapter() -> None:
    model = run(PLANS["chain"]).eval()
    live = toys.output(model)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert torch.equal(toys.output(model), toys.output(toys.Blocks()))
    model.set_adapter("default")
    assert torch.equal(toys.output(model), live)


def test_mixed_batches_are_refused() -> None:
    """The finished links cannot be chosen by row, so silence would give them to every row."""
    from peft import LoraConfig

    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        plait.DualModuleLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ):
        model: Any = get_peft_model(tiny.llama(), config)
        chain = start(model, ChainPlan.chain(2), 8)
        chain.tie(toys.adamw(model))
        model.eval()
        with pytest.raises(ValueError, match="adapter_names: adapter 'default' is a chain"):
            model(tiny.tokens(2), adapter_names=["default", "__base__"])


def test_the_optimizer_forgets_or_not() -> None:
    """Golden 4: state of the link's parameters is empty after a tie, other state stays."""
    for reset in (True, False):
        model = toys.wrap(modules_to_save=None)
        extra = nn.Parameter(torch.ones(3))
        start(model, ChainPlan.chain(2, reset_optimizer=reset), 4)
        optimizer = torch.optim.AdamW(
            [*(p for p in model.parameters() if p.requires_grad), extra], lr=1e-2
        )
        for step in range(2):
            x, y = toys.data(model, step)
            ((model(x) - y).square().mean() + extra.sum()).backward()
            optimizer.step()
        links = [p for n, p in model.named_parameters() if "lora_" in n]
        assert all(p.grad is None for p in links)
        assert all((p in optimizer.state) != reset for p in links)
        assert optimizer.state[extra]["step"] == 2
        toys.train(model, optimizer, 1, first=2)
        steps = {float(optimizer.state[p]["step"]) for p in links}
        assert steps == ({1.0} if reset else {3.0})


@pytest.mark.parametrize("freeze", ["A", "B"])
def test_rac_freezes_one_side(freeze: Any) -> None:
    """Golden 5: the frozen side keeps its bits through a link, and is another one in the next."""
    model = toys.wrap()
    start(model, ChainPlan.rac(2, freeze=freeze), 10)
    optimizer = toys.adamw(model, weight_decay=0.1)
    sides = toys.layer(model).lora_A["default"].weight, toys.layer(model).lora_B["default"].weight
    frozen, moving = sides if freeze == "A" else sides[::-1]
    assert (frozen.requires_grad, moving.requires_grad) == (False, True)
    first, rows = frozen.detach().clone(), frozen.detach() if freeze == "A" else frozen.detach().T
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=0, atol=1e-6)
    toys.train(model, optimizer, 4)
    assert torch.equal(frozen, first)
    assert moving.any()
    toys.train(model, optimizer, 2, first=4)
    assert not torch.equal(frozen, first)
    assert not frozen.requires_grad


@pytest.mark.parametrize("storage", ["stack", "merge"])
def test_rank_of_the_sum(storage: Any) -> None:
    """Golden 7: rank(dW) = min(sum r_k, min(in, out)), with ranks that step down."""
    for links, ranks, expected in ((3, [3, 2, 1], 6), (5, None, 8)):
        plan = ChainPlan.chain(links, ranks=ranks, storage=storage)
        model = run(plan, steps=30, total=30, r=3)
        dW = toys.dense(model)
        assert int((torch.linalg.svdvals(dW) > 1e-6).sum()) == expected
        chain = chain_of(model)
        assert chain is not None
        kept = [len(r.A) for r in chain.ledger.records if r.module == "layers.0.up"]
        assert kept == (ranks or [3] * links)[:-1]


def test_a_stack_wider_than_the_layer_is_compressed_exactly() -> None:
    model = run(ChainPlan.chain(6), steps=12, r=3)
    export = plait.to_lora(model)
    assert {layer.rank for layer in export.layers} == {8}
    assert export.error == 0
    A, B = (export.tensors[f"base_model.model.layers.0.up.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(B.double() @ A.double(), toys.dense(model), rtol=0, atol=1e-6)
    small = plait.to_lora(model, rank=2)
    S = torch.linalg.svdvals(toys.dense(model))
    lost = float((S[2:].square().sum() / S.square().sum()).sqrt())
    assert small.layers[0].error == pytest.approx(lost, rel=1e-4)


def test_links_of_one_step_and_a_total_that_does_not_divide() -> None:
    """Golden 14."""
    model = run(ChainPlan.chain(7), steps=7, total=7)
    chain = chain_of(model)
    assert chain is not None
    chain.finish()
    assert [r.steps for r in chain.ledger.records if r.module == "layers.0.up"] == [1] * 6
    model = run(ChainPlan.chain(3), steps=11, total=11)
    chain = chain_of(model)
    assert chain is not None
    assert chain.lengths == [4, 4, 3]
    assert chain.boundaries == [4, 8]
    assert chain.ledger.step == 11


def test_one_link_is_plain_lora_bit_for_bit() -> None:
    """Golden 17: chain with K = 1 is LoRA; rac with K = 1 is AsymLoRA from the same sketch."""
    chained, plain = toys.wrap(), toys.wrap()
    start(chained, ChainPlan.chain(1), 6)
    toys.train(chained, toys.adamw(chained), 6)
    toys.train(plain, toys.adamw(plain), 6)
    assert_equal(chained, plain)

    chained, plain = toys.wrap(), toys.wrap()
    start(chained, ChainPlan.rac(1), 6)
    for theirs, ours in zip(plain.parameters(), chained.parameters(), strict=True):
        with torch.no_grad():
            theirs.copy_(ours)
        theirs.requires_grad_(ours.requires_grad)
    toys.train(chained, toys.adamw(chained), 6)
    toys.train(plain, toys.adamw(plain), 6)
    assert_equal(chained, plain)


def test_one_client_that_stacks_its_update_each_round_is_a_chain() -> None:
    """Golden 18: rounds of local training whose s B A is added to the global weight."""
    plan = ChainPlan.chain(3, seed=4)
    chained = toys.wrap(toys.Blocks(torch.float64))
    start(chained, plan, 12)
    toys.train(chained, toys.adamw(chained), 12)

    weights = toys.Blocks(torch.float64)
    for k in range(3):
        client = toys.wrap(copy.deepcopy(weights))
        if k:
            for name, layer in client.get_base_model().named_modules():
                if name.endswith(("up", "down")):
                    A = kaiming(seeded(4, k, name), 2, layer.in_features)
                    with torch.no_grad():
                        layer.lora_A["default"].weight.copy_(A)
        toys.train(client, toys.adamw(client), 4, first=4 * k)
        for name, layer in client.get_base_model().named_modules():
            if name.endswith(("up", "down")):
                B, A = (f["default"].weight for f in (layer.lora_B, layer.lora_A))
                with torch.no_grad():
                    weights.get_submodule(name).weight += layer.scaling["default"] * B @ A
    torch.testing.assert_close(toys.output(chained), toys.output(weights), rtol=0, atol=1e-12)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    """Same names, same bits."""
    for (m, p), (n, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert m == n
        assert torch.equal(p, q), m


def test_a_boundary_that_never_fires_raises() -> None:
    """Golden 13."""
    model = toys.wrap()
    chain = start(model, ChainPlan.chain(3), 9)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = torch.ones_like(p)
        with torch.no_grad():
            p -= 0.1 * p.grad  # an optimizer of one's own: torch has no event for it
    with pytest.raises(EventNeverFired) as caught:
        chain.finish()
    assert str(caught.value) == (
        "chain: training ended after 0 completed optimizer steps with 0 of 2 ties. Train 9 steps "
        "with a torch optimizer that holds the adapter, or call plait.after_step(model, optimizer)."
    )
    optimizer = toys.adamw(model)
    for _ in range(3):
        plait.after_step(model, optimizer)
    assert chain.ties == 1


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    model = toys.wrap()
    chain = start(model, ChainPlan.chain(2), 4)
    optimizer = toys.adamw(model, fused=True)
    toys.train(model, optimizer, 1)
    optimizer.found_inf = torch.ones(())  # as a gradient scaler marks it
    toys.train(model, optimizer, 3)
    del optimizer.found_inf
    assert chain.ledger.step == 1
    toys.train(model, optimizer, 1)
    assert chain.ties == 1


def test_another_optimizer_is_no_step() -> None:
    model = toys.wrap()
    chain = start(model, ChainPlan.chain(2), 4)
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    other.step()
    assert chain.ledger.step == 0
    half = torch.optim.SGD([toys.layer(model).lora_A["default"].weight], lr=0.1)
    with pytest.raises(ValueError, match="this optimizer holds only a part of the adapter"):
        toys.train(model, half, 1)


# RAC: the theory ---------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """f(W) = 1/2 sum h_ij (W_ij - T_ij)^2, 3 x 3, h = 10 in one entry and 1 elsewhere."""

    def __init__(self, key: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)
        self.target = tiny.numbers(3, 3, key=key)
        self.h = torch.ones(3, 3, dtype=torch.float64)
        self.h[0, 0] = 10

    def forward(self) -> Tensor:
        """f at the effective weight."""
        W = self.linear(torch.eye(3, dtype=torch.float64)).T
        return 0.5 * (self.h * (W - self.target).square()).sum()


def descend(plan: Any, key: int, steps: int, lr: float = 0.1, s: float = 1.0) -> list[float]:
    """SGD on the quadratic with gamma = lr: values of f at the start and after each step."""
    model = toys.wrap(Quadratic(key), r=1, lora_alpha=s, target_modules=["linear"])
    start(model, plan, steps)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr / s**2)
    values = []
    for _ in range(steps):
        f = model()
        f.backward()
        values.append(f.item())
        optimizer.step()
        optimizer.zero_grad()
    return [*values, model().item()]


@pytest.mark.parametrize("freeze", ["A", "B"])
def test_rac_descends_monotonically(freeze: Any) -> None:
    """Golden 6: SGD with gamma = 1 / L, orthonormal sketch, one step a link: 20 of 20 runs."""
    for key in range(20):
        plan = ChainPlan.rac(steps_per_link=1, freeze=freeze, seed=key, lr="global")
        values = descend(plan, key, 60)
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values)), key
        assert values[-1] < 0.25 * values[0]


def test_rac_is_the_step_of_the_theory() -> None:
    """W+ = W - gamma G H_A whatever s is: exact to rounding."""
    for s in (1.0, 2.5):
        plan = ChainPlan.rac(steps_per_link=1, seed=3, lr="global")
        values = descend(plan, 0, 12, s=s)
        problem = Quadratic(0)
        W = torch.zeros(3, 3, dtype=torch.float64)
        for k in range(12):
            G = problem.h * (W - problem.target)
            A = plan.draw(k, "linear", 1, 3)
            W = W - 0.1 * G @ A.T @ torch.linalg.inv(A @ A.T) @ A
        f = 0.5 * (problem.h * (W - problem.target).square()).sum()
        assert values[-1] == pytest.approx(float(f), rel=1e-12)


def test_a_raw_gaussian_sketch_diverges() -> None:
    """Golden 6, the control: the theory needs the projection that an orthonormal sketch gives."""
    for key in range(3):
        plan = ChainPlan.rac(steps_per_link=10, sketch="gaussian", seed=key, lr="global")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlaitWarning)
            values = descend(plan, key, 600)
        assert not max(values) < 1e6 * values[0]


# XGB ---------------------------------------------------------------------------------------------


def test_xgb_trains_a_subset_of_blocks_and_switches_the_others_off() -> None:
    model = toys.wrap(toys.Blocks(blocks=4), r=1, lora_alpha=1)
    plan = ChainPlan.xgb(steps_per_link=2, blocks_per_link=0.5)
    optimizer = toys.adamw(model, weight_decay=0.5)
    chain = start(model, plan, 8)
    for step in range(8):
        on = {link.block for link in chain.selected()}
        assert len(on) == 2
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        tied = chain.ties
        toys.train(model, optimizer, 1, first=step)
        if chain.ties == tied:
            for name, p in model.named_parameters():
                block = ".".join(name.removeprefix("base_model.model.").split(".")[:2])
                assert torch.equal(p, before[name]) == ("lora_" not in name or block not in on)
    chain.finish()
    ranks = {n: len(r.A) for n in [x.name for x in chain.links] for r in chain.ledger.records}
    assert set(ranks.values()) == {1}
    linked = [{r.module for r in chain.ledger.records if r.link == k} for k in range(3)]
    assert all(len(names) == 4 for names in linked)  # two blocks of two layers
    assert {x.block for x in chain.links} == {f"layers.{i}" for i in range(4)}


def test_an_xgb_adapter_wider_than_its_links_leaves_the_surplus_at_zero() -> None:
    model = run(ChainPlan.xgb(3, blocks_per_link=1.0), steps=3, r=4)
    live = toys.layer(model)
    assert live.lora_B["default"].weight[:, 0].any()
    assert not live.lora_B["default"].weight[:, 1:].any()
    assert not live.lora_A["default"].weight[1:].any()


# Bases -------------------------------------------------------------------------------------------


def bnb(bits: int, tmp_path: Any) -> Any:
    """A quantised tiny Llama."""
    tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
    )
    return LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_keeps_its_bytes(bits: int, tmp_path: Any) -> None:
    """Golden 10."""
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = toys.wrap(bnb(bits, tmp_path), **options)
    optimizer, ids = toys.adamw(model), tiny.tokens()
    model(ids)  # bitsandbytes reorders the bytes for the CPU in the first forward
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    chain = start(model, ChainPlan.chain(3), 6)
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    chain.finish()
    for name, p in model.named_parameters():
        assert "lora_" in name or torch.equal(p, base[name]), name
    model.eval()
    with torch.no_grad():
        live = model(ids).logits
        plait.chain.save_stacked(model, tmp_path / "lora")
        stock = PeftModel.from_pretrained(bnb(bits, tmp_path), str(tmp_path / "lora")).eval()
        torch.testing.assert_close(stock(ids).logits, live, rtol=0, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, bnb(bits, tmp_path).eval()(ids).logits)
    with pytest.raises(NotMergeable, match="merging a chain needs a dequantised base"):
        plait.chain.merge(model)
    fresh = toys.wrap(bnb(bits, tmp_path), **options)
    with pytest.raises(ValueError, match=r'storage = "merge" edits the base weight, and .* is Lin'):
        start(fresh, ChainPlan.chain(2, storage="merge"), 6)


def test_half_precision_base() -> None:
    """Golden 11: 200 small links; one rounding of their sum loses little, 200 roundings much."""
    gen = torch.Generator().manual_seed(0)
    W0 = (torch.randn(256, 256, generator=gen) / 16).bfloat16()
    base = tiny.OneLinear(256, 256, torch.bfloat16, bias=False)
    with torch.no_grad():
        base.linear.weight.copy_(W0)
    model = toys.wrap(base, r=1, lora_alpha=1, target_modules=["linear"])
    with pytest.warns(PlaitWarning, match='storage = "merge" rounds the sum'):
        chain = start(model, ChainPlan.chain(201, storage="merge"), 201)
    dW, step_by_step = torch.zeros(256, 256, dtype=torch.float64), W0.clone()
    layer = model.base_model.model.linear
    optimizer = toys.adamw(model)
    for _ in range(200):
        a, b = torch.randn(1, 256, generator=gen), torch.randn(256, 1, generator=gen)
        b *= 3e-3 * W0.float().norm() / (b @ a).norm()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        dW += b.double() @ a.double()
        step_by_step = (step_by_step.float() + b @ a).bfloat16()
        chain.tie(optimizer)

    def lost(weight: Tensor) -> float:
        return float((weight.double() - W0.double() - dW).norm() / dW.norm())

    assert lost(layer.base_layer.weight.detach()) < 0.05
    assert lost(step_by_step) > 0.30
    merged = plait.chain.merge(model)
    assert lost(merged.linear.weight.detach()) < 0.05


@pytest.mark.parametrize("storage", ["stack", "merge"])
def test_conv1d(storage: Any) -> None:
    """GPT-2 stores (in, out)."""
    model = toys.wrap(tiny.gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    chain = start(model, ChainPlan.chain(3, storage=storage), 6)
    optimizer, ids = toys.adamw(model, lr=0.05), tiny.tokens()
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    chain.finish()
    model.eval()
    with torch.no_grad():
        live = model(ids).logits
        assert (live - tiny.gpt2()(ids).logits).abs().max() > 1e-2
        export = plait.to_lora(model)
        assert export.config.fan_in_fan_out
        merged: Any = plait.chain.merge(model)
        torch.testing.assert_close(merged(ids).logits, live, rtol=0, atol=1e-5)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, "chain: dora rescales the rows of the whole weight"),
        ({"init_lora_weights": "pissa"}, "chain: pissa edits the base weight at its start"),
        (
            {"init_lora_weights": "olora"},
            "chain: init_lora_weights = 'olora' edits the base weight",
        ),
        ({"lora_bias": True, "target_modules": ["down"]}, "adapter 'default': its update of a Lin"),
    ],
)
def test_variants_of_lora_are_refused(options: dict[str, Any], text: str) -> None:
    model = toys.wrap(**options)
    with pytest.raises(ValueError) as caught:
        start(model, ChainPlan.chain(2), 6)
    assert str(caught.value).startswith(text)


def test_refusals_of_models() -> None:
    from peft import AdaLoraConfig, LoHaConfig

    for config, text in (
        (
            AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["up"]),
            "adalora's sche",
        ),
        (LoHaConfig(r=2, target_modules=["up"]), "an adapter of type LOHA has no links"),
        (plait.DualLoraConfig(r=4, target_modules=["up"]), "dual_lora's update has full rank"),
        (plait.SharedBLoraConfig(r=4, target_modules=["up"]), "shared_b's update depends on the"),
    ):
        with pytest.raises(ValueError, match=f"^chain: {text}"):
            start(get_peft_model(toys.Blocks(), config), ChainPlan.chain(2), 6)  # type: ignore
    with pytest.raises(ValueError, match="the model has no adapter 'default' of LoRA"):
        start(toys.Blocks(), ChainPlan.chain(2), 6)
    dual = get_peft_model(  # type: ignore[call-overload]
        toys.Blocks(), plait.DualModuleLoraConfig(r=4, target_modules=["up"])
    )
    with pytest.raises(ValueError, match=r"ranks = \(2, 1\) needs upstream's lora; dual_"):
        start(dual, ChainPlan.chain(2, ranks=[2, 1]), 6)
    with pytest.raises(ValueError, match="rac: dual_module has no single pair"):
        start(dual, ChainPlan.rac(2), 6)
    model = toys.wrap()
    start(model, ChainPlan.chain(2), 6)
    with pytest.raises(ValueError, match="the model carries a chain already"):
        start(model, ChainPlan.chain(2), 6)
    with pytest.raises(ValueError, match=r"carries no chain. Start or load one first"):
        plait.chain.merge(toys.wrap())
    frozen = toys.wrap()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is frozen. Load it with is_trainable=True"):
        start(frozen, ChainPlan.chain(2), 6)
    flat = toys.wrap()
    toys.layer(flat).lora_A["default"].weight = nn.Parameter(torch.zeros(20))
    with pytest.raises(ValueError, match=r"are \(20,\) and \(8, 2\), so they are sharded or flat"):
        start(flat, ChainPlan.chain(2), 6)


def test_a_tie_of_a_merged_adapter_is_refused() -> None:
    model = run(PLANS["chain"], steps=1)
    model.merge_adapter()
    chain = chain_of(model)
    assert chain is not None
    with pytest.raises(ValueError, match=r"is merged, so the link cannot be tied. Call unmerge"):
        chain.tie(toys.adamw(model))
    with pytest.raises(ValueError, match="reset_optimizer is true and no optimizer is known"):
        chain.tie()


def test_a_wide_trunk_is_warned_of() -> None:
    with pytest.warns(PlaitWarning, match="the finished links will have 298 ranks a layer"):
        start(toys.wrap(), ChainPlan.chain(150), 150)


def test_the_trunk_is_no_parameter_and_not_saved() -> None:
    model = run(PLANS["chain"])
    trunk = trunk_of(toys.layer(model))
    assert trunk is not None
    assert trunk.factors()[0].shape == (4, toys.SIZES[0])
    assert not any("trunk" in name for name in model.state_dict())
    assert not any("trunk" in name for name, _ in model.named_parameters())
    assert any("plait_trunk_A" in name for name, _ in model.named_buffers())
