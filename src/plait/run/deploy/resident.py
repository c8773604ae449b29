"""A trainer that stays in memory and answers orders over a local socket, one after another.

    client program  --order-->  AF_UNIX socket  -->  answer(order)  --reply-->  client program

Flower starts a new process for every message. Loading torch and a base model there would cost more
than most rounds, so that process only forwards bytes to a `Resident`, which has loaded both. An
order and a reply are one byte string each, framed by `multiprocessing.connection`; no object is
sent, so nothing is unpickled. The socket's folder, accessible to its owner only, decides who may
use it.

Limits: POSIX. Orders wait for each other, even a `hello` for a training. A training that has begun
continues if the program that ordered it goes away; an order that still waits is dropped.
"""

import os
import queue
import stat
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from plait.federated.protocol import Answer, failure

LARGEST = 2**31 - 1  # bytes of an order; more does not pass Flower either
_LONGEST = 100  # of an address; the system's own limit is 104 to 108 bytes
_IDLE = 60.0  # seconds that a connection may take to send its order


class Resident:
    """Serves `answer` on a socket while the context is open.

    Args:
        address: of the socket. Its folder is made with mode 0700; an existing one must have that
            mode. `Resident.folder()` makes one with a short path.
        answer: an order -> its reply; see `plait.federated.protocol`.
        largest: size of the longest order that is read, in bytes.

    Raises:
        ValueError: the address is too long.
        PermissionError: others may enter the folder.
        FileExistsError: another trainer answers there, or the address is another kind of file.
    """

    def __init__(self, address: str | Path, answer: Answer, *, largest: int = LARGEST) -> None:
        self.address, self.answer, self.largest = Path(address), answer, largest
        self._orders: queue.SimpleQueue[tuple[Connection, bytes] | None] = queue.SimpleQueue()
        self._closing = False

    @staticmethod
    def folder() -> Path:
        """Make a folder for a socket, with mode 0700 and a short path; the caller removes it."""
        return Path(tempfile.mkdtemp(prefix="plait-"))

    def __enter__(self) -> "Resident":
        self._claim()
        self._listener = Listener(str(self.address), family="AF_UNIX", backlog=64)
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._listen, self._work)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop listening, without waiting for the order that is being answered."""
        self._closing = True
        self._orders.put(None)
        Client(str(self.address), family="AF_UNIX").close()  # wakes accept()
        self._threads[0].join()
        self._listener.close()

    def _claim(self) -> None:
        """Free the address of a stale socket, and check that its folder is private."""
        where, folder = self.address, self.address.parent
        if len(os.fsencode(where)) > _LONGEST:
            raise ValueError(
                f"{where}: the address of a socket has up to {_LONGEST} bytes, this one has "
                f"{len(os.fsencode(where))}. Use a shorter folder, such as one in /tmp."
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o077:
            raise PermissionError(
                f"{folder}: has mode {mode:04o}, so others could give orders to the trainer. "
                f"Run chmod 700 {folder}."
            )
        if not where.exists():
            return
        if not where.is_socket():
            raise FileExistsError(f"{where}: is there and is no socket. Use another address.")
        try:
            Client(str(where), family="AF_UNIX").close()
        except OSError:  # left there by a trainer that was killed
            where.unlink()
        else:
            raise FileExistsError(f"{where}: another trainer answers there. Use another address.")

    def _listen(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # gone before it was accepted
                continue
            if self._closing:
                connection.close()
                return
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: Connection) -> None:
        """Read one order; a client that sends none, or half of one, blocks this thread alone."""
        try:
            if connection.poll(_IDLE):
                self._orders.put((connection, connection.recv_bytes(self.largest)))
                return
        except (OSError, EOFError):  # gone, or too large
            pass
        connection.close()

    def _work(self) -> None:
        while (waiting := self._orders.get()) is not None:
            connection, order = waiting
            try:
                # A client sends once, so readable now means end of file: it has gone.
                if not connection.poll():
                    connection.send_bytes(self._reply(order))
            except OSError:  # gone while its order was answered
                pass
            finally:
                connection.close()

    def _reply(self, order: bytes) -> bytes:
        try:
            return self.answer(order)
        except Exception as error:  # the trainer outlives it
            return failure("", f"{type(error).__name__}: {error}")
