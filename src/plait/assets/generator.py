"""String and digit tasks made from a seed: the text behind the tiny model, and a shift from it.

A row asks for one word or one sum: prompt `reverse plait=`, completion `tialp`, task `reverse`.
`pretrain` holds the instructions that the shipped model was trained on, `shift` those that it has
never seen. Which split an input belongs to is decided by a hash of the input, so that no family
shows in training what another is tested on.
"""

import hashlib
import itertools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from plait.options import shown
from plait.run.config import did_you_mean

LETTERS = string.ascii_lowercase
_LENGTHS = (4, 8)  # letters of a word
_SPLITS = {"test": range(20), "validation": range(20, 30), "train": range(30, 100)}  # of 100
_ROWS = {"train": 4000, "validation": 200, "test": 400}  # without `n`
_MOST = 1_000_000  # rows
_OPTIONS = ("families", "n", "label_noise", "form")
FORMS = ("pairs", "labelled", "prompts")
_MISSES = 10_000  # draws in a row that bring no new input: the family is used up


def _word(rng: Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(*_LENGTHS)))


def _numbers(rng: Random) -> str:
    return f"{rng.randrange(100)} {rng.randrange(100)}"


@dataclass(frozen=True)
class Family:
    """One kind of task. answer: input -> completion; draw: generator -> input; help: one line."""

    help: str
    answer: Callable[[str], str]
    draw: Callable[[Random], str] = _word


PRETRAIN: Mapping[str, Family] = {
    "copy": Family("the word itself", lambda word: word),
    "reverse": Family("the letters from last to first", lambda word: word[::-1]),
    "sort": Family("the letters from a to z", lambda word: "".join(sorted(word))),
    "upper": Family("the word in capitals", str.upper),
    "first": Family("the first letter", lambda word: word[0]),
    "last": Family("the last letter", lambda word: word[-1]),
    "add": Family(
        "the sum of two numbers", lambda pair: str(sum(map(int, pair.split()))), _numbers
    ),
}

SHIFT: Mapping[str, Family] = {
    "rotate": Family("the first letter moved to the end", lambda word: word[1:] + word[0]),
    "next": Family(
        "each letter's successor, a after z",
        lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word),
    ),
    "descend": Family("the letters from z to a", lambda word: "".join(sorted(word, reverse=True))),
    "swap": Family(
        "neighbours exchanged, pair by pair",
        lambda word: "".join(word[i : i + 2][::-1] for i in range(0, len(word), 2)),
    ),
    "ends": Family("first and last letter exchanged", lambda word: word[-1] + word[1:-1] + word[0]),
    "skip": Family("every second letter, from the first on", lambda word: word[::2]),
    "double": Family("each letter twice", lambda word: "".join(c + c for c in word)),
    "shout": Family("the letters from last to first in capitals", lambda word: word[::-1].upper()),
}

GENERATORS: Mapping[str, Mapping[str, Family]] = {"pretrain": PRETRAIN, "shift": SHIFT}
# Without `families`: those of the shift that rank 8 learns within 200 steps of 32 rows.
DEFAULT_FAMILIES = {"pretrain": tuple(PRETRAIN), "shift": ("rotate", "next", "swap", "shout")}


