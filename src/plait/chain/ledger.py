"""The ledger: every finished link of a chain, in fp32, as chain.safetensors and chain.json.

Merging many small links into a half-precision weight one after another destroys them, so trunk
weights and exports are always computed from here. It also keeps the sketches that a link freezes,
which adapter-only checkpoints of sharded training leave out.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from plait.chain.plan import ChainPlan
from plait.core.files import write_atomic

TENSORS, TABLE = "chain.safetensors", "chain.json"
_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One finished link of one layer: dW = scaling B A, A (k, in), B (out, k), on the CPU."""

    link: int
    module: str
    A: Tensor
    B: Tensor
    scaling: float
    steps: int


@dataclass
class Ledger:
    """The finished links of a chain and its progress.

    step: completed optimizer steps. link: the live link (0, 1, ..). modules: adapted layers.
    records: in the order of the ties. frozen: module -> the live link's frozen factor.
    """

    plan: ChainPlan
    total_steps: int
    adapter: str
    modules: list[str]
    step: int = 0
    link: int = 0
    records: list[Record] = field(default_factory=list)
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def stacked(self, module: str) -> tuple[Tensor, Tensor] | None:
        """A (R, in) and B (out, R) of a layer's finished links, scaling 1; None without any."""
        links = [record for record in self.records if record.module == module]
        if not links:
            return None
        return torch.cat([k.A for k in links]), torch.cat([k.scaling * k.B for k in links], dim=1)

    def save(self, folder: str | Path) -> None:
        """Write chain.safetensors and chain.json into a folder, each whole or absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for r in self.records:
            tensors |= {f"{r.link}/{r.module}/A": r.A, f"{r.link}/{r.module}/B": r.B}
        for module, sketch in self.frozen.items():
            tensors[f"frozen/{module}"] = sketch.detach().cpu()
        content = save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
        facts = {"seed": self.plan.seed, "recipe": self.plan.recipe}
        table = {
            "version": _VERSION,
            "plan": self.plan.to_dict(),
            "total_steps": self.total_steps,
            "adapter": self.adapter,
            "modules": self.modules,
            "step": self.step,
            "link": self.link,
            "frozen": sorted(self.frozen),
            "links": [
                {
                    "link": r.link,
                    "module": r.module,
                    "rank": len(r.A),
                    "scaling": r.scaling,
                    "steps": r.steps,
                    **facts,
                }
                for r in self.records
            ],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_atomic(folder / TENSORS, content)
        write_atomic(folder / TABLE, json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Ledger":
        """Read a ledger.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, cut off, or not of the other one.
        """
        folder = Path(folder)
        for name in (TABLE, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder}: {name} is missing, so the finished links of the chain are unknown. "
                    "Give a folder that a chain was saved to."
                )
        remedy = "Copy both files again, or resume from another checkpoint."
        try:
            table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / TABLE}: is not JSON ({error}). {remedy}") from None
        if not isinstance(table, dict) or table.get("version") != _VERSION:
            raise ValueError(
                f"{folder / TABLE}: is not a ledger that this version of plait reads. {remedy}"
            )
        content = (folder / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != table.get("sha256"):
            raise ValueError(
                f"{folder / TENSORS}: damaged, cut off, or of another {TABLE} (the checksum "
                f"differs). {remedy}"
            )
        try:
            tensors = load(content)
            return cls._from(table, tensors)
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder / TABLE}: is incomplete ({error}). {remedy}") from None

    @classmethod
    def _from(cls, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Ledger":
        plan = dict(table["plan"])
        if isinstance(plan["ranks"], list):
            plan["ranks"] = tuple(plan["ranks"])
        records = [
            Record(
                link=row["link"],
                module=row["module"],
                A=tensors[f"{row['link']}/{row['module']}/A"],
                B=tensors[f"{row['link']}/{row['module']}/B"],
                scaling=row["scaling"],
                steps=row["steps"],
            )
            for row in table["links"]
        ]
        return cls(
            ChainPlan(**plan),
            table["total_steps"],
            table["adapter"],
            table["modules"],
            table["step"],
            table["link"],
            records,
            {module: tensors[f"frozen/{module}"] for module in table["frozen"]},
        )

    def check(self, plan: ChainPlan, total_steps: int, where: str | Path) -> None:
        """Check that a chain is continued under the plan that it was made by.

        Raises:
            ValueError: the plans differ; lists the differences.
        """
        then = {**self.plan.to_dict(), "total_steps": self.total_steps}
        now = {**plan.to_dict(), "total_steps": total_steps}
        changed = [f"{k}: {then[k]} -> {now[k]}" for k in now if then[k] != now[k]]
        if changed:
            raise ValueError(
                f"{where}: the chain was made by another plan ({'; '.join(changed)}). Restore the "
                "plan, or start again."
            )

    def check_model(self, shapes: Mapping[str, tuple[int, int]], where: str | Path) -> None:
        """Check that the links fit a model.

        Args:
            shapes: module -> (out, in) of the layers that the model's adapter has.
            where: the folder, for the error.

        Raises:
            ValueError: other layers, or other sizes.
        """
        _same_layers(self.modules, list(shapes), where)
        for r in self.records:
            out_features, in_features = shapes[r.module]
            if r.A.shape[1] != in_features or r.B.shape[0] != out_features:
                raise ValueError(
                    f"{where}: link {r.link} of {r.module} is {r.B.shape[0]} x {r.A.shape[1]}, the "
                    f"layer {out_features} x {in_features}. Use the model that it was trained on."
                )


def _same_layers(saved: Sequence[str], here: Sequence[str], where: str | Path) -> None:
    apart = sorted(set(saved) ^ set(here))
    if apart:
        raise ValueError(
            f"{where}: the chain was trained on other layers ({apart[0]} and {len(apart) - 1} more "
            "differ). Use the model and target_modules that it was trained on."
        )
