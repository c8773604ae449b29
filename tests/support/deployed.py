"""Real Flower programs for tests: a toy app without torch, functions in the background, cleaning.

`background` forks, so that what is imported here is not imported again.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from plait.run.deploy import certs
from plait.run.deploy.deployment import DeployConfig, Deployment

LIMIT = 150.0  # seconds for any one thing; a loaded machine takes long

# mode: ask (all nodes, one message), fail, few, forever. nodes: how many to wait for.
PROJECT = """\
[project]
name = "toy"
version = "1.0.0"
description = "toy"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "plait"

[tool.flwr.app.components]
serverapp = "toy:server"
clientapp = "toy:client"

[tool.flwr.app.config]
mode = "ask"
nodes = 1
"""
APP = """\
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.train()
def train(message, context):
    said = f"{context.node_config['client']} at {context.node_config['trainer']}"
    return Message(RecordDict({"said": ConfigRecord({"text": said})}), reply_to=message)


@server.main()
def main(grid, context):
    mode, nodes = context.run_config["mode"], context.run_config["nodes"]
    print("mode", mode)
    if mode == "fail":
        raise RuntimeError("OverflowError: it does not fit")
    while mode == "forever":
        time.sleep(0.2)
    end = time.time() + (1 if mode == "few" else 90)
    while len(list(grid.get_node_ids())) < nodes:
        if time.time() > end:
            raise RuntimeError(f"TooFewNodes: fewer than {nodes} nodes are online")
        time.sleep(0.2)
    sent = [
        Message(RecordDict({"q": ConfigRecord({"n": 1})}), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    ]
    for reply in grid.send_and_receive(sent, timeout=90):
        print("reply:", reply.content["said"]["text"])
"""


def toy(folder: Path) -> Path:
    """The toy app."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "toy.py").write_text(APP)
    return folder


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def deployment(folder: Path, clients: list[str], port: int | None = None) -> Deployment:
    """With certificates for 127.0.0.1 and keys."""
    certs.make_certs(folder / "certs", ["127.0.0.1"], clients)
    return Deployment(
        DeployConfig(
            address=f"127.0.0.1:{port or free_port()}",
            certs=str(folder / "certs"),
            home=str(folder / "home"),
        )
    )


class Background:
    """A function in a process of its own; what it says is in a file."""

    def __init__(self, file: Path, function: Callable[..., Any], *args: Any):
        self.file = file
        self.process = multiprocessing.get_context("fork").Process(
            target=_call, args=(file, function, *args), daemon=False
        )
        self.process.start()

    @property
    def shown(self) -> str:
        """What it said so far."""
        return self.file.read_text() if self.file.is_file() else ""

    def wait_for(self, text: str, limit: float = LIMIT) -> None:
        """Until it said `text`."""
        end = time.monotonic() + limit
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} was not said:\n{self.shown}"
            assert self.process.is_alive() or text in self.shown, self.shown
            time.sleep(0.1)

    def result(self, limit: float = LIMIT) -> str:
        """Its last line: `returned VALUE`, or the error."""
        self.process.join(limit)
        assert not self.process.is_alive(), f"it still runs:\n{self.shown}"
        return self.shown.splitlines()[-1]

    def signal(self, number: int) -> None:
        """Send a signal to it alone."""
        os.kill(self.process.pid or 0, number)

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process.is_alive():
            self.signal(signal.SIGINT)
            self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _call(file: Path, function: Callable[..., Any], *args: Any) -> None:
    def say(text: str) -> None:
        with file.open("a") as out:
            out.write(text + "\n")

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        say(f"returned {function(*args, say=say)}")
    except BaseException as error:
        if not isinstance(error, (ValueError, RuntimeError)):
            say(traceback.format_exc())
        say(f"{type(error).__name__}: {error}")


@contextmanager
def cleaned(folder: Path) -> Iterator[list[Background]]:
    """Ends what is put into the list, last first; afterwards no program of `folder` may be left."""
    running: list[Background] = []
    try:
        yield running
    finally:
        for one in reversed(running):
            one.stop()
        psutil.wait_procs(programs(folder), timeout=5)  # some are about to end
        left = programs(folder)
        for process in left:
            process.kill()
    assert not left, left


def programs(folder: Path) -> list[psutil.Process]:
    """The programs that run with files of `folder`, or with its home in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("FLWR_HOME", "")]
            if process.pid != os.getpid() and any(str(folder) in word for word in words):
                found.append(process)
        except psutil.Error:
            continue
    return found
