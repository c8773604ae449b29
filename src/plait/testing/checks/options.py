"""Checks of the config: what is kept in a file, and what is refused with which words."""

import json
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from peft import PeftConfig

from plait.testing.case import Case
from plait.testing.helpers import (
    wrap,
)


def config_is_strict(case: Case) -> None:
    """A file keeps every option; errors name the wrong key, type, rank or target."""
    config = case.config(seed=3, rank_pattern={"q_proj": 6}, layers_to_transform=[0])
    cls = case.method.config
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for read in (cls, PeftConfig):
            again = read.from_pretrained(folder)
            for option in fields(config):
                kept = getattr(again, option.name) == getattr(config, option.name)
                assert kept, f"{option.name} was lost on the way to the file"
        path = Path(folder, "adapter_config.json")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for change, text in (
            ({"lora_alhpa": 3}, r"lora_alhpa is not known to plait .* Did you mean lora_alpha\?"),
            ({"plait_version": "999.0"}, r"was written by plait 999.0; .* is installed"),
            ({"peft_type": "LORA"}, rf"is of type LORA, not PLAIT_{case.key.upper()}"),
        ):
            path.write_text(json.dumps({**saved, **change}), encoding="utf-8")
            with pytest.raises(ValueError, match=text):
                cls.from_pretrained(folder)
    for change, text in (
        ({"r": 0}, "r = 0 is out of range. Give 1 or more"),
        ({"r": -2}, "r = -2 is out of range"),
        ({"r": "8"}, "r = '8' is not a whole number"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is out of range. Give more than 0"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"bias": "some"}, "bias = 'some' is not known. Use one of 'none', 'all', 'plait_only'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] = 0 is out of range"),
    ):
        with pytest.raises(ValueError, match=text):
            case.config(**change)
    with pytest.raises(TypeError, match="rr"):
        case.config(rr=2)
    with pytest.raises(ValueError, match=r"no_such_layer.*q_proj"):
        wrap(case, target_modules=["no_such_layer"])
