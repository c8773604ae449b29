"""Load base models and tokenizers, and know their layers.

Weights are read from safetensors only. What a checkpoint lacks for its task (a new classification
head) starts random from the global seed, is trained, and is saved with the adapter.
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
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
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from plait.core.bridge import keep_trainable_on_cpu
from plait.core.precision import compute_in
from plait.options import shown
from plait.run.config import ModelConfig, RunConfig
from plait.run.data.bundle import DataBundle
from plait.run.data.templates import set_chat_template
from plait.upstream.table import BASELINES

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SECONDS = 3.0  # that a regular expression may take for all layers of a model
# Reads [expression, names]; in a process of its own, for nothing else ends a match that takes long.
_MATCH = "import json, re, sys; e, n = json.load(sys.stdin); [re.fullmatch(e, name) for name in n]"
_HEADS = ("classifier", "score")  # peft trains and saves these for classification by itself
_CONTEXT = ("max_position_embeddings", "max_seq_len")  # MPT has the second
# Layers whose weight the model reads without calling the layer, so that an update has no effect.
_UNCALLED = {
    "dt_proj": ("mamba", "falcon_mamba", "jamba", "zamba"),
    "out_proj": ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"),
}


@dataclass(frozen=True)
class Base:
    """A base model that reads a run's rows.

    layers: the linear layers that can be adapted, by name. missing: modules, no heads, that the
    checkpoint has no weights for; they are trained and saved with the adapter.
    """

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    missing: list[str]


def quantised_reason(method: str, quantization: str) -> str | None:
    """Why a method does not work on a base of this `model.quantization`; None if it does."""
    return BASELINES[method].no_quantised.get(quantization) if method in BASELINES else None


def load_tokenizer(model: ModelConfig, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; without a pad token it pads with eos.

    chat_template: `data.chat_template` of a run; None: the tokenizer's own.

    It pads on the right, and for XLNet, whose head reads the last position, on the left.

    Raises FileNotFoundError for a model that is not there, ValueError when nothing can pad, and
    what set_chat_template raises.
    """
    source = source_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        raise FileNotFoundError(_not_there(model, "tokenizer", error)) from error
    tokenizer.padding_side = "left" if _config_of(model).model_type == "xlnet" else "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model.name: the tokenizer of {model.name} has no pad, eos or unk token to pad with. "
            "Add a pad token to its tokenizer_config.json."
        )
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def prepare_base(cfg: RunConfig, data: DataBundle | None, labels: list[str] | None = None) -> Base:
    """Load the base model of a run and check that it reads the rows.

    The caller seeds: modules that the checkpoint lacks are drawn. data: None on a server without
    rows, which then gives the class names, labels.

    Raises as load_base_with_missing, check_length and check_ids do.
    """
    labels = labels if data is None else data.labels
    head = head_of(cfg.model.task, labels)
    if cfg.method.name == "full":
        model, missing = load_full(cfg.model, *head)
    else:
        model, missing = load_base_with_missing(cfg.model, *head)
    if data is not None:
        check_length(model, data.longest)
        check_ids(model, data.largest_id, data.tokenizer)
    layers = adaptable_layers(model)
    if cfg.model.quantization != "none":
        checkpointing = recomputes(cfg.training)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return Base(model, layers, missing)


def recomputes(training: Mapping[str, Any]) -> bool:
    """Whether a run computes the activations of its blocks again for the gradients.

    training: the section. transformers has two names for it, the later one being newer.
    """
    return any(training.get(f"{what}_checkpointing") for what in ("gradient", "activation"))


def head_of(task: str, labels: list[str] | None) -> tuple[int | None, dict[int, str] | None]:
    """Return the outputs of the head that a task needs and their names, as load_base takes them."""
    outputs = {"classification": len(labels or ()), "regression": 1}.get(task)
    return outputs, None if labels is None else dict(enumerate(labels))


def check_length(model: PeftModel | PreTrainedModel, longest: int) -> None:
    """Raise ValueError if the longest row has more tokens than the model has positions."""
    limit = positions_of(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"data: the longest row has {longest} tokens, the model reads {limit}. "
            f"Set data.max_length: {limit} and data.truncate: true."
        )


def positions_of(model: PeftModel | PreTrainedModel) -> int | None:
    """Return how many tokens of a row a model reads; None for one without a limit."""
    limit = context_of(model)
    if limit is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's first positions are taken by padding.
            limit -= 0 if module.padding_idx is None else module.padding_idx + 1
    return limit


def context_of(model: Any) -> int | None:
    """Return the number of positions that a model reads; None for one without, such as Bloom."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in _CONTEXT)  # XLNet says -1 for none
    return next((n for n in limits if isinstance(n, int) and n > 0), None)


def check_ids(
    model: PeftModel | PreTrainedModel, largest: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError if the model has no embedding of the padding or of a token of the rows.

    largest: the largest token id of the rows.
    """
    embedding = model.get_input_embeddings()
    count = getattr(embedding, "num_embeddings", None)
    if count is None:
        return
    pad = tokenizer.pad_token_id
    if isinstance(pad, int) and pad >= count:
        raise ValueError(
            f"model.name: the tokenizer pads with {tokenizer.pad_token!r}, id {pad}, but the model "
            f"has {count} embeddings, ids 0 to {count - 1}. Set another pad_token in its "
            "tokenizer_config.json, or resize the model's embeddings."
        )
    if largest >= count:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"data: the rows have the token {token!r}, id {largest}, but the model has {count} "
            f"embeddings, ids 0 to {count - 1}. Resize the model's embeddings, or use the "
            "tokenizer that it was trained with."
        )


