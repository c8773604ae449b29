"""The run folder: what one training leaves and later stages read, and the form of its JSON files.

A JSON file names its schema and version in its first keys, a file of JSON lines in its first line.
Files without them are of plait 0.1, which are of version 1.
"""

import copy
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, Self, TypeVar

from plait.core.files import LOCK, naming, put_back, replace_dir, write_atomic
from plait.run.config import config_to_dict, load_config

__all__ = [
    "CHECKPOINTS",
    "RunFolder",
    "append_line",
    "diff_configs",
    "environment",
    "read_json",
    "read_lines",
    "replace_dir",
    "with_absolute_paths",
    "write_atomic",
    "write_json",
    "write_lines",
]

Config = TypeVar("Config", bound=Any)

CHECKPOINTS = "checkpoints"
VERSION = 1  # of all schemas
_PACKAGES = ("plait", "torch", "peft", "transformers", "accelerate", "datasets", "safetensors")
# What a resumed run may change: none of these keys changes a weight.
_FREE = (
    "evaluation.batch_size",
    "output.",
    "parallel.processes",  # the folder's facts know how many there were
    "training.logging_",
    "training.log_level",
    "training.report_to",
    "training.run_name",
    "training.project",
    "training.save_steps",
    "training.save_strategy",
    "training.save_total_limit",
    "training.disable_tqdm",
)
_EVALUATION, _ENVIRONMENT, _METRICS = "plait.eval", "plait.environment", "plait.metrics"
# Of the facts about a run that later stages read.
_FACTS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "labels": (list, NoneType),
    "tasks": (list, NoneType),
    "chat_template": (str, NoneType),
    **dict.fromkeys(("train_rows", "train_tokens", "trainable", "parameters"), (int,)),
    **dict.fromkeys(("steps", "stored", "processes"), (int,)),
    "seconds": (int, float),
}


@dataclass(frozen=True, init=False)
class RunFolder:
    """The files of one run below `path`, which need not be there yet."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    @classmethod
    def free(cls, path: str | Path) -> Self:
        """Return a folder to be made; FileExistsError when there is something at `path` already."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(p.name != LOCK for p in path.iterdir())):
            raise FileExistsError(
                f"{path}: this run folder exists and is not empty. Continue it with --resume, "
                "remove it, or give another output.dir."
            )
        return cls(path)

    @classmethod
    def create(cls, path: str | Path) -> Self:
        """Make a new run folder; FileExistsError when there is something at `path` already."""
        folder = cls.free(path)
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def unfinished(cls, path: str | Path, config: dict[str, Any]) -> Self:
        """Return the folder of a run to be resumed.

        config: of the resumed run, as `config_to_dict` gives it, with absolute paths.

        Raises FileNotFoundError if there is no run at `path`, and ValueError if it is finished or
        began with another config.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise FileNotFoundError(
                f"{path}: there is no run to resume (config.yaml is missing). Train without "
                "--resume."
            )
        if folder.card.is_file():
            raise ValueError(
                f"{path}: this run is finished, nothing is left to resume. Train to another "
                f"output.dir, or evaluate it: plait evaluate {path}"
            )
        began = with_absolute_paths(load_config(folder.config))
        changes = diff_configs(config_to_dict(began), config)
        changes = [line for line in changes if not line.startswith(_FREE)]
        if changes:
            lines = "".join(f"\n  {line}" for line in changes)
            raise ValueError(
                f"{path}: the config changed since this run began, so the result would be of "
                f"neither:{lines}\nPut the values back, or train to another output.dir."
            )
        return folder

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return an existing run folder; FileNotFoundError when there is no run at `path`."""
        folder = cls(path)
        if not folder.config.is_file():
            raise FileNotFoundError(
                f"{path}: no run is here (config.yaml is missing). Give the output.dir of a "
                "finished run."
            )
        for trained in (folder.adapter, folder.model):
            put_back(trained)
        return folder

    def discard(self) -> None:
        """Remove everything that this run wrote into its folder."""
        for path in self.path.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

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
    def lora(self) -> Path:
        """The adapter as a plain LoRA, for every reader."""
        return self.path / "lora"

    @property
    def model(self) -> Path:
        """The trained model after full fine-tuning, instead of an adapter."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.path / CHECKPOINTS

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

    @property
    def start(self) -> Path:
        """The start of an adapter that holds a part of the base weight."""
        return self.checkpoints / "initial"

    def begin(self, config: str, seeds: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Make the folder and write what is known before training; a resumed run keeps its facts.

        config: as YAML. seeds: what they seed -> number. facts: as for `note`.

        Raises ValueError if a resumed run's rows changed; a run of plait 0.1 noted only their
        number.
        """
        noted = self.read_facts()
        for name in ("train_rows", "train_tokens", "labels", "train_digest", "validation_digest"):
            if name in noted and noted[name] != facts.get(name):
                raise ValueError(
                    f"{self.path}: the data changed since this run began ({name}: {noted[name]} -> "
                    f"{facts.get(name)}). Put the data back, or train to another output.dir."
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, config)
        write_json(
            self.environment,
            _ENVIRONMENT,
            environment() | {"seeds": dict(seeds), "run": {**noted, **facts}},
        )

    def read_environment(self) -> dict[str, Any]:
        """Return versions, hardware, seeds, and as `run` the facts; {} before training.

        Raises ValueError for a damaged file.
        """
        remedy = "Train again."
        content = read_json(self.environment, _ENVIRONMENT, remedy)
        facts = content.get("run", {})
        if not isinstance(facts, dict):
            raise ValueError(f"{self.environment}: run is {facts!r:.60}, not an object. {remedy}")
        for name, types in _FACTS.items():
            value = facts.get(name)
            if name in facts and (not isinstance(value, types) or isinstance(value, bool)):
                kinds = " or ".join(t.__name__.removesuffix("Type") for t in types)
                raise ValueError(
                    f"{self.environment}: run.{name} is {value!r:.60}, not {kinds}. {remedy}"
                )
        return content

    def read_facts(self) -> dict[str, Any]:
        """Return what training noted of this run; {} before training.

        Raises ValueError for a damaged file.
        """
        return self.read_environment().get("run", {})

    def note(self, **facts: Any) -> None:
        """Add facts about this run to environment.json."""
        content = self.read_environment()
        content["run"] = content.get("run", {}) | facts
        write_json(self.environment, _ENVIRONMENT, content)

    def read_evaluation(self) -> dict[str, Any]:
        """Return metrics by occasion (before, after, test, ..); {} before the first evaluation.

        Raises ValueError for a damaged file.
        """
        remedy = "Remove it and evaluate again."
        content = read_json(self.evaluation, _EVALUATION, remedy)
        for name, part in content.items():
            if not isinstance(part, str if name == "split" else dict):
                raise ValueError(f"{self.evaluation}: {name} is {part!r:.60}. {remedy}")
        return content

    def write_evaluation(self, **parts: Any) -> None:
        """Set some keys of eval.json and keep the others."""
        write_json(self.evaluation, _EVALUATION, self.read_evaluation() | parts)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; [] before training.

        Raises ValueError for a damaged file.
        """
        rows = read_lines(self.metrics, _METRICS)
        for row in rows:
            if not isinstance(row.get("step"), int):
                raise ValueError(f"{self.metrics}: {row!r:.60} has no step. Remove that line.")
        return rows

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the lines of metrics.jsonl."""
        write_lines(self.metrics, _METRICS, rows)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl, which is there already."""
        append_line(self.metrics, row)


# ------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, schema: str, remedy: str) -> dict[str, Any]:
    """Return the content of a JSON file without schema and version; {} if there is no file.

    remedy: what the error about a damaged file says to do.

    Raises ValueError for a damaged file, one of another schema or of a newer version.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise ValueError(f"{path}: is not JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is a {type(content).__name__}, not an object. {remedy}")
    return _checked(content, path, schema, remedy)


