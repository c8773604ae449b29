"""Texts to token ids with the loss mask, and rows of ids to batches.

A row of a causal model is cut into *segments* of text, each trained or not. The prompt's tokens are
the same as those that generation starts from: the whole text is tokenized at once if that keeps the
tokens of every leading part, and part by part if a token would cross a border.
"""

import bisect
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from plait.run.config import DataConfig, did_you_mean
from plait.run.data.reader import Columns, whole_text
from plait.run.data.rows import Row

IGNORED = -100  # the label of a token that is not trained
CUT = "cut"  # the column that says whether data.truncate shortened a row
_CHARACTERS = 128  # of a token, no more than which a row has on average
_LISTS = ("messages", "rejected_messages", "tools", "given")  # raw values that are no strings
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def tokenize(
    columns: Columns, data: DataConfig, causal: bool, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Dataset]:
    """Turn the rows of each split into a data set of token ids and raw strings.

    Raises ValueError for rows longer than data.max_length, rows without a token to train on, and
    labels that the training rows do not have.
    """
    splits = {}
    for split, values in columns.values.items():
        rows = columns.rows[split]
        if causal and columns.form == "prompt":
            encoded = _encode_prompts(values, rows, tokenizer)
        elif causal:
            encoded = _encode_causal(values, rows, data, tokenizer)
            if columns.form == "preference":
                _encode_rejected(encoded, values, rows, data, tokenizer)
        else:
            encoded = encode_texts(values, rows, data, tokenizer)
            for of_row, row, item in zip(values, rows, encoded, strict=True):
                item["labels"] = _label(of_row["label"], columns.labels, row.where)
        for of_row, item in zip(values, encoded, strict=True):
            item |= {k: v for k, v in of_row.items() if k not in _LISTS}
            if "given" in of_row:
                item["given"] = json.dumps(of_row["given"], default=str)
            if columns.tasks is not None:
                item["task_id"] = columns.tasks.index(of_row["task"])
        _fit(encoded, split, data, causal and columns.form != "prompt")
        splits[split] = Dataset.from_list(encoded)
    return splits


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
        names = (*_COLUMNS, "labels")
        batch = dict(self.pad([{k: row[k] for k in names if k in row} for row in rows]))
        if self.task_ids:
            batch["task_ids"] = torch.tensor([row["task_id"] for row in rows])
        if self.sample_types:
            batch["sample_types"] = torch.tensor([row["sample_type"] for row in rows])
        return batch


def _label(label: Any, labels: list[str] | None, where: str) -> Any:
    """Return the index of a class name; a number to predict stays what it is."""
    if labels is None:
        return label
    if label not in labels:
        raise ValueError(
            f"{where}: the label {label!r:.60} is not in the training set, which has "
            f"{len(labels)}. "
            f"{did_you_mean(label, labels)}"
        )
    return labels.index(label)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids that generation starts from: what training saw as the prompt."""
    return start_ids(tokenizer) + _encode_segments([[prompt]], tokenizer)[0][0]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str = "messages",
    tools: list[Any] | None = None,
) -> list[int]:
    """Return the ids of a conversation with the assistant's turn opened.

    where: named in errors. tools: what the template describes to the model.
    """
    text = _rendered(tokenizer, messages, True, where, tools)
    return _encode_segments([[text]], tokenizer)[0][0]


def encode_texts(
    values: list[dict[str, Any]],
    rows: list[Row],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Return the token ids and masks of rows with `text`, and with `text_pair` if they have it.

    Raises ValueError for a row without a token, and for one that surely exceeds data.max_length
    and is not to be cut.
    """
    parts = [name for name in ("text", "text_pair") if name in values[0]]
    whole = [[of_row[name] for name in parts] for of_row in values]
    within = [_within(texts, data, row.where) for texts, row in zip(whole, rows, strict=True)]

    def ids_of(chosen: Sequence[int], **options: Any) -> Any:
        texts: list[Any] = [[within[i][n] for i in chosen] for n in range(len(parts))]
        return tokenizer(texts[0], texts[1] if texts[1:] else None, **options)

    # The tokenizer cuts before it adds its closing special tokens.
    limit = data.max_length if data.truncate else None
    columns = ids_of(range(len(rows)), truncation=data.truncate, max_length=limit)
    encoded: list[dict[str, Any]] = [
        {k: columns[k][i] for k in _COLUMNS if k in columns} | {CUT: within[i] is not whole[i]}
        for i in range(len(rows))
    ]
    full = [i for i, item in enumerate(encoded) if len(item["input_ids"]) == limit]
    if full:
        for i, ids in zip(full, ids_of(full, verbose=False)["input_ids"], strict=True):
            encoded[i][CUT] |= len(ids) > data.max_length
    for row, item in zip(rows, encoded, strict=True):
        if not item["input_ids"]:
            raise ValueError(f"{row.where}: the text has no tokens. Remove the row.")
    return encoded


