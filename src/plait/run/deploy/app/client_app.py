"""The client program: forwards an order to the trainer on this machine, and its reply back.

    Message -> bytes -> socket of plait.run.deploy.resident -> bytes -> Message

Flower starts this program for every message, so it imports flwr and the standard library, and no
torch. The node's config names the socket: --node-config 'trainer="/path/to/socket"'. If the trainer
is absent or too slow, the reply says so.
"""

from multiprocessing.connection import Client
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def ask(trainer: str, order: bytes, limit: float) -> bytes:
    """The trainer's reply.

    Args:
        trainer: the socket. order: what to send. limit: seconds to wait for the reply.

    Raises:
        OSError: there is no trainer, or it went away; TimeoutError: it is too slow.
        EOFError: it went away.
    """
    with Client(trainer, family="AF_UNIX") as connection:
        connection.send_bytes(order)
        if not connection.poll(limit):
            raise TimeoutError(f"the trainer did not reply within {limit:.4g} s")
        return connection.recv_bytes()


@app.query()
@app.train()
@app.evaluate()
def forward(message: Message, context: Context) -> Message:
    """Answer a message of any kind."""
    trainer = str(context.node_config.get("trainer", ""))
    try:
        if not trainer:
            raise ValueError("the node's config does not name its trainer. Join with plait.")
        record: Any = message.content.config_records["plait"]
        answer: dict[str, Any] = {"reply": ask(trainer, record["order"], record["limit"])}
    except (OSError, EOFError, KeyError, ValueError) as error:
        text = str(error) or "the trainer went away"
        answer = {"failed": f"{type(error).__name__}: {text} (trainer {trainer!r})"}
    return Message(RecordDict({"plait": ConfigRecord(answer)}), reply_to=message)
