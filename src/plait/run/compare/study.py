"""The file of a comparison: arms, rates, seeds, factors, and the runs that they make.

Every run is an ordinary run of `plait train` with a resolved config. Arms differ in their method
alone; rows, order of rows, initialisation and head come from the same seeds for all arms, so that
differences are paired.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.options import did_you_mean, option, shown
from plait.run.config import RunConfig, config_from_dict, config_to_dict
from plait.run.config.yaml import Source, check_section, read
from plait.run.metrics import METRICS, METRICS_OF

_MOST_RUNS = 100_000
_VERSIONS = ("plait", "torch", "transformers", "peft")  # that change what a run computes
_WHOLE = 2**26  # bytes of a file that is read whole for a digest; of a larger one both ends
TRANSFER = "transfer"  # value of tune.learning_rate
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(kw_only=True)
class TuneConfig:
    """How each arm's learning rate is chosen: on validation rows, with as many trials as others."""

    learning_rate: list[float] | Literal["transfer"] = option(
        list,
        "Rates that each arm tries first; an empty list: training.learning_rate. transfer: the "
        "reference tries those of `reference`, and each other arm three around the rate that is "
        "carried over from the best of them.",
        above=0,
    )
    reference: list[float] = option(
        list,
        "With transfer, rates that the reference tries first; an empty list: a half of "
        "training.learning_rate, itself and twice that.",
        above=0,
    )
    budget: Literal["full", "halving"] = option(
        "full",
        "halving: all rates train for a quarter of the steps, and the best third of them for all.",
    )
    seeds: int = option(1, "Seeds that each rate is tried with.", least=1, most=1000)
    grow: int = option(
        3,
        "Rounds in which each arm tries one more rate while the best rate of some arm is at an end "
        "of its grid.",
        least=0,
        most=20,
    )


@dataclass(kw_only=True)
class VaryConfig:
    """Factors: the arms are tuned and compared for each combination of their values."""

    train_rows: list[int] = option(list, "Values of data.limit.", least=1)
    label_noise: list[float] = option(list, "Values of data.label_noise.", least=0, below=1)


@dataclass(kw_only=True)
class StudyConfig:
    """How the arms are compared."""

    reference: str | None = option(None, "The arm to compare with; null: the first.")
    match: Literal["none", "rank", "parameters", "time", "memory"] = option(
        "none",
        "What all arms have in common with the reference: their rank, or about as many trained "
        "parameters, by the choice of r. time and memory are refused for now.",
    )
    tune: TuneConfig = option(TuneConfig, "How each arm's learning rate is chosen.")
    seeds: int = option(
        5, "Seeds of the runs that are compared: training.seed and the next ones.", least=1,
        most=1000,
    )  # fmt: skip
    vary: VaryConfig = option(VaryConfig, "Factors.")
    metrics: list[str] = option(
        list,
        "The first decides; the others are shown. Their names are those of eval.json; an empty "
        "list: accuracy, exact_match, mse or loss.",
    )
    budget: str | None = option(
        None, "Time that one call may take, such as 30m or 2h; null: until all runs are done."
    )
    engine: Literal["local", "ray"] = option("local", "Where runs take place. ray is refused.")
    workers: int | None = option(
        None,
        "Runs at a time, each in a process that keeps the base model; null: one for each core, at "
        "most 8, and 1 with a GPU.",
        least=1,
        most=256,
    )
    dir: str | None = option(
        None, "The folder of the comparison; null: comparisons/ and the file's name.", least=1
    )


