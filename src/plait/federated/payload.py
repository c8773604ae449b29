"""What travels: one byte string, a digest, a JSON header and a safetensors blob. Never pickle.

    32 bytes   SHA-256 of all that follows
    4 bytes    length of the header, big-endian
    ..         header, JSON: schema, method, run, round, client, generation, rank, dtype,
               n_examples, frozen
    ..         tensors, safetensors, as the method's `payload_up` names them

An upload is checked in a fixed order, each check with a reason of its own (`Reason`); the first
that fails is reported. Shapes are compared with what the server's config declares of the client,
never guessed. `pack_tensors` and `unpack_tensors` are the same frame with any header; the state
files use it.

Whatever a sender writes, reading it ends in an upload or in `Rejected`, and what an error quotes of
it is short, printable and on one line (`plain`).
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from plait.federated.adapter import StateDict
from plait.federated.methods import Algorithm, Client

SCHEMA = 1
HEADER_BYTES = 64 * 1024  # longest header
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DIGEST, _LENGTH = 32, 4
_HUGE = 2**53  # no number of a header reaches it
_QUOTED = 300  # characters of an error's text about what somebody sent
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class Reason(StrEnum):
    """Why an upload is rejected, in the order of the checks."""

    OVERSIZE = "oversize"
    BAD_HASH = "bad_hash"
    BAD_SCHEMA = "bad_schema"
    WRONG_RUN = "wrong_run"
    STALE_ROUND = "stale_round"
    DUPLICATE = "duplicate"
    UNKNOWN_CLIENT = "unknown_client"
    METHOD_MISMATCH = "method_mismatch"
    MISSING_KEY = "missing_key"
    EXTRA_KEY = "extra_key"
    BAD_DTYPE = "bad_dtype"
    BAD_SHAPE = "bad_shape"
    NON_FINITE = "non_finite"
    NORM_OUTLIER = "norm_outlier"
    OPPOSED = "opposed"
    QUARANTINED = "quarantined"


def plain(text: str, most: int = _QUOTED) -> str:
    """Return what somebody sent as one short line of printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return line if len(line) <= most else f"{line[: most - 4]} ..."


class Rejected(ValueError):
    """An upload that does not enter the round.

    reason: of the first check that failed. client: who sent it. text: as `plain` makes it.
    """

    def __init__(self, reason: Reason, client: str, text: str) -> None:
        super().__init__(f"client {client!r}: {reason}: {plain(text)}")
        self.reason, self.client = reason, client


class CorruptFrame(ValueError):
    """Bytes that are no frame, or a damaged one. damaged: the digest does not match."""

    def __init__(self, text: str, damaged: bool) -> None:
        super().__init__(plain(text))
        self.damaged = damaged


