"""The payload: its bytes, and each reason of rejection by an injected fault."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from plait.federated import algorithm
from plait.federated.payload import (
    HEADER_BYTES,
    CorruptFrame,
    Header,
    Reason,
    Rejected,
    Round,
    check_name,
    digest,
    pack,
    pack_tensors,
    unpack,
    unpack_tensors,
)
from tests.support.clients import clients_of, states_of

CLIENTS = clients_of([6, 3], shapes={"sq": (6, 6), "x": (7, 5)})
METHOD = algorithm("flora")
ROUND = Round("run-1", 3, METHOD, CLIENTS, {"c0": 2}, seen={"c9"}, spare=2048)
HEADER = Header("flora", "run-1", 3, "c0", 2, 6, "fp32", 40)
TENSORS = states_of(CLIENTS)["c0"]


def framed(header: Any, blob: bytes, length: int | None = None) -> bytes:
    """A frame with a right digest around anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    body = size.to_bytes(4, "big") + text + blob
    return hashlib.sha256(body).digest() + body


def blob(dtype: str, shape: list[int]) -> bytes:
    """safetensors with one tensor without numbers, of any type and shape."""
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}).encode()
    return len(text).to_bytes(8, "little") + text


def sent(header: dict[str, Any] | None = None, **tensors: Any) -> bytes:
    """An upload with some of its header or tensors replaced; None leaves a tensor out."""
    found = {k: x for k, x in {**TENSORS, **tensors}.items() if x is not None}
    return framed({**dataclasses.asdict(HEADER), **(header or {})}, save(found))


def test_an_upload_arrives_as_it_was_sent() -> None:
    data = pack(HEADER, TENSORS)
    upload = unpack(data, ROUND, "c0")
    assert upload.header == HEADER
    assert upload.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(x, TENSORS[k]) for k, x in upload.tensors.items())
    assert upload.n_bytes == len(data)
    assert upload.sha256 == hashlib.sha256(data[32:]).hexdigest() == digest(data)
    again = pack(HEADER, dict(reversed(TENSORS.items())))
    assert again == data  # the same content, the same bytes
    assert len(data) - sum(x.nbytes for x in TENSORS.values()) < 1024


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_on_the_wire(dtype: str) -> None:
    expected = dataclasses.replace(ROUND, dtype=dtype)
    header = dataclasses.replace(HEADER, dtype=dtype)
    tensors = unpack(pack(header, TENSORS), expected, "c0").tensors
    wire = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert all(torch.equal(x, TENSORS[k].to(wire)) for k, x in tensors.items())
    if dtype == "fp16":  # beyond its range a cast gives inf, which is caught
        with pytest.raises(Rejected, match="non_finite"):
            unpack(pack(header, TENSORS | {"x/A": TENSORS["x/A"] * 1e6}), expected, "c0")


def cut(data: bytes) -> bytes:
    """Without its end."""
    return data[:-7]