_KEYS = ("base", "arms", *(field.name for field in dataclasses.fields(StudyConfig)))


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    arm: its name. cell: the factors' values. rate: learning rate. seed: of training.
    """

    arm: str
    cell: str
    rate: float
    seed: int
    config: RunConfig

    @functools.cached_property
    def key(self) -> str:
        """What the run folder is called: a digest of config, data and versions."""
        return _digest(self.config)


@dataclass(frozen=True)
class Study:
    """A comparison that was read and checked.

    base: the sections of every run. arms: name -> method section, in the file's order. cells: name
    -> what the factors set in the section `data`; one without a name if nothing is varied.
    metrics: names in METRICS, the one that decides first.
    """

    file: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    cells: dict[str, dict[str, Any]]
    options: StudyConfig
    reference: str
    metrics: list[str]

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    @property
    def task(self) -> str:
        """`model.task` of all runs."""
        return self.config(self.reference).model.task

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return METRICS[self.metric].higher_is_better

    @property
    def folder(self) -> Path:
        """Where the comparison is."""
        return Path(self.options.dir or f"comparisons/{Path(self.file).stem}")

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the reference."""
        return [arm for arm in self.arms if arm != self.reference]

    @property
    def transfers(self) -> bool:
        """Whether rates are carried over from the reference to the other arms."""
        return self.options.tune.learning_rate == TRANSFER

    @functools.cached_property
    def rates(self) -> list[float]:
        """The learning rates that each arm tries first, ascending; with transfer the reference."""
        tune = self.options.tune
        given = tune.reference if self.transfers else tune.learning_rate
        own = float(self.config(self.reference).training["learning_rate"])
        if self.transfers and not given:
            return [own / 2, own, 2 * own]
        return sorted(map(float, given)) or [own]

    @functools.cached_property
    def seeds(self) -> list[int]:
        """Seeds of the compared runs: that of the base and the ones after it."""
        first = self.config(self.reference).training["seed"]
        return [first + number for number in range(self.options.seeds)]

    @property
    def tuning_seeds(self) -> list[int]:
        """Seeds that rates are tried with."""
        return [self.seeds[0] + number for number in range(self.options.tune.seeds)]

    @property
    def seconds(self) -> float:
        """Seconds that a call may take; infinite without a budget."""
        return math.inf if self.options.budget is None else duration(self.options.budget)

    def config(
        self,
        arm: str,
        cell: str | None = None,
        rate: float | None = None,
        seed: int | None = None,
        tuning: bool = False,
        steps: int | None = None,
    ) -> RunConfig:
        """Return the config of a run; what is None is left as the base has it.

        tuning: leave the test rows out, which a choice must not see. steps: all that are made.

        Raises ValueError for a method section, or a base, that `plait train` would refuse.
        """
        raw = copy.deepcopy(self.base)
        raw["method"] = dict(self.arms[arm])
        training, data = raw.setdefault("training", {}), raw.setdefault("data", {})
        data |= self.cells.get(cell or "", {})
        changes = {"learning_rate": rate, "seed": seed, "max_steps": steps}
        training |= {key: value for key, value in changes.items() if value is not None}
        if tuning:
            data["test"] = None
        return config_from_dict(raw, file=f"{self.file}: arms.{arm}")

    def tuning(self, arm: str, cell: str, rate: float, steps: int | None = None) -> list[Trial]:
        """Return the runs that try a rate, one for each seed of tuning; steps: None for all."""
        return [
            Trial(arm, cell, rate, seed, self.config(arm, cell, rate, seed, True, steps))
            for seed in self.tuning_seeds
        ]

    def compared(self, rates: Mapping[tuple[str, str], float | None]) -> list[Trial]:
        """Return the runs that are compared: (arm, cell) -> its rate; None: none trains.

        Seed after seed, so that what is there when time is up can be compared.
        """
        return [
            Trial(arm, cell, rate, seed, self.config(arm, cell, rate, seed))
            for cell, seed, arm in itertools.product(self.cells, self.seeds, self.arms)
            if (rate := rates.get((arm, cell))) is not None
        ]


