"""Flower as the transport of a federated run: an `Exchange` over its Grid, and its simulation.

    hello     every node is asked whose clients it has: client -> node
    order     -> Message of one byte string -> client program -> Message of one byte string -> reply

Flower starts programs and carries bytes. Which clients take part, what is checked, summed and saved
is decided in `plait.federated.server`; none of Flower's strategies is used, and it reads no tensor.
What Flower says of a message (an error, a node that is away, nothing by the deadline) becomes the
failed reply of that client.

One order gets one reply. A reply that comes twice, or after its deadline, is dropped: its message
is not asked for again, and Flower forgets it soon after. An upload of an earlier round
inside a new reply is the server's to find.

Limits: an order and a reply pass as one piece, up to 2 GiB each. A node works on one message at a
time. Written for flwr 1.40 and 1.41.
"""

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from plait.federated.engines.switches import OFF
from plait.federated.engines.workers import Deadlines
from plait.federated.guard import TooFewUpdates
from plait.federated.payload import CorruptFrame
from plait.federated.protocol import Answer, Exchange, Order, Reply, failure

for _name, _value in OFF.items():  # Flower reads some of them when it is imported
    os.environ.setdefault(_name, _value)

try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ImportError(
        f'federated: Flower cannot be imported ({error}). Run pip install "plait[federated]".'
    ) from error

T = TypeVar("T")
log = logging.getLogger(__name__)

_RECORD, _ORDER, _LIMIT, _REPLY, _FAILED = "plait", "order", "limit", "reply", "failed"
_GRACE = 10.0  # seconds that Flower keeps a message beyond its deadline, for a server that is busy
_SHORT, _LONG = 0.05, 0.2  # seconds between looks for replies
_HELLO = 300.0  # seconds for all clients of a simulation to say their names
_AGAIN = 3.0  # seconds until a node whose trainer is not ready is asked again
_TRIES, _PAUSE = 3, 1.0  # of an order whose worker process died; seconds in between
_DIED = re.compile(r"ray\.exceptions\.(Actor|Worker|Owner)\w*Error")
_ERRORS = {
    value: name
    for name, value in vars(ErrorCode).items()
    if isinstance(value, int) and not name.startswith("_")
}


class TooFewNodes(TooFewUpdates):
    """A run whose clients did not come online in time."""


# The exchange -----------------------------------------------------------------------------------


@dataclass
class _Sent:
    """An order, or a hello, on its way."""

    node: int
    client: str
    since: float
    until: float


@dataclass
class _Nodes:
    """Which node has which clients."""

    of: dict[str, int] = field(default_factory=dict)  # client -> node
    refused: dict[int, str] = field(default_factory=dict)  # node -> why
    asked: dict[str, _Sent] = field(default_factory=dict)  # message -> hello without an answer
    again: dict[int, float] = field(default_factory=dict)  # node -> when to ask it again
    mute: dict[int, str] = field(default_factory=dict)  # node -> why it cannot say its names

    def keep(self, online: set[int]) -> None:
        """Forget the nodes that left; others may have the names that they had."""
        if set(self.of.values()) - online:
            self.refused.clear()
        self.of = {client: node for client, node in self.of.items() if node in online}
        for known in (self.refused, self.again, self.mute):
            for node in set(known) - online:
                del known[node]
        self.asked = {key: sent for key, sent in self.asked.items() if sent.node in online}


