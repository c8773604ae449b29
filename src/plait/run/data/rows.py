"""Read rows from files, the hub or a built-in generator; errors name the file and the line."""

import csv
import glob
import gzip
import io
import itertools
import json
import random
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

from plait.options import did_you_mean, shown
from plait.run.config import DataConfig

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}
_PACKED = (".gz", ".zst")
_MAGIC = "*?["  # what makes a path a pattern
_NAME = 255  # characters of a file's name
_DELIMITERS = {"csv": ",", "tsv": "\t", "txt": None}


class Row(NamedTuple):
    """One row as it was read. where: file and line, for errors. values: column -> value."""

    where: str
    values: dict[str, Any]


def read_splits(
    data: DataConfig, only: str | None = None
) -> tuple[list[Row], dict[str, list[Row]]]:
    """Read the sources of a run; return the rows of data.train, and the rows of each split.

    The former are all rows of the source, the latter what a fraction for validation and the limits
    leave of it.

    only: the one split to read; data.train is not read then if that split is not taken from it.

    Raises as `read_rows` does, and ValueError if `only` is not set.
    """
    source: list[Row] = []
    splits: dict[str, list[Row]] = {}
    fraction = isinstance(data.validation, int | float)
    if only in (None, "train") or (only == "validation" and fraction):
        source = splits["train"] = read_rows(data.train, data, "train")
    if isinstance(data.validation, int | float) and source:
        splits["train"], splits["validation"] = _split(
            source, data.validation, data.seed, data.split_by
        )
    elif isinstance(data.validation, str | list) and only in (None, "validation"):
        splits["validation"] = read_rows(data.validation, data, "validation")
    if data.test is not None and only in (None, "test"):
        splits["test"] = read_rows(data.test, data, "test")
    if only is not None:
        if only not in splits:
            raise ValueError(
                f"data.{only} is not set, so there is nothing to evaluate on. Set data.{only}."
            )
        splits = {only: splits[only]}
    limits = {"train": data.limit, "validation": data.validation_limit, "test": data.test_limit}
    return source, {
        split: _limited(rows, limits[split], data.seed) for split, rows in splits.items()
    }


def read_rows(sources: str | list[str], data: DataConfig, split: str) -> list[Row]:
    """Read the rows of one split ("train", "validation", "test") from one source or several.

    Rows of train are drawn in the proportions of data.mix, if that is set.

    Raises FileNotFoundError for a source that is not there, and ValueError for an empty one or a
    malformed line.
    """
    key = f"data.{split}"
    sources = [sources] if isinstance(sources, str) else sources
    if not sources:
        raise ValueError(f"{key} is an empty list. Give at least one source.")
    if split == "train" and data.mix is not None and len(data.mix) != len(sources):
        raise ValueError(
            f"data.mix has {len(data.mix)} weights, and data.train has {len(sources)} sources. "
            "Give one weight for each."
        )
    parts = []
    for source in sources:
        parts.append(_read_source(source, data, split, key))
        if not parts[-1]:
            raise ValueError(f"{source}: no rows are here. Give {key} a source with rows.")
    if split == "train" and data.mix is not None:
        parts = _mixed(parts, data.mix, data.seed)
    return list(itertools.chain(*parts))


def read_file(path: Path, data: DataConfig) -> list[Row]:
    """Read the rows of one file by the ending of its name; one of another ending is JSON lines.

    data: of the run, for delimiter, header and quotes.

    Raises FileNotFoundError if there is no such file, and ValueError for one without rows or with a
    malformed line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. Correct the path.")
    kind = _kind(path) or "jsonl"
    rows = list(_read_file(path, kind, data.split, data))
    if not rows:
        raise ValueError(f"{path}: no rows are here. Give a file with rows.")
    return rows


def _read_source(source: str, data: DataConfig, split: str, key: str) -> list[Row]:
    if source.startswith("builtin:"):
        from plait.assets import builtin_rows

        made = builtin_rows(source.removeprefix("builtin:"), split, data.seed)
        return [Row(f"{source}: row {n}", values) for n, values in enumerate(made, 1)]
    default_part = data.split if split == "train" else split
    name, part = source, default_part
    if "#" in source and not (len(source) <= _NAME and Path(source).exists()):
        name, _, part = source.partition("#")
    if any(len(part) > _NAME for part in name.split("/")):
        raise ValueError(
            f"{key} is {shown(source)}, with a name of more than {_NAME} characters. Correct it."
        )
    path, chosen = Path(name).expanduser(), part != default_part
    if path.exists():
        return _read_path(path, part, data, key, chosen)
    if any(sign in name for sign in _MAGIC):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise FileNotFoundError(f"{key}: no file matches {name}. Correct the pattern.")
        files = (_read_path(Path(file), part, data, key, chosen) for file in found)
        return list(itertools.chain.from_iterable(files))
    known = data.format or _kind(path)
    if known is not None or path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"{key}: there is no file {name}. Correct the path.")
    return _read_hub(name, part, data, key)


def _read_path(path: Path, part: str, data: DataConfig, key: str, chosen: bool) -> list[Row]:
    """Read a file or a folder; chosen: whether the config names the part itself."""
    if path.is_dir():
        return _read_folder(path, part, key, chosen)
    kind = data.format or _kind(path)
    if kind is None:
        known = ", ".join(sorted(set(_SUFFIXES.values())))
        raise ValueError(
            f"{key}: the ending of {path} says no format. Set data.format to one of {known}."
        )
    return list(_read_file(path, kind, part, data))


def _kind(path: Path) -> str | None:
    """Return the format that a file's ending says, None if it says none."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    return _SUFFIXES.get(suffixes[-1] if suffixes else "")


