"""Where an export may be written, and the mark by which a later one recognises it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from plait.core.files import lock
from plait.run.folder import RunFolder, read_json, write_json

MARK, _SCHEMA = "plait_export.json", "plait.export"  # the file that tells an export


def lock_for(out: Path, run: str | Path) -> AbstractContextManager[None]:
    """Return the lock of a run folder if `out` is inside it, else a lock of nothing."""
    folder = RunFolder.open(run).path
    inside = out.resolve().is_relative_to(folder.resolve())
    return lock(folder) if inside else nullcontext()


def place_for(path: str | Path, to: str, out: str | Path | None, force: bool) -> Path:
    """Return the folder that an export of the run at `path` writes.

    out: as the caller gave it; None: the folder named by `to` in the run folder.

    Raises:
        FileExistsError: it is a part of the run, or may not be replaced.
    """
    place, own = Path(out) if out is not None else Path(path) / to, RunFolder(path)
    if place.resolve() in [part.resolve() for part in (own.adapter, own.model, own.checkpoints)]:
        raise FileExistsError(f"{place}: is a part of the run itself. Give another --out.")
    check_replaceable(place, force)
    return place


def task_folders(place: Path, tasks: Sequence[str]) -> dict[str | None, Path]:
    """Return the folder of each task below `place`.

    Raises:
        ValueError: a task whose name cannot be that of a folder.
    """
    for task in tasks:
        if task != Path(task).name or task in ("", "..", MARK):
            raise ValueError(
                f"task {task!r} cannot name a folder. Export each with --task NAME --out DIR."
            )
    return {task: place / task for task in tasks}


def mark_export(folder: Path, **facts: Any) -> None:
    """Note in an export that plait wrote it, and its files: `check_replaceable` asks for both.

    facts: what else the note says.
    """
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    write_json(folder / MARK, _SCHEMA, {**facts, "files": files})


def check_replaceable(out: Path, force: bool) -> None:
    """Raise FileExistsError unless an export may be put at `out`.

    force: an earlier export may be replaced, if it holds no files but its own.
    """
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out}: exists. Give --force to replace it, or another --out.")
    refused = "--force replaces an earlier export alone. Remove it yourself, or give another --out."
    if not out.is_dir():
        raise FileExistsError(f"{out}: is a file. {refused}")
    if not any(out.iterdir()):
        return
    if not (out / MARK).is_file():
        raise FileExistsError(f"{out}: is no export (it has no {MARK}). {refused}")
    files = read_json(out / MARK, _SCHEMA, refused).get("files")
    known = {MARK, *files} if isinstance(files, list) else {MARK}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            raise FileExistsError(f"{out}: holds {name}, which no export wrote. {refused}")
