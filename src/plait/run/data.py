"""From rows to batches: columns, labels, tokens, the loss mask, splits and the overlap check.

A row becomes either *segments* of text, each trained or not (causal models), or a text with a
label (encoders). The prompt's tokens are the same as those that generation starts from: the whole
text is tokenized at once where that keeps the tokens of every leading part, and part by part
where a token would cross a border.
"""

import bisect
import itertools
import random
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from plait.run.config import ColumnsConfig, DataConfig, RunConfig, did_you_mean
from plait.run.rows import Row, read_rows

Kind = Literal["completion", "messages", "text", "classification", "regression"]
Split = Literal["train", "validation", "test"]
IGNORED = -100  # the label of a token that is not trained

_TOKENIZER_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class DataBundle:
    """The data of one run.

    Each split has `input_ids`, `attention_mask`, `labels` (token ids with -100 where no loss is
    taken; a class index; a number) and the raw strings: `prompt` and `completion` (causal; the
    first `prompt_length` ids are the prompt), or `text`, `text_pair`, `label`. With tasks, `task`
    is the name and `task_id` its index in `tasks`.

    labels: class names by index, classification only. tasks: task names by index, those of the
    training rows first. longest: longest row in tokens, of all splits.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    kind: Kind
    collator: "Collator"
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None
    tasks: list[str] | None
    longest: int

    def splits(self) -> dict[str, Dataset]:
        """Return the splits that are there, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in every.items() if split is not None}

    @property
    def held_out_split(self) -> Split | None:
        """The split that a run is judged on: test, else validation, else None."""
        if self.test is not None:
            return "test"
        return None if self.validation is None else "validation"


class Collator:
    """Pads the rows of a batch to its longest one and keeps what the model takes.

    task_ids, sample_types: also emit these, LongTensors (batch,), for a method that routes by task
    or whose balance loss has a target for each type.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        causal: bool,
        task_ids: bool = False,
        sample_types: bool = False,
    ):
        inner = DataCollatorForSeq2Seq if causal else DataCollatorWithPadding
        self.pad: Callable[[list[dict[str, Any]]], Any] = inner(tokenizer)
        self.task_ids, self.sample_types = task_ids, sample_types

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask (batch, longest) and labels."""
        wanted = (*_TOKENIZER_COLUMNS, "labels")
        batch = dict(self.pad([{k: row[k] for k in wanted if k in row} for row in rows]))
        if self.task_ids:
            batch["task_ids"] = torch.tensor([row["task_id"] for row in rows])
        if self.sample_types:
            batch["sample_types"] = torch.tensor([row["sample_type"] for row in rows])
        return batch


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None = None
) -> DataBundle:
    """Read, split, tokenize and check all data of a run.

    labels: class names by index, where the training rows here need not have all of them.

    Raises FileNotFoundError for missing sources and ValueError for rows that cannot be used:
    missing columns, labels outside the training set, rows longer than data.max_length.
    """
    data = config.data
    rows = {"train": read_rows(data.train, data, "train")}
    # Labels and tasks come from the whole source, so that a limit or a split keeps them all.
    reader = _Reader(config, rows["train"][0])
    labels = labels or reader.label_names(rows["train"])
    tasks = config.method.options.get("tasks") or reader.task_names(rows["train"])

    held_out = data.validation
    if isinstance(held_out, int | float):
        rows["train"], rows["validation"] = _split(rows["train"], held_out, data.seed)
    elif held_out is not None:
        rows["validation"] = read_rows(held_out, data, "validation")
    if data.test is not None:
        rows["test"] = read_rows(data.test, data, "test")
    limits = {
        "train": data.limit,
        "validation": data.validation_limit,
        "test": data.test_limit,
    }
    rows = {split: _limited(found, limits[split], data.seed) for split, found in rows.items()}

    routed = config.method.options.get("routing") == "task"
    if routed and not reader.has_task:
        raise ValueError(
            "method.routing is 'task', but the rows have no task column. "
            "Name it in data.columns.task."
        )
    delta = config.method.options.get("delta")  # of molora's balance loss
    if delta and not reader.has_type:
        raise ValueError(
            f"method.delta is {delta}, but the rows have no sample_type column. "
            "Name it in data.columns.sample_type."
        )
    read = {split: [reader.read(row) for row in found] for split, found in rows.items()}
    if tasks is not None:
        tasks = _all_tasks(read, rows, tasks, routed)
    splits = {
        split: _tokenized(found, rows[split], split, config, tokenizer, labels, tasks)
        for split, found in read.items()
    }
    return DataBundle(
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        kind=reader.kind,
        collator=Collator(tokenizer, config.model.task == "causal_lm", routed, bool(delta)),
        tokenizer=tokenizer,
        labels=labels,
        tasks=tasks,
        longest=max(len(ids) for split in splits.values() for ids in split["input_ids"]),
    )


