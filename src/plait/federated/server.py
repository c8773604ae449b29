"""The server's side: the rounds, their checks, the aggregate, the checkpoint.

    select -> order for each client -> (exchange) -> check and spool each upload as it comes
           -> norm filter -> at least min_updates -> aggregate, in the order of the names
           -> checkpoint -> next round

The server trains nothing and opens no connection: an `Exchange` carries the orders to the clients
and their replies back. The order in which replies arrive changes no bit. Accepted uploads wait on
the disk, and a mean reads one at a time. Faults of a client or its machine are noted in the round's
record; a round with too few good updates is retried up to `retries` times, then it is an error.

Limits: downloads are fp32, whatever the dtype of the uploads.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from plait.federated.adapter import StateDict
from plait.federated.agreement import agreement
from plait.federated.client import Roster
from plait.federated.guard import MANY, Guard, GuardOptions, TooFewUpdates, weigh
from plait.federated.methods import (
    Mapped,
    Mean,
    State,
    aggregation_error,
    weights_of,
)
from plait.federated.partition import select
from plait.federated.payload import (
    DTYPES,
    CorruptFrame,
    Rejected,
    Round,
    check_name,
    plain,
    unpack,
)
from plait.federated.privacy import Privacy, PrivacyReport
from plait.federated.protocol import Exchange, Kind, Order, Reply
from plait.federated.similarity import Similarity, factor_similarity
from plait.federated.state import Checkpoint, Checkpoints, Spool, config_hash
from plait.options import check_options, option

_METRICS, _NAME = 100, 100  # metrics of a client in a record, characters of a name

Stored = Callable[[str, int], StateDict]  # (client, round)
Progress = Callable[[int, int, int, str], None]  # (round, clients done, clients in all, client)


@dataclass(frozen=True)
class ServerOptions:
    """Options of a run. dtype: one of DTYPES. guard: see there."""

    run: str = option("run", "Name of the run, which the states carry.")
    rounds: int = option(10, "Rounds of the whole run.", least=1)
    fraction: float = option(1.0, "Share of the clients in a round.", above=0, most=1)
    seed: int = option(0, "Seed of the selection and of randomness in training.")
    dtype: str = option("fp32", "Number format of the uploads.")
    guard: GuardOptions = option(GuardOptions, "The guard.")
    keep: int = option(2, "Server checkpoints that are kept.", least=1)
    retries: int = option(0, "Retries of a round with too few updates.", least=0)

    def __post_init__(self) -> None:
        check_name("run", self.run)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} is none of {', '.join(DTYPES)}.")
        check_options(self)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round.

    up, down: of the tensors, as sent; up is 0 for an upload that was not read. up_formula,
    down_formula: by the method's formula, for a client of the last round. up_frame, down_frame:
    with digests, headers and names.
    """

    up: int
    up_formula: int
    up_frame: int
    down: int
    down_formula: int
    down_frame: int


