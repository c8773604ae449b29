"""Federated methods on models: states in and out, one client against local training, exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model

import plait
from plait.federated import Client, adapter, algorithm, fedavg_for, refusal, weights_of
from plait.federated.methods import Algorithm
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import adamw, deltas, relative, wrap

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
OPTIONS: dict[str, dict[str, Any]] = {
    "alloc": {"rounds": 0},
    "dual_module": {"total_steps": 10},
    "fedalora_het": {"common_rank": 3, "lora_alpha": None},
    "shared_b": {"num_A": 2},
    "cola": {"strategy": "random"},
    "nola": {"num_basis_A": 8, "num_basis_B": 8},
    "hydra": {"num_B": 2},
    "molora": {"num_experts": 2},
}


def lora(**changes: Any) -> Any:
    """The tiny Llama with upstream's LoRA."""
    with tiny.seed():
        return get_peft_model(tiny.llama(), LoraConfig(**{**LORA, **changes}))


def het(r: int = 2, q: int = 3) -> Any:
    """The tiny Llama with fedalora_het."""
    return wrap(Case("fedalora_het", {"r": r, "common_rank": q, "lora_alpha": None}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of one batch."""
    return model(input_ids=tiny.tokens()).logits


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int, key: int = 0) -> None:
    """Train some steps on one batch."""
    model.train()
    ids = tiny.tokens(4, 8, key)
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def federate(
    models: list[Any], method: Algorithm, rounds: int, check: Any = None
) -> tuple[Any, list[Any]]:
    """Rounds of three steps on each client, each with its own batch; no engine, no files.

    Returns the server's state and each client's private part. check(model): before training.
    """
    clients = {f"c{i}": Client.of(f"c{i}", model) for i, model in enumerate(models)}
    method.check(clients)
    first = [adapter.read(model) for model in models]
    state = method.start(first[0], clients["c0"])
    kept: list[Any] = [None] * len(models)
    trunks: list[Any] = [None] * len(models)
    for number in range(1, rounds + 1):
        uploads = {}
        for i, (model, client) in enumerate(zip(models, clients.values(), strict=True)):
            down = method.payload_down(state, client, held=max(number - 2, 0))
            trunks[i] = method.apply(
                model, down, client, round=number, first=first[i], kept=kept[i], trunk=trunks[i]
            )
            if check is not None:
                check(model)
            steps(model, adamw(model, 1e-2), 3, key=i)
            local = adapter.read(model)
            kept[i], uploads[client.id] = (
                method.private(local, client),
                method.payload_up(local, client),
            )
        counts = {name: i + 1 for i, name in enumerate(clients)}
        state = method.aggregate(uploads, weights_of(counts), state, clients)
    return state, kept


# States -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [m.key for m in plait.list_methods()])
def test_a_state_of_any_delta_goes_out_and_in(key: str) -> None:
    case = Case(key, OPTIONS.get(key, {}))
    one, two = wrap(case), wrap(case)
    steps(one, adamw(one, 1e-2), 2)
    state = adapter.read(one)
    assert all(
        x.data_ptr() != p.data_ptr() for x, p in zip(state.values(), one.parameters(), strict=False)
    )
    adapter.write(two, state)
    assert torch.equal(logits(one), logits(two))
    again = adapter.read(two)
    assert again.keys() == state.keys()
    assert all(torch.equal(x, again[name]) for name, x in state.items())
    assert set(adapter.trained(one)) <= set(state)
    numbers = sum(p.numel() for p in one.parameters() if p.requires_grad)
    assert sum(torch.Size(s).numel() for s in adapter.trained(one).values()) == numbers


def test_a_lora_state_and_its_head() -> None:
    model = get_peft_model(
        tiny.bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    state = adapter.read(model)
    assert {k.rpartition("/")[2] for k in state} == {"A", "B", "weight", "bias"}
    client = Client.of("c0", model)
    assert client.head == ("classifier/weight", "classifier/bias")
    assert client.layers["bert.encoder.layer.0.attention.self.query"].pair == 2 * 48
    adapter.write(model, {k: x + 1 for k, x in state.items()})
    assert torch.equal(adapter.read(model)["classifier/bias"], state["classifier/bias"] + 1)
    adapter.freeze(model, ["A"])
    assert not any(key.endswith("/A") for key in adapter.trained(model))


def test_states_that_do_not_fit() -> None:
    model = lora()
    state = adapter.read(model)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=rf"{name}/A is missing in the state \(and 0 more differ"):
        adapter.write(model, {k: x for k, x in state.items() if k != f"{name}/A"})
    with pytest.raises(ValueError, match=r"other/A is unknown in the state"):
        adapter.write(model, state | {"other/A": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{name}/A is \(3, 24\), the model's is \(2, 24\)"):
        adapter.write(model, state | {f"{name}/A": torch.zeros(3, 24)})
    other = het()
    with pytest.raises(ValueError, match=r"q_proj: size mismatch for A: .* Give each client"):
        adapter.write(other, adapter.read(het(r=3)))
    with pytest.raises(ValueError, match=r"the model has no adapter 'x'\. Wrap it"):
        adapter.read(model, "x")


def test_fresh_starts_are_keyed() -> None:
    for model in (lora(), het()):
        one, same, other = (adapter.drawn(model, key) for key in ((0, 1), (0, 1), (0, 2)))
        assert set(one) == set(adapter.read(model))
        assert all(torch.equal(one[k], same[k]) for k in one)
        assert any(not torch.equal(one[k], other[k]) for k in one)
        for name, x in one.items():
            if name.endswith(("/B", "/B2", "/B_bar")):
                assert not x.any()
    with pytest.raises(ValueError, match=r"q_proj cannot be redrawn: .*A and B are shared by"):
        adapter.drawn(wrap(Case("tied")), (0,))


# What can be federated --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(), None),
        (LoraConfig(use_rslora=True), None),
        (LoraConfig(use_dora=True), "dora's magnitudes rescale the whole weight"),
        (LoraConfig(init_lora_weights="pissa"), "pissa edits the base weight at its start, so the"),
        (LoraConfig(init_lora_weights="olora"), "'olora' edits the base weight or takes a clien"),
        (AdaLoraConfig(total_step=10), "adalora moves ranks between layers"),
        (VeraConfig(), "vera is neither upstream's LoRA nor a method of plait"),
        (LoHaConfig(), "an adapter of type LOHA is neither upstream's LoRA nor a method of plait"),
        (plait.DualLoraConfig(), "dual_lora's update is linear in none of its factors"),
        (plait.AllocLoraConfig(), "alloc moves ranks between layers on each client's own scores"),
        (plait.SoraConfig(gates=["alloc"]), "sora moves ranks between layers"),
        (plait.ColaConfig(), None),
        (plait.SharedBLoraConfig(), None),
        (plait.DualModuleLoraConfig(), None),
        (plait.FedAloraHetConfig(), None),
    ],
)
def test_what_fedavg_takes(config: Any, reason: str | None) -> None:
    found = refusal(algorithm("fedavg"), config)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("fedavg: ")
        assert reason in found
    assert refusal(algorithm("local"), config) is None


def test_methods_name_the_adapter_they_need() -> None:
    assert refusal(algorithm("fedit"), plait.ColaConfig()) == (
        "fedit: it needs the adapter lora, not cola. Use fedavg, which averages any parameters."
    )
    assert refusal(algorithm("fedalora_het"), LoraConfig()) == (
        "fedalora_het: it needs the adapter fedalora_het, not lora."
    )
    assert refusal(algorithm("fedalora_het"), plait.FedAloraHetConfig()) is None
    assert refusal(algorithm("fedit"), LoraConfig()) is None
    with pytest.raises(ValueError, match="flora: it needs the adapter lora, not fedalora_het"):
        algorithm("flora").check_model(het())


def test_what_a_mask_screens_stays_private() -> None:
    model = wrap(Case("dual_module", OPTIONS["dual_module"]))
    method = fedavg_for(model)
    client = Client.of("c0", model)
    assert {k.rpartition("/")[2] for k in method.share(client)} == {"A_s", "B_s"}
    private = method.private(adapter.read(model), client)
    assert {"A_e", "B_e", "E", "keep", "t"} <= {k.rpartition("/")[2] for k in private}
    with pytest.raises(
        ValueError, match=r"fedavg: A_e, B_e, E of dual_module: each client screens"
    ):
        algorithm("fedavg").check_model(model)
    shared = Client.of("c0", wrap(Case("shared_b", {"num_A": 2})))
    names = {k.rpartition("/")[2] for k in algorithm("fedavg").share(shared)}
    assert names == {"A", "B", "G"}


@pytest.mark.parametrize("key", ["shared_b", "cola", "dual_module", "sora", "tied", "nola"])
def test_two_clients_of_a_delta_meet(key: str) -> None:
    case = Case(key, OPTIONS.get(key, {}))
    models = [wrap(case), wrap(case)]
    method = fedavg_for(models[0])
    state, kept = federate(models, method, 2)
    client = Client.of("c0", models[0])
    for i, model in enumerate(models):
        down = method.payload_down(state, client)
        method.apply(model, down, client, round=3, first=adapter.read(model), kept=kept[i])
    one, two = (method.shared(adapter.read(model), client) for model in models)
    assert one.keys() == two.keys() == state.tensors.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(x.any() for x in one.values())


# One client -------------------------------------------------------------------------------------


def locally(model: Any, rounds: int) -> Any:
    """Rounds of three steps, each with a new optimizer."""
    for _ in range(rounds):
        steps(model, adamw(model, 1e-2), 3)
    return model


@pytest.mark.parametrize("key", ["fedit", "ffa", "fedsa", "fedalora"])
def test_one_client_is_local_training(key: str) -> None:
    method = algorithm(key)
    one, alone = lora(), lora()
    for model in (one, alone):
        adapter.freeze(model, method.frozen)
    state, _ = federate([one], method, 3)
    locally(alone, 3)
    assert torch.equal(logits(one), logits(alone))
    expected = adapter.read(alone)
    assert all(torch.equal(x, expected[k]) for k, x in state.tensors.items())
    assert bool(method.fingerprint(expected)) == (key == "ffa")


def test_one_client_of_fedex_is_local_training_without_a_trunk() -> None:
    one, alone = lora(), lora()
    state, _ = federate([one], algorithm("fedex"), 3)
    assert torch.equal(logits(one), logits(locally(alone, 3)))
    assert not any(x.any() for k, x in state.tensors.items() if k.endswith("/trunk_B"))


def test_one_client_of_flora_is_a_chain() -> None:
    """One link a round: the same draws, steps and sums."""
    one, other = lora(), lora()
    federate([one], algorithm("flora"), 3)
    plait.chain.start(other, plait.ChainPlan.chain(links=3, warmup_steps=0), total_steps=9)
    steps(other, adamw(other, 1e-2), 9)
    assert torch.equal(logits(one), logits(other))
    for name, x in adapter.read(other).items():
        assert torch.equal(adapter.read(one)[name], x)


def test_a_round_of_het_changes_nothing_for_one_client() -> None:
    method = algorithm("fedalora_het", common_rank=3)
    model, seen = het(), []

    def check(model: Any) -> None:
        seen.append(logits(model))
        assert not any(d.B2.any() for d in deltas(model))

    client = Client.of("c0", model)
    first = adapter.read(model)
    expected = logits(model)
    state, _ = federate([model], method, 2, check)
    assert torch.equal(seen[0], expected)  # B_bar = B2 = 0: the base model
    trained = logits(model)
    kept = method.private(adapter.read(model), client)
    down = method.payload_down(state, client)
    method.apply(model, down, client, round=3, first=first, kept=kept)
    assert relative(logits(model), trained) < 1e-6
    assert not torch.equal(logits(model), expected)
    for policy in ("reset", "redraw"):
        other = algorithm("fedalora_het", common_rank=3, private_policy=policy)
        other.apply(model, down, client, round=3, first=first, kept=kept)
        assert relative(logits(model), trained) > 1e-3, policy


def test_keep_is_neutral_and_reset_and_redraw_are_not() -> None:
    model = lora()
    client, first = Client.of("c0", model), adapter.read(model)
    state, kept = federate([model], algorithm("fedalora"), 2)
    trained = logits(model)
    for policy in ("keep", "reset", "redraw"):
        method = algorithm("fedalora", private_policy=policy)
        down = method.payload_down(state, client)
        method.apply(model, down, client, round=3, first=first, kept=kept[0])
        assert torch.equal(logits(model), trained) == (policy == "keep")


def test_own_or_common_draws() -> None:
    model = lora()
    first = adapter.read(model)
    for init, alike in (("common", True), ("per_client", False)):
        method = algorithm("flora", init=init)
        found = []
        for name in ("c0", "c1"):
            client = Client.of(name, model)
            method.apply(model, {}, client, round=2, first=first)
            found.append(adapter.read(model))
        assert all(torch.equal(x, found[1][k]) for k, x in found[0].items()) == alike


# Exports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "ranks"),
    [
        ("fedit", (2, 2)),
        ("fedsa", (2, 2)),
        ("fedalora", (2, 2)),
        ("flora", (3, 2)),
        ("flexlora", (3, 2)),
        ("hetlora", (3, 2)),
        ("fedex", (2, 2)),
        ("fedalora_het", (4, 2)),
    ],
)
def test_each_client_exports_as_a_plain_lora(key: str, ranks: Any, tmp_path: Path) -> None:
    """The trunk included; stock peft gives the same logits."""
    is_het = key == "fedalora_het"
    options = {"common_rank": 3} if is_het else {}
    method = algorithm(key, **options)
    models = [het(r) if is_het else lora(r=r, lora_alpha=2 * r) for r in ranks]
    state, kept = federate(models, method, 2)
    base = logits(tiny.llama())
    for i, model in enumerate(models):
        client = Client.of(f"c{i}", model)
        held = method.payload_down(state, client, held=-1)  # a late client: the whole trunk
        method.apply(model, held, client, round=3, first=adapter.read(model), kept=kept[i])
        plait.to_lora(model).write(tmp_path / str(i))
        plain = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / str(i))).eval()
        assert relative(logits(model.eval()), base) > 1e-4
        assert relative(logits(plain), logits(model)) < 1e-5
