"""How a model reads rows: how many tokens, which ids, padded on which side."""

import inspect
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT = ("max_position_embeddings", "max_seq_len")  # MPT has the second


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


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model which token pads: a decoder's head looks for the last token before these."""
    pad = tokenizer.pad_token_id
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


def pads_left(model: Any) -> bool:
    """Whether padding on the left changes no logit: whether the model is told its positions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(type(base).forward).parameters
