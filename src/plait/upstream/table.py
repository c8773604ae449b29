"""Upstream peft's methods and full fine-tuning under the names a config uses.

A baseline is an upstream config class, the options that make it that method and the defaults it
shares with plait's own methods, so that a comparison changes one thing at a time. All options of
the upstream class can be given under their own names; `renamed` maps the common words `r` and
`lora_dropout` where upstream has another name for the same thing. The fields that `plait methods`
shows are named as those of plait's own methods.
"""

from dataclasses import dataclass, field
from typing import Any

# The common defaults of plait's methods (r = 8, alpha = 16), given to every baseline of the family.
_LORA = {"r": 8, "lora_alpha": 16}


@dataclass(frozen=True)
class Baseline:
    """One upstream method.

    key: the name in `method.name`. config: name of the config class in `peft`, None for full
    fine-tuning. parameters: trained numbers of one layer. rank: the largest that dW can have.
    mergeable, exact_export: whether dW can go into the base weight, into a plain LoRA. fixed:
    options that define the method and cannot be given. defaults: options that differ from
    upstream's default. renamed: common option -> upstream option.
    """

    key: str
    config: str | None
    paper: str
    formula: str
    summary: str
    parameters: str
    rank: str
    mergeable: bool = True
    exact_export: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name that papers give the method: here the same as the key."""
        return self.key


BASELINES: dict[str, Baseline] = {
    b.key: b
    for b in (
        Baseline(
            "lora",
            "LoraConfig",
            "2106.09685",
            "dW = (alpha / r) B A",
            "Low-rank adaptation.",
            "r (in + out)",
            "r",
            exact_export=True,
            defaults=_LORA,
        ),
        Baseline(
            "rslora",
            "LoraConfig",
            "2312.03732",
            "dW = (alpha / sqrt(r)) B A",
            "LoRA with a scale that stays stable as the rank grows.",
            "r (in + out)",
            "r",
            exact_export=True,
            fixed={"use_rslora": True},
            defaults=_LORA,
        ),
        Baseline(
            "pissa",
            "LoraConfig",
            "2404.02948",
            "dW = (alpha / r) (B A - B0 A0), B0 A0 the principal part of W",
            "LoRA started at the leading singular vectors; the base holds the residual.",
            "r (in + out)",
            "2 r",
            exact_export=True,
            defaults={**_LORA, "init_lora_weights": "pissa_niter_4"},
        ),
        Baseline(
            "dora",
            "LoraConfig",
            "2402.09353",
            "W' = m (W + (alpha / r) B A) / norm(W + (alpha / r) B A), norm per output row",
            "LoRA for the direction of each row, a trained length for its size.",
            "r (in + out) + out",
            "min(in, out)",
            fixed={"use_dora": True},
            defaults=_LORA,
        ),
        Baseline(
            "adalora",
            "AdaLoraConfig",
            "2303.10512",
            "dW = (alpha / r) B diag(E) A, entries of E pruned by importance",
            "LoRA whose rank is moved between layers on a schedule. `r` is target_r, the rank "
            "left at the end on average; init_r is 1.5 r unless given.",
            "init_r (in + out + 1)",
            "init_r",
            exact_export=True,
            defaults={"lora_alpha": 16, "target_r": 8},
            renamed={"r": "target_r"},
        ),
        Baseline(
            "vera",
            "VeraConfig",
            "2310.11454",
            "dW = diag(b) B diag(d) A, A and B frozen and shared by all layers",
            "Two trained vectors a layer around one frozen random pair.",
            "r + out",
            "r",
            renamed={"lora_dropout": "vera_dropout"},
        ),
        Baseline(
            "vblora",
            "VBLoRAConfig",
            "2405.15179",
            "dW = B A, rows and columns cut into mixtures of vectors of one shared bank",
            "All factors are top-k mixtures of one trained vector bank.",
            "r (in + out) num_vectors / vector_length, and the bank",
            "r",
            renamed={"lora_dropout": "vblora_dropout"},
        ),
        Baseline(
            "unilora",
            "UniLoraConfig",
            "2506.00799",
            "dW = B A, all entries of A and B read from one vector theta_d",
            "One trained vector, projected by a fixed sparse map to every factor.",
            "none; theta_d_length for the model",
            "r",
            renamed={"lora_dropout": "unilora_dropout"},
        ),
        Baseline(
            "full",
            None,
            "",
            "dW free",
            "Full fine-tuning: every weight of the model is trained, no adapter.",
            "in out",
            "min(in, out)",
        ),
    )
}
