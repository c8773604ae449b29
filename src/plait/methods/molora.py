"""MoLoRA (LoRA-MoE, LoRAMoE, MoLA): a mixture of whole LoRAs, weighed per token.

    y = W x + s sum_i w_i(x) B_i A_i x
    A: (N, r, in)   B: (N, out, r)   G: (N, in), no bias   s = lora_alpha / r

w = softmax(G x) in fp32, dense (MoLoRA 2309.05444, LoRAMoE 2312.09979), or its top_k largest made
to sum to 1 (MoLA 2402.08562). `num_experts` may differ by transformer block. Start: A_i and G
Kaiming-uniform, B_i = 0. One (N r, in) and one (out, N r) product; weights of 0 are exact in
them.

Balance losses, off by default as in the published runs, enter once per optimizer step as the mean
over its micro-batches, through the gradient of the router's weights, whatever the loss is divided
by:

    loramoe   q = sum over tokens of w, (batch, N). The first N/2 experts favour sample type 1, the
              others type 0: z = q (1 + delta) where group and type agree, else q (1 - delta).
              var(z) / (mean(z)^2 + 1e-10) over all entries, n - 1
    switch    N sum_e f_e p_e, f the share of selected slots, p the mean weight; 1 where uniform

each summed over the layers and times balance_weight. Padding is left out if the batch has a mask.
Limits: merge and export need approx="mean".
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.core import FreeConfig, FreeDelta, FrozenLinear, TokenRouter, option, register
from plait.core.events import PlaitWarning
from plait.core.init import kaiming
from plait.core.route import Rows
from plait.methods._balance import Balance, loramoe, switch


@dataclass
class MoLoraConfig(FreeConfig):
    """Options of a mixture of LoRAs."""

    r: int = option(4, "Rank of one expert.", least=1)
    lora_alpha: float = option(32, "Numerator of the scaling s.", above=0)
    num_experts: int | list[int] = option(8, "N, or one number for each transformer block.")
    top_k: int | None = option(None, "Experts that a token uses; None: all.", least=1)
    balance: Literal["none", "loramoe", "switch"] = option("none", "Balance loss.")
    balance_weight: float = option(1e-3, "Weight of the balance loss.", least=0)
    delta: float = option(0.0, "How much sample types shift the target of loramoe.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta and self.balance != "loramoe":
            raise ValueError(f'delta = {self.delta} is for balance = "loramoe". Set it as well.')
        if self.balance == "switch" and self.top_k is None:
            text = 'molora: balance = "switch" without top_k is the constant 1. Give top_k.'
            warnings.warn(text, PlaitWarning, stacklevel=3)
        numbers = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        for n in numbers:
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"num_experts = {self.num_experts}: give whole numbers from 1.")
            if self.top_k is not None and self.top_k > n:
                raise ValueError(f"top_k = {self.top_k} with {n} experts. Give {n} or less.")
            if self.balance == "loramoe" and n % 2:
                raise ValueError(f'balance = "loramoe" halves the experts. {n} is odd; give even.')

    def experts(self, layer: str) -> int:
        """N of a layer, by the number of its block in its name."""
        if isinstance(self.num_experts, int):
            return self.num_experts
        block = next((int(part) for part in layer.split(".") if part.isdigit()), None)
        if block is None or block >= len(self.num_experts):
            raise ValueError(
                f"num_experts has {len(self.num_experts)} entries, and {layer} is not in one of "
                "as many blocks. Give one number for each block, or one for all."
            )
        return self.num_experts[block]


@register(
    "molora",
    MoLoraConfig,
    paper="2309.05444",
    formula="dW x = s sum_i softmax(G x)_i B_i A_i x",
    rank="N r per token; top-k: k r",
    names=("LoRA-MoE", "LoRAMoE", "MoLA"),
)
class MoLora(FreeDelta):
    """See the module."""

    mergeable: ClassVar[bool] = False
    exact_export: ClassVar[bool] = False
    reads = ("A", "B", "A0", "B0", "G")
    config: MoLoraConfig

    def __init__(self, base: FrozenLinear, config: Any, gen: torch.Generator) -> None:
        config.num_experts = n = config.experts(base.name)  # the layer's own copy
        super().__init__(base, config, gen, num_A=n, num_B=n)
        self.G = nn.Parameter(kaiming(gen, n, base.in_features))
        kind = {"none": None, "loramoe": loramoe, "switch": switch}[config.balance]
        self.balance = None if kind is None else Balance(kind, config.balance_weight)
        self.wants_mask = self.balance is not None

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """N (r in + r out + in)."""
        return config.num_experts * (
            cls.slots_of(config) * (in_features + out_features) + in_features
        )

    @property
    def needs_events(self) -> bool:
        """The balance loss is a mean over the micro-batches of a step."""
        return self.t is not None or self.balance is not None

    def mix(self) -> TokenRouter:
        """(.., N r) to (.., N r)."""
        tap = None if self.balance is None else self.tap
        return TokenRouter(self.G, "pair", self.config.top_k, tap)

    def tap(self, w: Tensor, rows: Rows) -> Tensor:
        """The weights; in training their gradient gets that of the balance loss."""
        balance: Any = self.balance  # torch's decorator hides the type of its method
        if balance is None or not (self.training and w.requires_grad and self.G.requires_grad):
            return w
        return balance.into(w, rows, self)

    def check_step(self) -> None:
        """Raise ValueError under fp16 autocast: the loss scale does not reach the balance loss."""
        if self.balance is not None:
            self.balance.check_scale(self)

    def before_step(self) -> None:
        """Raise ValueError if the number of micro-batches is unknown and not 1."""
        if self.balance is not None:
            self.balance.check_count(self)

    def after_step(self) -> None:
        """Reset the count of micro-batches."""
        if self.balance is not None:
            self.balance.restart(self)

    def rank(self) -> int:
        """Ranks that one token can use."""
        A, _ = self.factors()
        used = len(A) * (self.config.top_k or len(self.A)) // len(self.A)
        return min(used, self.base.in_features, self.base.out_features)