def _encode_causal(
    values: list[dict[str, Any]],
    rows: list[Row],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    cut, shortened = [], []
    for of_row, row in zip(values, rows, strict=True):
        if "messages" in of_row:
            tools = of_row.get("tools")
            segments = _chat_segments(of_row["messages"], tokenizer, row.where, tools)
            of_row["prompt"] = "".join(text for text, _ in segments[:-1])
            of_row["completion"] = segments[-1][0]
        else:
            segments = [(of_row["prompt"], False), (of_row["completion"], True)]
        whole = [text for text, _ in segments]
        texts = _within(whole, data, row.where)
        shortened.append(texts is not whole)
        cut.append([(text, trained) for text, (_, trained) in zip(texts, segments, strict=True)])
    tokens = _encode_segments([[text for text, _ in segments] for segments in cut], tokenizer)
    start = start_ids(tokenizer) if "messages" not in values[0] else []
    encoded = []
    for of_row, segments, parts, short in zip(values, cut, tokens, shortened, strict=True):
        ids, labels = list(start), [IGNORED] * len(start)
        for part, (_, trained) in zip(parts, segments, strict=True):
            ids += part
            labels += part if trained or data.train_on_prompt else [IGNORED] * len(part)
        # A chat template ends its turns itself, mostly with this very token, and a text may.
        last = parts[-1] if "messages" in of_row else parts[-1][-1:]
        if data.add_eos and _end_id(tokenizer) not in last:
            ids.append(_end_id(tokenizer))
            labels.append(_end_id(tokenizer) if segments[-1][1] else IGNORED)
        encoded.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": labels,
                "prompt_length": len(start) + sum(len(part) for part in parts[:-1]),
                CUT: short,
            }
        )
    return encoded


def _encode_rejected(
    encoded: list[dict[str, Any]],
    values: list[dict[str, Any]],
    rows: list[Row],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Add to each pair `rejected_ids`, what follows its prompt in the rejected answer.

    Raises ValueError for a pair whose answers do not follow the same tokens.
    """
    others = []
    for of_row in values:
        if "messages" in of_row:
            other = {"messages": of_row["rejected_messages"], "tools": of_row.get("tools")}
        else:
            other = {"prompt": of_row["prompt"], "completion": of_row["rejected"]}
        others.append(other)
    rejected = _encode_causal(others, rows, data, tokenizer)
    for item, of_row, made, other, row in zip(encoded, values, rejected, others, rows, strict=True):
        start = made["prompt_length"]
        if made["input_ids"][:start] != item["input_ids"][: item["prompt_length"]]:
            raise ValueError(
                f"{row.where}: the prompt has other tokens before the rejected answer than before "
                "the chosen one. Correct or remove the row."
            )
        of_row["rejected"] = other["completion"]
        item["rejected_ids"] = made["input_ids"][start:]
        item[CUT] |= made[CUT]


def _encode_prompts(
    values: list[dict[str, Any]], rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return the ids that generation starts from, for rows without answers."""
    encoded = []
    for of_row, row in zip(values, rows, strict=True):
        if "messages" in of_row:
            text = _rendered(tokenizer, of_row["messages"], True, row.where, of_row.get("tools"))
            ids, of_row["prompt"] = _encode_segments([[text]], tokenizer)[0][0], text
        else:
            ids = encode_prompt(tokenizer, of_row["prompt"])
        if not ids:
            raise ValueError(f"{row.where}: the prompt has no tokens. Remove the row.")
        of_row["completion"] = ""
        whole = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(ids)}
        encoded.append(whole | {"prompt_length": len(ids), CUT: False})
    return encoded