# ---------------------------------------------------------------------------------- columns


class _Reader:
    """Reads a row's columns as the config maps them; the first row decides what the data is."""

    def __init__(self, config: RunConfig, first: Row):
        self.data = config.data
        self.columns = config.data.columns
        self.first = first
        self.kind: Kind = self._kind(config.model.task)
        self.has_pair = self.columns.text_pair is not None or "text_pair" in first.values
        self.has_task = self.columns.task is not None or "task" in first.values
        typed = self.columns.sample_type is not None or "sample_type" in first.values
        self.has_type = typed and bool(config.method.options.get("delta"))  # else nobody reads it

    def read(self, row: Row) -> dict[str, Any]:
        """Return the row's raw strings (`messages` stays a list), `label` and `task`."""
        found: dict[str, Any]
        if self.kind == "completion":
            found = {part: self._templated(row, part) for part in ("prompt", "completion")}
            if not found["completion"]:
                raise ValueError(
                    f"{row.where}: the completion is empty, so nothing is trained. Remove the row."
                )
        elif self.kind == "messages":
            found = {"messages": _conversation(self._value(row, "messages"), row.where)}
        elif self.kind == "text":
            found = {"prompt": "", "completion": self._text(row, "text")}
        else:
            found = {"text": self._text(row, "text")}
            if self.has_pair:
                found["text_pair"] = self._text(row, "text_pair")
            label = self._value(row, "label")
            found["label"] = (
                _number(label, row.where) if self.kind == "regression" else _name(label, row.where)
            )
        if self.has_task:
            found["task"] = _name(self._value(row, "task"), row.where, "task")
        if self.has_type:
            kind = _name(self._value(row, "sample_type"), row.where, "sample_type")
            if kind not in ("0", "1"):
                raise ValueError(f"{row.where}: the sample_type is {kind!r:.60}. Give 0 or 1.")
            found["sample_type"] = int(kind)
        return found

    def label_names(self, rows: Iterable[Row]) -> list[str] | None:
        """Return the sorted class names (by number where all are whole numbers)."""
        if self.kind != "classification":
            return None
        names = {_name(self._value(row, "label"), row.where) for row in rows}
        if len(names) < 2:
            raise ValueError(
                f"{self.data.train}: all training rows have the label {names.pop()!r}. "
                "Give rows of at least two labels, or correct data.columns.label."
            )
        whole = all(name.lstrip("-").isdigit() for name in names)
        return sorted(names, key=int) if whole else sorted(names)

    def task_names(self, rows: Iterable[Row]) -> list[str] | None:
        """Return the sorted task names of the training rows, None without a task column."""
        if not self.has_task:
            return None
        return sorted({_name(self._value(row, "task"), row.where, "task") for row in rows})

    def _kind(self, task: str) -> Kind:
        if task == "classification":
            return "classification"
        if task == "regression":
            return "regression"
        mapped, there = self.columns, self.first.values
        if self.data.completion_template is not None or self.data.prompt_template is not None:
            return "completion"
        roles: tuple[Kind, ...] = ("messages", "completion", "text")
        for role in roles:
            if _mapping(mapped, role) is not None:
                return role
        if mapped.prompt is not None:
            return "completion"
        for role in roles:
            if role in there:
                return role
        raise ValueError(
            f"{self.first.where}: no column to train on. A causal model needs prompt and "
            f"completion, messages, or text; the columns are {_listed(there)}. Map them in "
            "data.columns, or give data.prompt_template and data.completion_template."
        )

    def _templated(self, row: Row, part: str) -> str:
        templates = {
            "prompt": self.data.prompt_template,
            "completion": self.data.completion_template,
        }
        template = templates[part]
        if template is None:
            return self._text(row, part)
        values = {}
        for name in template_columns(template, f"data.{part}_template"):
            if name not in row.values:
                raise ValueError(_missing(row, f"data.{part}_template", name))
            values[name] = _string(row.values[name], row.where, name)
        return template.format(**values)

    def _text(self, row: Row, role: str) -> str:
        return _string(self._value(row, role), row.where, str(_mapping(self.columns, role) or role))

    def _value(self, row: Row, role: str) -> Any:
        """Return the value of the column that plays this role."""
        column = _mapping(self.columns, role)
        if isinstance(column, int):
            values = list(row.values.values())
            if not 0 <= column < len(values):
                raise ValueError(
                    f"{row.where}: data.columns.{role} is {column}, but the row has "
                    f"{len(values)} columns, counted from 0. Give a lower number."
                )
            return values[column]
        name = role if column is None else column
        if name not in row.values:
            raise ValueError(_missing(row, f"data.columns.{role}", name))
        return row.values[name]