def flipped(data: bytes) -> bytes:
    """One bit of a tensor changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


FAULTS: dict[str, tuple[Reason, Callable[[], bytes]]] = {
    "oversize": (Reason.OVERSIZE, lambda: pack(HEADER, TENSORS) + bytes(200_000)),
    "cut off": (Reason.BAD_HASH, lambda: cut(pack(HEADER, TENSORS))),
    "one bit": (Reason.BAD_HASH, lambda: flipped(pack(HEADER, TENSORS))),
    "nothing": (Reason.BAD_HASH, lambda: b""),
    "no frame": (Reason.BAD_HASH, lambda: b"\x80\x04N." * 30),
    "header too long": (Reason.BAD_SCHEMA, lambda: framed(b" " * (HEADER_BYTES + 1), b"")),
    "header past the end": (Reason.BAD_SCHEMA, lambda: framed(b"{}", b"", 9000)),
    "no JSON": (Reason.BAD_SCHEMA, lambda: framed(b"{,", save(TENSORS))),
    "deep JSON": (Reason.BAD_SCHEMA, lambda: framed(b"[" * 50_000, save(TENSORS))),
    "no UTF-8": (Reason.BAD_SCHEMA, lambda: framed(b"\xff\xfe{}", save(TENSORS))),
    "a list": (Reason.BAD_SCHEMA, lambda: framed([1], save(TENSORS))),
    "no safetensors": (
        Reason.BAD_SCHEMA,
        lambda: framed(dataclasses.asdict(HEADER), b"PK\x03\x04"),
    ),
    "a shape beyond 64 bits": (
        Reason.BAD_SCHEMA,
        lambda: framed(dataclasses.asdict(HEADER), blob("F32", [0, 2**62, 2**62])),
    ),
    "an unknown type of numbers": (
        Reason.BAD_SCHEMA,
        lambda: framed(dataclasses.asdict(HEADER), blob("F7", [0])),
    ),
    "a number of 5,000 digits": (
        Reason.BAD_SCHEMA,
        lambda: framed(b'{"rank": ' + b"9" * 5000 + b"}", save(TENSORS)),
    ),
    "field missing": (Reason.BAD_SCHEMA, lambda: framed({"schema": 1}, save(TENSORS))),
    "field unknown": (Reason.BAD_SCHEMA, lambda: sent({"weight": 1})),
    "another schema": (Reason.BAD_SCHEMA, lambda: sent({"schema": 2})),
    "count as text": (Reason.BAD_SCHEMA, lambda: sent({"n_examples": "40"})),
    "count as fraction": (Reason.BAD_SCHEMA, lambda: sent({"n_examples": 1e12})),
    "count as truth": (Reason.BAD_SCHEMA, lambda: sent({"n_examples": True})),
    "count of none": (Reason.BAD_SCHEMA, lambda: sent({"n_examples": 0})),
    "negative count": (Reason.BAD_SCHEMA, lambda: sent({"n_examples": -5})),
    "round 0": (Reason.BAD_SCHEMA, lambda: sent({"round": 0})),
    "unknown dtype": (Reason.BAD_SCHEMA, lambda: sent({"dtype": "fp8"})),
    "client is a path": (Reason.BAD_SCHEMA, lambda: sent({"client": "../c0"})),
    "another run": (Reason.WRONG_RUN, lambda: sent({"run": "run-2"})),
    "an old round": (Reason.STALE_ROUND, lambda: sent({"round": 2})),
    "a round to come": (Reason.STALE_ROUND, lambda: sent({"round": 4})),
    "another generation": (Reason.STALE_ROUND, lambda: sent({"generation": 1})),
    "a second answer": (Reason.DUPLICATE, lambda: sent({"client": "c9"})),
    "another client": (Reason.UNKNOWN_CLIENT, lambda: sent({"client": "c1", "generation": 0})),
    "nobody": (Reason.UNKNOWN_CLIENT, lambda: sent({"client": "c7"})),
    "another method": (Reason.METHOD_MISMATCH, lambda: sent({"method": "fedit"})),
    "other frozen factors": (Reason.METHOD_MISMATCH, lambda: sent({"frozen": "00"})),
    "missing key": (Reason.MISSING_KEY, lambda: sent(**{"x/B": None})),
    "extra key": (Reason.EXTRA_KEY, lambda: sent(secret=torch.zeros(1))),
    "wide tensor": (Reason.BAD_DTYPE, lambda: sent(**{"x/B": TENSORS["x/B"].double()})),
    "whole numbers": (Reason.BAD_DTYPE, lambda: sent(**{"x/B": TENSORS["x/B"].to(torch.int32)})),
    "header of another dtype": (Reason.BAD_DTYPE, lambda: sent({"dtype": "bf16"})),
    "declared rank": (Reason.BAD_SHAPE, lambda: sent({"rank": 5})),
    "rank of another": (Reason.BAD_SHAPE, lambda: sent(**{"x/B": torch.zeros(5, 3)})),
    "transposed": (Reason.BAD_SHAPE, lambda: sent(**{"x/A": torch.zeros(7, 6)})),
    "flat": (Reason.BAD_SHAPE, lambda: sent(**{"x/A": torch.zeros(42)})),
    "NaN": (Reason.NON_FINITE, lambda: sent(**{"x/A": TENSORS["x/A"] * float("nan")})),
    "infinite": (Reason.NON_FINITE, lambda: sent(**{"x/A": TENSORS["x/A"] / 0})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_rejected_with_its_reason(fault: str) -> None:
    reason, data = FAULTS[fault]
    with pytest.raises(Rejected, match=f"client 'c0': {reason}: ") as found:
        unpack(data(), ROUND, "c0")
    assert found.value.reason is reason
    assert found.value.client == "c0"


def test_every_reason_of_the_payload_was_injected() -> None:
    """The three others are the guard's, tests/federated/test_guard.py and test_agreement.py."""
    ours = {reason for reason, _ in FAULTS.values()}
    guards = {Reason.NORM_OUTLIER, Reason.OPPOSED, Reason.QUARANTINED}
    assert set(Reason) - ours == guards


