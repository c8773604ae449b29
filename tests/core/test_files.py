"""Files and folders that are whole or absent, and locks, also when a process is killed."""

import os
import random
import socket
import time
from pathlib import Path

import pytest

from plait.core import files
from plait.core.files import lock, put_back, replace_dir, write_atomic
from tests.support.killed import child, holder, killed


def fill(folder: Path) -> None:
    (folder / "c").write_text("next")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Replacing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_between_the_two_renames_loses_nothing(step: int, tmp_path: Path) -> None:
    """Where names cannot be exchanged: the old folder comes back."""
    target = tmp_path / "adapter"
    code = f"""
files.replace_dir(path, fill("old"))
calls, real = [], os.replace
def replace(*names):
    calls.append(names)
    kill() if len(calls) == {step} else real(*names)
files._exchange = lambda one, other: False
os.replace = replace
files.replace_dir(path, fill("new"))
"""
    killed(code, target)
    assert len(names(tmp_path)) > 1 or not target.exists()
    put_back(target)
    assert (target / "a").read_text() == (target / "b").read_text() == "old"
    replace_dir(target, fill)
    assert names(tmp_path) == ["adapter"]
    assert names(target) == ["c"]


def test_the_next_call_puts_the_old_folder_back_before_it_writes(tmp_path: Path) -> None:
    target, old = tmp_path / "adapter", tmp_path / ".adapter.old.x"
    old.mkdir()
    (old / "a").write_text("old")

    def broken(folder: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        replace_dir(target, broken)
    assert names(tmp_path) == ["adapter"]
    assert (target / "a").read_text() == "old"


@pytest.mark.parametrize("moment", ["files._put = kill", "files._exchange = kill", "fill = kill"])
def test_a_kill_before_the_new_folder_is_in_place_keeps_the_old_one(
    moment: str, tmp_path: Path
) -> None:
    target = tmp_path / "adapter"
    new = "kill" if moment.startswith("fill") else "fill('new')"
    killed(
        f"files.replace_dir(path, fill('old'))\n{moment}\nfiles.replace_dir(path, {new})", target
    )
    assert (target / "a").read_text() == (target / "b").read_text() == "old"
    assert any(".adapter.new." in name for name in names(tmp_path))
    replace_dir(target, fill)
    assert names(tmp_path) == ["adapter"]


def test_a_folder_is_there_whenever_the_process_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    replace_dir(target, fill)
    if not files._exchange(target, target):
        pytest.skip("this file system cannot exchange names")
    code = """
for i in range(100000):
    files.replace_dir(path, fill(str(i)))
    if i == 1: print("at work", flush=True)
"""
    moments = random.Random(0)
    for _ in range(10):
        process = child(code, target)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.wait()
        assert names(target) == ["a", "b"]
        assert (target / "a").read_text() == (target / "b").read_text()
    replace_dir(target, fill)
    assert names(tmp_path) == ["adapter"]


def test_a_writer_at_work_keeps_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    code = """
def wait(folder):
    print("in", flush=True)
    time.sleep(60)
files.replace_dir(path, wait)
"""
    process = child(code, target)
    assert process.stdout is not None
    process.stdout.readline()
    replace_dir(target, fill)
    assert len(names(tmp_path)) == 2
    process.kill()
    process.wait()
    replace_dir(target, fill)
    assert names(tmp_path) == ["adapter"]


def test_a_file_is_no_folder_to_replace(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(NotADirectoryError, match="x: is a file"):
        replace_dir(tmp_path / "x", fill)
    assert (tmp_path / "x").read_text() == "mine"


def test_what_a_killed_writer_of_a_file_left_is_removed(tmp_path: Path) -> None:
    killed("os.replace = kill\nfiles.write_atomic(path, 'half')", tmp_path / "eval.json")
    assert len(names(tmp_path)) == 1
    (tmp_path / ".other.json.tmp.x").write_text("another one's")
    write_atomic(tmp_path / "eval.json", "whole")
    assert names(tmp_path) == [".other.json.tmp.x", "eval.json"]


def test_names_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that a name was put into, and before that all that is in it."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    write_atomic(tmp_path / "x", "1")
    assert synced == [tmp_path]
    synced.clear()
    replace_dir(tmp_path / "y", fill)
    assert [path.name for path in synced[:1]] == ["c"]
    assert synced[-1] == tmp_path


# Locks -------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    process = holder(folder)
    try:
        with pytest.raises(FileExistsError) as caught, lock(folder):
            pass
        who = f"process {process.pid} on {socket.gethostname()} since 2"
        assert str(caught.value).startswith(f"{folder}: is in use by {who}")
        assert names(folder) == [".lock"]
    finally:
        process.kill()
        process.wait()
    assert names(folder) == [".lock"]  # nobody removed it, and it does not count
    with lock(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
        with pytest.raises(FileExistsError, match=rf"process {os.getpid()} on"), lock(folder):
            pass
    assert names(folder) == []


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    """Neither the folders that it made, unless they are used, nor its file."""
    with lock(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="no"), lock(tmp_path / "a" / "b"):
        raise ValueError("no")
    assert names(tmp_path) == []
    with lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").touch()
    assert names(tmp_path / "a" / "b") == ["x"]
    (tmp_path / "c").mkdir()
    with lock(tmp_path / "c"):
        pass
    assert (tmp_path / "c").is_dir()
    (tmp_path / "d").touch()
    with pytest.raises(NotADirectoryError, match="d: is a file"), lock(tmp_path / "d"):
        pass


def test_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    code = """
try:
    with files.lock(path):
        while not path.with_name("end").exists():
            time.sleep(0.01)
except FileExistsError:
    sys.exit(2)
"""
    processes = [child(code, tmp_path / "run") for _ in range(8)]
    late = time.monotonic() + 30
    while sum(p.poll() is None for p in processes) > 1 and time.monotonic() < late:
        time.sleep(0.01)
    (tmp_path / "end").touch()
    assert sorted(p.wait(30) for p in processes) == [0, *[2] * 7]
    # Where another process than the winner made the folder, an empty one may stay behind.
    assert names(tmp_path) in (["end"], ["end", "run"])
    assert not (tmp_path / "run").exists() or not names(tmp_path / "run")


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
lock = files.lock(path)
lock.__enter__()
if os.fork():
    print("forked", flush=True)
    kill()
time.sleep(2)
"""
    process = child(code, tmp_path / "run")
    process.wait(30)
    with lock(tmp_path / "run"):
        pass


def test_without_kernel_locks_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "claim", lambda handle: None)
    gone = r"If that process is gone, remove .*\.lock"
    with lock(tmp_path), pytest.raises(FileExistsError, match=gone), lock(tmp_path):
        pass
    assert names(tmp_path) == []
