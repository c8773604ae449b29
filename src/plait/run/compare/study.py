"""The file of a comparison: arms, rates, seeds, and the runs that they make.

Every run is an ordinary run of `plait train` with a resolved config. Arms differ in their method
alone; rows, order of rows, initialisation and head come from the same seeds for all arms, so that
differences are paired.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.options import did_you_mean, option, shown
from plait.run.config import RunConfig, config_from_dict, config_to_dict
from plait.run.config.yaml import Source, check_section, override, read
from plait.run.metrics import METRICS, METRICS_OF

_KEYS = ("base", "arms", "compare")
_MOST_RUNS = 100_000
_VERSIONS = ("plait", "torch", "transformers", "peft")  # that change what a run computes


@dataclass(kw_only=True)
class CompareConfig:
    """How the arms are compared."""

    reference: str | None = option(None, "The arm to compare with; null: the first.")
    metric: str | None = option(
        None, "What decides, by its name in eval.json; null: accuracy, exact_match, mse or loss."
    )
    learning_rates: list[float] = option(
        list,
        "Tried by each arm on the validation rows; an empty list: training.learning_rate.",
        above=0,
    )
    tuning_seeds: int = option(1, "Seeds that each rate is tried with.", least=1, most=1000)
    seeds: int = option(5, "Seeds of the runs that are compared.", least=1, most=1000)
    workers: int = option(1, "Runs at a time, each in a process of its own.", least=1, most=256)
    dir: str = option("comparisons/first", "The folder of the comparison.", least=1)


@dataclass(frozen=True)
class Trial:
    """One run of a comparison. arm: its name. rate: learning rate. seed: of training."""

    arm: str
    rate: float
    seed: int
    config: RunConfig

    @property
    def key(self) -> str:
        """What the run folder is called: a digest of config, data and versions."""
        return _digest(self.config)


@dataclass(frozen=True)
class Study:
    """A comparison that was read and checked.

    base: the sections of every run. arms: name -> method section, in the file's order. seeds: of
    the compared runs. metric: a name in METRICS.
    """

    file: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    compare: CompareConfig
    reference: str
    metric: str

    @property
    def rates(self) -> list[float]:
        """The learning rates that each arm tries."""
        first = self.config(next(iter(self.arms)))
        return self.compare.learning_rates or [float(first.training["learning_rate"])]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the compared runs: those of the base and the ones after it."""
        first = self.config(next(iter(self.arms))).training["seed"]
        return [first + number for number in range(self.compare.seeds)]

    def config(
        self,
        arm: str,
        rate: float | None = None,
        seed: int | None = None,
        tuning: bool = False,
    ) -> RunConfig:
        """Return the config of a run.

        tuning: leave the test rows out, which a choice must not see.

        Raises ValueError for a method section, or a base, that `plait train` would refuse.
        """
        raw = copy.deepcopy(self.base)
        raw["method"] = dict(self.arms[arm])
        training, data = raw.setdefault("training", {}), raw.setdefault("data", {})
        if rate is not None:
            training["learning_rate"] = rate
        if seed is not None:
            training["seed"] = seed
        if tuning:
            data["test"] = None
        return config_from_dict(raw, file=f"{self.file}: arms.{arm}")

    def tuning(self) -> list[Trial]:
        """Return the runs that choose each arm's rate; [] if there is one rate."""
        if len(self.rates) < 2:
            return []
        seeds = [self.seeds[0] + number for number in range(self.compare.tuning_seeds)]
        return [
            Trial(arm, rate, seed, self.config(arm, rate, seed, tuning=True))
            for arm, rate, seed in itertools.product(self.arms, self.rates, seeds)
        ]

    def compared(self, rates: dict[str, float]) -> list[Trial]:
        """Return the runs that are compared, each arm at its rate."""
        return [
            Trial(arm, rates[arm], seed, self.config(arm, rates[arm], seed))
            for arm, seed in itertools.product(self.arms, self.seeds)
        ]


