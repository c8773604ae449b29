"""The JSON of a federated run folder: schema and version, files of plait 0.1, damage."""

import json
from pathlib import Path

import pytest

from plait.run.federated.folder import FederatedFolder

ROUNDS = [{"kind": "evaluation", "round": 0, "clients": {}}, {"kind": "round", "round": 1}]
PARTITION = {"ann": [0, 2], "bob": [1]}
COUNTS = {"ann": {"x": 1, "y": 1}, "bob": {"x": 1, "y": 0}}


def test_what_is_written_names_its_schema_and_is_read_back(tmp_path: Path) -> None:
    folder = FederatedFolder(tmp_path)
    assert (folder.read_partition(), folder.read_row_counts(), folder.read_rounds()) == ({}, {}, [])
    folder.write_partition(PARTITION)
    folder.write_row_counts(COUNTS)
    folder.write_rounds(ROUNDS[:1])
    folder.append_round(ROUNDS[1])
    assert folder.read_partition() == PARTITION
    assert folder.read_row_counts() == COUNTS
    assert folder.read_rounds() == ROUNDS
    heads = [json.loads((tmp_path / name).read_text()) for name in ("partition.json", "rows.json")]
    heads.append(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]))
    assert [head["schema"] for head in heads] == ["plait.partition", "plait.rows", "plait.rounds"]
    assert [head["version"] for head in heads] == [1, 1, 1]


def test_files_of_plait_0_1_are_read(tmp_path: Path) -> None:
    (tmp_path / "partition.json").write_text(json.dumps(PARTITION) + "\n")
    (tmp_path / "rows.json").write_text(json.dumps(COUNTS) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROUNDS))
    folder = FederatedFolder(tmp_path)
    assert folder.read_partition() == PARTITION
    assert folder.read_row_counts() == COUNTS
    assert folder.read_rounds() == ROUNDS


def test_an_unfinished_last_line_is_dropped_and_other_damage_named(tmp_path: Path) -> None:
    folder = FederatedFolder(tmp_path)
    folder.write_rounds(ROUNDS)
    with folder.metrics.open("a") as file:
        file.write('{"kind": "rou')
    assert folder.read_rounds() == ROUNDS
    folder.metrics.write_text("{\n{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is not JSON"):
        folder.read_rounds()
    (tmp_path / "partition.json").write_text('{"schema": "plait.partition", "version": 9}')
    with pytest.raises(ValueError, match="version is 9"):
        folder.read_partition()
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(ValueError, match=r"rows\.json: .* Remove it and resume the run"):
        folder.read_row_counts()
