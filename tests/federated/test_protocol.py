"""Replies from clients that send anything: read within bounds, or refused with a type."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.federated.engines.local import Federation
from plait.federated.payload import CorruptFrame, plain
from plait.federated.protocol import HEAD_BYTES, Reply
from plait.federated.server import Server
from tests.support.federation import NAMES, federation


def framed(head: Any, upload: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(4, "big") + text + upload


GOOD = {"client": "a", "metrics": {}, "held_out": {}, "seconds": 0.5, "failed": ""}

REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "deep": framed(b"[" * 100_000),
    "5,000 digits": framed(b'{"seconds": ' + b"9" * 5000 + b"}"),
    "a list": framed([1]),
    "an upload in the header": framed({**GOOD, "upload": "x"}),
    "an unknown field": framed({**GOOD, "more": 1}),
    "another type": framed({**GOOD, "metrics": []}),
    "a long header": framed({**GOOD, "failed": "x" * HEAD_BYTES}),
    "NaN seconds": framed({**GOOD, "seconds": float("nan")}),
    "endless seconds": framed({**GOOD, "seconds": float("inf")}),
    "negative seconds": framed({**GOOD, "seconds": -1.0}),
    "whole seconds": framed({**GOOD, "seconds": 10**300}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reply_is_refused_with_a_short_text(case: str) -> None:
    with pytest.raises(CorruptFrame, match="no reply") as found:
        Reply.unpack(REFUSED[case])
    assert len(str(found.value)) < 400
    assert str(found.value).isprintable()


@settings(max_examples=200)
@given(data=st.binary(max_size=80), head=st.binary(max_size=80))
def test_any_bytes_are_a_reply_or_a_typed_refusal(data: bytes, head: bytes) -> None:
    for sent in (data, framed(head, data)):
        try:
            Reply.unpack(sent)
        except CorruptFrame:
            continue


def test_texts_are_plain() -> None:
    reply = Reply.unpack(framed({**GOOD, "failed": "\x1b[31mred\n# head\ud800" + "x" * 9000}))
    assert reply.failed.isprintable()
    assert reply.failed.startswith("[31mred # head xxx")
    assert len(reply.failed) == 2000
    assert plain("a\t b\u202ec") == "a b c"
    assert Reply.unpack(Reply("a", b"upload", {"loss": 1.0}).pack()) == Reply(
        "a", b"upload", {"loss": 1.0}
    )


def test_a_record_takes_a_bounded_number_of_finite_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one client sends beside a good upload stays small, finite and printable."""
    made: Federation = federation(tmp_path, rounds=1)
    metrics = {f"m{i}": 1.0 for i in range(5000)}
    metrics |= {"\x1b[2J" + "n" * 5000: 2.0, "loss": float("nan"), "big": 10**400, "yes": True}
    metrics = dict(sorted(metrics.items()))
    pack = Reply.pack

    def nasty(self: Reply) -> bytes:
        changed = Reply(self.client, self.upload, metrics, {"failed": "\n" * 9 + "h" * 9999}, 0.1)
        return pack(changed if self.client == "b" else self)

    monkeypatch.setattr(Reply, "pack", nasty)
    step = Server.step

    def measured(self: Server, exchange: Any, done: Any = None, **options: Any) -> Any:
        return step(self, exchange, done, measure=True)

    monkeypatch.setattr(Server, "step", measured)
    record = made.step()
    assert record.accepted == [*NAMES]
    assert len(record.metrics["b"]) == 100
    assert "loss" not in record.metrics["b"]
    assert "yes" not in record.metrics["b"]
    assert "big" not in record.metrics["b"]
    assert all(name.isprintable() and len(name) <= 100 for name in record.metrics["b"])
    assert len(record.held_out["b"]["failed"]) == 300
    assert len(json.dumps(record.to_dict(), allow_nan=False)) < 50_000