def _within(texts: list[str], data: DataConfig, where: str) -> list[str]:
    """Cut the texts of a row where data.max_length tokens surely end, before they are tokenized.

    The same list is returned if nothing is cut.

    Raises ValueError if such a row is not to be cut.
    """
    left, length = _CHARACTERS * data.max_length, sum(map(len, texts))
    if length <= left:
        return texts
    if not data.truncate:
        raise ValueError(
            f"{where}: has {length:,} characters, more than data.max_length = {data.max_length} "
            "tokens hold. Raise data.max_length, or cut rows with data.truncate: true."
        )
    cut = []
    for text in texts:
        cut.append(text[:left])
        left -= len(cut[-1])
    return cut


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [bos] if the tokenizer puts one in front of a text, else []."""
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

    The texts are tokenized together if the tokens of each leading part are a prefix of the whole,
    else one by one.
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
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    tools: list[Any] | None = None,
) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into (text, trained): trained are the assistant's turns.

    A turn of weight 0 is not trained. tools: what the template describes to the model.

    A turn starts where the template, asked for an open assistant turn, stops, and ends where the
    conversation up to it does. Both must be beginnings of the whole.
    """

    def rendered(count: int, open_turn: bool) -> str:
        return _rendered(tokenizer, messages[:count], open_turn, where, tools)

    whole = whole_text(rendered(len(messages), False), where, "messages")
    if tools and whole == _rendered(tokenizer, messages, False, where):
        raise ValueError(
            f"{where}: the row has tools, and the chat template of this tokenizer shows none to "
            "the model. Use a model with tools, or remove them from the rows."
        )
    segments, done = [], 0
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened, closed = rendered(n, True), rendered(n + 1, False)
        if not (whole.startswith(opened) and whole.startswith(closed) and len(opened) >= done):
            raise ValueError(
                f"{where}: the chat template of this tokenizer changes earlier turns (message "
                f"{n + 1} of {len(messages)}), so the trained part cannot be found. Give "
                "conversations with one assistant turn, or prompt and completion."
            )
        trained = message.get("weight") != 0
        segments.append((whole[done : len(opened)], False))
        segments.append((whole[len(opened) : len(closed)], trained))
        done = len(closed)
    return segments


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    open_turn: bool,
    where: str,
    tools: list[Any] | None = None,
) -> str:
    import jinja2

    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: the rows are messages, but the model's tokenizer has no chat template. "
            "Give one, such as data.chat_template: chatml, or rows with prompt and completion."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=open_turn
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{where}: the chat template refuses these messages ({error}). Correct their roles."
        ) from None
    return str(text)


def _fit(encoded: list[dict[str, Any]], split: str, data: DataConfig, causal: bool) -> None:
    """Cut rows to data.max_length in place if data.truncate is set; raise if it is not."""
    limit = data.max_length
    lengths = sorted(map(length_of, encoded))
    long = len(lengths) - bisect.bisect_right(lengths, limit)
    if long and not data.truncate:
        raise ValueError(
            f"data.max_length is {limit} tokens: {long} of {len(lengths)} {split} rows "
            f"({100 * long / len(lengths):.1f} %) are longer, the longest {lengths[-1]}. "
            "Raise data.max_length, or cut them with data.truncate: true."
        )
    if long:
        for item in encoded:
            item[CUT] |= length_of(item) > limit
            if "rejected_ids" in item:
                item["rejected_ids"] = item["rejected_ids"][: max(0, limit - item["prompt_length"])]
            for name in (*_COLUMNS, "labels"):
                if name in item:
                    item[name] = item[name][:limit]
    if any(not item.get("rejected_ids", [0]) for item in encoded):
        raise ValueError(
            f"data: a {split} row has no token of its rejected answer within {limit} tokens. Raise "
            "data.max_length."
        )
    if causal:
        # The first token of a row is never predicted, so its label trains nothing.
        empty = sum(all(label == IGNORED for label in item["labels"][1:]) for item in encoded)
        if empty:
            why = "Raise data.max_length." if long else "Remove them."
            raise ValueError(
                f"data: {empty} of {len(encoded)} {split} rows have no token to train on within "
                f"{limit} tokens. {why}"
            )


def length_of(item: dict[str, Any]) -> int:
    """Return the tokens of a row, of a pair those of its longer answer."""
    other = item.get("prompt_length", 0) + len(item.get("rejected_ids", ()))
    return max(len(item["input_ids"]), other)