class GridExchange:
    """Carries orders to the nodes of a Flower run; it is an `Exchange`.

    The first exchange waits for nodes of all its clients. Later ones give a failed reply for a
    client without a node. Nodes that are new, or back, are asked for their names at each exchange.

    Args:
        grid: of the server program.
        clients: names that a node may have; None: any.
        wait: seconds that the needed clients have to come online.
        deadlines: how long a reply may take; None: `Deadlines(600, 60)`.
        least: clients of the first orders that are enough once `wait` is over; None: all.
        at_once: orders on their way at a time; None: one for each node.
        ready: a node that cannot say its names is an error, and not a trainer that still loads.
        check: called between looks; what it raises ends the exchange.

    Attributes:
        refused: node -> why its names do not count, such as a name that another node has.
    """

    def __init__(
        self,
        grid: Grid,
        clients: Sequence[str] | None = None,
        *,
        wait: float = 300.0,
        deadlines: Deadlines | None = None,
        least: int | None = None,
        at_once: int | None = None,
        ready: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if not wait > 0:
            raise ValueError(f"wait = {wait}. Give seconds above 0.")
        self.grid, self.wait, self.at_once, self.check = grid, wait, at_once, check
        self.ready = ready
        self.clients = None if clients is None else frozenset(clients)
        self.deadlines, self.least = deadlines or Deadlines(600.0, 60.0), least
        self._nodes, self._met = _Nodes(), False

    @property
    def refused(self) -> Mapping[int, str]:
        """Node -> why its names do not count."""
        return self._nodes.refused

    def __call__(self, orders: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """Carry the orders; see `protocol.Exchange`.

        Raises:
            TooFewNodes: clients of the first orders are not online in time.
        """
        self.meet(orders)
        self.deadlines.begin()
        left, sent, pause = list(orders), dict[str, _Sent](), _SHORT
        deaths, held = Counter[str](), dict[str, float]()  # client -> of workers, -> until when
        while left or sent:
            busy, waiting = {one.node for one in sent.values()}, []
            for number, client in enumerate(left):
                if self.at_once is not None and len(sent) >= self.at_once:
                    waiting += left[number:]
                    break
                node = self._nodes.of.get(client)
                if node is None:
                    yield client, failure(client, "ConnectionError: no node of it is online")
                elif node in busy or held.get(client, 0.0) > time.monotonic():
                    waiting.append(client)
                else:
                    busy.add(node)
                    data = orders[client]  # made here, so that few are in memory
                    key, order = self._send(node, client, data)
                    if key is None:
                        text = f"ConnectionError: Flower took no order of {len(data)} bytes"
                        yield client, failure(client, text)
                    else:
                        sent[key] = order
            left = waiting
            now = time.monotonic()  # what came until now is in time, however long each reply takes
            came, late = self._replies(sent), [k for k, one in sent.items() if now > one.until]
            for one, data in came:
                deaths[one.client] += data is None
                if data is None and deaths[one.client] < _TRIES:
                    # Maybe for another client: Ray gives orders to a dead worker for a moment.
                    held[one.client] = time.monotonic() + deaths[one.client] ** 2 * _PAUSE
                    left.append(one.client)
                    continue
                if data is None:
                    data = failure(one.client, "ChildProcessError: its worker process ended")
                self.deadlines.note(now - one.since)
                yield one.client, data
            for one in map(sent.pop, late):
                text = f"TimeoutError: no reply within {one.until - one.since:.3g} s"
                yield one.client, failure(one.client, text)
            pause = _SHORT if came else min(1.5 * pause, _LONG)
            if left or sent:
                self._rest(pause, sent)

    def meet(self, clients: Iterable[str]) -> None:
        """Learn which nodes have these clients, for up to `wait` seconds.

        The first time it waits for all of them, later for nodes that are online and have not said
        their names yet.

        Raises:
            TooFewNodes: the first time, if fewer than `least` are there.
        """
        needed, nodes, until = sorted(clients), self._nodes, time.monotonic() + self.wait
        while True:
            self._greet(until)
            self._names()
            missing = [client for client in needed if client not in nodes.of]
            open_ = bool(nodes.asked or nodes.again)
            if not missing or (self._met and not open_) or time.monotonic() > until:
                break
            self._rest(_SHORT if open_ else _LONG, {})
        least = len(needed) if self.least is None else min(self.least, len(needed))
        if not self._met and len(needed) - len(missing) < least:
            raise TooFewNodes(self._missing(needed, missing))
        self._met = True

    def _missing(self, needed: list[str], missing: list[str]) -> str:
        here = [f"{client} (node {node})" for client, node in sorted(self._nodes.of.items())]
        here += [f"node {node} was refused: {text}" for node, text in self.refused.items()]
        here += [f"node {n} cannot say its names: {text}" for n, text in self._nodes.mute.items()]
        silent = {one.node for one in self._nodes.asked.values()} - set(self._nodes.mute)
        here += [f"node {node} does not answer" for node in sorted(silent)]
        return (
            f"federated: {len(missing)} of {len(needed)} clients are not online after "
            f"{self.wait:.4g} s: {', '.join(missing)}. Online: {'; '.join(here) or 'none'}. "
            "Start the missing ones with plait federate join, or wait longer."
        )

    # Nodes ----------------------------------------------------------------------------------------

    def _greet(self, until: float) -> None:
        """Say hello to each node whose names are not known."""
        nodes, online, now = self._nodes, set(self.grid.get_node_ids()), time.monotonic()
        nodes.keep(online)
        known = {*nodes.of.values(), *nodes.refused, *(one.node for one in nodes.asked.values())}
        for node in sorted(online - known):
            if nodes.again.get(node, 0.0) <= now:
                nodes.again.pop(node, None)
                data, left = Order("hello").pack(), max(until - now, 1.0)
                key = self._push(node, "query", data, left)
                if key is not None:
                    nodes.asked[key] = _Sent(node, "", now, now + left)

    def _names(self) -> None:
        nodes = self._nodes
        for one, data in self._replies(nodes.asked):
            try:
                reply = Reply.unpack(data or failure("", "its worker process ended"))
            except CorruptFrame as error:
                reply = Reply("", failed=str(error))
            if reply.failed and self.ready:
                raise RuntimeError(f"federated: node {one.node} does not start: {reply.failed}")
            if reply.failed:  # its trainer is not ready yet, or not there
                if nodes.mute.get(one.node) != reply.failed:
                    log.warning("node %d cannot say its names: %s", one.node, reply.failed)
                nodes.mute[one.node] = reply.failed
                nodes.again[one.node] = time.monotonic() + _AGAIN
                continue
            nodes.mute.pop(one.node, None)
            listed = reply.metrics.get("clients", [reply.client])
            names = tuple(map(str, listed)) if isinstance(listed, list) else (reply.client,)
            fault = self._fault(names)
            if fault is None:
                nodes.of.update(dict.fromkeys(names, one.node))
            else:
                log.warning("node %d is refused: %s", one.node, fault)
                nodes.refused[one.node] = fault
        for key in [k for k, one in nodes.asked.items() if time.monotonic() > one.until]:
            del nodes.asked[key]

    def _fault(self, names: tuple[str, ...]) -> str | None:
        for name in names:
            if self.clients is not None and name not in self.clients:
                return f"it says it is {name!r}, which is no client of this run"
            holder = self._nodes.of.get(name)
            if holder is not None:
                return f"it says it is {name!r}, which node {holder} is already"
        return None

    # Messages -------------------------------------------------------------------------------------

    def _send(self, node: int, client: str, data: bytes) -> tuple[str | None, _Sent]:
        limit, now = self.deadlines.limit(), time.monotonic()
        return self._push(node, "train", data, limit), _Sent(node, client, now, now + limit)

    def _push(self, node: int, kind: str, data: bytes, limit: float) -> str | None:
        """The message's id; None where Flower did not take it."""
        content = RecordDict({_RECORD: ConfigRecord({_ORDER: data, _LIMIT: limit})})
        message = Message(content, node, kind, ttl=limit + _GRACE)
        keys = list(self.grid.push_messages([message]))
        return keys[0] if keys else None

    def _replies(self, sent: dict[str, _Sent]) -> list[tuple[_Sent, bytes | None]]:
        """What came for these messages; they are taken out of `sent`. None: see `_bytes`."""
        found = []
        for message in self.grid.pull_messages(list(sent)) if sent else ():
            one = sent.pop(message.metadata.reply_to_message_id, None)
            if one is not None:  # else the second reply to one message
                found.append((one, _bytes(message, one.client)))
        return found

    def _rest(self, seconds: float, sent: Mapping[str, _Sent]) -> None:
        """Until the next look, but not beyond a deadline."""
        self.check()
        ends = [one.until - time.monotonic() for one in sent.values()]
        time.sleep(max(0.0, min([seconds, *ends])))


def _bytes(message: Message, client: str) -> bytes | None:
    """A reply, or the failed one that stands for it; None if a simulation's worker process died."""
    if message.has_error():
        error, reason = message.error, message.error.reason or ""
        if error.code == ErrorCode.UNKNOWN and _DIED.search(reason):
            return None
        lines = [line.strip() for line in reason.splitlines() if line.strip()] or [""]
        text = " .. ".join(dict.fromkeys([lines[0], lines[-1]]))  # between them: a traceback
        return failure(client, f"{_ERRORS.get(error.code, error.code)}: {text}")
    record = message.content.config_records.get(_RECORD, {}) if message.has_content() else {}
    if isinstance(data := record.get(_REPLY), bytes):
        return data
    text = record.get(_FAILED)
    return failure(client, text if isinstance(text, str) else "the reply holds no bytes")


# Simulation -------------------------------------------------------------------------------------


def simulate(
    conduct: Callable[[Exchange], T],
    make: Callable[[], Answer],
    clients: Sequence[str],
    *,
    home: str | Path,
    workers: int = 2,
    threads: int = 1,
    deadlines: Deadlines | None = None,
) -> T:
    """Run a whole federation on this machine, with Flower's simulation on Ray.

    Args:
        conduct: the server's part; it runs in the calling thread and is given the exchange.
        make: builds an answerer for all clients; a picklable function of no arguments. It is called
            once in each worker process, which keeps it: private states must be files.
        clients: their names; client number i, by name, is Flower's partition i.
        home: folder that Flower writes to in place of ~/.flwr.
        workers: processes. threads: torch's, in each of them.
        deadlines: how long a reply may take; None: `Deadlines(600, 60)`.

    Returns:
        What `conduct` returned.

    Raises:
        RuntimeError: Ray runs already in this process, or the simulation ended by itself.
        Exception: whatever `conduct` raises, as it is.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise ValueError(f"engine.{name} = {value}. Give 1 or more.")
    names = sorted(clients)
    with _ray(Path(home), workers) as stop:
        app = ClientApp()
        respond = partial(_respond, make, names, threads, str(stop))
        for register in (app.query, app.train, app.evaluate):
            register()(respond)
        # A worker that dies is started again; the pool would give its place to nobody else.
        resources = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}
        with _runtime(app, len(names), resources, stop) as (grid, check):
            exchange = GridExchange(
                grid,
                names,
                wait=_HELLO,
                deadlines=deadlines,
                ready=True,
                at_once=workers,  # so that no order's time runs while it waits for a worker
                check=check,
            )
            return conduct(exchange)


@contextmanager
def _ray(home: Path, workers: int) -> Iterator[Path]:
    """Ray on this machine, quiet; yields the file whose presence tells its workers to end."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f'federated: Ray cannot be imported ({error}). Run pip install "plait[federated]".'
        ) from error
    from flwr.supercore import telemetry

    if ray.is_initialized():
        raise RuntimeError("federated: Ray runs in this process. Call ray.shutdown() first.")
    # flwr may have been imported before OFF was set.
    telemetry.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]
    home.mkdir(parents=True, exist_ok=True)
    flower, had_home = logging.getLogger("flwr"), os.environ.get("FLWR_HOME")
    had_level, had_signal = flower.level, signal.getsignal(signal.SIGTERM)
    folder = Path(tempfile.mkdtemp(prefix="plait-ray-"))
    os.environ["FLWR_HOME"] = str(home.absolute())
    flower.setLevel(logging.CRITICAL)  # what fails is in the replies
    try:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            runtime_env={
                "env_vars": {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
            },
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
        yield folder / "stop"
    finally:
        ray.shutdown()
        flower.setLevel(had_level)
        if had_signal is not None:
            signal.signal(signal.SIGTERM, had_signal)
        if had_home is None:
            del os.environ["FLWR_HOME"]
        else:
            os.environ["FLWR_HOME"] = had_home
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _runtime(
    app: ClientApp, nodes: int, resources: dict[str, Any], stop: Path
) -> Iterator[tuple[Grid, Callable[[], None]]]:
    """Flower's simulation in a thread; yields its grid, and what raises once it has ended.

    Flower runs a server program in a thread of its own, and turns its errors into others. Here the
    program hands out the grid and waits, so that the caller's thread does the work.
    """
    from flwr.simulation import run_simulation

    opened, done, faults = SimpleQueue[Grid | None](), threading.Event(), list[BaseException]()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        opened.put(grid)
        done.wait()

    def run() -> None:
        try:
            run_simulation(server, app, nodes, backend_config={"client_resources": resources})
        except BaseException as error:
            faults.append(error)
        finally:
            opened.put(None)

    def check() -> None:
        if not thread.is_alive():
            cause = faults[0] if faults else None
            raise RuntimeError(f"federated: Flower's simulation ended: {cause}") from cause

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        grid = opened.get()
        if grid is None:
            thread.join()
            check()
        assert grid is not None
        yield grid, check
    finally:
        stop.touch()
        done.set()
        thread.join()


_answer: dict[str, Answer] = {}  # of this worker process, built by its first order


def _respond(
    make: Callable[[], Answer],
    names: list[str],
    threads: int,
    stop: str,
    message: Message,
    context: Context,
) -> Message:
    """The client program of a simulation, in a worker process."""
    name = names[int(context.node_config["partition-id"])]
    if message.metadata.message_type == "query":
        data = Reply(name).pack()
    else:
        torch.set_num_threads(threads)
        record: Any = message.content.config_records[_RECORD]
        try:
            with _watched(record[_LIMIT], Path(stop)):
                if stop not in _answer:
                    _answer[stop] = make()
                data = _answer[stop](record[_ORDER])
        except Exception as error:
            data = failure(name, f"{type(error).__name__}: {error}")
    return Message(RecordDict({_RECORD: ConfigRecord({_REPLY: data})}), reply_to=message)


@contextmanager
def _watched(limit: float, stop: Path) -> Iterator[None]:
    """End this process after `limit` seconds, or once `stop` is there.

    A worker that hangs would never work for another client, and Ray would wait for it at the end.
    """
    done = threading.Event()

    def watch() -> None:
        until = time.monotonic() + limit
        while not done.wait(0.2):
            if time.monotonic() > until or stop.exists():
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


# Deployment -------------------------------------------------------------------------------------


def write_app(folder: str | Path, config: str | Path) -> Path:
    """Write the Flower app of a run, for `flwr run FOLDER`.

    Args:
        folder: to write to; what is there of an earlier app is replaced. config: the run's YAML. It
            travels to every node, as it is.

    Returns:
        The folder.
    """
    folder, template = Path(folder), Path(__file__).parents[2] / "run" / "deploy" / "app"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        shutil.copyfile(template / name, folder / name)
    shutil.copyfile(config, folder / "run.yaml")
    return folder
