"""Clients in worker processes: several at a time, each with a deadline, each allowed to die.

    exchange: an idle worker gets the next order; a worker that is silent at the deadline is killed;
              the order of a worker that dies fails; both are replaced before the next order

A worker is a process that builds its own answerer (base model, adapters, data) once and answers
order after order. Workers are forked from a server process that has imported torch and plait, so
that starting or replacing one takes a fraction of a second. Private states are files, so any worker
can answer for any client.

Limits: one machine. Each worker holds its own base model. Only the deadline distinguishes a slow
order from one that hangs.
"""

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from statistics import median
from typing import Any

from plait.federated.protocol import Answer, failure

_BUILT = b"built"
# Errors that a change of the config can fix keep their type, which decides how they are shown.
_TOLD = {kind.__name__: kind for kind in (ValueError, FileNotFoundError, ImportError)}


class Deadlines:
    """How long a reply may take.

    `first` seconds until a reply has come, for the cold start; then max(`floor`, 3 x the largest
    median of an exchange so far). An exchange is the training or the evaluation of a round; a few
    slow clients do not move its median.
    """

    def __init__(self, first: float, floor: float) -> None:
        for name, seconds in (("first", first), ("floor", floor)):
            if not seconds > 0:
                raise ValueError(f"timeouts.{name} = {seconds}. Give seconds above 0.")
        self.first, self.floor = first, floor
        self._slowest, self._now = 0.0, list[float]()

    def begin(self) -> None:
        """Begin an exchange."""
        self._slowest, self._now = self._median(), []

    def note(self, seconds: float) -> None:
        """Note how long a reply took."""
        self._now.append(seconds)

    def limit(self) -> float:
        """Seconds that the next reply may take."""
        slowest = self._median()
        return max(self.floor, 3 * slowest) if slowest else self.first

    def _median(self) -> float:
        return max(self._slowest, median(self._now) if self._now else 0.0)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    client: str = ""  # whose order it has
    since: float = 0.0
    until: float = float("inf")
    built: bool = False


class Workers:
    """A pool of worker processes; it is an `Exchange`, and closes as a context manager.

    Args:
        make: builds the answerer, in the worker; a picklable function of no arguments.
        count: processes.
        deadlines: of the replies; None: no limit.
        threads: torch's, in each worker; None: torch's own choice.

    Raises:
        Exception: when an exchange begins, if a worker could not build its answerer: the same
            ValueError, ImportError or FileNotFoundError, else a RuntimeError.
    """

    def __init__(
        self,
        make: Callable[[], Answer],
        count: int,
        deadlines: Deadlines | None = None,
        threads: int | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"engine.workers = {count}. Give 1 or more.")
        self.make, self.count, self.threads = make, count, threads
        self.deadlines = deadlines
        self._pool: list[_Worker] = []

    def __enter__(self) -> "Workers":
        self._pool += [self._start() for _ in range(self.count - len(self._pool))]
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ready(self) -> None:
        """Wait until all workers are built.

        Raises:
            Exception: see the class.
        """
        while not all(worker.built for worker in self._pool):
            for _ in self._heard():
                pass  # nobody has an order

    def close(self) -> None:
        """End all workers."""
        while self._pool:
            self._end(self._pool[0])

    def __call__(self, orders: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Carry the orders; see `protocol.Exchange`."""
        left = list(orders)
        if self.deadlines is not None:
            self.deadlines.begin()
        try:
            while left or any(w.client for w in self._pool):
                while len(self._pool) < min(self.count, len(left)):
                    self._pool.append(self._start())
                for worker in list(self._pool):
                    if left and worker.built and not worker.client:
                        taken = self._give(worker, left[0], orders[left[0]])
                        left = left[taken:]
                yield from self._heard()
        finally:  # an abandoned exchange leaves no worker with an old order
            for worker in [w for w in self._pool if w.client]:
                self._end(worker)

    def _give(self, worker: _Worker, client: str, order: bytes) -> bool:
        """Send an order; False if the worker had died while idle, which removes it."""
        try:
            worker.pipe.send_bytes(order)
        except OSError:
            self._end(worker)
            return False
        worker.client, worker.since = client, time.monotonic()
        if self.deadlines is not None:
            worker.until = worker.since + self.deadlines.limit()
        return True

    def _heard(self) -> Iterator[tuple[str, bytes]]:
        """Wait until something happens; yield the replies, and the failures of lost workers."""
        now = time.monotonic()
        first = min((w.until for w in self._pool), default=now)
        ready = wait([w.pipe for w in self._pool], max(0.0, min(first - now, 1.0)))
        for worker in list(self._pool):
            client = worker.client
            if worker.pipe in ready:
                try:
                    data = worker.pipe.recv_bytes()
                except (EOFError, OSError):
                    if not client:  # it had no order: it died idle or while it was built
                        self._died(worker)
                    else:
                        yield client, self._lost(worker)
                    continue
                if not worker.built:
                    self._settle(worker, data)
                    continue
                if self.deadlines is not None:
                    self.deadlines.note(time.monotonic() - worker.since)
                worker.client, worker.until = "", float("inf")
                yield client, data
            elif time.monotonic() > worker.until:
                seconds = worker.until - worker.since
                self._end(worker)
                yield client, failure(client, f"TimeoutError: no reply within {seconds:.3g} s")

    def _settle(self, worker: _Worker, data: bytes) -> None:
        if data != _BUILT:
            self.close()
            kind, _, text = data.decode().partition(": ")
            if kind in _TOLD:
                raise _TOLD[kind](text)
            raise RuntimeError(f"a worker process could not start: {kind}: {text}")
        worker.built = True

    def _died(self, worker: _Worker) -> None:
        code, built = self._end(worker), worker.built
        if not built:
            self.close()
            raise RuntimeError(
                f"a worker process ended with exit code {code} while it was built. Look at what it "
                "printed, or give it more memory."
            )

    def _lost(self, worker: _Worker) -> bytes:
        code = self._end(worker)
        return failure(worker.client, f"ChildProcessError: its process ended, exit code {code}")

    def _start(self) -> _Worker:
        # The server has no threads: a fork of this process, which may have some, could hang.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["plait.federated.client"])
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, self.make, self.threads), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _end(self, worker: _Worker) -> int | None:
        """Kill a worker; its exit code."""
        self._pool.remove(worker)
        worker.pipe.close()
        worker.process.join(0.05)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        return worker.process.exitcode


def _work(pipe: Connection, make: Callable[[], Answer], threads: int | None) -> None:
    """What a worker process does."""
    import torch

    threading.Thread(target=_watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the head ends it
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        answer = make()
    except Exception as error:
        pipe.send_bytes(f"{type(error).__name__}: {error}".encode())
        return
    pipe.send_bytes(_BUILT)
    with suppress(EOFError, OSError):  # the head has closed the pipe, or is gone
        while True:
            pipe.send_bytes(answer(pipe.recv_bytes()))


def _watch() -> None:
    """End with the head process, even in the middle of an order."""
    head = mp.parent_process()
    if head is not None:
        head.join()
    os._exit(0)
