"""Load base models and tokenizers, and put a method on them.

Weights are read from safetensors only. What a checkpoint lacks for its task (a new classification
head) starts random from `training.seed`, is trained, and is saved with the adapter.
"""

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from plait.core.bridge import keep_trainable_on_cpu
from plait.core.delta import Delta
from plait.run.config import ModelConfig, RunConfig, allocates, method_options, peft_config
from plait.run.data import DataBundle

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HEADS = ("classifier", "score")  # peft trains and saves these for classification by itself
_FLOAT_BASE_ONLY = {
    "pissa": "it splits the base weight",
    "unilora": "its scales take the base weight's type, which is not a float (peft 0.21.2)",
    "full": "packed weights cannot be trained",
}


_NO_8BIT = {"dora": "upstream's start leaves an 8-bit layer without its scales (peft 0.21.2)"}


def quantised_reason(method: str, quantization: str) -> str | None:
    """Why a method does not work on a base of this `model.quantization`; None where it does."""
    if quantization == "none":
        return None
    return _FLOAT_BASE_ONLY.get(method) or (
        _NO_8BIT.get(method) if quantization == "8bit" else None
    )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, padding on the right; without a pad token it pads with eos.

    Raises FileNotFoundError for a model that is not there, ValueError when nothing can pad.
    """
    source = source_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        raise FileNotFoundError(_not_there(model, "tokenizer", error)) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model.name: the tokenizer of {model.name} has no pad, eos or unk token to pad with. "
            "Add a pad token to its tokenizer_config.json."
        )
    return tokenizer


def load_base(
    model: ModelConfig, num_labels: int | None = None, id2label: dict[int, str] | None = None
) -> PreTrainedModel:
    """Load the base model of a run, frozen weights and all.

    num_labels: outputs of the head for classification and regression (1). id2label: its names.
    Raises FileNotFoundError for a model or weights that are not there; ValueError for pickles,
    damaged files, and models that do not fit `model.task`; ImportError without bitsandbytes.
    """
    return load_with_new(model, num_labels, id2label)[0]


def build_model(config: RunConfig, data: DataBundle) -> PeftModel | PreTrainedModel:
    """Load the base model and put the config's method on it; a plain model for `full`.

    The model is in training mode. Sets the global seed to `training.seed`, from which a new head
    is drawn. Raises what load_base raises, and ValueError for target modules that match nothing,
    a rank or a vector length that the layers do not allow, and rows longer than the model reads.
    """
    set_seed(config.training["seed"])
    id2label = None if data.labels is None else dict(enumerate(data.labels))
    outputs = {"classification": len(data.labels or ()), "regression": 1}.get(config.model.task)
    base, new = load_with_new(config.model, outputs, id2label)
    _check_length(base, data)
    quantized = config.model.quantization != "none"
    reason = quantised_reason(config.method.name, config.model.quantization)
    if reason is not None:
        raise ValueError(
            f"method.name: {config.method.name} does not work on a {config.model.quantization} "
            f"base: {reason}. Set model.quantization: none, or use another method."
        )
    options = dict(config.method.options)
    if new:
        options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *new]
    layers = adaptable_layers(base)
    if "fan_in_fan_out" in method_options(config.method.name):  # how GPT-2 stores its weights
        options.setdefault("fan_in_fan_out", any(isinstance(m, Conv1D) for m in layers.values()))
    method = replace(config.method, options=options)
    wanted = peft_config(
        method,
        config.model.task,
        total_steps=planned_steps(config.training, len(data.train)),
        tasks=data.tasks,
    )
    if wanted is None:
        return base.train()
    if allocates(wanted) and data.validation is None:
        raise ValueError(
            f"data.validation is not set, and {method.name} scores its ranks on validation rows. "
            "Give a source or a fraction of train."
        )
    if quantized:
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=bool(config.training.get("gradient_checkpointing"))
        )
    _check_targets(layers, wanted, method.name)
    model = get_peft_model(base, wanted).train()
    first = next((m for m in model.modules() if isinstance(m, Delta)), None)
    if first is not None and config.chain is None:  # a chain checks the steps of a link
        first.check_schedule()
    return model


def planned_steps(training: dict[str, Any], rows: int) -> int:
    """Return the optimizer steps that the Trainer will make on one device."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    batches = rows / training["per_device_train_batch_size"]
    batches = math.floor(batches) if training.get("dataloader_drop_last") else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / training.get("gradient_accumulation_steps", 1)))
    return math.ceil(per_epoch * training["num_train_epochs"])


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that `all-linear` adapts, by name: all but the output and heads."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and name.partition(".")[0] not in _HEADS
    }


# ------------------------------------------------------------------------------------ loading


