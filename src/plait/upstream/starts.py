"""Starts of a LoRA that are made from training rows."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor

from plait.upstream.table import start_kind

_UNMET = ("corda", "lora_ga")


def check_start(config: Any) -> None:
    """Refuse a start that reads rows before the adapter is made: peft would make a plain LoRA.

    Raises:
        ValueError: the start is such a one.
    """
    start = str(getattr(config, "init_lora_weights", ""))
    if start in _UNMET:
        raise ValueError(
            f"init_lora_weights is {start}, which reads training rows before the adapter is made. "
            "A run file cannot do that, and peft alone would train a plain LoRA without a word. "
            "Use eva, or leave it out."
        )


def start_from_rows(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Make the start of an adapter from training rows, where its config asks for it.

    batches: of training rows, as the model takes them, in an order that is always the same.
    """
    if not isinstance(model, PeftModel) or start_kind(model.active_peft_config) != "data":
        return
    from peft import initialize_lora_eva_weights

    device = model.device
    moved = [{name: t.to(device) for name, t in batch.items()} for batch in batches]
    was_training = model.training
    initialize_lora_eva_weights(model, moved, show_progress_bar=False)
    model.train(was_training)
