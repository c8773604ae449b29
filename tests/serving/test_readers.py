"""Every reader computes the update that was trained, or plait says beforehand that it does not.

Each export is read by the rules of stock peft, vLLM (new and old), SGLang and llama.cpp, and
compared with dW of the live model in fp64. The bound is 1e-5 of the norm of dW beyond what the
export itself declares: what it leaves out, and the rounding of its dtype.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import plait
from plait.run.config import MethodConfig, peft_config
from plait.testing import tiny
from plait.upstream import servers
from plait.upstream.export import LoraExport
from plait.upstream.table import BASELINES
from tests.serving import readers
from tests.serving.readers import Refused, Saved

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]
CONV1D = ["c_attn", "c_fc", "attn.c_proj"]
BOUND = 1e-5

# What each method of plait runs with, and the arguments of its export. All but those by token.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alloc": ({"rounds": 0}, {}),
    "cola": ({"strategy": "heuristic"}, {}),
    "droplora": ({}, {}),
    "dual_lora": ({"gate_steps": 8}, {"rank": 24}),
    "dual_module": ({"total_steps": 10, "tinit": 2, "tfinal": 2, "deltaT": 1}, {}),
    "fedalora_het": ({"common_rank": 3}, {}),
    "nola": ({"num_basis_A": 8, "num_basis_B": 8}, {}),
    "shared_b": ({"routing": "task", "tasks": ["law", "care"]}, {"task": "care"}),
    "sora": ({"l1_weight": 0.1}, {}),
    "tied": ({}, {}),
}
TOKEN_ROUTED = {"hydra": {"num_B": 2}, "molora": {"num_experts": 2}, "shared_b": {"num_A": 2}}
UPSTREAM = [name for name in BASELINES if name not in ("full", "pissa")]
# Changes of the config, and arguments of the export.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ranks": ({"rank_pattern": {"q_proj": 2, "up_proj": 6}}, {}),
    "alphas": ({"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 40}}, {}),
    "ranks and alphas": ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}, {}),
    "pissa": ({"init": "pissa"}, {}),
    "sora gate": ({"gates": ["sora"], "lora_dropout": 0.0}, {}),
    "droplora gate": ({"gates": ["droplora"], "lora_dropout": 0.0}, {}),
    "alloc gate": ({"gates": [{"name": "alloc", "rounds": 0}], "lora_dropout": 0.0}, {}),
    "rank": ({"rank_pattern": {"q_proj": 2}}, {"rank": 3}),
    "energy": ({}, {"energy": 0.9}),
    "bf16 file": ({}, {"dtype": torch.bfloat16}),
    "fp16 file": ({"rank_pattern": {"q_proj": 2}}, {"dtype": torch.float16}),
}


def randomize(model: nn.Module) -> None:
    """Give every trainable parameter values, and shut gates in unequal numbers."""
    gen = torch.Generator().manual_seed(1)
    shut = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.is_floating_point():
                p.copy_(0.3 * torch.randn(p.shape, generator=gen))
            if name.endswith(".g") or ".g." in name:
                shut += 1
                p.view(-1)[: shut % 4] = 0
        for name, buffer in model.named_buffers():
            if name.endswith(".t"):  # past the warm-up
                buffer.fill_(10)


def wrapped(config: Any, base: nn.Module | None = None) -> Any:
    model: Any = get_peft_model(base or tiny.llama(), config).eval()  # type: ignore[arg-type]
    randomize(model)
    return model


def own(key: str, base: nn.Module | None = None, **changes: Any) -> Any:
    """A tiny model with a method of plait; ValueError for options that it does not have."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **METHODS[key][0], **changes}
    return wrapped(plait.find(key).config(**options), base)


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Adapted layers with the names that they have in the base model."""
    for name, layer in model.get_base_model().named_modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Linear | Conv1D):
            yield name, layer


def true_updates(model: PeftModel, choice: dict[str, Any]) -> dict[str, Tensor]:
    """dW (out, in) in fp64: the merged weight less the base weight, both on an fp64 copy."""
    wide: Any = copy.deepcopy(model).double()
    before = {name: layer.base_layer.weight.clone() for name, layer in linear_layers(wide)}
    keys = {k: v for k, v in choice.items() if k in ("task", "approx")}
    merged = wide.merge_and_unload(**keys)
    updates = {n: merged.get_submodule(n).weight.detach() - W for n, W in before.items()}
    conv = {n for n, layer in linear_layers(model) if isinstance(layer.base_layer, Conv1D)}
    return {n: dW.T if n in conv else dW for n, dW in updates.items()}


def compare(
    model: Any, truth: dict[str, Tensor], export: LoraExport, folder: Path
) -> dict[str, float | str]:
    """Title of each reader -> largest error by layer beyond what is declared, or why it is refused.

    A reader that plait calls right has to read every layer right. One that misreads an export has
    to be named by plait; so does one that refuses it.
    """
    export.write(folder, lossy=True)
    frozen = {
        name.removesuffix(".base_layer"): torch.zeros_like(layer.weight, dtype=torch.float64)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, nn.Linear)
    }
    truth = {**frozen, **truth}  # layers that are filled up with zeros must not change
    shapes = {name: (dW.shape[0], dW.shape[1]) for name, dW in truth.items()}
    saved = Saved.load(folder, shapes)
    base = servers.Base.of(model.get_base_model())
    found: dict[str, float | str] = {}
    for reader in servers.READERS:
        reasons = reader.reasons(export.config, export.tensors, base)
        try:
            reading = readers.READERS[reader.title](saved)
        except Refused as refused:
            found[reader.title] = str(refused)
            unsaid = "" if reasons else f"{reader.title} refuses it, unsaid: {refused}"
            assert not unsaid
            continue
        worst = 0.0
        declared = {x.name: x.error + x.rounding for x in export.layers}
        for name, dW in truth.items():
            read = reading.updates.get(name, torch.zeros_like(dW))
            error = float((read - dW).norm() / dW.norm()) if dW.norm() else float(read.norm())
            worst = max(worst, error - declared.get(name, 0.0))
        right = worst <= BOUND and not reading.lost
        assert right or reasons, f"{reader.title} misreads it by {worst}, {reading.lost}, unsaid"
        found[reader.title] = worst
    return found


def all_read(found: dict[str, float | str]) -> bool:
    """Whether every reader reads every layer right."""
    return all(isinstance(x, float) and x <= BOUND for x in found.values())


def test_the_readers_are_those_that_plait_reports_on() -> None:
    from plait_cli import _parser

    assert [reader.title for reader in servers.READERS] == list(readers.READERS)
    words = ["export", "x", "--to", "lora", "--for"]
    for key in (*servers.SERVERS, "all"):
        assert _parser().parse_args([*words, key]).server == key


@pytest.mark.parametrize("key", METHODS)
def test_own_methods(key: str, tmp_path: Path) -> None:
    """Every variant that the method has, by every reader; in the default form by all of them."""
    done = []
    for variant, (changes, arguments) in VARIANTS.items():
        try:
            model = own(key, **changes)
        except (ValueError, TypeError):
            continue  # an option that the method does not have
        choice = {**METHODS[key][1], **arguments}
        if "energy" in arguments:
            choice.pop("rank", None)
        truth = true_updates(model, choice)
        found = compare(model, truth, plait.to_lora(model, **choice), tmp_path / variant)
        assert all_read(found), (variant, found)
        compact = plait.to_lora(model, **choice, compact=True)
        found = compare(model, truth, compact, tmp_path / f"{variant} compact")
        assert found["stock peft"] <= BOUND  # type: ignore[operator]
        assert found["vLLM >= 0.33"] <= BOUND  # type: ignore[operator]
        done.append(variant)
    assert {"plain", "ranks", "alphas", "rank", "energy", "bf16 file"} <= {*done}


@pytest.mark.parametrize("name", UPSTREAM)
def test_methods_of_peft(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": TARGETS, "r": 4}
    if name in ("lora", "rslora"):
        options |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    if name == "vblora":
        options |= {"vector_length": 4, "num_vectors": 16}
    config = peft_config(MethodConfig(name=name, options=options), "causal_lm", total_steps=60)
    model = wrapped(config)
    truth = true_updates(model, {})
    sizes: list[dict[str, Any]] = [{}, {"rank": 3}, {"rank": 24}, {"dtype": torch.bfloat16}]
    for arguments in sizes:
        export = plait.to_lora(model, **arguments)
        assert all_read(compare(model, truth, export, tmp_path / str(arguments)))
        if arguments.get("rank") == 24:
            assert export.error < 1e-6, "a LoRA of full rank leaves something out"


@pytest.mark.parametrize("key", ["cola", "lora"])
@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], ["v_proj", "o_proj"], ["up_proj"]])
def test_layers_that_a_server_stacks(targets: list[str], key: str, tmp_path: Path) -> None:
    """SGLang loads no q without v, no k or v without q, no up without gate; the rest is zeros."""
    if key == "lora":
        model = wrapped(LoraConfig(r=4, target_modules=targets))
    else:
        model = own(key, target_modules=targets)
    truth = true_updates(model, {})
    assert all_read(compare(model, truth, plait.to_lora(model), tmp_path))
    compact = plait.to_lora(model, compact=True)
    assert {name.split(".")[-3] for name in compact.tensors} == {*targets}
    found = compare(model, truth, compact, tmp_path / "compact")
    assert isinstance(found["SGLang"], str), "it loads it; then no zeros are needed"


def test_a_layer_whose_gates_are_shut_is_no_gap(tmp_path: Path) -> None:
    """It has rank 0, and the compact form leaves it out."""
    model = own("sora", target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers.1.self_attn.v_proj" in name and name.endswith(".g"):
                p.zero_()
    truth = true_updates(model, {})
    assert any(not dW.norm() for dW in truth.values()), "no layer is shut"
    export = plait.to_lora(model)
    assert all_read(compare(model, truth, export, tmp_path))


def test_the_magnitude_of_dora_is_part_of_its_update(tmp_path: Path) -> None:
    """peft's own conversion drops it."""
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = wrapped(config)
    export = plait.to_lora(model)
    assert export.error > 0.01
    with pytest.raises(ValueError, match=r"leaves out \d+\.\d% of its update"):
        export.write(tmp_path)