def _read_file(path: Path, kind: str, part: str, data: DataConfig) -> Iterator[Row]:
    """Yield the rows of a file of this kind; a ValueError names the file and the line."""
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    try:
        with closing(_opened(path)) as file:
            if kind == "jsonl":
                yield from _read_jsonl(path, file)
            elif kind == "json":
                yield from _read_json(path, file, part)
            else:
                yield from _read_delimited(path, file, kind, data)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.object[error.start]:#x} is not UTF-8 text. "
            "Convert the file to UTF-8."
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a whole gzip file ({error}). Copy it again, or rename it without .gz."
        ) from None
    except OSError as error:
        if path.suffix != ".zst":
            raise
        raise ValueError(
            f"{path}: not a whole zstd file ({error}). Copy it again, or rename it without .zst."
        ) from None


def _opened(path: Path) -> IO[str]:
    """Open a file as text, unpacked if its name says that it is packed."""
    # utf-8-sig: a byte order mark is not part of the first column's name.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    if path.suffix == ".zst":
        import pyarrow

        unpacked: Any = pyarrow.input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


class DuplicateKey(ValueError):
    """A JSON object that has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; json itself would drop all but the last value of a key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        shown = ", ".join(f"{str(value)!r:.30}" for name, value in pairs if name == twice)
        raise DuplicateKey(
            f"the key {twice!r:.60} is given twice in an object ({shown}). Remove one."
        )
    return values


def _read_jsonl(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}). Correct that line."
            ) from None
        except DuplicateKey as error:
            raise ValueError(f"{where}: {error}") from None
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deep nesting
            raise ValueError(f"{where}: {_unusual(error)}. Correct that line.") from None
        yield Row(where, _columns(value, where))


def _read_json(path: Path, file: IO[str], part: str) -> Iterator[Row]:
    try:
        value = json.load(file, object_pairs_hook=_object)
    except DuplicateKey as error:
        raise ValueError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}). "
            "Correct that line; one JSON object a line is data.format: jsonl."
        ) from None
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_unusual(error)}. Correct it.") from None
    if isinstance(value, dict):
        if not isinstance(value.get(part), list):
            raise ValueError(
                f"{path}: no list of rows under {part!r}. It has {', '.join(value)}: "
                "choose with data.split, or write FILE#KEY."
            )
        value = value[part]
    if not isinstance(value, list):
        raise ValueError(
            f"{path}: is a {type(value).__name__}. Give a list of rows, or lists by split."
        )
    for number, row in enumerate(value, 1):
        where = f"{path}: row {number}"
        yield Row(where, _columns(row, where))


def _unusual(error: Exception) -> str:
    """Describe what JSON's own syntax errors do not."""
    if isinstance(error, RecursionError):
        return "the values are nested too deeply"
    return f"not readable ({str(error).partition(';')[0][:200]})"


def _read_delimited(path: Path, file: IO[str], kind: str, data: DataConfig) -> Iterator[Row]:
    delimiter = data.delimiter or _DELIMITERS[kind]
    if delimiter is None:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"{path}: line {number}", {"text": line.rstrip("\r\n")})
        return
    quotes = kind == "csv" if data.quotes is None else data.quotes
    header = kind != "txt" if data.header is None else data.header
    names: list[str] | None = None
    for number, fields in _split_lines(path, file, delimiter, quotes):
        where = f"{path}: line {number}"
        if not header:
            yield Row(where, _columns(fields, where))
        elif names is None:
            names = [name.strip() for name in fields]
            if len(set(names)) < len(names):
                raise ValueError(f"{where}: a column name is given twice: {names}. Rename one.")
        elif len(fields) != len(names):
            raise ValueError(
                f"{where}: {len(fields)} values, but the header names {len(names)} columns. "
                f"Correct that line (delimiter {delimiter!r}, quotes {str(quotes).lower()})."
            )
        else:
            yield Row(where, dict(zip(names, fields, strict=True)))