def head_labels(model: ModelConfig) -> list[str] | None:
    """Return the class names of the head that a checkpoint holds, by index.

    None without a head for classification, and [] for a head whose classes have no names.
    """
    if model.task != "classification":
        return None
    config: Any = _config_of(model)
    if not any(
        str(name).endswith("ForSequenceClassification") for name in config.architectures or ()
    ):
        return None
    names = [str(config.id2label[i]).strip() for i in sorted(config.id2label)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def ignored_layers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those of these layers whose update the model would ignore."""
    kind = model.config.model_type
    return [name for name in names if kind in _UNCALLED.get(name.rpartition(".")[2], ())]


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model which token pads: a decoder's head looks for the last token before these."""
    pad = tokenizer.pad_token_id
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


def pads_left(model: Any) -> bool:
    """Whether padding on the left changes no logit: whether the model is told its positions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(type(base).forward).parameters


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
    dtype: Any = _config_of(model).dtype  # None, a name or a dtype
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
        raise FileNotFoundError(_not_there(model, "model", error)) from error
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
    return loaded, [name for name in missing if name.partition(".")[0] not in _HEADS]


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Return a quantised model with plain linear layers that hold the same weights, in float32.

    The other weights keep their type.
    """
    with _errors_only():
        return model.dequantize(torch.float32)


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


def check_patterns(options: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse regular expressions among a method's options that are none, or that take too long.

    options: of the method; peft matches target_modules, exclude_modules, modules_to_save,
    layers_pattern and the keys of rank_pattern and alpha_pattern with the names of all modules.

    Raises:
        ValueError: names the option, the expression and the reason.
    """
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(options.get(key), str):
            _check_pattern(f"method.{key}", options[key], options[key], names)
    for key in ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern"):
        patterns = options.get(key) or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            _check_pattern(f"method.{key}", pattern, rf"(.*\.)?({pattern})", names)


def _check_pattern(key: str, text: str, expression: str, names: Iterable[str]) -> None:
    if re.fullmatch(r"[\w.-]*", text):
        return
    try:
        re.compile(expression)
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([expression, list(names)]),
            text=True,
            timeout=_SECONDS,
            check=True,
            capture_output=True,
        )
    except (re.error, RecursionError, OverflowError, subprocess.CalledProcessError) as error:
        reason = "too large" if isinstance(error, subprocess.CalledProcessError) else error
        raise ValueError(
            f"{key} has {shown(text)}, which is no regular expression ({reason}). Correct it."
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{key} has {shown(text)}, a regular expression that takes more than {_SECONDS:g} s on "
            "the names of this model's layers. Write a simpler one, or a list of names."
        ) from None


def parameter_counts(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """Return (trainable parameters, all parameters), with the adapter's."""
    if isinstance(model, PeftModel):  # knows how many numbers a 4-bit weight packs
        return model.get_nb_trainable_parameters()
    total = sum(p.numel() for p in model.parameters())
    return total, total


def to_device(model: Any, cfg: RunConfig) -> Any:
    """Move a model to the device of its run; bitsandbytes has already placed a quantised one."""
    stays = cfg.training.get("use_cpu") or cfg.model.quantization != "none"
    if stays or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())


# ------------------------------------------------------------------------------------ loading


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
    """Return what transformers loads: the absolute path of a folder, or a hub id."""
    if model.name == "builtin:tiny":
        from plait.assets import tiny_model_dir

        return str(tiny_model_dir())
    if model.name.startswith("builtin:"):
        raise ValueError(f"model.name is {model.name!r}. The only built-in model is builtin:tiny.")
    path = Path(model.name).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.is_absolute() or model.name.startswith((".", "~")) or path.exists():
        raise FileNotFoundError(
            f"model.name: {model.name} is no folder here. Correct the path, or give a hub id."
        )
    return model.name


def base_name(model: ModelConfig) -> str:
    """Return what adapter_config.json calls the base: a built-in's name, else as `source_of`."""
    return model.name if model.name.startswith("builtin:") else source_of(model)


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


def _config_of(model: ModelConfig) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            source_of(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        raise FileNotFoundError(_not_there(model, "config", error)) from error


def _check_shapes(
    mismatched: Iterable[tuple[str, Any, Any]], model: ModelConfig, num_labels: int | None
) -> None:
    for name, stored, built in sorted(mismatched):
        if num_labels is not None and name.partition(".")[0] in _HEADS:
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
        "llm_int8_skip_modules": None if model.task == "causal_lm" else [*_HEADS, ".*pooler"],
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


def _not_there(model: ModelConfig, what: str, error: OSError) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return (
        f"model.name: the {what} of {model.name} cannot be loaded ({reason}). "
        "Correct the path or the hub id."
    )
