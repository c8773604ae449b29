"""CoLA with full pairing is PiSSA with two learning rates: both are trained here and compared."""

import copy

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

import plait
from plait.assets import tiny_model_dir

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype="float64")
ids = torch.randint(3, base.config.vocab_size, (8, 24))


def train(num_A: int, num_B: int, rate_A: float, rate_B: float) -> torch.Tensor:
    """Train 20 steps of AdamW on one batch; return dW of all layers."""
    config = plait.ColaConfig(
        r=4, num_A=num_A, num_B=num_B, svd="exact", target_modules="all-linear"
    )
    model = get_peft_model(copy.deepcopy(base), config)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in named.items() if n.endswith(".A")], "lr": rate_A},
        {"params": [p for n, p in named.items() if n.endswith(".B")], "lr": rate_B},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    model.train()
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [m for m in model.eval().modules() if isinstance(m, BaseTunerLayer)]
    return torch.cat([layer.get_delta_weight("default").flatten() for layer in layers])


lr = 1e-3
full = train(num_A=2, num_B=3, rate_A=lr, rate_B=lr)
control = train(num_A=1, num_B=1, rate_A=2 * lr, rate_B=3 * lr)  # M = N = 1 is PiSSA
print(f"largest entry of dW: {full.abs().max():.2g}")
print(f"cola full and its control arm differ by at most {(full - control).abs().max():.1e}")