@pytest.mark.parametrize("key", ["cola", "sora", "lora"])
def test_conv1d(key: str, tmp_path: Path) -> None:
    """GPT-2: llama.cpp's converter transposes the factors, which plait says."""
    if key == "lora":
        config = LoraConfig(r=4, target_modules=CONV1D, fan_in_fan_out=True)
        model = wrapped(config, tiny.gpt2())
    else:
        model = own(key, tiny.gpt2(), target_modules=CONV1D)
    truth = true_updates(model, {})
    found = compare(model, truth, plait.to_lora(model), tmp_path)
    for title in ("stock peft", "vLLM >= 0.33", "older vLLM"):
        assert found[title] <= BOUND  # type: ignore[operator]
    square = {n: dW for n, dW in truth.items() if dW.shape[0] == dW.shape[1]}
    assert square, "llama.cpp reads a square layer transposed without a word"
    one = own("sora", tiny.gpt2(), target_modules=["attn.c_proj"])
    found = compare(one, true_updates(one, {}), plait.to_lora(one), tmp_path / "square")
    assert found["llama.cpp"] > 0.1  # type: ignore[operator]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("storage", ["stack", "merge"])
def test_chain(rslora: bool, storage: Any, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=TARGETS, use_rslora=rslora, rank_pattern={} if rslora else {"q_proj": 3}
    )
    model: Any = get_peft_model(tiny.llama(), config).train()
    chain = plait.chain.start(model, plait.ChainPlan.chain(2, storage=storage), 4)
    base: dict[str, Any] = {
        n: tiny.llama().get_submodule(n).weight for n, _ in linear_layers(model)
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    randomize(model)
    chain.tie(optimizer)
    randomize(model)
    export = plait.to_lora(model.eval())
    merged: Any = plait.chain.merge(model)
    truth = {n: (merged.get_submodule(n).weight - W).detach().double() for n, W in base.items()}
    assert all_read(compare(model, truth, export, tmp_path))
    assert export.rank == (4 if rslora else 6)  # both links, the live one included


def test_weighted_sum_with_a_head(tmp_path: Path) -> None:
    """Updates of other ranks and scales are added; the head that both share is kept."""
    base = tiny.bert()
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = wrapped(plait.SoraConfig(r=4, **options), base)
    model.add_adapter("b", plait.SoraConfig(r=2, lora_alpha=3, init_weights=False, **options))
    head = model.get_submodule("base_model.model.classifier").modules_to_save
    head["b"].load_state_dict(head["default"].state_dict())
    model.add_weighted_adapter(["default", "b"], [0.25, -1.5], "sum")
    model.set_adapter("sum")
    export = plait.to_lora(model, "sum")
    weight = "base_model.model.classifier.weight"
    assert torch.equal(export.tensors[weight], head["default"].weight)
    truth = {
        name: layer.get_delta_weight("sum").detach().double()
        for name, layer in linear_layers(model)
        if "sum" in layer.plait_delta
    }
    found = compare(model, truth, export, tmp_path)
    assert found["stock peft"] <= BOUND  # type: ignore[operator]
    assert isinstance(found["llama.cpp"], str)


def test_a_bf16_base(tmp_path: Path) -> None:
    model = own("sora", tiny.llama().bfloat16())
    truth = {n: x.get_delta_weight("default").detach().double() for n, x in linear_layers(model)}
    assert all_read(compare(model, truth, plait.to_lora(model), tmp_path))


@pytest.mark.parametrize("key", TOKEN_ROUTED)
def test_by_token_no_reader_holds_the_update(key: str) -> None:
    options = {"r": 2, "target_modules": TARGETS, **TOKEN_ROUTED[key]}
    model = wrapped(plait.find(key).config(**options))
    with pytest.raises(plait.NotMergeable, match="its update depends on the token"):
        plait.to_lora(model)
    assert plait.to_lora(model, approx="mean").config.rank_pattern == {}


def test_the_compact_form_is_misread_and_plait_says_by_whom(tmp_path: Path) -> None:
    """The control: these readers see wrong scales, so the comparison above can fail."""
    model = own("sora", alpha_pattern={"v_proj": 1})
    export = plait.to_lora(model, compact=True)
    found = compare(model, true_updates(model, {}), export, tmp_path)
    wrong = {t: x for t, x in found.items() if isinstance(x, str) or x > 0.1}
    assert set(wrong) == {"older vLLM", "SGLang", "llama.cpp"}
    seen = servers.Base.of(model.get_base_model())
    named = [r.title for r in servers.READERS if r.reasons(export.config, export.tensors, seen)]
    assert named == list(wrong)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bias": "all"}, r"biases \(bias = 'all'\)"),
        ({"trainable_token_indices": [3, 4]}, r"rows of the embedding \(trainable_token_indices\)"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head \(modules_to_save\)"),
    ],
)
def test_what_the_default_form_cannot_say_is_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """The compact form has it for stock peft alone, and plait says that the others do not."""
    base, targets = (tiny.gpt2, ["c_attn"]) if "bias" in options else (tiny.llama, TARGETS)
    for config in (
        plait.ColaConfig(r=2, target_modules=targets, **options),
        LoraConfig(r=2, target_modules=targets, **options),
    ):
        model = wrapped(config, base())
        with pytest.raises(ValueError, match=rf"The adapter trains {named}, which .* \(--compact"):
            plait.to_lora(model)
        export = plait.to_lora(model, compact=True)
        seen = servers.Base.of(base())
        every = {r.title: r.reasons(export.config, export.tensors, seen) for r in servers.READERS}
        titles = [title for title, reasons in every.items() if not reasons]
        assert titles == ["stock peft"]
        export.write(tmp_path)
        stock = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
        with torch.no_grad():
            logits = [m(input_ids=tiny.tokens()).logits for m in (stock, model)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_a_live_pissa_is_refused() -> None:
    """Its base weight is not the base model's, so its factors alone are not the update."""
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="a part of the base weight is in the adapter"):
        plait.to_lora(wrapped(config))


def test_a_number_that_the_dtype_cannot_hold_is_refused() -> None:
    model = own("sora")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1e6)
    with pytest.raises(ValueError, match=r"its factors overflow float16\. Use bf16"):
        plait.to_lora(model, dtype=torch.float16)
    assert plait.to_lora(model, dtype=torch.bfloat16).rounding < 0.01


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (16, 16), (300, 320), (513, None)])
def test_the_rank_that_vllm_is_started_with(rank: int, served: int | None) -> None:
    assert servers.max_lora_rank(rank) == served
