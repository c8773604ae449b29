"""One file a method: its mathematics, its options, its start. Importing them registers them."""

from plait.methods import (
    alloc,
    cola,
    droplora,
    dual_lora,
    dual_module,
    fedalora_het,
    hydra,
    molora,
    nola,
    shared_b,
    sora,
    tied,
)

__all__ = [
    "alloc",
    "cola",
    "droplora",
    "dual_lora",
    "dual_module",
    "fedalora_het",
    "hydra",
    "molora",
    "nola",
    "shared_b",
    "sora",
    "tied",
]