def _mapping(columns: ColumnsConfig, role: str) -> str | int | None:
    return vars(columns)[role]


def _missing(row: Row, key: str, name: str) -> str:
    return (
        f"{row.where}: there is no column {name!r}; the columns are {_listed(row.values)}. "
        f"Correct {key}."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "none"


def template_columns(template: str, key: str) -> list[str]:
    """Return the column names in a template; ValueError when it cannot be filled."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"{key} is {template!r}: {error}. Write {{{{ and }}}} for braces that are text."
        ) from None
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"{key} is {template!r}: it has to name columns, like {{question}}. "
            "Write {{ and }} for braces that are text."
        )
    return names


def _string(value: Any, where: str, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(
        f"{where}: column {column!r} is {value!r:.60}, not text. Correct or remove the row."
    )


def _name(value: Any, where: str, what: str = "label") -> str:
    """Return a class or task name; a whole float such as 1.0 is the number 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int | str) and str(value).strip():
        return str(value).strip()
    raise ValueError(
        f"{where}: the {what} is {value!r:.60}. Give a name or a whole number."
        + (" For a number to predict, set model.task: regression." if what == "label" else "")
    )


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number - number != 0:  # NaN or infinite
        raise ValueError(f"{where}: the label is {value!r:.60}. Regression needs a finite number.")
    return number


def _conversation(messages: Any, where: str) -> list[dict[str, Any]]:
    """Check a list of messages; return it without what follows the last assistant turn."""
    ok = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )
    if not ok:
        raise ValueError(
            f"{where}: messages is {messages!r:.60}. "
            'Give a list of {"role": ..., "content": ...} objects.'
        )
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise ValueError(
            f"{where}: no message has the role assistant, so nothing is trained. Remove the row."
        )
    return messages[: turns[-1] + 1]


# ----------------------------------------------------------------------------------- splits