def read_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read the file of a comparison.

    `base` is a run file's path, relative to the comparison's, or its sections inline. `arms` is a
    method section for each name; where an option is a list that it does not take, or a list of
    lists, the arm stands for one arm for each item.

    Raises:
        FileNotFoundError: no such file, or no base.
        ValueError: what is wrong in it, with file, key and remedy; a base without the rows that
            tuning and comparing take; more than 100,000 runs.
    """
    raw = read(Path(path), "Write one; its sections are base, arms and compare.")
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path}: is a {type(raw).__name__}. Give the sections base, arms, compare."
        )
    source = Source(str(path), [override(raw, text) for text in overrides])
    for key in raw:
        if key not in _KEYS:
            raise ValueError(source.unknown(str(key), _KEYS, f"Sections: {', '.join(_KEYS)}."))
    base = _base(raw.get("base"), Path(path), source)
    compare = check_section(CompareConfig, raw.get("compare") or {}, "compare", source)
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
    reference = next(iter(arms)) if compare.reference is None else compare.reference
    if reference not in arms:
        raise ValueError(
            f"{source.at('compare.reference')} is {shown(reference)}, which is no arm. "
            f"{did_you_mean(reference, arms)}"
        )
    study = Study(str(path), base, arms, compare, reference, "")
    return dataclasses.replace(study, metric=_checked(study, source))


def _base(raw: Any, path: Path, source: Source) -> dict[str, Any]:
    if isinstance(raw, str):
        raw = read((path.parent / raw).resolve(), f"Correct base in {path}.")
    if not isinstance(raw, dict):
        raise ValueError(f"{source.at('base')} is {shown(raw)}. Give a run file or its sections.")
    for key in ("method", "output"):
        raw.pop(key, None)
    return raw


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


def _checked(study: Study, source: Source) -> str:
    """Check every arm's config; return the metric that decides."""
    compare = study.compare
    configs = {arm: study.config(arm) for arm in study.arms}
    data, task = configs[study.reference].data, configs[study.reference].model.task
    if data.test is None:
        raise ValueError(
            f"{source.at('base')}: data.test is not set, and the arms are compared on test rows. "
            "Give them."
        )
    if len(compare.learning_rates) > 1 and data.validation is None:
        raise ValueError(
            f"{source.at('compare.learning_rates')}: several rates, and data.validation of the "
            "base is not set. A rate is chosen on validation rows; give a source, or a fraction."
        )
    number = len(study.arms) * (
        len(study.rates) * compare.tuning_seeds * (len(study.rates) > 1) + compare.seeds
    )
    if number > _MOST_RUNS:
        raise ValueError(f"{source.file}: {number:,} runs. Give at most {_MOST_RUNS:,}.")
    if compare.metric is not None:
        if compare.metric not in METRICS_OF[task]:
            raise ValueError(
                f"{source.at('compare.metric')} is {shown(compare.metric)}, which a {task} run "
                f"does not measure. {did_you_mean(compare.metric, METRICS_OF[task])}"
            )
        return compare.metric
    generates = configs[study.reference].evaluation.generate
    first = {"classification": "accuracy", "regression": "mse", "causal_lm": "exact_match"}[task]
    return "loss" if first == "exact_match" and not generates else first


def _digest(config: RunConfig) -> str:
    """Return a digest of a run: its config without the folder, the data's files, the versions."""
    from importlib.metadata import version

    raw = config_to_dict(config)
    del raw["output"]
    sources = [raw["data"][split] for split in ("train", "validation", "test")]
    total = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode())
    for source in sources:
        for name in source if isinstance(source, list) else [source]:
            path = Path(str(name).rpartition("#")[0] or str(name))
            if isinstance(name, str) and path.is_file():
                total.update(hashlib.sha256(path.read_bytes()).digest())
    total.update(json.dumps([version(name) for name in _VERSIONS]).encode())
    return total.hexdigest()[:16]


def higher_is_better(study: Study) -> bool:
    """Whether more of the study's metric is better."""
    return METRICS[study.metric].higher_is_better
