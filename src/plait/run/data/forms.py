"""The forms in which people have rows for a causal model, recognised by their columns.

A form becomes a conversation, a prompt with its completion, or a text:

    messages            messages: [{role, content}]                    a conversation
    conversations       conversations: [{from, value}] (ShareGPT)      a conversation
    alpaca              instruction, output, and maybe input           a conversation
    prompt-completion   prompt, completion: texts, or lists of         a prompt and a completion,
                        messages                                       or a conversation
    text                text                                           a text

What could be two of them is refused: nothing is guessed. Other objectives than sft name the form:

    preference          prompt, chosen, rejected: texts, or lists of messages; as whole
                        conversations, chosen and rejected differ in the last message alone
    labelled            prompt, completion, and a label: whether that completion is desired
    prompt              prompt: a text, or messages; the other columns are for the reward
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from plait.run.config import DataConfig, Form
from plait.run.data.rows import Row

FORMS: tuple[Form, ...] = get_args(Form)
_NEEDED: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_SHOWN: dict[str, str] = {
    "messages": "messages with role and content",
    "conversations": "conversations with from and value (ShareGPT)",
    "alpaca": "instruction, input and output (Alpaca)",
    "prompt-completion": "prompt and completion",
    "text": "text",
    "preference": "prompt, chosen and rejected",
    "labelled": "prompt, completion and label",
    "prompt": "prompt",
}
# Who speaks in a ShareGPT conversation -> the role.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
Keys = Literal["role, content", "from, value"]
AnyForm = Form | Literal["preference", "labelled", "prompt"]
# Objective -> the form of its rows.
FORM_OF: dict[str, AnyForm] = {
    "dpo": "preference",
    "reward": "preference",
    "kto": "labelled",
    "grpo": "prompt",
}


def recognise(row: Row, data: DataConfig) -> Form | None:
    """Return the form of a row: that of data.form, else the one whose columns it has.

    None without any.

    Raises ValueError for a row that could be two of them.
    """
    if data.form is not None:
        return data.form
    found: list[Form] = [
        form for form in FORMS if all(name in row.values for name in _NEEDED[form])
    ]
    if len(found) > 1:
        could = " or ".join(f"{form} ({', '.join(_NEEDED[form])})" for form in found)
        raise ValueError(
            f"{row.where}: the rows could be {could}, by their columns. Set data.form: "
            f"{' or data.form: '.join(found)}."
        )
    return found[0] if found else None


def described(form: AnyForm, conversational: bool) -> str:
    """Return the form of rows in words, for people."""
    lists = conversational and form not in ("messages", "conversations", "alpaca")
    return _SHOWN[form] + (", lists of messages" if lists else "")


def turns(form: AnyForm, row: Row, column: str, answered: bool = True) -> list[dict[str, Any]]:
    """Return the messages of a row that is a conversation, not yet checked.

    Args:
        form: of the rows. row: one of them. column: that holds the conversation, for the forms
            `messages` and `conversations`. answered: whether the answers of `alpaca` and
            `prompt-completion` are there and wanted.

    Raises ValueError for a column that is missing or holds no conversation.
    """
    if form == "alpaca":
        return _alpaca_turns(row, answered)
    if form == "prompt":
        return asked_turns(row)
    if form in ("prompt-completion", "labelled"):
        return asked_turns(row) + (completed(row, "completion") if answered else [])
    if form == "preference":
        return preferred_turns(row)[0] if answered else preferred_turns(row)[0][:-1]
    messages = _listed(_value(row, column), row.where, column)
    if form == "conversations":
        return _with_system(messages, row)
    return messages


def _keys(value: Any) -> Keys:
    """Return which keys the messages of a column have, by the first one."""
    first = value[0] if isinstance(value, list) and value else None
    spoken = isinstance(first, dict) and "from" in first and first.get("role") is None
    return "from, value" if spoken else "role, content"


def is_conversational(row: Row, column: str) -> bool:
    """Whether a column, such as a prompt, holds messages and no text."""
    return isinstance(row.values.get(column), list)


def _alpaca_turns(row: Row, answered: bool) -> list[dict[str, Any]]:
    asked = _text(row, "instruction")
    if not asked.strip():
        raise ValueError(f"{row.where}: the instruction is empty. Correct or remove the row.")
    given = row.values.get("input")
    given = "" if given is None else _text(row, "input")
    messages = []
    for before in _history(row):
        messages += [
            {"role": "user", "content": before[0]},
            {"role": "assistant", "content": before[1], "weight": 0},
        ]
    messages.append({"role": "user", "content": f"{asked}\n\n{given}" if given else asked})
    if answered:
        answer = _text(row, "output")
        if not answer:
            raise ValueError(
                f"{row.where}: the output is empty, so nothing is trained. Remove the row."
            )
        messages.append({"role": "assistant", "content": answer})
    return _with_system(messages, row)


def _history(row: Row) -> list[list[str]]:
    """Return the earlier turns of an Alpaca row: [[instruction, output], ..]."""
    history = row.values.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        for pair in history
    )
    if not pairs:
        raise ValueError(
            f"{row.where}: history is {history!r:.60}. Give a list of [instruction, output]."
        )
    return history


def asked_turns(row: Row) -> list[dict[str, Any]]:
    """Return a prompt of messages, whose own answers are not trained.

    Raises ValueError for a column that is missing or holds no conversation.
    """
    prompt = _listed(_value(row, "prompt"), row.where, "prompt")
    if not prompt:
        raise ValueError(f"{row.where}: the prompt has no messages. Correct or remove the row.")
    return [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]


def preferred_turns(row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the conversations that end with the chosen and with the rejected answer.

    Raises ValueError for columns that are missing or hold no answers to one prompt.
    """
    both = [_listed(_value(row, name), row.where, name) for name in ("chosen", "rejected")]
    if all(both) and both[0][0]["role"] != "assistant":  # whole conversations
        if both[0][:-1] != both[1][:-1]:
            raise ValueError(
                f"{row.where}: chosen and rejected are conversations that differ in more than the "
                "last message, so they answer two prompts. Correct or remove the row."
            )
        prompt = both[0][:-1]
        prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
        both = [messages[-1:] for messages in both]
    else:
        prompt = asked_turns(row)
    for name, answer in zip(("chosen", "rejected"), both, strict=True):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise ValueError(
                f"{row.where}: {name} is {answer!r:.60}. It is one message of the role assistant."
            )
    return prompt + both[0], prompt + both[1]