def load_with_new(
    model: ModelConfig, num_labels: int | None, id2label: dict[int, str] | None
) -> tuple[PreTrainedModel, list[str]]:
    """Load as `load_base`; also the modules, no heads, that the checkpoint has no weights for."""
    source = source_of(model)
    _check_files(Path(source), model.name)
    common: dict[str, Any] = {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(source, **common)
        _check_architecture(config, model)
        if num_labels is not None:
            config.num_labels = num_labels
        if id2label is not None:
            config.id2label = id2label
            config.label2id = {name: i for i, name in id2label.items()}
        if model.task == "regression":
            config.problem_type = "regression"
        causal = model.task == "causal_lm"
        auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        with _errors_only():
            loaded, report = auto.from_pretrained(
                source,
                config=config,
                dtype=model.dtype,
                quantization_config=_quantization(model),
                use_safetensors=True,
                output_loading_info=True,
                **common,
            )
    except SafetensorError as error:
        raise ValueError(f"{model.name}: weights damaged ({error}). Load them anew.") from None
    except OSError as error:
        raise FileNotFoundError(_not_there(model, "model", error)) from error
    keep_trainable_on_cpu(loaded)
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = load_tokenizer(model).pad_token_id
    missing = sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
    if missing and model.task == "causal_lm":
        raise ValueError(
            f"{model.name}: the weights of {missing[0]} and {len(missing) - 1} more modules are "
            "missing. Give a complete causal language model."
        )
    heads = (name for name in missing if name.partition(".")[0] not in _HEADS)
    return loaded, list(heads)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' report of missing weights: the caller raises, trains and saves them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def source_of(model: ModelConfig) -> str:
    """Return what transformers loads: a folder or a hub id."""
    if model.name == "builtin:tiny":
        from plait.assets import tiny_model_dir

        return str(tiny_model_dir())
    if model.name.startswith("builtin:"):
        raise ValueError(f"model.name is {model.name!r}. The only built-in model is builtin:tiny.")
    path = Path(model.name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or model.name.startswith((".", "~")) or path.exists():
        raise FileNotFoundError(
            f"model.name: {model.name} is no folder here. Correct the path, or give a hub id."
        )
    return model.name


def _check_files(folder: Path, name: str) -> None:
    """Check a local model folder: weights there, as safetensors, each file whole."""
    if not folder.is_dir():
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"model.name: {name} holds its weights as a pickle ({pickles[0]}), which can run "
                "any code when it is read. Convert it to safetensors."
            )
        raise FileNotFoundError(
            f"model.name: {name} has no weights (no .safetensors file). "
            "Give a folder written by save_pretrained."
        )
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut off ({error}). Copy it again.") from None


def _check_architecture(config: PretrainedConfig, model: ModelConfig) -> None:
    if model.task != "causal_lm":
        return
    if config.is_encoder_decoder:
        raise ValueError(
            f"model.task is causal_lm, but {model.name} is an encoder-decoder "
            f"({config.model_type}). Give a decoder such as a Llama."
        )
    values = config.to_dict()
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not values.get("is_decoder"):
        raise ValueError(
            f"model.task is causal_lm, but {model.name} is an encoder ({config.model_type}). "
            "Set model.task: classification or regression, or give a decoder."
        )


def _quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    if model.quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"model.quantization is {model.quantization}, which needs bitsandbytes. "
            'Install it with: pip install "plait[quant]"'
        )
    compute = torch.bfloat16 if model.dtype == "auto" else vars(torch)[model.dtype]
    return BitsAndBytesConfig(
        load_in_4bit=model.quantization == "4bit",
        load_in_8bit=model.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        # What a checkpoint has no weights for cannot be packed, and is trained (transformers 5.23
        # leaves out the last layer only where it has no bias).
        llm_int8_skip_modules=None if model.task == "causal_lm" else [*_HEADS, ".*pooler"],
    )


def _not_there(model: ModelConfig, what: str, error: OSError) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return (
        f"model.name: the {what} of {model.name} cannot be loaded ({reason}). "
        "Correct the path or the hub id."
    )


# ------------------------------------------------------------------------------------- checks


def _check_length(base: PreTrainedModel, data: DataBundle) -> None:
    limit = base.config.to_dict().get("max_position_embeddings")
    if limit is None:  # models without positions, such as Bloom
        return
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's first positions are taken by padding.
            limit -= 0 if module.padding_idx is None else module.padding_idx + 1
    if data.longest > limit:
        raise ValueError(
            f"data: the longest row has {data.longest} tokens, the model reads {limit}. "
            f"Set data.max_length: {limit} and data.truncate: true."
        )


def _check_targets(layers: dict[str, nn.Module], wanted: PeftConfig, method: str) -> None:
    """Raise when a target matches no layer, or a layer has sizes the method cannot take."""
    options = wanted.to_dict()
    targets = options["target_modules"]
    if targets != "all-linear":
        names = [targets] if isinstance(targets, str) else sorted(targets or ())
        unmatched = [n for n in names if not _matches(n, layers, isinstance(targets, str))]
        if unmatched:
            candidates = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"method.target_modules: {', '.join(map(repr, unmatched))} matches no linear "
                f"layer of this model. It has {', '.join(candidates)}; or use all-linear."
            )
    else:
        wanted = replace(wanted, target_modules=list(layers))
    layers = {n: m for n, m in layers.items() if check_target_module_exists(wanted, n)}
    for name, layer in layers.items():
        out_features, in_features = _sizes(layer)
        smaller = min(in_features, out_features)
        if method == "pissa" and options["r"] > smaller:
            raise ValueError(
                f"method.r is {options['r']}, but pissa takes singular vectors of {name}, which "
                f"has {smaller}. Give r: {smaller} or less, or leave that layer out."
            )
        if method == "vblora":
            length = options["vector_length"]
            if in_features % length or out_features % length:
                raise ValueError(
                    f"method.vector_length is {length}, which does not divide {name} "
                    f"({out_features} x {in_features}). Give a common divisor of all layers, "
                    f"such as {_common_divisor(layers.values())}."
                )


def _matches(target: str, layers: Iterable[str], pattern: bool) -> bool:
    """Whether a target (a name ending, or a regular expression) fits one of the layers."""
    if pattern:
        return any(re.fullmatch(target, name) for name in layers)
    return any(name == target or name.endswith(f".{target}") for name in layers)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features), of a bitsandbytes layer too."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def _common_divisor(layers: Iterable[nn.Module]) -> int:
    return math.gcd(*(size for layer in layers for size in _sizes(layer)))
