"""Read what plait needs from the columns of the rows: texts, labels, tasks, types.

The first training row decides what kind of data the rows are.
"""

import math
import string
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plait.core.events import PlaitWarning
from plait.run.config import ColumnsConfig, DataConfig, Form, MethodConfig
from plait.run.data.forms import (
    FORM_OF,
    AnyForm,
    conversation,
    is_conversational,
    open_conversation,
    preferred_turns,
    recognise,
    tools_of,
    turns,
)
from plait.run.data.rows import Row

_PAIRS: Form = "prompt-completion"
Kind = Literal["completion", "messages", "text", "classification", "regression"]
_YES = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Columns:
    """The values of the rows, by role.

    form: how the rows of a causal model come, see plait.run.data.forms; None for a classifier.
    rows: split -> its rows. values: split -> for each row its raw strings (`messages` and `tools`
    stay lists), `label`, `task` and `sample_type`; of pairs the completion is the chosen one, and
    `rejected` or `rejected_messages` holds the other. labels: class names by index, classification
    only. tasks: task names by index, those of the training rows first. routed: whether the method
    routes by task. typed: whether it takes `sample_type`.
    """

    kind: Kind
    form: AnyForm | None
    rows: dict[str, list[Row]]
    values: dict[str, list[dict[str, Any]]]
    labels: list[str] | None
    tasks: list[str] | None
    routed: bool
    typed: bool