def _split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut a fraction off, shuffled by the seed; at least one row stays on either side."""
    if len(rows) < 2:
        raise ValueError(
            f"data.validation is {fraction}, but there is 1 training row. Give validation rows."
        )
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    cut = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    return [rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]]


def _limited(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in random.Random(seed).sample(range(len(rows)), limit)]


def _all_tasks(
    read: dict[str, list[dict[str, Any]]],
    rows: dict[str, list[Row]],
    tasks: list[str],
    routed: bool,
) -> list[str]:
    """Return `tasks`, then those met besides (an error when rows are routed by task)."""
    known = list(tasks)
    for split, found in read.items():
        for row, values in zip(rows[split], found, strict=True):
            if values["task"] in known:
                continue
            if routed:
                raise ValueError(
                    f"{row.where}: the task {values['task']!r} is not among the tasks of the "
                    f"method ({_listed(tasks)}). Remove the row."
                )
            known.append(values["task"])
    return known


# ----------------------------------------------------------------------------------- tokens


def _tokenized(
    found: list[dict[str, Any]],
    rows: list[Row],
    split: str,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    tasks: list[str] | None,
) -> Dataset:
    """Turn the read rows of a split into a data set of tokens and raw strings."""
    if config.model.task == "causal_lm":
        encoded = _encode_causal(found, rows, config.data, tokenizer)
    else:
        encoded = _encode_texts(found, config.data, tokenizer)
        for values, row, item in zip(found, rows, encoded, strict=True):
            item["labels"] = values["label"]
            if labels is not None:
                if values["label"] not in labels:
                    raise ValueError(
                        f"{row.where}: the label {values['label']!r} is not in the training set, "
                        f"which has {len(labels)}. {did_you_mean(values['label'], labels)}"
                    )
                item["labels"] = labels.index(values["label"])
    for values, item in zip(found, encoded, strict=True):
        item |= {k: v for k, v in values.items() if k != "messages"}
        if tasks is not None:
            item["task_id"] = tasks.index(values["task"])
    _fit(encoded, split, config)
    return Dataset.from_list(encoded)


def _encode_texts(
    found: list[dict[str, Any]], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    texts = [values["text"] for values in found]
    pairs = [values["text_pair"] for values in found] if "text_pair" in found[0] else None
    # The tokenizer cuts before it adds its closing special tokens.
    columns = tokenizer(
        texts,
        pairs,
        truncation=data.truncate,
        max_length=data.max_length if data.truncate else None,
    )
    return [
        {k: columns[k][i] for k in _TOKENIZER_COLUMNS if k in columns} for i in range(len(texts))
    ]


def _encode_causal(
    found: list[dict[str, Any]],
    rows: list[Row],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    cut = []
    for values, row in zip(found, rows, strict=True):
        if "messages" in values:
            segments = _chat_segments(values["messages"], tokenizer, row.where)
            values["prompt"] = "".join(text for text, _ in segments[:-1])
            values["completion"] = segments[-1][0]
        else:
            segments = [(values["prompt"], False), (values["completion"], True)]
        cut.append(segments)
    tokens = _encode_segments([[text for text, _ in segments] for segments in cut], tokenizer)
    start = _start_ids(tokenizer) if "messages" not in found[0] else []
    encoded = []
    for values, segments, parts in zip(found, cut, tokens, strict=True):
        ids, labels = list(start), [IGNORED] * len(start)
        for part, (_, trained) in zip(parts, segments, strict=True):
            ids += part
            labels += part if trained or data.train_on_prompt else [IGNORED] * len(part)
        # A chat template ends its turns itself, mostly with this very token.
        if data.add_eos and ("messages" not in values or _end_id(tokenizer) not in parts[-1]):
            ids.append(_end_id(tokenizer))
            labels.append(_end_id(tokenizer))
        encoded.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": labels,
                "prompt_length": len(start) + sum(len(part) for part in parts[:-1]),
            }
        )
    return encoded


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids that generation starts from: what training saw as the prompt."""
    return _start_ids(tokenizer) + _encode_segments([[prompt]], tokenizer)[0][0]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids of a conversation with the assistant's turn opened."""
    text = _rendered(tokenizer, messages, open_turn=True, where="messages")
    return _encode_segments([[text]], tokenizer)[0][0]


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [bos] where the tokenizer puts one in front of a text, else []."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(
            "data.add_eos is true, but the model's tokenizer has no end-of-sequence token. "
            "Set data.add_eos: false."
        )
    return end