@dataclass
class RoundRecord:
    """What happened in a round.

    round: 1, 2, ... selected, accepted: clients. metrics: client -> what its training returned.
    held_out: accepted client -> metrics of its own model right after its training, if requested;
    `failed` -> why there are none. weights: client -> w_i. capped: clients whose claimed examples
    the guard capped. votes: client -> factor below 1 that the guard put on its weight. rejected:
    (client, reason, text), in the order of the clients. failed: client -> its error. traffic:
    client -> bytes. aggregation_error: layer -> that of averaging A and B separately, for methods
    that do. similarity: of the clients' factors, see `factor_similarity`. seconds: client -> of
    its reply, by its own clock.
    """

    round: int
    selected: list[str]
    accepted: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    capped: list[str] = field(default_factory=list)
    votes: dict[str, float] = field(default_factory=dict)
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    aggregation_error: dict[str, float] = field(default_factory=dict)
    similarity: Similarity = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; votes only if there are any, as in plait 0.1, which knew none."""
        return {k: v for k, v in asdict(self).items() if k != "votes" or v}

    def __str__(self) -> str:
        """In one line."""
        text = f"round {self.round}: {len(self.accepted)} of {len(self.selected)} updates"
        losses = [own["loss"] for own in self.metrics.values() if "loss" in own]
        if losses:
            text += f", training loss {sum(losses) / len(losses):.4g}"
        faults = [f"{client} {reason}" for client, reason, _ in self.rejected]
        return ", ".join([text, *faults, *(f"{client} failed" for client in self.failed)])


class Server:
    """The server of a run; `step` is a round.

    Args:
        roster: all clients, with their models.
        folder: for the checkpoints and the uploads of the round.
        options: see ServerOptions.
        facts: what else decides the result, such as the data; a resumed run must have the same.
        resume: continue from the newest checkpoint, or from the start if there is none.
        privacy: clip and noise the updates; None: neither.
        stored: (client, round) -> what the client stored, if its private state is on this machine
            too, for the similarity of private factors; None: compare only what is sent.
        progress: called after each reply.

    Raises:
        ValueError: the method cannot serve the clients, a checkpoint exists without `resume`, or it
            is one of another config.
    """

    def __init__(
        self,
        roster: Roster,
        folder: str | Path,
        options: ServerOptions | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
        privacy: Privacy | None = None,
        stored: Stored | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.roster, self.method, self.clients = roster, roster.method, roster.clients
        self.options, self.privacy = options or ServerOptions(), privacy
        self.stored = stored or (lambda client, round: {})
        self.progress = progress or (lambda round, done, total, client: None)
        self._mean = self.options.guard.mean(self.method)
        first, self._frozen = roster.start()
        decisive = asdict(self.options)
        for name in ("rounds", "keep", "retries"):  # change no bit of a round
            del decisive[name]
        compared = {name: decisive["guard"].pop(name) for name in ("agreement", "max_pull")}
        hidden = None if privacy is None else {"clip": privacy.clip, "noise": privacy.noise}
        described = {
            "method": [self.method.key, asdict(self.method)],
            "options": decisive,
            "clients": roster.described,
            "facts": dict(facts or {}),
            "privacy": hidden,
        }
        without = config_hash(described)
        self._compares = self.options.guard.compares(privacy is not None)
        self._config = without
        self._checkpoints = Checkpoints(Path(folder), self.options.keep)
        if self._compares:
            self._config = config_hash(described | {"compared": compared["max_pull"]})
            newest = self._checkpoints.newest() if compared["agreement"] is None else None
            if newest is not None and newest.config == without:
                # It began under plait 0.1, which compared nothing, and goes on as it began.
                self._config, self._compares = without, False
        if privacy is not None:
            # Runs that draw the same noise have none in their difference.
            self.privacy = replace(privacy, key=f"{privacy.key}/{self._config}")
            self._check_privacy(self.privacy)
        self._spool = Spool(Path(folder) / "spool")  # of the round that runs
        checkpoint = self._checkpoints.latest(self._config)
        if checkpoint is not None and not resume:
            raise ValueError(
                f"{self._checkpoints.folder}: holds round {checkpoint.state.round} of a run. "
                "Resume it, or use another folder."
            )
        self._last = checkpoint or Checkpoint(
            self.options.run, self.method.key, self._config, first
        )
        self.guard = Guard(self.options.guard, copy.deepcopy(self._last.rejections))

    def _check_privacy(self, privacy: Privacy) -> None:
        privacy.check(self.method, self.options.guard, len(self.clients))
        least = self.options.guard.min_updates
        for number in range(1, self.options.rounds + 1):
            drawn = len(self._selected(number))
            if drawn < least:
                raise ValueError(
                    f"privacy: round {number} draws {drawn} clients, {least} are needed "
                    f"(sampling.fraction = {self.options.fraction}, each client by itself). Raise "
                    "sampling.fraction or lower guard.min_updates."
                )

    # What it knows ------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Completed rounds."""
        return self._last.state.round

    @property
    def state(self) -> State:
        """The server's state of the method."""
        return self._last.state

    def privacy_report(self) -> PrivacyReport | None:
        """(epsilon, delta) of the completed rounds; None without privacy, or before round 1.

        Raises:
            ImportError: the accountant is not installed.
        """
        if self.privacy is None or not self.round:
            return None
        return self.privacy.report(self.options.fraction, len(self.clients), self.round)

    def order(self, kind: Kind, client: str, measure: bool = False) -> tuple[Order, StateDict]:
        """A client's next order, and the tensors that go with it; measure: see `step`."""
        last = self._last
        order = Order(
            kind,
            self.options.run,
            self.round + 1,
            client,
            last.last_accepted.get(client, 0),
            self.options.dtype,
            self.roster.digest(client),
            measure,
        )
        held = last.trunks.get(client, 0)
        return order, self.method.payload_down(last.state, self.clients[client], held)

    # A round ------------------------------------------------------------------------------------

    def step(
        self,
        exchange: Exchange,
        done: Callable[[RoundRecord], None] | None = None,
        *,
        measure: bool = False,
    ) -> RoundRecord:
        """One round.

        Args:
            exchange: carries the orders.
            done: called with the record before the checkpoint is written: after a crash in between
                the round is repeated, with the same record.
            measure: each client of the round also measures its own model on its held-out rows after
                its training. That changes no bit of the result.

        Raises:
            TooFewUpdates: every try had fewer accepted updates than guard.min_updates; the state is
                unchanged.
            FloatingPointError: the aggregate is not finite; the state is unchanged.
        """
        for left in reversed(range(self.options.retries + 1)):
            try:
                return self._round(exchange, done, measure)
            except TooFewUpdates:
                if not left:
                    raise
        raise AssertionError

    def evaluate(self, exchange: Exchange, clients: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Client -> metrics of its own model, as it would start the next round.

        A client that fails has its text under `failed` in place of metrics.
        """
        orders = _Orders(clients, lambda name: self._packed("evaluate", name))
        metrics: dict[str, dict[str, Any]] = {}
        for number, (name, data) in enumerate(exchange(orders), 1):
            reply = _read(name, data)
            metrics[name] = _held_out({"failed": reply.failed} if reply.failed else reply.metrics)
            self.progress(self.round, number, len(clients), name)
        return dict(sorted(metrics.items()))

    def _packed(self, kind: Kind, client: str) -> bytes:
        order, down = self.order(kind, client)
        return order.pack(down)

    def _selected(self, number: int) -> list[str]:
        """Select the clients of a round; private runs draw by the secret key."""
        private = self.privacy
        seed = self.options.seed if private is None else f"{private.key}/select"
        names = list(self.clients)
        return select(names, self.options.fraction, seed, number, poisson=private is not None)

    def _round(
        self, exchange: Exchange, done: Callable[[RoundRecord], None] | None, measure: bool
    ) -> RoundRecord:
        number, last = self.round + 1, self._last
        # From the checkpoint: a round that failed and is retried counts once.
        self.guard = Guard(self.options.guard, copy.deepcopy(last.rejections))
        names = self._selected(number)
        record, self._spool = RoundRecord(number, names), Spool(self._spool.folder)
        claimed, digests, sizes = self._collect(exchange, record, measure)
        self._drop(record, self.guard.screen(sizes))
        record.votes = self._compare(record)
        _in_order(record)
        self._require(record)
        counts = self.guard.counts({name: claimed[name] for name in self._spool})
        record.accepted = sorted(counts)
        record.capped = [name for name in record.accepted if counts[name] < claimed[name]]
        # A private mean weighs all the same, for the numbers of examples are private too.
        weights = weights_of(dict.fromkeys(counts, 1) if self.privacy else counts)
        record.weights = weigh(weights, record.votes)
        if self.method.mean_of_factors:
            record.aggregation_error = aggregation_error(self._spool, record.weights, self.clients)
        states = Mapped(self._spool, lambda name, sent: sent | self.stored(name, number))
        record.similarity = {  # the last digits depend on where a tensor lies in memory
            kind: {measure: round(x, 9) for measure, x in found.items()}
            for kind, found in factor_similarity(states, self.clients).items()
        }
        state = self.method.aggregate(
            self._spool, record.weights, last.state, self.clients, self._mean_of(number)
        )
        _finite(state)
        if done is not None:
            done(record)
        after = replace(
            last,
            state=state,
            last_accepted={**last.last_accepted, **dict.fromkeys(counts, number)},
            trunks={**last.trunks, **dict.fromkeys(counts, number - 1)},
            rejections=copy.deepcopy(self.guard.rejections),
            accepted={name: digests[name] for name in record.accepted},
        )
        self._checkpoints.save(after)
        self._last = after
        self._spool.clear()
        return record

    def _mean_of(self, number: int) -> Mean:
        if self.privacy is None:
            return self._mean
        return self.privacy.mean(self.options.fraction * len(self.clients), number)

    def _collect(
        self, exchange: Exchange, record: RoundRecord, measure: bool
    ) -> tuple[dict[str, int], dict[str, str], dict[str, float]]:
        """Client -> claimed examples, digest and norm of each upload that passed its checks."""
        last, number, seen = self._last, record.round, set[str]()
        asked = []
        for name in record.selected:
            if self.guard.quarantined(name):
                self._note(record, self.guard.quarantine(name))
            else:
                asked.append(name)
        sent: dict[str, tuple[int, int]] = {}

        def order(name: str) -> bytes:
            header, down = self.order("train", name, measure)
            data = header.pack(down)
            sent[name] = (_bytes(down), len(data))
            return data

        expected = Round(
            self.options.run,
            number,
            self.method,
            {name: self.clients[name] for name in asked},
            {name: last.last_accepted.get(name, 0) for name in asked},
            self.options.dtype,
            self._frozen,
            seen,
        )
        size, cohort = DTYPES[self.options.dtype].itemsize, [self.clients[c] for c in last.accepted]
        claimed: dict[str, int] = {}
        digests: dict[str, str] = {}
        sizes: dict[str, float] = {}
        answered = set[str]()
        for name, data in exchange(_Orders(asked, order)):
            reply = _read(name, data)
            if name not in answered:
                answered.add(name)
                self.progress(number, len(answered), len(asked), name)
            if reply.failed:
                if name not in seen:  # nothing accepted is lost to a second, failed reply
                    record.failed[name] = reply.failed
                continue
            try:
                upload = unpack(reply.upload, expected, name)
            except Rejected as rejected:
                self._note(record, rejected)
                up = 0
            else:
                seen.add(name)
                record.failed.pop(name, None)
                self._spool.add(name, reply.upload)
                claimed[name], digests[name] = upload.header.n_examples, upload.sha256
                sizes[name] = self.method.size(
                    upload.tensors, self.clients[name], last.state.tensors
                )
                record.metrics[name] = _numbers(reply.metrics)
                if measure and reply.held_out:
                    record.held_out[name] = _held_out(reply.held_out)
                record.seconds[name] = reply.seconds
                up = _bytes(upload.tensors)
            if name in sent and name not in record.traffic:
                client, (down, frame) = self.clients[name], sent[name]
                record.traffic[name] = Traffic(
                    up,
                    size * self.method.numbers_up(client),
                    len(reply.upload),
                    down,
                    4 * self.method.numbers_down(client, cohort),
                    frame,
                )
        for name in set(asked) - answered:
            record.failed[name] = "no reply"
        return claimed, digests, sizes

    def _compare(self, record: RoundRecord) -> dict[str, float]:
        """Reject what the others oppose; returns client -> its vote, where that is below 1."""
        if not self._compares or len(self._spool) < MANY:
            return {}
        rejections, votes = self.guard.judge(
            agreement(self._spool, self.method, self._last.state, self.clients)
        )
        self._drop(record, rejections)
        return votes

    def _drop(self, record: RoundRecord, rejections: Mapping[str, Rejected]) -> None:
        for name, rejected in rejections.items():
            self._note(record, rejected)
            self._spool.drop(name)
            record.held_out.pop(name, None)  # of an update that is not accepted

    def _note(self, record: RoundRecord, rejected: Rejected) -> None:
        self.guard.count(rejected)
        record.rejected.append((rejected.client, rejected.reason.value, str(rejected)))

    def _require(self, record: RoundRecord) -> None:
        try:
            self.guard.require(self._spool, record.round)
        except TooFewUpdates as error:
            listed = [f"{name} failed: {text}" for name, text in record.failed.items()]
            listed += [text for _, _, text in record.rejected]
            raise TooFewUpdates("\n  ".join([str(error), *listed])) from None


class _Orders(Mapping[str, bytes]):
    """Client -> order, built on access: one in memory at a time."""

    def __init__(self, clients: Sequence[str], make: Callable[[str], bytes]) -> None:
        self.clients, self.make = clients, make

    def __getitem__(self, client: str) -> bytes:
        return self.make(client)

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


def _read(client: str, data: bytes) -> Reply:
    try:
        return Reply.unpack(data)
    except CorruptFrame as error:
        return Reply(client, failed=str(error))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the metrics that a client reports, as far as a record takes them."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and abs(value) <= sys.float_info.max:  # no NaN either
            if len(numbers) == _METRICS:
                break
            numbers[plain(name, _NAME)] = value
    return numbers


def _held_out(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers among a client's held-out metrics, or why there are none.

    If one model is measured on the rows of several clients, their numbers are under `clients`.
    """
    if metrics.get("failed"):
        return {"failed": plain(str(metrics["failed"]))}
    apart = metrics.get("clients")
    if isinstance(apart, Mapping):
        by_client = {plain(name, _NAME): x for name, x in apart.items() if isinstance(x, Mapping)}
        return {"clients": {name: _numbers(x) for name, x in by_client.items()}}
    return _numbers(metrics)


def _in_order(record: RoundRecord) -> None:
    """Sort by the names of the clients, so that the order of the replies does not matter."""
    record.rejected.sort(key=lambda row: row[0])
    for name in ("metrics", "held_out", "failed", "traffic", "seconds"):
        setattr(record, name, dict(sorted(getattr(record, name).items())))


def _bytes(tensors: StateDict) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _finite(state: State) -> None:
    for key, x in state.tensors.items():
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"round {state.round}: the aggregate of {key} has NaN or infinite values, though "
                "no update had. Lower guard.max_norm_ratio."
            )