def check_name(what: str, name: str) -> str:
    """A run's or client's name, which also names files.

    Raises:
        ValueError: other characters than letters, digits, `.`, `_`, `-`, or over 100 of them.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} = {name!r} cannot name a file. Use up to 100 letters, digits, '.', '_' and "
            "'-', the first one no '.'."
        )
    return name


# The frame --------------------------------------------------------------------------------------


def pack_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A frame of a JSON header and tensors; equal content gives equal bytes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    # Copies: safetensors refuses tensors that share memory, as a trunk and its first step do.
    own = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
    blob = save(own)
    body = len(text).to_bytes(_LENGTH, "big") + text + blob
    return hashlib.sha256(body).digest() + body


def unpack_tensors(
    data: bytes, header_bytes: int | None = None
) -> tuple[dict[str, Any], StateDict]:
    """The header and the tensors of a frame.

    Args:
        data: the frame. header_bytes: longest header; None: any.

    Raises:
        CorruptFrame: damaged, cut off, or something else.
    """
    body = memoryview(data)[_DIGEST:]
    if len(body) < _LENGTH or hashlib.sha256(body).digest() != data[:_DIGEST]:
        raise CorruptFrame("the digest does not match the content: damaged or cut off", True)
    length = int.from_bytes(body[:_LENGTH], "big")
    if length > (header_bytes or length) or _LENGTH + length > len(body):
        raise CorruptFrame(f"the header is said to have {length} bytes", False)
    try:
        header = json.loads(bytes(body[_LENGTH : _LENGTH + length]))
        tensors = load(bytes(body[_LENGTH + length :]))
    except Exception as error:  # also of torch: a shape of (0, 2**62, 2**62) is a RuntimeError
        raise CorruptFrame(f"no JSON header with safetensors ({error})", False) from None
    if not isinstance(header, dict):
        raise CorruptFrame("the header is no JSON object", False)
    return header, tensors


def blob_of(data: bytes) -> memoryview:
    """The safetensors of a frame that was read before."""
    start = _DIGEST + _LENGTH
    return memoryview(data)[start + int.from_bytes(data[_DIGEST:start], "big") :]


def digest(data: bytes) -> str:
    """The digest that a frame carries, as hexadecimal digits."""
    return data[:_DIGEST].hex()


# Uploads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What an upload says of itself.

    method: key of the federated method. run, client: names. round: 1, 2, ... generation: the
    client's private state that the round started from, 0 for its first one. rank: largest rank of
    its layers. dtype: "fp32", "bf16", "fp16". n_examples: training examples, claimed.
    frozen: the method's fingerprint of what is frozen, "" without any.
    """

    method: str
    run: str
    round: int
    client: str
    generation: int
    rank: int
    dtype: str
    n_examples: int
    frozen: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class Upload:
    """An upload that passed its checks. sha256: of the frame. n_bytes: as it came."""

    header: Header
    tensors: StateDict
    sha256: str
    n_bytes: int


@dataclass(frozen=True)
class Round:
    """What the server expects of the uploads of one round.

    run: its name. number: 1, 2, ... method: the algorithm. clients: id -> what the config declares,
    of the clients that were asked. generations: id -> generation that the client was told to start
    from. dtype: on the wire. frozen: the fingerprint. seen: clients that have answered. spare:
    bytes an upload may have beyond the tensors it must hold.
    """

    run: str
    number: int
    method: Algorithm
    clients: Mapping[str, Client]
    generations: Mapping[str, int]
    dtype: str = "fp32"
    frozen: str = ""
    seen: Collection[str] = field(default_factory=tuple)
    spare: int = 1024 * 1024

    def limit(self, client: str) -> int:
        """Most bytes of an upload: what its tensors need, a header, their names, and `spare`."""
        declared = self.clients.get(client)
        shapes = self.method.share(declared) if declared is not None else {}
        size = DTYPES[self.dtype].itemsize * sum(map(math.prod, shapes.values()))
        return size + HEADER_BYTES + sum(len(key) + 200 for key in shapes) + self.spare


