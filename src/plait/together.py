"""Train several adapters of one base model in one process, each as if it trained by itself.

    arms = [Arm("slow", config, batches, lr=1e-4), Arm("fast", config, batches, lr=1e-3)]
    model, losses = plait.train_together(base, arms)

The rows of all arms pass the base model in one batch (`adapter_names`), the updates are products of
stacked factors (kernels/grouped.py), and the loss of an arm is that of its own rows. So the
gradient of an arm is that of its separate run. Each arm has its own learning rate, schedule, weight
decay, clipping and seed. The arms are of one method; ranks and numbers of rows may differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from plait.callback import set_micro_batches, set_total_steps
from plait.core import DeltaConfig, find
from plait.core.bridge import PlaitLayer
from plait.kernels.stream import Stream

Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


@dataclass
class Arm:
    """One of the adapters that are trained together.

    Attributes:
        name: of the adapter.
        config: of the method, as for get_peft_model; its seed decides the start.
        batches: the inputs of one step after the other, tensors with one entry for each row.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: number of completed steps -> factor of lr; None: always 1.
        max_grad_norm: to which the gradients of this arm are clipped; None: they are not.
        seed: of the masks of dropout, as torch.manual_seed takes it; None: that of the config.
    """

    name: str
    config: DeltaConfig
    batches: Sequence[Batch]
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Callable[[int], float] | None = None
    max_grad_norm: float | None = None
    seed: int | None = None


def train_together(
    base: nn.Module, arms: Sequence[Arm], loss: Loss | None = None
) -> tuple[PeftModel, dict[str, list[float]]]:
    """Train the arms with AdamW; each ends where its separate run would, up to rounding.

    Args:
        base: the frozen model, without adapters. It is changed as get_peft_model changes it.
        arms: at least one; all take equally many steps.
        loss: (logits of the rows of one arm, its batch) -> scalar. None: the model's own loss of
            `labels`, as causal language models have it.

    Returns:
        The model with an adapter for each arm, in evaluation mode, and the losses of each by name.

    Raises:
        ValueError: no arms; arms of several methods, of one name or of unequal length; a method
            that scores ranks by forwards of its own; parts that train outside the adapted layers;
            masks that would not be those of separate runs: a base model with dropout, or adapters
            with it under gradient checkpointing or with rows of unequal length.
    """
    _check(base, arms)
    model: Any = get_peft_model(base, arms[0].config, adapter_name=arms[0].name)  # type: ignore
    for arm in arms[1:]:
        model.add_adapter(arm.name, arm.config)
    model.base_model.set_adapter([arm.name for arm in arms])
    layers = [m for m in model.modules() if isinstance(m, PlaitLayer)]
    groups: list[dict[str, Any]] = []
    for arm in arms:
        deltas: Any = [x.plait_delta[arm.name] for x in layers if arm.name in x.plait_delta]
        stream = Stream(arm.config.seed if arm.seed is None else arm.seed)
        parameters: dict[int, nn.Parameter] = {}
        for delta in deltas:
            delta.stream = stream
            parameters |= {id(p): p for p in delta.parameters() if p.requires_grad}
        trained = list(parameters.values())
        groups.append({"params": trained, "lr": arm.lr, "weight_decay": arm.weight_decay})
    kinds = {p.device.type for group in groups for p in group["params"]}
    optimizer = torch.optim.AdamW(groups, fused=kinds <= {"cpu", "cuda"})  # of many small tensors
    steps = len(arms[0].batches)
    model.train()
    if any(delta.draws for layer in layers for delta in layer.plait_delta.values()):
        _check_masks(base, arms, steps)
    set_total_steps(model, steps)
    set_micro_batches(model, 1)
    values = [_step(model, arms, step, optimizer, loss or _own_loss(base)) for step in range(steps)]
    for layer in layers:
        for delta in layer.plait_delta.values():
            delta.stream = None  # type: ignore[assignment]
    columns = torch.stack(values).t().tolist()
    return model.eval(), dict(zip([arm.name for arm in arms], columns, strict=True))


def _check(base: nn.Module, arms: Sequence[Arm]) -> None:
    """Raise ValueError for what cannot train as it would alone."""
    if not arms or not len(arms[0].batches):
        raise ValueError("train_together: there is no arm, or it has no batches. Give one or more.")
    names = [arm.name for arm in arms]
    methods = sorted({arm.config.key for arm in arms})
    lengths = {arm.name: len(arm.batches) for arm in arms}
    if len(set(names)) < len(names):
        raise ValueError(f"train_together: two arms have one name, {names}. Give each its own.")
    if any(not name or "." in name for name in names):
        raise ValueError(
            f"train_together: an arm's name is empty or has a dot, {names}. Rename it."
        )
    if len(methods) > 1:
        raise ValueError(
            f"train_together: the arms are of the methods {', '.join(methods)}; one base holds "
            "one method. Train the arms of each method in a call of their own."
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"train_together: the arms take unequal steps, {lengths}. Make them equal."
        )
    for arm in arms:
        config = arm.config
        if find(config.key).delta.allocates(config):
            raise ValueError(
                f"train_together: {arm.name}: ranks are moved by forwards with this adapter alone. "
                "Train it by itself."
            )
        beside = [
            n for n in ("modules_to_save", "trainable_token_indices") if getattr(config, n, 0)
        ]
        beside += ["bias"] if config.bias != "none" else []
        if beside or getattr(config, "task_type", None) in ("SEQ_CLS", "TOKEN_CLS"):
            raise ValueError(
                f"train_together: {arm.name} trains {', '.join(beside) or 'a head'} beside the "
                "adapted layers. Train it by itself."
            )
    found = [f"{n} p = {m.p}" for n, m in base.named_modules() if isinstance(m, nn.Dropout) and m.p]
    options = getattr(getattr(base, "config", None), "__dict__", {})
    found += [
        f"config.{name} = {value}"
        for name, value in options.items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value
    ]
    if found:
        raise ValueError(
            f"train_together: the base model has dropout, {', '.join(found[:3])}. Its masks would "
            "not be those of separate runs: set it to 0."
        )


def _check_masks(base: nn.Module, arms: Sequence[Arm], steps: int) -> None:
    """Raise ValueError where the masks would not be those of separate runs."""
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(
            "train_together: gradient checkpointing would draw the masks of each arm a second "
            "time. Train without dropout, or without gradient checkpointing."
        )
    for step in range(steps):
        lengths = {arm.name: arm.batches[step]["input_ids"].shape[1] for arm in arms}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"train_together: step {step} has rows of unequal length, {lengths}, and the "
                "adapters draw masks for each token, of padding too. Pad the batches of all arms "
                "to one length, or train without dropout."
            )


def _own_loss(base: Any) -> Loss:
    """The loss that the model computes from logits and labels."""
    if not hasattr(base, "loss_function"):
        raise ValueError(
            f"train_together: {type(base).__name__} has no loss_function. Give train_together a "
            "loss of logits and batch."
        )
    return lambda logits, batch: base.loss_function(
        logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1]
    )


def _step(
    model: Any, arms: Sequence[Arm], step: int, optimizer: torch.optim.Optimizer, loss: Loss
) -> Tensor:
    """Make one step of all arms; return their losses (arms,)."""
    batches = [arm.batches[step] for arm in arms]
    rows = [len(next(iter(batch.values()))) for batch in batches]
    names = [arm.name for arm, count in zip(arms, rows, strict=True) for _ in range(count)]
    out = model(**_joined(batches), adapter_names=names)
    logits = out if isinstance(out, Tensor) else out.logits
    values = [
        loss(_cut(part, batch), batch)
        for part, batch in zip(logits.split(rows), batches, strict=True)
    ]
    torch.stack(values).sum().backward()
    for arm, group in zip(arms, optimizer.param_groups, strict=True):
        group["lr"] = arm.lr * (1.0 if arm.schedule is None else arm.schedule(step))
        if arm.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(group["params"], arm.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(values).detach()


def _joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The rows of all arms without labels, padded on the right to one length."""
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    lengths = {batch["input_ids"].shape[1] for batch in inputs if "input_ids" in batch}
    if len(lengths) > 1:
        for batch in inputs:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    joined = {}
    for key in inputs[0]:
        parts = [batch[key] for batch in inputs]
        if parts[0].ndim > 1:
            width = max(part.shape[1] for part in parts)
            tail = [0, 0] * (parts[0].ndim - 2)
            parts = [F.pad(part, [*tail, 0, width - part.shape[1]]) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def _cut(logits: Tensor, batch: Batch) -> Tensor:
    """Those of the batch's own tokens, (rows, tokens, ..), without the padding of `_joined`."""
    ids = batch.get("input_ids")
    return logits[:, : ids.shape[1]].contiguous() if ids is not None and logits.ndim > 2 else logits
