"""The run folder: what one training leaves and later stages read."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plait.core.files import umask, write_atomic

__all__ = ["RunFolder", "diff_configs", "environment", "replace_dir", "write_atomic"]

_PACKAGES = ("plait", "torch", "peft", "transformers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run below `path`."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def new(cls, path: str | Path) -> "RunFolder":
        """Return a folder to be made; FileExistsError when there is something at `path` already."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path}: this run folder exists and is not empty. Continue it with --resume, "
                "remove it, or give another output.dir."
            )
        return cls(path)

    @classmethod
    def create(cls, path: str | Path) -> "RunFolder":
        """Make a new run folder; FileExistsError when there is something at `path` already."""
        folder = cls.new(path)
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Return an existing run folder; FileNotFoundError when there is no run at `path`."""
        folder = cls(Path(path))
        if not folder.config.is_file():
            raise FileNotFoundError(
                f"{path}: no run is here (config.yaml is missing). Give the output.dir of a "
                "finished run."
            )
        return folder

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, as training went."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model after full fine-tuning, instead of an adapter."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Metrics before and after training."""
        return self.path / "eval.json"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def loss_curve(self) -> Path:
        """The picture of the loss."""
        return self.path / "loss.png"


def replace_dir(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write(folder)` fill a temporary folder, then put it at `path`.

    A folder that was there stays untouched until the new one is complete, and comes back when
    the last rename fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new."))
    try:
        write(new)
        for file in filter(Path.is_file, new.rglob("*")):  # some writers make files private
            file.chmod(0o666 & ~umask())
        new.chmod(0o777 & ~umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old)
            try:
                os.replace(new, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def environment() -> dict[str, Any]:
    """Return versions and hardware: what somebody else needs to compare a run."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 1,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def diff_configs(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List the differences of two nested dicts as `key: old -> new`, sorted by key."""
    absent = object()
    lines = []
    for key in sorted({*old, *new}, key=str):
        a, b = old.get(key, absent), new.get(key, absent)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += diff_configs(a, b, f"{prefix}{key}.")
        elif a is absent or b is absent or a != b:
            shown = ["(not set)" if v is absent else repr(v) for v in (a, b)]
            lines.append(f"{prefix}{key}: {shown[0]} -> {shown[1]}")
    return lines
