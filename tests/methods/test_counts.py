"""Trainable parameters on real shapes, built on the meta device: formulas and published numbers."""

from functools import cache
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import plait

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {},  # the defaults of LlamaConfig
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    },
}
PARAMETERS = {"Llama-2-7B": 6_738_415_616, "Llama-3.1-8B": 8_030_261_248}


@cache
def shapes(name: str) -> dict[str, tuple[int, int]]:
    """Module name -> (in, out) of all linear layers but the head."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    return {
        n: (m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    }


def by_formula(config: Any, model: str, targets: list[str]) -> int:
    """The method's own `count`, summed over the layers."""
    count = plait.find(config.key).delta.count
    chosen = [s for n, s in shapes(model).items() if n.rpartition(".")[2] in targets]
    return sum(count(config, *s) for s in chosen)


PUBLISHED = [
    # Llama-2-7B, all 7 linear types, r 8: the table of the methods' specification
    (plait.DualLoraConfig(r=8), "Llama-2-7B", LINEAR, 19_988_480, None),
    (plait.DualModuleLoraConfig(r=8), "Llama-2-7B", LINEAR, 19_989_824, None),
    (plait.SharedBLoraConfig(r=8), "Llama-2-7B", LINEAR, 41_623_552, None),
    (
        plait.SharedBLoraConfig(r=8, routing="task", tasks=["a", "b", "c"]),
        "Llama-2-7B",
        LINEAR,
        38_207_488,
        None,
    ),
    (plait.ColaConfig(r=8), "Llama-2-7B", LINEAR, 50_855_936, None),
    # DMC's script: r 128 with 32 shared and 96 expert ranks
    (plait.DualModuleLoraConfig(r=128, shared_r=32), "Llama-2-7B", LINEAR, 319_837_184, None),
    # ALoRA: LLaMA3-8B, q and o, n 3
    (plait.SharedBLoraConfig(r=8), "Llama-3.1-8B", ["q_proj", "o_proj"], 9_175_040, None),
    # CoLA's table, per cent of Llama-3.1-8B with its adapter: LoRA/PiSSA .26, 1/3 .53, 2/3 .66
    (plait.ColaConfig(r=8, num_A=1, num_B=1), "Llama-3.1-8B", LINEAR, None, 0.260),
    (plait.ColaConfig(r=8, num_A=1, num_B=3), "Llama-3.1-8B", LINEAR, None, 0.533),
    (plait.ColaConfig(r=8, num_A=2, num_B=3), "Llama-3.1-8B", LINEAR, None, 0.655),
]


@pytest.mark.parametrize(("config", "model", "targets", "count", "percent"), PUBLISHED)
def test_published_counts(
    config: Any, model: str, targets: list[str], count: int | None, percent: float | None
) -> None:
    """The formula gives the published number or percentage."""
    found = by_formula(config, model, targets)
    if count is not None:
        assert found == count
    if percent is not None:
        share = 100 * found / (PARAMETERS[model] + found)
        assert round(share, 3) == pytest.approx(percent, abs=5e-4)


@pytest.mark.parametrize("model", list(SHAPES))
@pytest.mark.parametrize(
    "config",
    [
        plait.DualLoraConfig(r=4),
        plait.DualModuleLoraConfig(r=4),
        plait.SharedBLoraConfig(r=2),
        plait.ColaConfig(r=2, strategy="heuristic"),
    ],
    ids=lambda c: c.key,
)
def test_formula_equals_the_built_adapter(config: Any, model: str) -> None:
    """On the meta device: what peft counts equals the formula, and nothing is allocated."""
    config.target_modules = LINEAR
    shape = {**SHAPES[model], "num_hidden_layers": 2}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**shape))
    wrapped = get_peft_model(base, config)
    trainable, _ = wrapped.get_nb_trainable_parameters()
    assert trainable * 16 == by_formula(config, model, LINEAR)
    assert all(p.is_meta for p in wrapped.parameters())
