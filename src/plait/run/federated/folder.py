"""The folder of a federated run: its files, and the JSON in them.

config.yaml      the config, with its overrides
partition.json   client -> indices of its training rows
rows.json        client -> label or task -> how many training rows
metrics.jsonl    a line for each round, each evaluation, and each report on privacy
server/          checkpoints; clients/: private states; report.md and pictures
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plait.run.folder import RunFolder, append_line, read_json, read_lines, write_json, write_lines

Series = list[tuple[int, dict[str, float]]]  # (round, client -> value)

_PARTITION, _ROWS, _ROUNDS = "plait.partition", "plait.rows", "plait.rounds"
_REMEDY = "Remove it and resume the run, which writes it again."


class FederatedFolder(RunFolder):
    """The files of one federated run below `path`."""

    @property
    def server(self) -> Path:
        """The server's checkpoints."""
        return self.path / "server"

    @property
    def clients(self) -> Path:
        """The clients' private states, if they are on this machine."""
        return self.path / "clients"

    @property
    def privacy_key(self) -> Path:
        """The secret behind noise and sampling, if the config names no other file."""
        return self.path / "privacy.key"

    def write_partition(self, partition: Mapping[str, Iterable[int]]) -> None:
        """Write client -> indices of its training rows."""
        _write_clients(self.path / "partition.json", _PARTITION, partition)

    def read_partition(self) -> dict[str, list[int]]:
        """Read client -> indices of its training rows; {} before the run."""
        return _read_clients(self.path / "partition.json", _PARTITION)

    def write_row_counts(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Write client -> label or task -> number of its training rows."""
        _write_clients(self.path / "rows.json", _ROWS, counts)

    def read_row_counts(self) -> dict[str, dict[str, int]]:
        """Read client -> label or task -> number of its training rows; {} if unknown."""
        return _read_clients(self.path / "rows.json", _ROWS)

    def write_rounds(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace the lines of metrics.jsonl."""
        write_lines(self.metrics, _ROUNDS, lines)

    def read_rounds(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl; [] before the run."""
        return read_rounds(self.metrics)

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl, which exists."""
        append_line(self.metrics, line)


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl; [] if there is none.

    Raises:
        ValueError: a line is damaged. An unfinished last line is dropped instead.
    """
    lines = read_lines(path, _ROUNDS)
    for line in lines:
        if not isinstance(line.get("round"), int) or not isinstance(line.get("kind"), str):
            raise ValueError(f"{path}: {line!r:.60} has no round or no kind. Remove that line.")
    return lines


def _write_clients(path: Path, schema: str, content: Mapping[str, Any]) -> None:
    write_json(path, schema, {"clients": dict(content)})


def _read_clients(path: Path, schema: str) -> dict[str, Any]:
    content = read_json(path, schema, _REMEDY)
    wrapped = content.get("clients")
    clients = wrapped if isinstance(wrapped, dict) else content  # 0.1 wrote the clients alone
    for name, value in clients.items():
        if not isinstance(value, list | dict):
            raise ValueError(f"{path}: {name} is {value!r:.60}. {_REMEDY}")
    return clients
