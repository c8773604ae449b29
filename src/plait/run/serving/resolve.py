"""Turn a name into the folder of a plain LoRA, for servers that load adapters on request.

`Adapters(root, cache, base)` serves the folders below one root: run folders, adapter folders and
exported ones. What is no plain LoRA is converted by plait.run.serving.convert in a fresh process,
once; the result stays in the cache under a digest of the files that it was made from. This module
reads JSON only: it imports neither torch nor peft, and it runs no code that a folder brings along.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from plait._version import __version__
from plait.upstream.table import UNEVEN

_CONFIG, _WEIGHTS, _RUN = "adapter_config.json", "adapter_model.safetensors", "config.yaml"
_EXPORT = "plait_export.json"


class AdapterError(ValueError):
    """A folder that is there and that cannot be served; the message says why and what to do."""


def find(root: Path, name: str) -> Path | None:
    """Return the folder that a name means below `root`.

    None for a name that leads out of it, or to no folder of an adapter or a run. A name comes from
    whoever may call the server.
    """
    root = root.resolve()
    if not name or "\0" in name or Path(name).is_absolute():
        return None
    folder = (root / name).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        return None
    if (folder / _RUN).is_file() or (folder / _CONFIG).is_file():
        return folder
    return None


def plain_lora(folder: Path, cache: Path, base: str) -> Path:
    """Return a folder with the plain LoRA of a run folder, adapter folder or exported folder.

    Args:
        folder: that `find` returned.
        cache: where converted adapters are kept.
        base: the model that the server serves.

    Raises:
        AdapterError: the adapter is of another base model, is a pickle, is damaged, or cannot be a
            plain LoRA.
    """
    adapter = folder / "adapter" if (folder / _RUN).is_file() else folder
    if not adapter.is_dir():
        raise AdapterError(
            f"{folder.name}: the run has no adapter/. Either its training did not finish, or it "
            "fine-tuned the whole model, which is served by itself."
        )
    config = _config(adapter)
    trained_on = config.get("base_model_name_or_path")
    if not _same_model(trained_on, base):
        raise AdapterError(
            f"{folder.name}: the adapter was trained on {trained_on}, and this server serves "
            f"{base}. Serve it with its own base model."
        )
    if not (adapter / _WEIGHTS).is_file():
        raise AdapterError(
            f"{folder.name}: {_WEIGHTS} is missing. Save the adapter as safetensors; a pickle can "
            "run any code when it is read."
        )
    if _exact_export(folder / "lora"):  # that training or `plait export` wrote into the run
        return folder / "lora"
    chained = (adapter / "chain.json").is_file()
    uneven = any(config.get(key) for key in UNEVEN)
    if config.get("peft_type") == "LORA" and not chained and not uneven:
        return adapter
    out = cache / _digest(folder, adapter)
    if not (out / _CONFIG).is_file():
        _convert(folder, out)
    return out


def _config(adapter: Path) -> dict[str, Any]:
    try:
        config = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{adapter.name}: {_CONFIG} cannot be read ({error}).") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{adapter.name}: {_CONFIG} is no JSON object. Save the adapter again.")
    return config


def _exact_export(folder: Path) -> bool:
    """Whether a folder is an export of the whole update, in the form for every server."""
    try:
        facts = json.loads((folder / _EXPORT).read_text(encoding="utf-8"))
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    even = isinstance(config, dict) and not any(config.get(key) for key in UNEVEN)
    exact = isinstance(facts, dict) and facts.get("to") == "lora" and facts.get("exact") is True
    return even and exact and (folder / _WEIGHTS).is_file()


def _same_model(one: Any, other: str) -> bool:
    """Whether two names mean one model: equal, or two paths of one folder."""
    if one == other:
        return True
    paths = [Path(str(name)).expanduser() for name in (one, other)]
    return all(path.is_dir() for path in paths) and os.path.samefile(*paths)


def _digest(folder: Path, adapter: Path) -> str:
    """A name for what these files are converted to by this version of plait."""
    digest = hashlib.sha256(__version__.encode())
    files = [file for file in sorted(adapter.iterdir()) if file.suffix in (".json", ".safetensors")]
    for file in [*files, folder / _RUN]:
        if file.is_file():
            digest.update(f"\0{file.name}\0".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]


def _convert(folder: Path, out: Path) -> None:
    # -P: a module in the working folder must not stand in for one of the standard library. The
    # server's accelerators are left alone.
    command = [sys.executable, "-P", "-m", "plait.run.serving.convert", folder, out]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = _finish([*map(str, command)], environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AdapterError(f"{folder.name}: {last}")


def _finish(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True)
