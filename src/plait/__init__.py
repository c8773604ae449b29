"""plait: dual, collaborative and multi-LoRA fine-tuning methods on upstream peft."""

__version__ = "0.1.0"