def read_study(path: str | Path, *, import_plugins: bool = False) -> Study:
    """Read the file of a comparison.

    `base` is a run file's path, relative to the comparison's, or its sections inline. `arms` is a
    method section for each name; where an option is a list that it does not take, or a list of
    lists, the arm stands for one arm for each item. The other keys are those of StudyConfig.
    import_plugins: as for load_config.

    Raises:
        FileNotFoundError: no such file, or no base.
        ValueError: what is wrong in it, with file, key and remedy; a base without the rows that
            tuning and comparing take; more than 100,000 runs.
    """
    path = Path(path)
    raw = read(path, "Write one; its keys are base, arms and how these are compared.")
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: is a {type(raw).__name__}. Give the keys base, arms, seeds ...")
    source = Source(str(path))
    for key in raw:
        if key not in _KEYS:
            raise ValueError(source.unknown(str(key), _KEYS, f"Keys: {', '.join(_KEYS)}."))
    base = _base(raw.get("base"), path, source)
    if import_plugins:
        config_from_dict(base, file=str(path), import_plugins=True)
    given = {k: v for k, v in raw.items() if k not in ("base", "arms") and v is not None}
    options = check_section(StudyConfig, given, "", source)
    sections = raw.get("arms")
    if not isinstance(sections, dict) or not sections:
        raise ValueError(f"{source.at('arms')}: give a method section for each arm's name.")
    arms: dict[str, dict[str, Any]] = {}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{source.at(f'arms.{name}')} is {shown(section)}. Give a method.")
        arms |= _multiplied(str(name), section, base, str(path))
    if len(arms) < 2:
        raise ValueError(f"{source.at('arms')}: one arm, and nothing to compare it with. Add one.")
    reference = next(iter(arms)) if options.reference is None else options.reference
    if reference not in arms:
        raise ValueError(
            f"{source.at('reference')} is {shown(reference)}, which is not an arm. "
            f"{did_you_mean(reference, arms)}"
        )
    study = Study(str(path), base, arms, _cells(options.vary), options, reference, [])
    return dataclasses.replace(study, metrics=_checked(study, source))


def _base(raw: Any, path: Path, source: Source) -> dict[str, Any]:
    if isinstance(raw, str):
        raw = read((path.parent / raw).resolve(), f"Correct base in {path}.")
    if not isinstance(raw, dict):
        raise ValueError(f"{source.at('base')} is {shown(raw)}. Give a run file or its sections.")
    return {key: value for key, value in raw.items() if key not in ("method", "output")}


def _cells(vary: VaryConfig) -> dict[str, dict[str, Any]]:
    """Return the combinations of the factors' values: name -> keys of `data`."""
    factors = {name: list(dict.fromkeys(values)) for name, values in vars(vary).items() if values}
    cells = {}
    for values in itertools.product(*factors.values()):
        chosen = dict(zip(factors, values, strict=True))
        name = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in chosen.items())
        cells[name] = {{"train_rows": "limit"}.get(key, key): v for key, v in chosen.items()}
    return cells


def _multiplied(
    name: str, section: dict[str, Any], base: dict[str, Any], file: str
) -> dict[str, dict[str, Any]]:
    """Return the arms that a section stands for: one for each combination of its lists' items."""
    choices: dict[str, list[Any]] = {}
    for key, value in section.items():
        if isinstance(value, list) and value and not _takes(section, key, value, base, file):
            choices[key] = value
    arms = {}
    for items in itertools.product(*choices.values()):
        chosen = dict(zip(choices, items, strict=True))
        words = " ".join(f"{key}={_word(item)}" for key, item in chosen.items())
        arms[f"{name} {words}".strip()] = {**section, **chosen}
    return arms


def _takes(
    section: dict[str, Any], key: str, value: list[Any], base: dict[str, Any], file: str
) -> bool:
    """Whether a method's option takes this list as its value."""
    only = {"name": section.get("name", "lora"), key: value}
    try:
        config_from_dict({"model": base.get("model") or {}, "method": only}, file=file)
    except ValueError:
        return False
    return True


def _word(item: Any) -> str:
    return item if isinstance(item, str) else json.dumps(item, default=str)


