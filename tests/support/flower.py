"""Flower's grid without Flower's network."""

import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from plait.federated.engines.flower import exchange as flower
from plait.federated.engines.flower.exchange import GridExchange
from plait.federated.engines.workers import Deadlines
from plait.federated.protocol import Exchange, Order, Reply

Act = Callable[[str, bytes], Any]  # (message type, order) -> what the node does with it


class Late(float):
    """A node's reply comes after so many seconds."""


class FakeGrid(Grid):
    """Nodes are functions that return bytes, an error, a list of replies, or None: nothing."""

    def __init__(self, nodes: Mapping[int, Act]) -> None:
        self.nodes, self.ids, self.sent = dict(nodes), count(1), list[tuple[int, str]]()
        self.waiting: list[tuple[float, Message]] = []
        self.takes = True

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages if self.takes else ():
            keys.append(f"m{next(self.ids)}")
            message.metadata.__dict__["_message_id"] = keys[-1]
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.sent.append((node, kind))
            record: Any = message.content.config_records["plait"]
            found, delay = self.nodes[node](kind, record["order"]), 0.0
            for one in found if isinstance(found, list) else [found]:
                if isinstance(one, Late):
                    delay = float(one)
                elif one is not None:
                    reply = self.reply(message, one)
                    self.waiting.append((time.monotonic() + delay, reply))
        return keys

    def reply(self, message: Message, found: Any) -> Message:
        if isinstance(found, Error):
            return Message(found, reply_to=message)
        values = found if isinstance(found, dict) else {"reply": found}
        return Message(RecordDict({"plait": ConfigRecord(values)}), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        keys, now = set(message_ids), time.monotonic()
        due = [x for x in self.waiting if x[0] <= now and x[1].metadata.reply_to_message_id in keys]
        self.waiting = [x for x in self.waiting if x not in due]
        return [message for _, message in due]

    run = property(lambda self: None)  # type: ignore[assignment]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower knows of the process that makes a message, and no long waits."""
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    monkeypatch.setattr(flower, "_AGAIN", 0.1)


def node(*names: str, act: Act | None = None) -> Act:
    """A node with these clients; act: what it does with an order, None: the order back."""

    def does(kind: str, order: bytes) -> Any:
        if kind == "query":
            assert Order.unpack(order)[0].kind == "hello"
            return Reply(names[0], metrics={"clients": [*names]}).pack()
        if act is not None:
            return act(kind, order)
        return Reply(names[0], upload=order).pack()

    return does


def orders(*names: str) -> dict[str, bytes]:
    return {name: f"for {name}".encode() for name in names}


def exchanged(exchange: Exchange, *names: str) -> dict[str, Reply]:
    found = list(exchange(orders(*names)))
    assert len(found) == len(dict(found)) == len(names), "one reply for each order"
    return {name: Reply.unpack(data) for name, data in found}


def exchange(grid: Grid, **options: Any) -> GridExchange:
    options = {"wait": 1.0, "deadlines": Deadlines(1.0, 1.0)} | options
    return GridExchange(grid, **options)