def read_columns(
    data: DataConfig,
    task: str,
    method: MethodConfig,
    source: list[Row],
    rows: dict[str, list[Row]],
    labels: list[str] | None = None,
    head: list[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    objective: str = "sft",
) -> Columns:
    """Read the columns of all rows.

    Args:
        data: the `data` section.
        task: `model.task`.
        method: a method that routes by task needs a task for each row.
        source: all training rows, before they were split and limited: labels and tasks are theirs.
        rows: split -> its rows.
        labels: class names by index, if `source` need not have all of them.
        head: class names of the model's head, [] if it does not name them; None: no head yet.
        facts: of a trained run, whose kind, labels and tasks hold; `source` may be empty then.
        objective: other ones than sft have rows of their own form.

    Warns of labels and tasks that differ only in case or white space, of rows without text, and of
    a head whose classes get another meaning.

    Raises ValueError for a column that is missing and a value that cannot be used.
    """
    delta = method.options.get("delta")  # of molora's balance loss
    first = source[0] if source else next(iter(rows.values()))[0]
    reader = _Reader(data, task, first, bool(delta), facts or {}, objective)
    tasks = method.options.get("tasks")
    if facts is None:
        labels = reader.label_names(source) if labels is None else labels
        labels = order_labels(labels, head, data)
        tasks = tasks or reader.task_names(source)
    else:
        labels = facts.get("labels")
        tasks = tasks or facts.get("tasks")
    tasks = tasks if reader.has_task else None
    routed = method.options.get("routing") == "task"
    if routed and not reader.has_task:
        raise ValueError(
            "method.routing is 'task', but the rows have no task column. "
            "Name it in data.columns.task."
        )
    if delta and not reader.has_type:
        raise ValueError(
            f"method.delta is {delta}, but the rows have no sample_type column. "
            "Name it in data.columns.sample_type."
        )
    values = {split: [reader.read(row) for row in part] for split, part in rows.items()}
    for split, part in rows.items():
        _warn_of_blanks(reader.kind, split, part, values[split])
    if tasks is not None:
        tasks = _all_tasks(values, rows, tasks, routed)
    return Columns(reader.kind, reader.form, rows, values, labels, tasks, routed, bool(delta))


def read_inputs(
    data: DataConfig, task: str, rows: list[Row], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Read of rows without answers what the model of a trained run reads.

    Args:
        data: the `data` section. task: `model.task`. rows: one or more. facts: of the run.

    Returns:
        For each row `text` and maybe `text_pair`; `prompt`; or `messages` up to the turn that the
        assistant is to write, and maybe `tools`. With `task` if the run knows tasks and the row
        names one.

    Raises ValueError for a column that is missing and a value that cannot be used.
    """
    reader = _Reader(data, task, rows[0], False, facts)
    return [reader.inputs(row) for row in rows]


class _Reader:
    """Reads a row's columns as the config maps them; the first row decides what the data is."""

    def __init__(
        self,
        data: DataConfig,
        task: str,
        first: Row,
        typed: bool,
        facts: Mapping[str, Any],
        objective: str = "sft",
    ):
        self.data = data
        self.columns = data.columns
        self.first = first
        self.form: AnyForm | None = (
            facts.get("form") or FORM_OF.get(objective) or self._form(task, facts.get("kind"))
        )
        self.kind: Kind = facts.get("kind") or self._kind(task)
        paired = self.columns.text_pair is not None or "text_pair" in first.values
        self.has_pair = facts.get("text_pair", paired)
        there = self.columns.task is not None or "task" in first.values
        self.has_task = facts["tasks"] is not None if "tasks" in facts else there
        there = self.columns.sample_type is not None or "sample_type" in first.values
        self.has_type = there and typed  # else nobody reads it

    def read(self, row: Row) -> dict[str, Any]:
        """Return the row's raw strings (`messages`, `tools` stay lists), `label` and `task`."""
        values: dict[str, Any]
        if self.form == "prompt":
            values = self.inputs(row) | {"given": row.values}
        elif self.kind == "completion":
            values = {"prompt": self._templated(row, "prompt")} | self._completions(row)
        elif self.kind == "messages":
            values = {"messages": conversation(self._turns(row, answered=True), row.where)}
            if self.form == "preference":
                other = preferred_turns(self._renamed(row))[1]
                values["rejected_messages"] = conversation(other, row.where)
            tools = tools_of(row.values.get("tools"), row.where)
            if tools:
                values["tools"] = tools
        elif self.kind == "text":
            values = {"prompt": "", "completion": self._text(row, "text")}
            if not values["completion"]:
                raise ValueError(f"{row.where}: the text is empty. Remove the row.")
        else:
            values = {"text": self._text(row, "text")}
            if self.has_pair:
                values["text_pair"] = self._text(row, "text_pair")
            label = self._value(row, "label")
            values["label"] = (
                _number(label, row.where) if self.kind == "regression" else _name(label, row.where)
            )
        if self.form == "labelled":
            values["desired"] = _desired(self._value(row, "label"), row.where)
        if self.has_task:
            values["task"] = _name(self._value(row, "task"), row.where, "task")
        if self.has_type:
            kind = _name(self._value(row, "sample_type"), row.where, "sample_type")
            if kind not in ("0", "1"):
                raise ValueError(f"{row.where}: the sample_type is {kind!r:.60}. Give 0 or 1.")
            values["sample_type"] = int(kind)
        return values

    def inputs(self, row: Row) -> dict[str, Any]:
        """Return what the model reads of a row, and `task` if the row has one; no answers."""
        values: dict[str, Any]
        if self.kind == "completion":
            values = {"prompt": self._templated(row, "prompt")}
        elif self.kind == "messages":
            values = {"messages": open_conversation(self._turns(row, answered=False), row.where)}
            tools = tools_of(row.values.get("tools"), row.where)
            if tools:
                values["tools"] = tools
        elif self.kind == "text":
            values = {"prompt": self._text(row, "text")}
        else:
            values = {"text": self._text(row, "text")}
            if self.has_pair:
                values["text_pair"] = self._text(row, "text_pair")
        mapped = _mapping(self.columns, "task")
        if self.has_task and (isinstance(mapped, int) or (mapped or "task") in row.values):
            values["task"] = _name(self._value(row, "task"), row.where, "task")
        return values

    def label_names(self, rows: Iterable[Row]) -> list[str] | None:
        """Return the sorted class names (as numbers if all are whole numbers)."""
        if self.kind != "classification":
            return None
        names = self._names(rows, "label")
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
        return sorted(self._names(rows, "task"))

    def _names(self, rows: Iterable[Row], role: str) -> set[str]:
        """Return the names in a column; warn of those that may be meant to be one."""
        where: dict[str, str] = {}
        for row in rows:
            where.setdefault(_name(self._value(row, role), row.where, role), row.where)
        alike: dict[str, str] = {}
        for name in where:
            other = alike.setdefault(normal(name), name)
            if other != name:
                warnings.warn(
                    f"{where[name]}: the {role} {name!r:.60} differs from {other!r:.60} "
                    f"({where[other]}) only in case or white space. They are two {role}s; correct "
                    "the rows if one is meant.",
                    PlaitWarning,
                    stacklevel=2,
                )
        return {*where}

    def _form(self, task: str, kind: Kind | None) -> Form | None:
        """Return the form of the rows: as the config maps them, else as their columns say.

        kind: of a run of an older plait, which noted no form; None for a new run.
        """
        if task != "causal_lm":
            return None
        mapped, there = self.columns, self.first.values
        if kind is not None:
            return "messages" if kind == "messages" else "text" if kind == "text" else _PAIRS
        if self.data.completion_template is not None or self.data.prompt_template is not None:
            return _PAIRS
        if mapped.messages is not None:
            return "messages"
        if mapped.completion is not None:
            return _PAIRS
        if mapped.text is not None:
            return "text"
        if mapped.prompt is not None:
            return _PAIRS
        form = recognise(self.first, self.data)
        if form is None and "completion" in there:  # the missing prompt is named later
            return _PAIRS
        if form is None:
            raise ValueError(
                f"{self.first.where}: no column to train on. A causal model needs prompt and "
                "completion, messages, conversations, instruction and output, or text; the "
                f"columns are {_listed(there)}. Map them in data.columns, or give "
                "data.prompt_template and data.completion_template."
            )
        return form

    def _kind(self, task: str) -> Kind:
        if task == "classification":
            return "classification"
        if task == "regression":
            return "regression"
        if self.form == "text":
            return "text"
        if self.form in ("messages", "conversations", "alpaca"):
            return "messages"
        first = self._renamed(self.first)
        column = "chosen" if self.form == "preference" else "prompt"
        templated = self.data.prompt_template is not None
        return "completion" if templated or not is_conversational(first, column) else "messages"

    def _turns(self, row: Row, answered: bool) -> list[dict[str, Any]]:
        """Return the conversation of a row; answered: up to the last answer, if it has one."""
        assert self.form is not None
        if self.form in FORM_OF.values():
            return turns(self.form, self._renamed(row), self.form, answered)
        mapped = _mapping(self.columns, "messages")
        if self.form == "messages" or mapped is not None:
            row = Row(row.where, {**row.values, "messages": self._value(row, "messages")})
            return turns("messages", row, "messages", answered)
        return turns(self.form, row, self.form, answered)

    def _renamed(self, row: Row) -> Row:
        """Return a row with plait's names of the columns that hold prompts and answers."""
        names = ("prompt", "completion", "chosen", "rejected")
        mapped = [name for name in names if _mapping(self.columns, name) is not None]
        return Row(row.where, row.values | {name: self._value(row, name) for name in mapped})

    def _completions(self, row: Row) -> dict[str, str]:
        """Return the completion of a row, and of a pair the rejected one as well."""
        if self.form == "preference":
            texts = {
                "completion": self._text(row, "chosen"),
                "rejected": self._text(row, "rejected"),
            }
        else:
            texts = {"completion": self._templated(row, "completion")}
        for name, text in texts.items():
            if not text:
                column = "chosen" if self.form == "preference" and name == "completion" else name
                what = "the completion" if column == "completion" else column
                raise ValueError(
                    f"{row.where}: {what} is empty, so nothing is trained. Remove the row."
                )
        return texts

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
    text = ", ".join(map(str, names)) or "none"
    return text if len(text) <= 500 else f"{text[:500]} ..."


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


def whole_text(text: str, where: str, column: str) -> str:
    """Return a text; ValueError if it has a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: column {column!r:.60} has half of a surrogate pair, which is no character. "
            "Correct or remove the row."
        ) from None
    return text


def _string(value: Any, where: str, column: str) -> str:
    if isinstance(value, str):
        return whole_text(value, where, column)
    if isinstance(value, bool):
        raise ValueError(
            f"{where}: column {column!r} is {str(value).lower()}, not text. Write the words that "
            'are meant, such as "yes" or "true" in quotes.'
        )
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
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


def _desired(value: Any, where: str) -> bool:
    known = isinstance(value, bool | int | str)
    answer = _YES.get(str(value).strip().lower()) if known else None
    if answer is None:
        raise ValueError(
            f"{where}: the label is {value!r:.60}. Give true for a completion that is desired, "
            "or false."
        )
    return answer


def _number(value: Any, where: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number - number != 0:  # NaN or infinite
        raise ValueError(f"{where}: the label is {value!r:.60}. Regression needs a finite number.")
    return number


def normal(text: str) -> str:
    """Return a text without what Unicode form, case and white space make of it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def order_labels(
    labels: list[str] | None, head: list[str] | None, data: DataConfig
) -> list[str] | None:
    """Return the names of a head's classes if they are those of the rows, else the rows' names.

    labels: class names of the rows, None without any. head: see `read_columns`. Warns where the
    classes of a head get another meaning.
    """
    if labels is None or head is None:
        return labels
    if {*labels} <= {*head}:
        return head
    if not head and labels == [str(i) for i in range(len(labels))]:
        return labels
    shown = "does not name its classes" if not head else f"has the classes {_listed(head)}"
    warnings.warn(
        f"{data.train}: the model's head {shown}, and the rows have {_listed(labels)}. They are "
        "numbered from 0 in this order, whatever the head learned; its weights are where training "
        "starts. Use the head's names in the rows to keep its classes.",
        PlaitWarning,
        stacklevel=2,
    )
    return labels


def _warn_of_blanks(kind: Kind, split: str, rows: list[Row], values: list[dict[str, Any]]) -> None:
    """Warn once of a split's rows whose text holds nothing but white space."""
    what = {"messages": "assistant's text", "completion": "completion"}.get(kind, "text")
    blank = [
        row.where
        for row, of_row in zip(rows, values, strict=True)
        if not all(text.strip() for text in _trained_texts(of_row))
    ]
    if blank:
        warnings.warn(
            f"{blank[0]}: the {what} is blank, as in {len(blank)} of {len(rows)} {split} rows. "
            "Remove them if that is not meant.",
            PlaitWarning,
            stacklevel=2,
        )


def _trained_texts(of_row: dict[str, Any]) -> list[str]:
    """Return the texts of a row that should not be blank."""
    if "given" in of_row:  # a prompt, whose answers are drawn
        return []
    if "messages" in of_row:
        return [
            message["content"]
            for message in of_row["messages"]
            if message["role"] == "assistant"
            and message.get("weight") != 0
            and not message.get("tool_calls")
        ]
    if "completion" in of_row:
        return [of_row["completion"]]
    return [of_row["text"] + of_row.get("text_pair", "")]


def _all_tasks(
    values: dict[str, list[dict[str, Any]]],
    rows: dict[str, list[Row]],
    tasks: list[str],
    routed: bool,
) -> list[str]:
    """Return `tasks` and then further ones of the rows; these are an error if rows are routed."""
    known = list(tasks)
    for split, part in values.items():
        for row, of_row in zip(rows[split], part, strict=True):
            if of_row["task"] in known:
                continue
            if routed:
                raise ValueError(
                    f"{row.where}: the task {of_row['task']!r} is not among the tasks of the "
                    f"method ({_listed(tasks)}). Remove the row."
                )
            known.append(of_row["task"])
    return known