def test_checks_come_in_order() -> None:
    """An upload with all faults of a kind and later ones is rejected for the first."""
    nan = {"x/A": torch.full((7, 6), float("nan")).double(), "more": torch.zeros(1), "x/B": None}
    values: dict[str, Any] = {"schema": 2, "run": "r", "round": 1, "client": "c9", "method": "ffa"}
    order = [
        (Reason.BAD_SCHEMA, {"schema": 1}),
        (Reason.WRONG_RUN, {"run": "run-1"}),
        (Reason.STALE_ROUND, {"round": 3}),
        (Reason.DUPLICATE, {"client": "c1", "generation": 0}),
        (Reason.UNKNOWN_CLIENT, {"client": "c0", "generation": 2}),
        (Reason.METHOD_MISMATCH, {"method": "flora"}),
    ]
    for reason, cure in order:
        with pytest.raises(Rejected) as found:
            unpack(sent(values, **nan), ROUND, "c0")
        assert found.value.reason is reason
        values |= cure
    cures: list[tuple[Reason, dict[str, Any]]] = [
        (Reason.MISSING_KEY, {"x/B": TENSORS["x/B"]}),
        (Reason.EXTRA_KEY, {"more": None}),
        (Reason.BAD_DTYPE, {"x/A": torch.full((7, 6), float("nan"))}),
        (Reason.BAD_SHAPE, {"x/A": torch.full((6, 7), float("nan"))}),
        (Reason.NON_FINITE, {"x/A": TENSORS["x/A"]}),
    ]
    for reason, cure in cures:
        with pytest.raises(Rejected) as found:
            unpack(sent(values, **nan), ROUND, "c0")
        assert found.value.reason is reason
        nan |= cure
    assert unpack(sent(values, **nan), ROUND, "c0").header.client == "c0"


def test_a_square_factor_that_was_transposed_is_not_seen_by_its_shape_alone() -> None:
    """A (6, 6) at rank 6: only an honest declaration can tell; the shape check says so little."""
    swapped = sent(**{"sq/A": TENSORS["sq/A"].T.contiguous()})
    assert unpack(swapped, ROUND, "c0").tensors["sq/A"].shape == (6, 6)


@settings(max_examples=200)
@given(place=st.integers(0, 5000), value=st.integers(1, 255))
def test_no_changed_byte_passes(place: int, value: int) -> None:
    data = bytearray(pack(HEADER, TENSORS))
    data[place % len(data)] ^= value
    with pytest.raises(Rejected) as found:
        unpack(bytes(data), ROUND, "c0")
    assert found.value.reason is Reason.BAD_HASH


@settings(max_examples=200)
@given(text=st.binary(max_size=60), blob=st.binary(max_size=60))
def test_anything_in_a_right_frame_is_a_typed_rejection(text: bytes, blob: bytes) -> None:
    with pytest.raises(Rejected) as found:
        unpack(framed(text, blob), ROUND, "c0")
    assert found.value.reason is Reason.BAD_SCHEMA
    with pytest.raises(CorruptFrame):
        unpack_tensors(text + blob)


def test_a_frame_without_tensors() -> None:
    assert unpack_tensors(pack_tensors({"a": 1}, {})) == ({"a": 1}, {})


def test_headers_that_are_not_sent() -> None:
    for change, text in (
        ({"n_examples": 0}, r"n_examples = 0 is below 1"),
        ({"n_examples": 10**400}, r"n_examples is 2\*\*53 or more"),
        ({"client": "a/b"}, r"client = 'a/b' cannot be a name"),
        ({"dtype": "int8"}, r"dtype = 'int8' is none of fp32, bf16, fp16"),
        ({"rank": 2.0}, r"rank = 2\.0 is not of type int"),
    ):
        with pytest.raises(ValueError, match=rf"payload: {text}\. Correct the header\."):
            pack(dataclasses.replace(HEADER, **change), TENSORS)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\\b", "a b", "x" * 101, "ü", "a\n"])
def test_names_that_cannot_be_files(name: str) -> None:
    with pytest.raises(ValueError, match=r"client = .* cannot name a file"):
        check_name("client", name)
    assert check_name("client", "node-7.eu_1") == "node-7.eu_1"


def test_tensors_that_share_memory_are_written_twice() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    _, found = unpack_tensors(pack_tensors({}, {"a": x, "b": x}))
    assert torch.equal(found["a"], x)
    assert torch.equal(found["b"], x)


@settings(max_examples=200)
@given(
    dtype=st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "F4"]),
    shape=st.lists(st.integers(0, 2**64), max_size=5),
)
def test_any_shape_is_a_typed_rejection(dtype: str, shape: list[int]) -> None:
    with pytest.raises(Rejected):
        unpack(framed(dataclasses.asdict(HEADER), blob(dtype, shape)), ROUND, "c0")


@pytest.mark.parametrize(
    "change",
    [
        {"method": "m" * 30_000},
        {"method": "\x1b[2J\n# heading"},
        {"dtype": "\ud800" * 1000},
        {"n_examples": -(10**4000)},
        {"schema": 10**4000},
    ],
)
def test_what_is_quoted_of_an_upload_is_one_short_line(change: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as found:
        unpack(sent(change), ROUND, "c0")
    text = str(found.value)
    assert len(text) < 400
    assert text.isprintable()


def test_a_long_key_is_quoted_short() -> None:
    data = sent(**{"k" * 1500: torch.zeros(1)})
    with pytest.raises(Rejected, match="extra_key: 'kkk") as found:
        unpack(data, dataclasses.replace(ROUND, spare=10**6), "c0")
    assert len(str(found.value)) < 400