def pack(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    """An upload; floating tensors are cast to the header's dtype.

    Raises:
        ValueError: an unknown dtype, a name that cannot be one, or a count below its least value.
    """
    problem = _problem(asdict(header))
    if problem:
        raise ValueError(f"payload: {problem}. Correct the header.")
    cast = {k: x.to(DTYPES[header.dtype]) for k, x in tensors.items()}
    return pack_tensors(asdict(header), cast)


def _problem(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a header, or None."""
    kinds = {f.name: f.type for f in fields(Header)}
    if set(values) != set(kinds):
        return f"the header has the fields {sorted(values)}, not {sorted(kinds)}"
    for name, value in values.items():
        if type(value) is not kinds[name]:
            return f"{name} = {value!r} is not of type {kinds[name].__name__}"  # type: ignore[union-attr]
    if values["schema"] != SCHEMA:
        return f"schema = {values['schema']}, this plait reads {SCHEMA}"
    for name, least in (("round", 1), ("generation", 0), ("rank", 1), ("n_examples", 1)):
        if values[name] < least:
            return f"{name} = {values[name]} is below {least}"
        if values[name] >= _HUGE:  # more digits than a float can take, maybe
            return f"{name} is 2**53 or more"
    if values["dtype"] not in DTYPES:
        return f"dtype = {values['dtype']!r} is none of {', '.join(DTYPES)}"
    for name in ("run", "client"):
        if not _NAME.fullmatch(values[name]):
            return f"{name} = {values[name]!r} cannot be a name"
    return None


def unpack(data: bytes, expected: Round, sender: str) -> Upload:
    """Check an upload up to its values and read it.

    Args:
        data: as it came. expected: what the server expects of this round.
        sender: the client that the transport says it came from.

    Raises:
        Rejected: with the reason; `norm_outlier` and `quarantined` are the guard's.
    """

    def refuse(reason: Reason, text: str) -> Rejected:
        return Rejected(reason, sender, text)

    limit = expected.limit(sender)
    if len(data) > limit:
        raise refuse(Reason.OVERSIZE, f"{len(data)} bytes, {limit} are allowed")
    try:
        values, tensors = unpack_tensors(data, HEADER_BYTES)
    except CorruptFrame as error:
        reason = Reason.BAD_HASH if error.damaged else Reason.BAD_SCHEMA
        raise refuse(reason, str(error)) from None
    problem = _problem(values)
    if problem:
        raise refuse(Reason.BAD_SCHEMA, problem)
    header = Header(**values)
    if header.run != expected.run:
        raise refuse(Reason.WRONG_RUN, f"run {header.run!r}, here runs {expected.run!r}")
    if header.round != expected.number:
        text = f"round {header.round}, here is round {expected.number}"
        raise refuse(Reason.STALE_ROUND, text)
    known = header.client in expected.clients
    if known and header.generation != expected.generations.get(header.client, 0):
        text = f"it started from generation {header.generation}, it was told "
        text += f"{expected.generations.get(header.client, 0)}"
        raise refuse(Reason.STALE_ROUND, text)
    if header.client in expected.seen:
        raise refuse(Reason.DUPLICATE, "it has answered in this round already")
    if header.client != sender or not known:
        text = f"client {header.client!r} was not asked in this round"
        if header.client != sender:
            text = f"it says that it is {header.client!r}"
        raise refuse(Reason.UNKNOWN_CLIENT, text)
    if header.method != expected.method.key:
        text = f"method {header.method!r}, here runs {expected.method.key!r}"
        raise refuse(Reason.METHOD_MISMATCH, text)
    if header.frozen != expected.frozen:
        text = "its frozen factors are not those of the server"
        raise refuse(Reason.METHOD_MISMATCH, text)
    client = expected.clients[sender]
    _check_tensors(tensors, header, expected.method.share(client), client, expected.dtype)
    return Upload(header, tensors, digest(data), len(data))


def _check_tensors(
    tensors: StateDict,
    header: Header,
    shapes: Mapping[str, tuple[int, ...]],
    client: Client,
    dtype: str,
) -> None:
    """Keys, dtypes, shapes and values, in this order."""
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing:
        raise Rejected(Reason.MISSING_KEY, client.id, f"{missing[0]}, {len(missing)} in all")
    if extra:
        raise Rejected(Reason.EXTRA_KEY, client.id, f"{extra[0]!r}, {len(extra)} in all")
    for key, x in tensors.items():
        if x.dtype != DTYPES[dtype] or header.dtype != dtype:
            found = f"{key} is {str(x.dtype).removeprefix('torch.')}, the header says "
            raise Rejected(Reason.BAD_DTYPE, client.id, f"{found}{header.dtype}, wanted {dtype}")
    rank = rank_of(client)
    if header.rank != rank:
        text = f"it declares rank {header.rank}, the config {rank}"
        raise Rejected(Reason.BAD_SHAPE, client.id, text)
    for key, x in tensors.items():
        if tuple(x.shape) != tuple(shapes[key]):
            text = f"{key} is {tuple(x.shape)}, wanted {tuple(shapes[key])}"
            raise Rejected(Reason.BAD_SHAPE, client.id, text)
    for key, x in tensors.items():
        if not torch.isfinite(x).all():
            raise Rejected(Reason.NON_FINITE, client.id, f"{key} has NaN or infinite values")


def rank_of(client: Client) -> int:
    """The rank that a client's header states: the largest of its layers."""
    return max((layer.r for layer in client.layers.values()), default=1)
