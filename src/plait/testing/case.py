"""A method under test: its key, its options, and which parts of the contract it relaxes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import plait

TARGETS = ["q_proj", "v_proj", "up_proj"]  # the adapted layers of the tiny Llama


@dataclass(frozen=True)
class Case:
    """A registered method with options.

    Args:
        key: the method's name in the registry.
        options: passed to its config.
        lr: AdamW's learning rate on the tiny Llama, at which 30 steps lower the loss by 0.1 nats.
        experts: parameters whose slices along the first axis must differ after training.
        alike: parameters whose slices must stay equal, by the method's mathematics.
        additive: options under which gradients of micro-batches add up to those of one batch.
        start_error: largest difference, relative, between the output of a fresh adapter and that
            of the base model; 0 demands equal bits.
    """

    key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    experts: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    additive: Mapping[str, Any] = field(default_factory=dict)
    start_error: float = 0.0

    @property
    def method(self) -> plait.Method:
        """The method's row in the registry."""
        return plait.find(self.key)

    def config(self, **changes: Any) -> Any:
        """A config for the tiny Llama with a schedule of 10 steps; changes override options."""
        defaults = {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            "total_steps": 10,
        }
        return self.method.config(**{**defaults, **self.options, **changes})

    def __str__(self) -> str:
        return "-".join([self.key, *(str(v) for v in self.options.values() if isinstance(v, str))])
