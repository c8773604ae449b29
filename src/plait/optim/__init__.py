"""Optimizers of low-rank pairs: LoRA-RITE and LoRSum, and SVDLoRA as their reference."""

from plait.optim.lora_rite import LoraRite, create_lora_rite_optimizer
from plait.optim.lorsum import LorSum, create_lorsum_optimizer
from plait.optim.pairs import PairOptimizer, collect_pairs
from plait.optim.svd_lora import svd_lora

__all__ = [
    "LorSum",
    "LoraRite",
    "PairOptimizer",
    "collect_pairs",
    "create_lora_rite_optimizer",
    "create_lorsum_optimizer",
    "svd_lora",
]
