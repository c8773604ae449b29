"""One file a method: its mathematics, its options, its start. Importing them registers them."""

from plait.methods import cola, dual_lora, dual_module, shared_b

__all__ = ["cola", "dual_lora", "dual_module", "shared_b"]
