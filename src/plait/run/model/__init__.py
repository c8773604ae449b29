"""The base model of a run: found, loaded with its tokenizer, and what it can read and adapt.

source      its name, its files, its config       tokenizer   its tokenizer
loading     type, quantisation, weights, device   head        outputs of a classifier
base        all of this for a run that trains     reading     how many tokens, which ids, which side
layers      what can be adapted, what a pattern selects
"""

from plait.run.model.base import Base, prepare_base, recomputes
from plait.run.model.head import head_labels, head_of
from plait.run.model.layers import (
    adaptable_layers,
    check_patterns,
    ignored_layers,
    parameter_counts,
    quantised_reason,
)
from plait.run.model.loading import (
    dequantise,
    load_base,
    load_full,
    quantization_options,
    to_device,
)
from plait.run.model.reading import (
    check_ids,
    check_length,
    context_of,
    pads_left,
    positions_of,
    set_padding,
)
from plait.run.model.source import base_name, source_of
from plait.run.model.tokenizer import load_tokenizer

__all__ = [
    "Base",
    "adaptable_layers",
    "base_name",
    "check_ids",
    "check_length",
    "check_patterns",
    "context_of",
    "dequantise",
    "head_labels",
    "head_of",
    "ignored_layers",
    "load_base",
    "load_full",
    "load_tokenizer",
    "pads_left",
    "parameter_counts",
    "positions_of",
    "prepare_base",
    "quantised_reason",
    "quantization_options",
    "recomputes",
    "set_padding",
    "source_of",
    "to_device",
]
