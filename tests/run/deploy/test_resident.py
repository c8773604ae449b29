"""The trainer on a socket: real sockets, broken clients, and the client program in its process."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from plait.federated.protocol import Reply
from plait.run.deploy import resident
from plait.run.deploy.resident import Resident

STUB = Path(resident.__file__).parent / "app" / "client_app.py"
# What Flower does in its process for one message, without its network.
FORWARD = """
import runpy, sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

stub, trainer, order, limit = sys.argv[1:]
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, 3
app = runpy.run_path(stub)["app"]
record = ConfigRecord({"order": bytes.fromhex(order), "limit": float(limit)})
message = Message(RecordDict({"plait": record}), 7, "train")
message.metadata.__dict__["_message_id"] = "m"
config = {"trainer": trainer} if trainer else {}
reply = app(message, Context(1, 7, config, RecordDict(), {}))
heavy = [name for name in ("torch", "plait", "transformers") if name in sys.modules]
found = reply.content.config_records["plait"]
print(heavy, found["reply"].hex() if "reply" in found else found["failed"])
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder for a socket."""
    path = Resident.folder()
    yield path
    shutil.rmtree(path)


def ask(address: Path, order: bytes) -> bytes:
    with Client(str(address), family="AF_UNIX") as connection:
        connection.send_bytes(order)
        return connection.recv_bytes()


def test_it_answers_one_order_after_another_and_is_gone_at_the_end(folder: Path) -> None:
    running, most = [], []

    def answer(order: bytes) -> bytes:
        running.append(order)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(order)
        return order[::-1]

    with Resident(folder / "t", answer) as resident:
        found: dict[int, bytes] = {}

        def one(i: int) -> None:
            found[i] = ask(resident.address, b"order %d" % i)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        big = os.urandom(3 << 20)
        assert ask(resident.address, big) == big[::-1]
    assert found == {i: (b"order %d" % i)[::-1] for i in range(5)}
    assert max(most) == 1
    assert not (folder / "t").exists()


def test_broken_clients_and_orders_that_raise_do_not_end_it(folder: Path) -> None:
    asked, begun, go_on = [], threading.Event(), threading.Event()

    def answer(order: bytes) -> bytes:
        asked.append(order)
        if order == b"slow":
            begun.set()
            go_on.wait(60)
        if order == b"raise":
            raise RuntimeError("out of memory")
        return b"done"

    with Resident(folder / "t", answer, largest=1000) as resident:
        silent = Client(str(resident.address), family="AF_UNIX")  # sends nothing, ever
        half = socket.socket(socket.AF_UNIX)
        half.connect(str(resident.address))
        half.sendall(b"\0\0\1\0ab")  # 2 of 256 bytes
        with Client(str(resident.address), family="AF_UNIX") as large:
            large.send_bytes(b"x" * 1001)
            with pytest.raises((EOFError, OSError)):
                large.recv_bytes()
        gone = Client(str(resident.address), family="AF_UNIX")
        gone.send_bytes(b"slow")
        assert begun.wait(60)
        gone.close()  # while its order is answered
        waits = Client(str(resident.address), family="AF_UNIX")
        waits.send_bytes(b"nobody waits for this")
        waits.close()  # before its order is begun
        go_on.set()
        assert Reply.unpack(ask(resident.address, b"raise")).failed == "RuntimeError: out of memory"
        assert ask(resident.address, b"last") == b"done"
        silent.close()
        half.close()
    assert asked == [b"slow", b"raise", b"last"]


def test_its_folder_is_for_its_owner_only(folder: Path) -> None:
    with Resident(folder / "new" / "t", bytes) as resident:
        assert (folder / "new").stat().st_mode & 0o777 == 0o700
        with pytest.raises(FileExistsError, match="another trainer answers there"):
            Resident(resident.address, bytes).__enter__()
    (folder / "new").chmod(0o750)
    with pytest.raises(PermissionError, match=r"has mode 0750, .* Run chmod 700"):
        Resident(folder / "new" / "t", bytes).__enter__()
    (folder / "file").write_text("")
    with pytest.raises(FileExistsError, match="is there and is no socket"):
        Resident(folder / "file", bytes).__enter__()
    with pytest.raises(ValueError, match=r"has up to 100 bytes, this one has 1\d\d. Use a shorter"):
        Resident(folder / ("x" * 100), bytes).__enter__()


def test_the_socket_of_a_killed_trainer_is_taken_over(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "t"))
    assert (folder / "t").exists()
    with Resident(folder / "t", lambda order: order + b"!") as resident:
        assert ask(resident.address, b"a") == b"a!"


# The client program -----------------------------------------------------------------------------


def forward(trainer: str | Path, order: bytes, limit: float = 20.0) -> str:
    """What the client program replies, in a process of its own."""
    pytest.importorskip("flwr", reason="needs plait[federated]")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, str(STUB), str(trainer), order.hex(), str(limit)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heavy, _, rest = done.stdout.strip().partition(" ")
    assert heavy == "[]", "the client program must stay light"
    return rest


def test_the_client_program_forwards_bytes_and_says_what_went_wrong(folder: Path) -> None:
    def answer(order: bytes) -> bytes:
        if order == b"\2":
            time.sleep(1.5)
        return order * 3

    with Resident(folder / "t", answer) as resident:
        assert forward(resident.address, b"\0ab") == (b"\0ab" * 3).hex()
        late = forward(resident.address, b"\2", limit=0.5)
        assert late.startswith("TimeoutError: the trainer did not reply within 0.5 s (trainer ")
    assert forward(folder / "t", b"a").startswith("FileNotFoundError: ")
    assert forward("", b"a").startswith("ValueError: the node's config does not name its trainer.")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "t"))
    assert forward(folder / "t", b"a").startswith("ConnectionRefusedError: ")