def _encode_segments(
    rows: list[list[str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]]]:
    """Tokenize each row's consecutive texts so that each leading part keeps its own tokens.

    Joint tokens where the leading parts' tokens are their prefix; else each text on its own.
    """
    leading = ["".join(texts[: n + 1]) for texts in rows for n in range(len(texts))]
    runs = iter(tokenizer(leading, add_special_tokens=False)["input_ids"])
    encoded = []
    for texts in rows:
        mine = list(itertools.islice(runs, len(texts)))
        if all(mine[-1][: len(run)] == run for run in mine):
            starts = [0, *(len(run) for run in mine)]
            encoded.append([run[start:] for start, run in zip(starts, mine, strict=False)])
        else:
            encoded.append(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return encoded


def _chat_segments(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into (text, trained): trained are the assistant's turns.

    A turn starts where the template, asked for an open assistant turn, stops, and ends where the
    conversation up to it does. Both must be beginnings of the whole.
    """
    whole = _rendered(tokenizer, messages, open_turn=False, where=where)
    segments, done = [], 0
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _rendered(tokenizer, messages[:n], open_turn=True, where=where)
        closed = _rendered(tokenizer, messages[: n + 1], open_turn=False, where=where)
        if not (whole.startswith(opened) and whole.startswith(closed) and len(opened) >= done):
            raise ValueError(
                f"{where}: the chat template of this tokenizer changes earlier turns (message "
                f"{n + 1} of {len(messages)}), so the trained part cannot be found. Give "
                "conversations with one assistant turn, or prompt and completion."
            )
        segments += [(whole[done : len(opened)], False), (whole[len(opened) : len(closed)], True)]
        done = len(closed)
    return segments


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    open_turn: bool,
    where: str,
) -> str:
    import jinja2

    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: the rows are messages, but the model's tokenizer has no chat template. "
            "Use a chat model, or rows with prompt and completion."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{where}: the chat template refuses these messages ({error}). Correct their roles."
        ) from None
    return str(text)


def _fit(encoded: list[dict[str, Any]], split: str, config: RunConfig) -> None:
    """Cut rows to data.max_length in place where asked; else raise with their number and share."""
    data, limit = config.data, config.data.max_length
    lengths = sorted(len(item["input_ids"]) for item in encoded)
    long = len(lengths) - bisect.bisect_right(lengths, limit)
    if long and not data.truncate:
        raise ValueError(
            f"data.max_length is {limit} tokens: {long} of {len(lengths)} {split} rows "
            f"({100 * long / len(lengths):.1f} %) are longer, the longest {lengths[-1]}. "
            "Raise data.max_length, or cut them with data.truncate: true."
        )
    if long:
        for item in encoded:
            for name in (*_TOKENIZER_COLUMNS, "labels"):
                if name in item:
                    item[name] = item[name][:limit]
    if config.model.task == "causal_lm":
        # The first token of a row is never predicted, so its label trains nothing.
        empty = sum(all(label == IGNORED for label in item["labels"][1:]) for item in encoded)
        if empty:
            why = "Raise data.max_length." if long else "Remove them."
            raise ValueError(
                f"data: {empty} of {len(encoded)} {split} rows have no token to train on within "
                f"{limit} tokens. {why}"
            )


# ---------------------------------------------------------------------------------- overlap


@dataclass(frozen=True)
class Overlap:
    """Rows of a held-out split whose input also occurs among the training rows.

    rows: how many. identical: those whose answer is the same, too. total: rows of the split.
    examples: up to three of the inputs.
    """

    split: str
    rows: int
    identical: int
    total: int
    examples: list[str]


def overlap(bundle: DataBundle) -> list[Overlap]:
    """Compare validation and test with train: case, Unicode form and white space do not count."""
    seen: dict[str, set[str]] = {}
    for question, answer in _questions(bundle.train, bundle.kind):
        seen.setdefault(question, set()).add(answer)
    found = []
    for name, split in bundle.splits().items():
        if name == "train":
            continue
        shared = [(q, a) for q, a in _questions(split, bundle.kind) if q in seen]
        identical = sum(a in seen[q] for q, a in shared)
        examples = list(dict.fromkeys(q for q, _ in shared))[:3]
        found.append(Overlap(name, len(shared), identical, len(split), examples))
    return found


def _questions(split: Dataset, kind: Kind) -> Iterable[tuple[str, str]]:
    """Yield (normalised input, normalised answer); a plain text is its own input."""
    if kind in ("classification", "regression"):
        pairs = split["text_pair"] if "text_pair" in split.column_names else [""] * len(split)
        questions = [f"{a} {b}" for a, b in zip(split["text"], pairs, strict=True)]
        answers = [str(label) for label in split["label"]]
    elif kind == "text":
        questions, answers = split["completion"], [""] * len(split)
    else:
        questions, answers = split["prompt"], split["completion"]
    return ((_normal(q), _normal(a)) for q, a in zip(questions, answers, strict=True))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
