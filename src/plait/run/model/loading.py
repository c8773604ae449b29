"""Load a base model: type, quantisation, weights, device; what a checkpoint lacks is refused."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from plait.core.bridge import keep_trainable_on_cpu
from plait.core.precision import compute_in
from plait.run.config import ModelConfig, RunConfig
from plait.run.model.head import HEADS
from plait.run.model.reading import set_padding
from plait.run.model.source import _check_files, config_of, not_there, source_of
from plait.run.model.tokenizer import load_tokenizer


def load_base(
    model: ModelConfig, num_labels: int | None = None, id2label: dict[int, str] | None = None
) -> PreTrainedModel:
    """Load a base model alone; arguments and errors as in load_base_with_missing."""
    return load_base_with_missing(model, num_labels, id2label)[0]


def load_full(
    model: ModelConfig,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    trained: Path | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model of which every weight is trained: in fp32, and it computes in `model.dtype`.

    trained: the folder of weights that were trained so; None: those of the base model. The other
    arguments, results and errors are those of load_base_with_missing.
    """
    weights = replace(model, dtype="float32")
    if trained is not None:
        weights = replace(weights, name=str(trained.resolve()), revision=None)
    loaded, missing = load_base_with_missing(weights, num_labels, id2label)
    compute_in(loaded, _compute_dtype(model))
    return loaded, missing


def _compute_dtype(model: ModelConfig) -> torch.dtype:
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    dtype: Any = config_of(model).dtype  # None, a name or a dtype
    return getattr(torch, str(dtype).removeprefix("torch."), torch.float32)


def load_base_with_missing(
    model: ModelConfig, num_labels: int | None = None, id2label: dict[int, str] | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Load a base model; return it with the names of modules that its checkpoint does not hold.

    Heads for classification and regression are not among these names: peft trains and saves them
    by itself.

    Args:
        model: the `model` section of a run.
        num_labels: outputs of the head for classification and regression (1).
        id2label: names of these outputs.

    Raises:
        FileNotFoundError: there is no such model, or it has no weights.
        ValueError: pickled or damaged weights, a model that does not fit `model.task`, or weights
            of another shape, such as a head with another number of outputs.
        ImportError: a quantised base without bitsandbytes.
    """
    source = source_of(model)
    _check_files(Path(source), model.name)
    common: dict[str, Any] = {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
    try:
        config: Any = AutoConfig.from_pretrained(source, **common)
        _check_architecture(config, model)
        if num_labels is not None:
            config.num_labels = num_labels
        if id2label is not None:
            config.id2label = id2label
            config.label2id = {name: i for i, name in id2label.items()}
        causal = model.task == "causal_lm"
        if not causal:  # a head of an earlier task may say another loss
            kinds = {"regression": "regression", "classification": "single_label_classification"}
            config.problem_type = kinds[model.task]
        if config.model_type == "rwkv":
            config.rescale_every = 0  # else evaluation divides weights, and not their updates
        auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        with _errors_only():
            loaded, report = auto.from_pretrained(
                source,
                config=config,
                dtype=model.dtype,
                quantization_config=_quantization(model),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below
                **common,
            )
    except SafetensorError as error:
        raise ValueError(f"{model.name}: weights damaged ({error}). Download them again.") from None
    except OSError as error:
        raise FileNotFoundError(not_there(model, "model", error)) from error
    _check_shapes(report["mismatched_keys"], model, num_labels)
    keep_trainable_on_cpu(loaded)
    if loaded.config.pad_token_id is None or not causal:
        set_padding(loaded, load_tokenizer(model))
    missing = sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
    if missing and model.task == "causal_lm":
        raise ValueError(
            f"{model.name}: the weights of {missing[0]} and {len(missing) - 1} more modules are "
            "missing. Give a complete causal language model."
        )
    return loaded, [name for name in missing if name.partition(".")[0] not in HEADS]


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Return a quantised model with plain linear layers that hold the same weights, in float32.

    The other weights keep their type.
    """
    with _errors_only():
        return model.dequantize(torch.float32)


def to_device(model: Any, cfg: RunConfig) -> Any:
    """Move a model to the device of its run; bitsandbytes has already placed a quantised one."""
    stays = cfg.training.get("use_cpu") or cfg.model.quantization != "none"
    if stays or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' report of missing weights: the caller raises, trains and saves them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_shapes(
    mismatched: Iterable[tuple[str, Any, Any]], model: ModelConfig, num_labels: int | None
) -> None:
    for name, stored, built in sorted(mismatched):
        if num_labels is not None and name.partition(".")[0] in HEADS:
            raise ValueError(
                f"model.name: the head of {model.name} has {stored[0]} outputs ({name}), and "
                f"model.task {model.task} with these rows needs {num_labels}. Give rows with its "
                "classes, or a model without a head."
            )
        raise ValueError(
            f"model.name: {name} of {model.name} has the shape {list(stored)} in its weights and "
            f"{list(built)} by its config.json. Copy the model again."
        )


def _check_architecture(config: PretrainedConfig, model: ModelConfig) -> None:
    if model.task != "causal_lm":
        return
    if config.is_encoder_decoder:
        raise ValueError(
            f"model.task is causal_lm, but {model.name} is an encoder-decoder "
            f"({config.model_type}). Give a decoder such as a Llama."
        )
    values = config.to_dict()
    if config.model_type in (*MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "xlnet"):
        raise ValueError(
            f"model.task is causal_lm, but {model.name} ({config.model_type}) was not made to "
            "predict the next token: its loss compares a token with itself. Give a decoder such "
            "as a Llama."
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not values.get("is_decoder"):
        raise ValueError(
            f"model.task is causal_lm, but {model.name} is an encoder ({config.model_type}). "
            "Set model.task: classification or regression, or give a decoder."
        )


def quantization_options(model: ModelConfig) -> dict[str, Any] | None:
    """Return how a base is packed, as JSON can hold it and BitsAndBytesConfig takes it."""
    if model.quantization == "none":
        return None
    return {
        "load_in_4bit": model.quantization == "4bit",
        "load_in_8bit": model.quantization == "8bit",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16" if model.dtype == "auto" else model.dtype,
        # What a checkpoint has no weights for cannot be packed, and is trained (transformers 5.23
        # leaves out the last layer only where it has no bias).
        "llm_int8_skip_modules": None if model.task == "causal_lm" else [*HEADS, ".*pooler"],
    }


def _quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    options = quantization_options(model)
    if options is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"model.quantization is {model.quantization}, which needs bitsandbytes. "
            'Install it with: pip install "plait[quant]"'
        )
    return BitsAndBytesConfig(**options)
