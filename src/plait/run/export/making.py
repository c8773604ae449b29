"""Exports in memory: the plain LoRA of a run's adapter, and its merged model."""

import copy
from itertools import islice
from typing import Any

from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from plait.core.config import DeltaConfig
from plait.core.delta import NotMergeable
from plait.run.config import ModelConfig
from plait.run.export.fitting import MOMENT_BATCHES, distilled, training_batches
from plait.run.export.request import DTYPES, Request
from plait.run.model import base_name, load_base, set_padding
from plait.run.prepare import TrainedRun
from plait.run.serving.quantised import merge_quantised
from plait.upstream.export import LoraExport, to_lora
from plait.upstream.moments import second_moments


def as_lora(run: TrainedRun, request: Request, task: str | None) -> LoraExport:
    """Return the adapter of a run as a plain LoRA that names its base as the run does.

    Raises:
        NotMergeable: the update depends on the input.
        ValueError: the run has no adapter, or one whose update no plain LoRA holds.
    """
    model, cfg, choice = run.model, run.cfg, request.choice(task)
    if not isinstance(model, PeftModel):
        raise ValueError("method.name = full has no adapter. Use --to merged.")
    own = isinstance(model.peft_config["default"], DeltaConfig)
    if choice and not own:
        raise ValueError(
            f"{cfg.method.name} has no tasks and no router. Leave out "
            f"{', '.join(f'--{name}' for name in choice)}."
        )
    moments = None
    if request.weighted:
        moments = second_moments(model, islice(training_batches(run, task), MOMENT_BATCHES))
    try:
        lora = to_lora(
            model,
            rank=request.rank,
            energy=request.energy,
            compact=request.compact,
            dtype=None if request.dtype is None else DTYPES[request.dtype],
            moments=moments,
            **choice,
        )
    except NotMergeable:
        raise
    except ValueError as error:
        if own or cfg.chain is not None:
            raise
        raise ValueError(
            f"{error} The run's own {run.folder.adapter} loads in stock peft as it is."
        ) from None
    name_base(lora, cfg.model)
    if request.distill:
        lora = distilled(run, lora, with_lora(run, lora), request.distill, task)
    return lora


def name_base(lora: LoraExport, model: ModelConfig) -> None:
    """Let an export name its base as a run does."""
    lora.config.base_model_name_or_path = base_name(model)
    lora.config.revision = model.revision


def fresh_base(run: TrainedRun) -> Any:
    """Load the base model of a run anew."""
    causal = run.cfg.model.task == "causal_lm"
    base = load_base(run.cfg.model, None if causal else run.model.config.num_labels, None)
    if not causal:
        set_padding(base, run.tokenizer)
    return base


def with_lora(run: TrainedRun, lora: LoraExport) -> Any:
    """Put an exported LoRA on a fresh base model, by peft alone."""
    config = copy.copy(lora.config)  # peft writes into it where the base was loaded from
    config.base_model_name_or_path = None
    exported = get_peft_model(fresh_base(run), config)
    set_peft_model_state_dict(exported, lora.tensors)
    return exported


def merged(run: TrainedRun, request: Request, task: str | None, keeps: bool) -> dict[str, Any]:
    """Return the model with the adapter in its weights; a fully trained one as it is.

    keeps: whether the run's model is needed again; else it is merged in place. On a quantised base
    the forms of merge_quantised, else one.
    """
    model, choice = run.model, request.choice(task)
    if not isinstance(model, PeftModel):
        return {"trained": model}
    if run.cfg.model.quantization != "none":
        return merge_quantised(run, choice)
    model = copy.deepcopy(model) if keeps else model
    merge: Any = model.merge_and_unload
    return {"merged": merge(safe_merge=True, **choice)}


def merges_exactly(run: TrainedRun) -> bool:
    """Whether merging into the base weights rounds no more than fp32 does."""
    model = run.model
    if run.cfg.model.quantization != "none":
        return False
    if not isinstance(model, PeftModel):
        return True
    return all(p.dtype.itemsize >= 4 for p in model.parameters() if p.is_floating_point())


def base_of(run: TrainedRun) -> Any:
    """Return the base model inside a run's adapter."""
    model: Any = run.model
    return model.get_base_model()