def completed(row: Row, column: str) -> list[dict[str, Any]]:
    """Return the messages of a completion, which the assistant begins.

    Raises ValueError for a column that is missing, and for messages that are none.
    """
    messages = _listed(_value(row, column), row.where, column)
    if not messages or messages[0]["role"] != "assistant":
        raise ValueError(
            f"{row.where}: {column} is {messages!r:.60}. A completion begins with a message of "
            "the role assistant."
        )
    return messages


def _with_system(messages: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
    """Put the column `system`, where a row has one, in front."""
    if row.values.get("system") in (None, ""):
        return messages
    system = _text(row, "system")
    if messages and messages[0]["role"] == "system":
        raise ValueError(
            f"{row.where}: there is a column 'system', and the conversation begins with a system "
            "message. Remove one of them."
        )
    return [{"role": "system", "content": system}, *messages]


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise ValueError(
            f"{row.where}: there is no column {column!r}; the columns are "
            f"{', '.join(map(str, row.values)) or 'none':.500}. Correct the row, or data.form."
        )
    return row.values[column]


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise ValueError(
            f"{row.where}: column {column!r} is {value!r:.60}, not text. Correct or remove the row."
        )
    return value


def _listed(messages: Any, where: str, column: str) -> list[dict[str, Any]]:
    """Return messages with role and content, whichever keys they have."""
    keys = _keys(messages)
    who, what = keys.split(", ")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get(who), str) and what in m for m in messages
    ):
        raise ValueError(
            f"{where}: {column} is {messages!r:.60}. "
            f'Give a list of {{"{who}": ..., "{what}": ...}} objects.'
        )
    if keys == "role, content":
        return messages
    return [_spoken(message, f"{where}: message {n}") for n, message in enumerate(messages, 1)]


def _spoken(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message of ShareGPT with role and content."""
    if message.get("role") is not None or message.get("content") is not None:
        raise ValueError(
            f"{where}: has from and value, and role or content as well. Remove one of the pairs."
        )
    role = _SPEAKERS.get(message["from"])
    if role is None:
        raise ValueError(
            f"{where}: from is {message['from']!r:.60}, which is not a known speaker. Give one of "
            f"{', '.join(_SPEAKERS)}."
        )
    others = {k: v for k, v in message.items() if k not in ("from", "value")}
    return {**others, "role": role, "content": message["value"]}


# ------------------------------------------------------------------------------ conversations


def conversation(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Check a list of messages; return it without what follows the last assistant turn.

    Contents that are lists of text parts become strings.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise ValueError(
            f"{where}: no message has the role assistant, so nothing is trained. Remove the row."
        )
    kept = []
    for number, message in enumerate(messages[: turns[-1] + 1], 1):
        at = f"{where}: message {number}"
        weight = message.get("weight", 1)
        if weight is not None and weight not in (0, 1):
            raise ValueError(
                f"{at}: the weight is {weight!r:.60}. Give 1, or 0 for an assistant's turn that is "
                "not trained."
            )
        calls = bool(message.get("tool_calls"))
        kept.append({**message, "content": _content(message["content"], at, calls)})
    if all(kept[i].get("weight") == 0 for i in turns):
        raise ValueError(
            f"{where}: all assistant turns have the weight 0, so nothing is trained. Remove the "
            "row."
        )
    return kept


def open_conversation(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Check a list of messages; return it without the assistant's turns at its end."""
    kept = list(messages)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not kept:
        raise ValueError(f"{where}: there is no message to answer. Remove the row.")
    return [
        {**m, "content": _content(m["content"], f"{where}: message {n}", bool(m.get("tool_calls")))}
        for n, m in enumerate(kept, 1)
    ]


def _content(content: Any, where: str, calls: bool) -> str | None:
    """Return the text of a message; None only for one that calls tools instead."""
    if isinstance(content, str) or (content is None and calls):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"{where}: the content is {content!r:.60}, not text. Correct or remove the row."
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise ValueError(
                f"{where}: the content has the part {part!r:.60}. Parts are "
                '{"type": "text", "text": ...}; images and sound are not trained on. Remove the '
                "row."
            )
        texts.append(text)
    return "".join(texts)


def tools_of(tools: Any, where: str) -> list[Any]:
    """Return the `tools` of a conversation, which the chat template describes to the model."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError(
                f"{where}: tools is {tools!r:.60}, which is not JSON. Give a list of tools."
            ) from None
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: tools is {tools!r:.60}. Give a list of objects.")
    return tools
