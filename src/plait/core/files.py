"""Files and folders that are whole or absent, and folders that one process at a time writes to."""

import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

# A write fails for these although the path is right: there is no room, or the disk is broken.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

LOCK = ".lock"  # in a folder that a process writes to
_locks: set[int] = set()  # open handles of this process' locks


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a failed write name its file and be an OSError with a number.

    Python leaves the name out once a file is open, and safetensors has an error of its own.
    """
    try:
        yield
    except Exception as error:
        number = number_of(error)
        if number not in UNWRITABLE or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def number_of(error: BaseException) -> int | None:
    """Return the errno of an error, also of one that a library raises in its place."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # as Rust writes it
    return int(found[1]) if found else None


def unwritten(text: str, cause: BaseException) -> OSError:
    """Return an OSError with a text of its own and the errno of its cause; EIO if it has none."""
    error = OSError(text)
    error.errno = number_of(cause) or errno.EIO
    return error


def write_atomic(path: str | Path, content: str | bytes, private: bool = False) -> None:
    """Write a file under a temporary name beside it, then rename it: never half a file.

    What killed writers of the same file left behind is removed. private: only its owner may read
    the file.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    for left in abandoned(path, "tmp"):
        left.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp.")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            claim(handle)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not private:  # as mkstemp makes it; else what the user's umask gives any other file
            os.chmod(name, 0o666 & ~umask())
        os.replace(name, path)
        sync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def umask() -> int:
    """Return the process' umask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk, where a power failure leaves them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not possible on this file system
            raise
    finally:
        os.close(handle)


def replace_dir(path: str | Path, write: Callable[[Path], Result]) -> Result:
    """Let `write(folder)` fill a temporary folder, then put it at `path`; return its result.

    A folder that was there stays untouched until the new one is complete, and comes back when
    the last rename fails. What killed calls left behind is put back or removed.

    Raises NotADirectoryError if `path` is a file.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file. Remove it, or give another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    put_back(path)
    for left in (*abandoned(path, "old"), *abandoned(path, "new")):
        shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new."))
    handle = os.open(new, os.O_RDONLY)
    try:
        claim(handle)
        with naming(path):
            result = write(new)
        for file in filter(Path.is_file, new.rglob("*")):  # some writers make files private
            file.chmod(0o666 & ~umask())
            sync(file)
        new.chmod(0o777 & ~umask())
        for folder in (new, *filter(Path.is_dir, new.rglob("*"))):
            sync(folder)
        _put(new, path)
        return result
    finally:
        os.close(handle)
        shutil.rmtree(new, ignore_errors=True)


def put_back(path: Path) -> None:
    """Put a folder back that a call of `replace_dir` moved away before it was killed."""
    for left in abandoned(path, "old"):
        if not path.exists():
            os.replace(left, path)


def _put(new: Path, path: Path) -> None:
    """Give a complete folder its name; the one that had it ends as `new`, or is removed."""
    if not path.exists():
        os.replace(new, path)
    elif not _exchange(new, path):
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one step; False where that is not possible.

    There is no moment at which a killed process leaves no folder under either name. Linux has it,
    on most of its file systems.
    """
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# Locks ------------------------------------------------------------------------------------------


def claim(handle: int) -> bool | None:
    """Lock an open file or folder; False if it is locked already, None where nothing can be locked.

    The kernel drops the lock when the handle is closed or its process ends, however it ends.
    """
    try:
        import fcntl  # not on every system

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def abandoned(path: Path, kind: str) -> Iterator[Path]:
    """Yield what killed writers of `path` left beside it, under the names .NAME.KIND.*

    A writer that is at work has claimed its file or folder, which is left out.
    """
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.{kind}.*")):
        try:
            handle = os.open(left, os.O_RDONLY)
        except OSError:  # gone by now, or another user's
            continue
        try:
            if claim(handle):
                yield left
        finally:
            os.close(handle)


def check_place(folder: str | Path) -> Path:
    """Return the path of a folder that can be made, or written to if it is there.

    Raises NotADirectoryError if it, or a folder above it, is a file, and PermissionError if nothing
    can be written there.
    """
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest}: is a file. Remove it, or give another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest}: cannot be written to. Give another folder.")
    return folder


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; a lock whose holder is dead is taken over.

    The folder is made if it is missing, and removed again if it is empty at the end. Where several
    processes ask at once, an empty folder that a refused one made may stay.

    Raises FileExistsError if a process holds the folder, and what `check_place` raises.
    """
    folder = check_place(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        handle = _take(folder)
        try:
            yield
        finally:
            if handle in _locks:  # not in a forked process
                _locks.remove(handle)
                (folder / LOCK).unlink(missing_ok=True)
                os.close(handle)
    finally:
        for path in missing:
            try:
                path.rmdir()
            except OSError:  # it holds something
                break


def _take(folder: Path) -> int:
    """Lock the lock file of a folder and write into it who holds it; return its open handle."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            made = True
        except FileExistsError:
            try:
                handle, made = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # removed by its holder just now
                continue
        except FileNotFoundError:  # the folder was removed just now
            continue
        claimed = claim(handle)
        if claimed is False or (claimed is None and not made):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            stale = "" if claimed is False else f" If that process is gone, remove {path}."
            raise FileExistsError(
                f"{folder}: is in use by {holder or 'another process'}. Wait until it ends, or "
                f"give another folder.{stale}"
            )
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)  # its holder removed the file before it was locked here
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    try:
        with naming(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, holder.encode(), 0)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(handle)
        raise
    _locks.add(handle)
    return handle


def _forget_locks() -> None:
    """Close the locks in a forked process: a lock ends with the process that took it."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
