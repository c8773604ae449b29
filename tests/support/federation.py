"""A federation of three clients in one process."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

import plait
from plait.federated import algorithm
from plait.federated.client import LocalTraining
from plait.federated.engines.local import Federation
from plait.federated.guard import GuardOptions
from plait.federated.server import RoundRecord, ServerOptions
from plait.testing import tiny

TARGETS = ["q_proj", "v_proj"]


NAMES = ("a", "b", "c")


def lora(r: int = 2, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, lora_dropout=dropout)


def rows(names: tuple[str, ...] = NAMES) -> dict[str, list[Tensor]]:
    gen = torch.Generator().manual_seed(0)
    return {
        name: [torch.randint(3, tiny.VOCABULARY, (6,), generator=gen) for _ in range(4 + i)]
        for i, name in enumerate(names)
    }


def collate(batch: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(batch)
    return {"input_ids": ids, "labels": ids}


def training(names: tuple[str, ...] = NAMES, **options: Any) -> LocalTraining:
    options = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2} | options
    return LocalTraining(rows(names), collate, **options)


def parts(key: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    """Base, configs, method, training and options of a federation; takes what it uses out."""
    names = changes.pop("names", NAMES)
    ranks = changes.pop("ranks", [2] * len(names))
    config = changes.pop("config", lora)
    options = ServerOptions(
        run=changes.pop("run", "run"),
        rounds=changes.pop("rounds", 2),
        guard=changes.pop("guard", GuardOptions()),
        fraction=changes.pop("fraction", 1.0),
        dtype=changes.pop("dtype", "fp32"),
    )
    method = algorithm(key, **changes.pop("method", {}))
    train = changes.pop("train", None) or training(names)
    configs = {name: config(r) for name, r in zip(names, ranks, strict=True)}
    return changes.pop("base", None) or tiny.llama(), configs, method, train, options


def federation(folder: Path, key: str = "fedit", **changes: Any) -> Federation:
    """A federation of the tiny Llama; changes: ranks, names, method options, runner arguments."""
    base, configs, method, train, options = parts(key, changes)
    return Federation(base, configs, method, train, folder, options, **changes)


def run(federation: Federation) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    federation.run(records.append)
    return records


def het(r: int) -> Any:
    return plait.FedAloraHetConfig(r=r, common_rank=2, target_modules=TARGETS)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("local", {"ranks": [1, 2, 3]}),
    ("fedit", {}),
    ("ffa", {}),
    ("fedsa", {}),
    ("fedalora", {"method": {"init": "per_client"}}),
    ("fedalora_het", {"ranks": [1, 2, 3], "config": het, "method": {"common_rank": 2}}),
    ("flora", {"ranks": [1, 2, 3]}),
    ("hetlora", {"ranks": [1, 2, 3]}),
    ("zeropad", {"ranks": [1, 2, 3]}),
    ("flexlora", {"ranks": [1, 2, 3]}),
    ("fedex", {}),
    ("fedalora", {"method": {"private_policy": "redraw"}}),
    ("fedsa", {"method": {"private_policy": "reset"}}),
    (
        "fedavg",
        {
            "config": lambda r: plait.DualModuleLoraConfig(
                r=r, target_modules=TARGETS, total_steps=6
            ),
            "method": {"private_names": ("A_e", "B_e", "E")},
        },
    ),
]


def loss_of(model: torch.nn.Module, client: str) -> dict[str, float]:
    """The loss on a client's own rows, in the mode that the model is in."""
    with torch.no_grad():
        return {"loss": float(model(**collate(rows()[client][:4])).loss)}
