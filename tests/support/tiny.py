"""Tiny random models built from configs, and batches for them. Nothing is downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 31


@contextmanager
def seed(value: int = 0) -> Iterator[None]:
    """A fixed global seed inside; the state outside is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        yield


def llama_config(**changes: Any) -> LlamaConfig:
    """Two blocks; every shape of a linear layer differs from its transpose or its neighbour."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**sizes, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    """A causal language model with nn.Linear layers, in evaluation mode."""
    with seed():
        return LlamaForCausalLM(llama_config(**changes)).eval()


def gpt2() -> GPT2LMHeadModel:
    """A causal language model with Conv1D layers, which store (in, out)."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with seed():
        return GPT2LMHeadModel(config).eval()


def bert() -> BertForSequenceClassification:
    """An encoder with a classification head."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = 3
    with seed():
        return BertForSequenceClassification(config).eval()


def deberta() -> DebertaV2ForSequenceClassification:
    """An encoder with relative attention."""
    config = DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=64, pad_token_id=0, type_vocab_size=0,
        relative_attention=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    config.num_labels = 3
    with seed():
        return DebertaV2ForSequenceClassification(config).eval()


class OneLinear(nn.Module):
    """A single linear layer, for checks of shapes and precision."""

    def __init__(
        self, n_in: int, n_out: int, dtype: torch.dtype = torch.float64, bias: bool = True
    ) -> None:
        super().__init__()
        with seed():
            self.linear = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return self.linear(x)


def tokens(rows: int = 4, length: int = 8, key: int = 0) -> Tensor:
    """Random token ids (rows, length), no special ones."""
    gen = torch.Generator().manual_seed(key)
    return torch.randint(3, VOCABULARY, (rows, length), generator=gen)


def numbers(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian numbers of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key), dtype=dtype)