def write_json(path: Path, schema: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file that `read_json` reads."""
    write_atomic(path, json.dumps({**_header(schema), **content}, indent=1) + "\n")


def read_lines(path: Path, schema: str) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; [] if there is no file.

    A last line that a killed process left unfinished is dropped.

    Raises as `read_json` does.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
            if number < len(lines):
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(
                    f"{path}: line {number} is not JSON: {reason}. Remove that line."
                ) from None
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is {row!r:.60}, no object. Remove that line.")
        rows.append(row)
    if rows and "schema" in rows[0]:
        _checked(rows.pop(0), path, schema, "Give the file of a run.")
    return rows


def write_lines(path: Path, schema: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines that `read_lines` reads."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in (_header(schema), *rows)))


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of JSON lines."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=float) + "\n")


def _header(schema: str) -> dict[str, Any]:
    return {"schema": schema, "version": VERSION}


def _checked(content: dict[str, Any], path: Path, schema: str, remedy: str) -> dict[str, Any]:
    """Take schema and version off a file's content and check them."""
    actual, number = content.pop("schema", schema), content.pop("version", VERSION)
    if actual != schema:
        raise ValueError(f"{path}: schema is {actual!r}, it should be {schema!r}. {remedy}")
    if not isinstance(number, int) or number > VERSION:
        raise ValueError(
            f"{path}: version is {number!r}, and this plait reads versions up to {VERSION}. "
            "Upgrade plait: pip install --upgrade plait"
        )
    return content


# ------------------------------------------------------------------------------- files and facts


def with_absolute_paths(config: Config) -> Config:
    """Return a config that means the same in every working folder.

    config: with the sections `model` and `data`. What is nothing here, such as a hub id,
    stays as it is.
    """
    model, data = config.model, config.data
    base = Path(model.name).expanduser()
    if not model.name.startswith("builtin:") and base.is_dir():
        model = replace(model, name=_absolute(base))
    if model.adapter is not None:
        model = replace(model, adapter=_absolute(Path(model.adapter).expanduser()))
    sources = {key: getattr(data, key) for key in ("train", "validation", "test")}
    data = replace(data, **{key: _absolute_sources(x) for key, x in sources.items()})
    if data.chat_template is not None and Path(data.chat_template).expanduser().is_file():
        data = replace(data, chat_template=_absolute(Path(data.chat_template).expanduser()))
    changed: Any = copy.copy(config)
    changed.model, changed.data = model, data
    return changed


def _absolute_sources(sources: Any) -> Any:
    """The sources of a split with the paths of files made absolute."""
    if isinstance(sources, list):
        return [_absolute_sources(source) for source in sources]
    if not isinstance(sources, str) or sources.startswith("builtin:"):
        return sources
    name, sign, part = sources, "", ""
    if not Path(sources).exists():
        name, sign, part = sources.partition("#")
    path = Path(name).expanduser()
    absolute, there = _absolute(path), path.exists() or bool(glob.glob(str(path)))
    if not there or (sign and "#" in absolute):  # a second "#" would change its meaning
        return sources
    return f"{absolute}{sign}{part}"


def _absolute(path: Path) -> str:
    return str(path.resolve() if ".." in path.parts else path.absolute())


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