def _checked(study: Study, source: Source) -> list[str]:
    """Check every arm's config; return the metrics, the one that decides first."""
    options = study.options
    configs = {arm: study.config(arm) for arm in study.arms}
    data, task = configs[study.reference].data, configs[study.reference].model.task
    objective = configs[study.reference].objective.name
    if objective != "sft":
        raise ValueError(
            f"{source.at('base')}: objective is {objective}, and comparisons are of supervised "
            "runs (sft). Remove it."
        )
    if options.match in ("time", "memory"):
        raise ValueError(
            f"{source.at('match')} is {options.match}, which this plait cannot match. Use "
            f"parameters or rank; the report shows the {options.match} of each arm."
        )
    if options.engine == "ray":
        raise ValueError(f"{source.at('engine')} is ray, which is not built. Use local.")
    if options.budget is not None:
        try:
            duration(options.budget)
        except ValueError as error:
            raise ValueError(f"{source.at('budget')} {error}") from None
    if data.test is None:
        raise ValueError(
            f"{source.at('base')}: data.test is not set, and the arms are compared on test rows. "
            "Give them."
        )
    rates, tune = study.rates, options.tune
    key = "tune.reference" if study.transfers else "tune.learning_rate"
    if tune.reference and not study.transfers:
        raise ValueError(
            f"{source.at('tune.reference')}: is read with tune.learning_rate: transfer alone. Set "
            "that, or give all rates as tune.learning_rate."
        )
    if len(set(rates)) < len(rates):
        raise ValueError(f"{source.at(key)}: a rate is given twice. Remove one.")
    if study.transfers and len(rates) < 2:
        raise ValueError(
            f"{source.at(key)}: one rate, and rates are carried over from the best of several. "
            "Give two or more."
        )
    if len(rates) > 1 and data.validation is None:
        raise ValueError(
            f"{source.at(key)}: several rates, and data.validation of the "
            "base is not set. A rate is chosen on validation rows; give a source, or a fraction."
        )
    tried = (len(rates) + options.tune.grow) * options.tune.seeds if len(rates) > 1 else 0
    number = len(study.arms) * len(study.cells) * (tried + options.seeds)
    if number > _MOST_RUNS:
        raise ValueError(f"{source.file}: {number:,} runs. Give at most {_MOST_RUNS:,}.")
    for metric in options.metrics:
        if metric not in METRICS_OF[task]:
            raise ValueError(
                f"{source.at('metrics')}: {shown(metric)} is not measured by a {task} run. "
                f"{did_you_mean(metric, METRICS_OF[task])} Time, memory and size of each arm are "
                "shown in any case."
            )
    if options.metrics:
        return list(dict.fromkeys(options.metrics))
    generates = configs[study.reference].evaluation.generate
    first = {"classification": "accuracy", "regression": "mse", "causal_lm": "exact_match"}[task]
    return ["loss"] if first == "exact_match" and not generates else [first]


def duration(text: str) -> float:
    """Return the seconds of a text such as 90s, 30m, 1.5h or 2d; ValueError for another one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"is {shown(text)}. Give a time such as 90s, 30m or 2h.")
    return float(found[1]) * _UNITS[found[2]]


# ------------------------------------------------------------------------------------- digests


def _digest(config: RunConfig) -> str:
    """Return a digest of a run: its config without the folder, the files that it reads, versions.

    Files are those of the rows, of the chat template and of a model in a local folder.
    """
    from importlib.metadata import version

    raw = config_to_dict(config)
    del raw["output"]
    total = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode())
    sources = [raw["data"][key] for key in ("train", "validation", "test", "chat_template")]
    for source in sources:
        for name in source if isinstance(source, list) else [source]:
            if isinstance(name, str):
                for path in (Path(name), Path(name.rpartition("#")[0] or name)):
                    if _is_file(path):
                        total.update(_of_file(path))
                        break
    model = Path(config.model.name).expanduser()
    if not config.model.name.startswith("builtin:") and model.is_dir():
        for path in sorted(model.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                total.update(path.name.encode() + _of_file(path))
    total.update(json.dumps([version(name) for name in _VERSIONS]).encode())
    return total.hexdigest()[:16]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _of_file(path: Path) -> bytes:
    state = path.stat()
    return _of_content(str(path.resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _of_content(path: str, size: int, changed: int) -> bytes:
    """Digest a file; changed: when, so that a changed file is read again."""
    with open(path, "rb") as file:
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).digest()
        start = file.read(2**20)
        file.seek(-(2**20), 2)
        return hashlib.sha256(start + file.read() + str(size).encode()).digest()
