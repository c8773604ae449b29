"""Tiny random models, built from configs, and batches for them. Nothing is downloaded.

A model is initialised once for each process; every call returns a new copy of it.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

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
P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)


@contextmanager
def seed(value: int = 0) -> Iterator[None]:
    """Set torch's global seed inside the block and restore the state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        yield


def built_once(build: Callable[P, M]) -> Callable[P, M]:
    """Decorator: build the model with seed 0, in evaluation mode, and hand out copies of it."""
    cached = functools.cache(build)

    @functools.wraps(build)
    def copied(*args: P.args, **kwargs: P.kwargs) -> M:
        with seed():
            return copy.deepcopy(cached(*args, **kwargs).eval())  # type: ignore[arg-type]

    return copied


def llama_config(**changes: Any) -> LlamaConfig:
    """Two blocks; each linear layer differs in shape from its transpose or its neighbour."""
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


@built_once
def llama(**changes: Any) -> LlamaForCausalLM:
    """A causal language model with nn.Linear layers; changes: of its config."""
    return LlamaForCausalLM(llama_config(**changes))


@built_once
def gpt2() -> GPT2LMHeadModel:
    """A causal language model with Conv1D layers, whose weights are (in, out)."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@built_once
def bert() -> BertForSequenceClassification:
    """An encoder with a classification head."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = 3
    return BertForSequenceClassification(config)


@built_once
def deberta() -> DebertaV2ForSequenceClassification:
    """An encoder with relative attention."""
    config = DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=64, pad_token_id=0, type_vocab_size=0,
        relative_attention=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    config.num_labels = 3
    return DebertaV2ForSequenceClassification(config)


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
    """Random token ids, int64 (rows, length), without special tokens."""
    gen = torch.Generator().manual_seed(key)
    return torch.randint(3, VOCABULARY, (rows, length), generator=gen)


def numbers(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of the given shape; `key` is the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key), dtype=dtype)
