"""Flower as the transport of a federated run: an `Exchange` over its Grid.

    hello     every node is asked whose clients it has: client -> node
    order     -> Message of one byte string -> client program -> Message of one byte string -> reply

Flower starts programs and carries bytes. Which clients take part, what is checked, summed and saved
is decided in `plait.federated.server`; none of Flower's strategies is used, and it reads no tensor.
Whatever Flower reports about a message (an error, a node that is away, no reply by the deadline)
becomes the failed reply of that client.

One order gets one reply. A second reply, or one after the deadline, is dropped: its message is not
pulled again, and Flower discards it soon after. An upload of an earlier round inside a new reply is
detected by the server.

Limits: an order and a reply are one piece of up to 2 GiB each. A node works on one message at a
time. Written for flwr 1.40 and 1.41.
"""

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from plait.federated.engines.flower.switches import OFF
from plait.federated.engines.workers import Deadlines
from plait.federated.guard import TooFewUpdates
from plait.federated.payload import CorruptFrame, plain
from plait.federated.protocol import Order, Reply, failure

for _name, _value in OFF.items():  # Flower reads some of them when it is imported
    os.environ.setdefault(_name, _value)

try:
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid
except ImportError as error:
    raise ImportError(
        f'federated: Flower cannot be imported ({error}). Run pip install "plait[federated]".'
    ) from error

log = logging.getLogger(__name__)

# A message is a record with an order and the seconds to answer it, or a reply or its failure.
RECORD, ORDER, LIMIT, REPLY, FAILED = "plait", "order", "limit", "reply", "failed"
_GRACE = 10.0  # seconds that Flower keeps a message beyond its deadline, for a server that is busy
_SHORT, _LONG = 0.05, 0.2  # seconds between two pulls of replies
_AGAIN = 3.0  # seconds until a node whose trainer is not ready is asked again
_TRIES = 3  # of an order whose worker process died while it answered
_PAUSE = 1.0  # seconds until an order whose worker process died is sent again
_DIED = re.compile(r"ray\.exceptions\.(Actor|Worker|Owner)\w*Error")
_ERRORS = {
    value: name
    for name, value in vars(ErrorCode).items()
    if isinstance(value, int) and not name.startswith("_")
}


class TooFewNodes(TooFewUpdates):
    """Too few clients of a run came online in time."""


# The exchange -----------------------------------------------------------------------------------


@dataclass
class _Sent:
    """An order, or a hello, on its way. key: of its message. since, until: monotonic seconds."""

    key: str
    node: int
    client: str
    since: float
    until: float


@dataclass
class _Lost:
    """Orders of one exchange whose worker process died."""

    deaths: Counter[str] = field(default_factory=Counter)  # client -> workers that died answering
    undelivered: dict[str, float] = field(default_factory=dict)  # client -> since when
    held: dict[str, float] = field(default_factory=dict)  # client -> when its order may be sent