def split_of(text: str) -> str:
    """Return the split that an input belongs to: "train" (70 %), "validation" or "test" (20 %)."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % 100
    return next(split for split, range_ in _SPLITS.items() if number in range_)


def builtin_rows(spec: str, split: str, seed: int) -> list[dict[str, str]]:
    """Make the rows of a built-in generator: dicts with `prompt`, `completion` and `task`.

    spec: `[builtin:]NAME[?key=value&...]`, such as `shift?families=rotate,next&label_noise=0.1`.
    NAME is `pretrain` or `shift`. Keys: `families` (comma-separated; DEFAULT_FAMILIES),
    `n` (rows; 4,000 for train, 200 for validation, 400 for test) and `label_noise` (fraction of
    the training rows that get the answer to another input; 0), and `form`, for other objectives
    than sft: `pairs` has `chosen` and a wrong answer, `rejected`; `labelled` a `label` beside
    right and wrong completions in turn; `prompts` the `answer` for a reward.
    split: "train", "validation" or "test". seed: of all draws.

    The families take turns. No input occurs twice, and a smaller n gives the first rows of a
    larger one. Noise changes completions only; a larger fraction keeps the wrong answers of a
    smaller one.

    Raises ValueError for an unknown generator, key, family or split, a value out of range, and
    for more rows than a family has inputs.
    """
    name, _, query = spec.removeprefix("builtin:").partition("?")
    where = f"builtin:{name}"
    if name not in GENERATORS:
        raise ValueError(f"{where}: {name!r} is not a generator. {did_you_mean(name, GENERATORS)}")
    if split not in _SPLITS:
        raise ValueError(f"{where}: {split!r} is not a split. {did_you_mean(split, _SPLITS)}")
    known = GENERATORS[name]
    options = _options(query, where)
    families = options.get("families", ",".join(DEFAULT_FAMILIES[name])).split(",")
    for family in families:
        if family not in known:
            raise ValueError(
                f"{where}: families has {family!r}, which is not known. "
                f"{did_you_mean(family, known)}"
            )
    count = _whole(options.get("n", str(_ROWS[split])), where)
    noise = _fraction(options.get("label_noise", "0"), where)
    form = options.get("form", "")
    if form not in ("", *FORMS):
        raise ValueError(f"{where}: form is {shown(form)}. {did_you_mean(form, FORMS)}")

    draws = Random(f"inputs/{split}/{seed}")
    wrong = Random(f"noise/{split}/{seed}")
    rows, seen = [], set[str]()
    for task in itertools.islice(itertools.cycle(families), count):
        family = known[task]
        text = _new_input(family, split, draws, seen, f"{where}: family {task}")
        completion = family.answer(text)
        # Drawn for each row, needed or not: the fraction must not move the rest of the draws.
        level, other = wrong.random(), _other_answer(family, completion, wrong)
        given = other if split == "train" and level < noise else completion
        answers = {
            "": {"completion": given},
            "pairs": {"chosen": completion, "rejected": other},
            "labelled": {"completion": other, "label": "false"}
            if len(rows) // len(families) % 2
            else {"completion": completion, "label": "true"},
            "prompts": {"answer": completion},
        }[form]
        rows.append({"prompt": _prompt(task, text), **answers, "task": task})
    return rows


def pretraining_rows(families: Sequence[str], seed: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) of the pretraining families without end, in random order.

    A family named twice comes twice as often. Inputs are those of the train split and repeat
    where a family has few.
    """
    rng = Random(f"pretrain/{seed}")
    while True:
        task = rng.choice(families)
        text = PRETRAIN[task].draw(rng)
        if split_of(text) == "train":
            yield _prompt(task, text), PRETRAIN[task].answer(text)


def _prompt(task: str, text: str) -> str:
    return f"{task} {text}="


def _new_input(family: Family, split: str, rng: Random, seen: set[str], where: str) -> str:
    for _ in range(_MISSES):
        text = family.draw(rng)
        if text not in seen and split_of(text) == split:
            seen.add(text)
            return text
    raise ValueError(f"{where} has no more {split} inputs after {len(seen)} rows. Lower n.")


def _other_answer(family: Family, completion: str, rng: Random) -> str:
    """Return the answer to a random input that differs from this answer."""
    while (other := family.answer(family.draw(rng))) == completion:
        pass
    return other


def _options(query: str, where: str) -> dict[str, str]:
    """Split `key=value&key=value`."""
    options: dict[str, str] = {}
    for part in query.split("&") if query else []:
        key, equals, value = part.partition("=")
        if key not in _OPTIONS:
            raise ValueError(f"{where}: {key!r} is not an option. {did_you_mean(key, _OPTIONS)}")
        if not equals or not value:
            raise ValueError(f"{where}: {key} has no value. Write {key}=VALUE.")
        if key in options:
            raise ValueError(f"{where}: {key} is given twice. Give it once.")
        options[key] = value
    return options


def _whole(value: str, where: str) -> int:
    if not value.isdecimal() or len(value) > 18 or not 1 <= int(value) <= _MOST:
        raise ValueError(
            f"{where}: n is {shown(value)}. Give a whole number of rows, 1 or more, at most "
            f"{_MOST:,}."
        )
    return int(value)


def _fraction(value: str, where: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise ValueError(f"{where}: label_noise is {value!r}. Give a fraction from 0 to 1.")
    return fraction
