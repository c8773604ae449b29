"""Load the tokenizer of a base model."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from plait.run.config import ModelConfig
from plait.run.data.templates import set_chat_template
from plait.run.model.source import config_of, not_there, source_of


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
        raise FileNotFoundError(not_there(model, "tokenizer", error)) from error
    tokenizer.padding_side = "left" if config_of(model).model_type == "xlnet" else "right"
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