@dataclass
class _Nodes:
    """Which node has which clients."""

    of: dict[str, int] = field(default_factory=dict)  # client -> node
    refused: dict[int, str] = field(default_factory=dict)  # node -> why
    asked: dict[str, _Sent] = field(default_factory=dict)  # message -> hello without an answer
    again: dict[int, float] = field(default_factory=dict)  # node -> when to ask it again
    mute: dict[int, str] = field(default_factory=dict)  # node -> why it cannot say its names

    def keep(self, online: set[int]) -> None:
        """Forget the nodes that left; other nodes may take over their names."""
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
    client without a node. New and returned nodes are asked for their names at each exchange.

    Args:
        grid: of the server program.
        clients: names that a node may have; None: any.
        wait: seconds that the needed clients have to come online.
        deadlines: how long a reply may take; None: `Deadlines(600, 60)`.
        least: how many clients of the first orders suffice once `wait` is over; None: all.
        at_once: orders on their way at a time; None: one for each node.
        ready: a node that cannot say its names is an error, and not a trainer that still loads.
        check: called between pulls; an exception that it raises ends the exchange.
        delivered: whether the message of this key reached a client program; asked when a worker
            process died. An undelivered order is sent again until a worker has it.

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
        delivered: Callable[[str], bool] = lambda key: True,
    ) -> None:
        if not wait > 0:
            raise ValueError(f"wait = {wait}. Give seconds above 0.")
        self.grid, self.wait, self.at_once, self.check = grid, wait, at_once, check
        self.ready, self.delivered = ready, delivered
        self.clients = None if clients is None else frozenset(clients)
        self.deadlines, self.least = deadlines or Deadlines(600.0, 60.0), least
        self._nodes, self._met = _Nodes(), False
        self._cold = False  # whether a worker died: a later order may meet a new one, which is slow

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
        left, sent, lost, pause = dict.fromkeys(orders), dict[str, _Sent](), _Lost(), _SHORT
        while left or sent:
            yield from self._send(orders, left, sent, lost)
            now = time.monotonic()  # what came until now is in time, however long each reply takes
            came, late = self._replies(sent), [k for k, one in sent.items() if now > one.until]
            for one, data in came:
                if data is None:
                    data = self._died(one, lost)
                if data is None:
                    left[one.client] = None
                else:
                    self.deadlines.note(now - one.since)
                    yield one.client, data
            for one in map(sent.pop, late):
                text = f"TimeoutError: no reply within {one.until - one.since:.3g} s"
                yield one.client, failure(one.client, text)
            pause = _SHORT if came else min(1.5 * pause, _LONG)
            if left or sent:
                self._rest(pause, sent)

    def _send(
        self,
        orders: Mapping[str, bytes],
        left: dict[str, None],
        sent: dict[str, _Sent],
        lost: _Lost,
    ) -> Iterator[tuple[str, bytes]]:
        """Move what can be sent now from `left` to `sent`; yield the failures of what cannot be."""
        busy = {one.node for one in sent.values()}
        for client in list(left):
            if self.at_once is not None and len(sent) >= self.at_once:
                return
            node = self._nodes.of.get(client)
            if node is None:
                del left[client]
                yield client, failure(client, "ConnectionError: no node of it is online")
            elif node not in busy and lost.held.get(client, 0.0) <= time.monotonic():
                del left[client]
                busy.add(node)
                order = orders[client]  # made here, so that few are in memory
                one = self._push(node, client, "train", order, self._limit())
                if one is None:
                    text = f"ConnectionError: Flower took no order of {len(order)} bytes"
                    yield client, failure(client, text)
                else:
                    sent[one.key] = one

    def _limit(self) -> float:
        limit = self.deadlines.limit()
        return max(limit, self.deadlines.first) if self._cold else limit

    def _died(self, one: _Sent, lost: _Lost) -> bytes | None:
        """The failed reply of an order whose worker process died; None: it is to be sent again.

        An order counts as tried if it was delivered. Until Ray has restarted a worker, orders for
        it are not; they wait for that, but not longer than a cold start may take.
        """
        self._cold, client, now = True, one.client, time.monotonic()
        if self.delivered(one.key):
            lost.undelivered.pop(client, None)
            lost.deaths[client] += 1
            if lost.deaths[client] >= _TRIES:
                return failure(client, "ChildProcessError: its worker process ended")
        elif now - lost.undelivered.setdefault(client, now) > self.deadlines.first:
            text = f"ChildProcessError: no worker process started in {self.deadlines.first:.3g} s"
            return failure(client, text)
        lost.held[client] = now + _PAUSE
        return None

    def meet(self, clients: Iterable[str]) -> None:
        """Learn which nodes have these clients, for up to `wait` seconds.

        The first call waits for all clients, later calls only for online nodes that have not said
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
        """Say hello to each node whose names are unknown."""
        nodes, online, now = self._nodes, set(self.grid.get_node_ids()), time.monotonic()
        nodes.keep(online)
        known = {*nodes.of.values(), *nodes.refused, *(one.node for one in nodes.asked.values())}
        for node in sorted(online - known):
            if nodes.again.get(node, 0.0) <= now:
                nodes.again.pop(node, None)
                one = self._push(node, "", "query", Order("hello").pack(), max(until - now, 1.0))
                if one is not None:
                    nodes.asked[one.key] = one

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
            listed = listed if isinstance(listed, list) else [reply.client]
            names = tuple(plain(str(name)) for name in listed)
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
                return f"it says it is {name!r}, which is not a client of this run"
            holder = self._nodes.of.get(name)
            if holder is not None:
                return f"it says it is {name!r}, which node {holder} is already"
        return None

    # Messages -------------------------------------------------------------------------------------

    def _push(self, node: int, client: str, kind: str, data: bytes, limit: float) -> _Sent | None:
        """Send a message; None: Flower did not take it."""
        content = RecordDict({RECORD: ConfigRecord({ORDER: data, LIMIT: limit})})
        message, now = Message(content, node, kind, ttl=limit + _GRACE), time.monotonic()
        keys = list(self.grid.push_messages([message]))
        return _Sent(keys[0], node, client, now, now + limit) if keys else None

    def _replies(self, sent: dict[str, _Sent]) -> list[tuple[_Sent, bytes | None]]:
        """Pull the replies to these messages, which leave `sent`. None: see `_bytes`."""
        replies = []
        for message in self.grid.pull_messages(list(sent)) if sent else ():
            one = sent.pop(message.metadata.reply_to_message_id, None)
            if one is not None:  # else the second reply to one message
                replies.append((one, _bytes(message, one.client)))
        return replies

    def _rest(self, seconds: float, sent: Mapping[str, _Sent]) -> None:
        """Sleep until the next pull, but not beyond a deadline."""
        self.check()
        ends = [one.until - time.monotonic() for one in sent.values()]
        time.sleep(max(0.0, min([seconds, *ends])))


def _bytes(message: Message, client: str) -> bytes | None:
    """A reply, or a failed one in its place; None if a worker process of a simulation died."""
    if message.has_error():
        error, reason = message.error, message.error.reason or ""
        if error.code == ErrorCode.UNKNOWN and _DIED.search(reason):
            return None
        lines = [line.strip() for line in reason.splitlines() if line.strip()] or [""]
        text = " .. ".join(dict.fromkeys([lines[0], lines[-1]]))  # between them: a traceback
        return failure(client, f"{_ERRORS.get(error.code, error.code)}: {text}")
    record = message.content.config_records.get(RECORD, {}) if message.has_content() else {}
    if isinstance(data := record.get(REPLY), bytes):
        return data
    text = record.get(FAILED)
    return failure(client, text if isinstance(text, str) else "the reply holds no bytes")