def _split_lines(
    path: Path, file: IO[str], delimiter: str, quotes: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, fields) of each record that is not blank."""
    if not quotes:
        for number, line in enumerate(file, 1):
            if line.strip("\r\n"):
                yield number, line.rstrip("\r\n").split(delimiter)
        return
    if len(delimiter) > 1:
        raise ValueError(
            f"data.delimiter is {delimiter!r}: quoted values need one character. "
            "Set data.quotes: false."
        )
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {start}: {error}. Correct its quotes, or set data.quotes: false."
        ) from None


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        table = pyarrow.parquet.read_table(path)
        rows, features = table.to_pylist(), Features.from_arrow_schema(table.schema)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: not a readable Parquet file ({reason}). Write it again."
        ) from None
    return _named_rows(rows, features, str(path))


def _read_folder(path: Path, part: str, key: str, chosen: bool) -> list[Row]:
    """Read a folder that `save_to_disk` of datasets wrote.

    part: the split, where the folder holds several. chosen: whether the config names it.
    """
    from datasets import Dataset, DatasetDict, load_from_disk

    whole = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    if not whole and not (path / "dataset_dict.json").is_file():
        raise IsADirectoryError(
            f"{key}: {path} is a folder, and not one of datasets' save_to_disk. Give its files: "
            f"[a.jsonl, b.jsonl], or a pattern: {path}/*.jsonl"
        )
    try:
        found = load_from_disk(str(path))
    except Exception as error:  # whatever datasets makes of a damaged folder
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: not a readable folder of datasets ({reason}). Save it again."
        ) from None
    if isinstance(found, DatasetDict):
        if part not in found:
            known = ", ".join(map(str, found))
            raise ValueError(f"{path}: has no split {part!r}. It has {known}: write FOLDER#SPLIT.")
        found = found[part]
    elif chosen:
        raise ValueError(f"{path}: holds no splits, so there is no {part!r}. Leave it out.")
    assert isinstance(found, Dataset)
    return _named_rows(found.with_format(None).to_list(), found.features, str(path))


def _read_hub(name: str, part: str, data: DataConfig, key: str) -> list[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, data.subset, split=part)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{key}: {name} is no file here, and the hub gives no such data set ({reason}). "
            "Correct the path or the hub id, data.subset and the split."
        ) from error
    return _named_rows(dataset.to_list(), dataset.features, name)


def _named_rows(rows: list[dict[str, Any]], features: Any, where: str) -> list[Row]:
    """Return rows with the names of their classes, where a column has numbers of classes.

    features: of datasets, which know the names.
    """
    from datasets import ClassLabel

    names = {n: f.names for n, f in features.items() if isinstance(f, ClassLabel)}
    for values in rows:
        for column, known in names.items():
            if values[column] in range(len(known)):  # an unlabelled row holds -1 or None
                values[column] = known[values[column]]
    return [Row(f"{where}: row {number}", values) for number, values in enumerate(rows, 1)]


def _columns(value: Any, where: str) -> dict[str, Any]:
    """Return a row as columns; a list has the columns c0, c1, ..."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {f"c{i}": v for i, v in enumerate(value)}
    raise ValueError(f"{where}: is {value!r:.60}. A row is an object or a list of values.")


def _split(
    rows: list[Row], fraction: float, seed: int, by: str | int | None = None
) -> tuple[list[Row], list[Row]]:
    """Cut a fraction off, shuffled by the seed; at least one row stays on either side.

    by: a column; rows with an equal value there stay together, and the number of rows cut off is
    the nearest that whole groups reach in their shuffled order.
    """
    if len(rows) < 2:
        raise ValueError(
            f"data.validation is {fraction}, but there is 1 training row. Give validation rows."
        )
    target, draw = min(max(1, round(fraction * len(rows))), len(rows) - 1), random.Random(seed)
    if by is None:
        order = draw.sample(range(len(rows)), len(rows))
        return [rows[i] for i in order[target:]], [rows[i] for i in order[:target]]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row, by), []).append(row)
    if len(groups) < 2:
        raise ValueError(
            f"data.split_by is {by!r}, and all {len(rows)} rows have the same value there. Give "
            "another column, or validation rows."
        )
    order = draw.sample(list(groups.values()), len(groups))
    sizes = list(itertools.accumulate(map(len, order)))[:-1]
    cut = 1 + min(range(len(sizes)), key=lambda n: abs(sizes[n] - target))
    validation, train = order[:cut], order[cut:]
    return list(itertools.chain(*train)), list(itertools.chain(*validation))


def _group(row: Row, by: str | int) -> str:
    """Return the value of a column, by name or by index, as text."""
    names = list(row.values)
    name = dict(enumerate(names)).get(by) if isinstance(by, int) else by
    if name not in row.values:
        raise ValueError(
            f"{row.where}: data.split_by is {by!r}, and the columns are "
            f"{', '.join(names[:20])}. {did_you_mean(str(by), names)}"
        )
    return json.dumps(row.values[name], sort_keys=True, default=str)


def _mixed(parts: list[list[Row]], weights: list[float], seed: int) -> list[list[Row]]:
    """Draw rows of each source in these proportions; the source that ends first is used whole."""
    most = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    draw, mixed = random.Random(seed), []
    for part, weight in zip(parts, weights, strict=True):
        count = min(len(part), max(1, round(most * weight)))
        mixed.append([part[i] for i in sorted(draw.sample(range(len(part)), count))])
    return mixed


def _limited(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in random.Random(seed).sample(range(len(rows)), limit)]
