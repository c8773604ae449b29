"""What a server and its clients exchange: an order and its reply, both plain bytes.

    order    a frame of `payload`: JSON header (`Order`), tensors of the method's `payload_down`
    reply    4 bytes length, JSON (`Reply` without the upload), the upload, b"" without one

A client is a function from an order to a reply. An `Exchange` carries the bytes: a loop in this
process, worker processes, or a network. It reads neither, and yields a reply for each order: if
none came, one that says why (`failure`). So a fault of a client, of its machine or of the
connection is a line in the round's record, and never ends a run.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from plait.federated.adapter import StateDict
from plait.federated.payload import CorruptFrame, pack_tensors, plain, unpack_tensors

_LENGTH = 4
_TEXT = 2000  # characters of an error's text
HEAD_BYTES = 4 * 1024 * 1024  # of a reply without its upload; a `hello` may list many clients

Kind = Literal["hello", "train", "evaluate"]
Answer = Callable[[bytes], bytes]  # an order -> its reply
# (client -> order) -> (client, reply) for each of them, in the order they come in.
Exchange = Callable[[Mapping[str, bytes]], Iterable[tuple[str, bytes]]]


@dataclass(frozen=True)
class Order:
    """What a client is to do.

    kind: "hello" asks for the client's name alone. run: its name. round: 1, 2, ... client: the
    receiver. generation: the private state to start from, 0: the first one. dtype: of the upload.
    config: digest of the method and the client's adapter, which must be the same on both sides.
    measure: after training, also take held-out metrics of the client's own model.
    """

    kind: Kind
    run: str = "run"
    round: int = 1
    client: str = ""
    generation: int = 0
    dtype: str = "fp32"
    config: str = ""
    measure: bool = False

    def pack(self, tensors: StateDict | None = None) -> bytes:
        """The order as bytes, with the tensors for the client."""
        return pack_tensors(asdict(self), tensors or {})

    @classmethod
    def unpack(cls, data: bytes) -> "tuple[Order, StateDict]":
        """Read an order.

        Raises:
            CorruptFrame: it is damaged, or not an order.
        """
        header, tensors = unpack_tensors(data)
        try:
            return cls(**header), tensors
        except TypeError as error:
            raise CorruptFrame(f"no order ({error})", False) from None


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    client: its name. upload: as packed by `payload.pack`, b"" without one. metrics: of training or
    evaluation. held_out: metrics of its own model after training, if the order asks for them; the
    key `failed` holds the error of that measurement alone. seconds: that the order took. failed:
    the error, "" for none.
    """

    client: str
    upload: bytes = b""
    metrics: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""

    def pack(self) -> bytes:
        """The reply as bytes."""
        head = asdict(replace(self, upload=b""))
        del head["upload"]
        text = json.dumps(head, sort_keys=True).encode()
        return len(text).to_bytes(_LENGTH, "big") + text + self.upload

    @classmethod
    def unpack(cls, data: bytes) -> "Reply":
        """Read a reply without trusting it; `payload.unpack` checks the upload.

        Its texts are made plain. The metrics may hold anything; whoever uses them takes the
        numbers alone.

        Raises:
            CorruptFrame: it is damaged, too long, or not a reply.
        """
        length = int.from_bytes(data[:_LENGTH], "big")
        if length > HEAD_BYTES:
            raise CorruptFrame(f"no reply (its header is said to have {length} bytes)", False)
        try:
            head = json.loads(data[_LENGTH : _LENGTH + length])
            reply = cls(upload=data[_LENGTH + length :], **head)
        except Exception as error:
            raise CorruptFrame(f"no reply ({error})", False) from None
        known = {
            "client": str, "metrics": dict, "held_out": dict, "seconds": float, "failed": str,
        }  # fmt: skip
        wrong = [name for name, kind in known.items() if type(getattr(reply, name)) is not kind]
        if wrong:
            raise CorruptFrame(f"no reply ({wrong[0]} has another type)", False)
        if not 0 <= reply.seconds < math.inf:
            raise CorruptFrame(f"no reply (seconds = {reply.seconds})", False)
        return replace(reply, client=plain(reply.client), failed=plain(reply.failed, _TEXT))


def failure(client: str, text: str) -> bytes:
    """The reply in place of one that did not come."""
    return Reply(client, failed=text).pack()
