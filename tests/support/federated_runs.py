"""Config files of small federated runs, and what their folders hold."""

from pathlib import Path
from typing import Any

import yaml

from plait.run.federated.config import FederateConfig, load_federate_config
from plait.run.federated.folder import read_rounds
from plait.run.folder import RunFolder

SMALL: dict[str, Any] = {
    "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
    "federated": {"method": "fedit"},
    "data": {"train": "builtin:shift?n=24", "validation": "builtin:shift?n=8"},
    "partition": {"kind": "iid", "clients": 3},
    "local": {"rounds": 2, "steps": 1, "batch_size": 4},
}


def config(folder: Path, changes: dict[str, dict[str, Any]] | None = None) -> FederateConfig:
    """The small config with sections changed; a value None takes a key out."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    raw = {name: dict(section) for name, section in SMALL.items()}
    for name, section in (changes or {}).items():
        merged = raw.get(name, {}) | section
        raw[name] = {k: v for k, v in merged.items() if v is not None}
    raw["output"] = {"dir": str(folder)}
    path.write_text(yaml.safe_dump(raw))
    return load_federate_config(path)


def write(folder: Path, **changes: dict[str, Any]) -> str:
    """The file of a config."""
    config(folder, changes)
    return str(folder.parent / f"{folder.name}.yaml")


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rounds(folder.metrics)]
