"""Federated fine-tuning in one process: one base model, adapters swapped, client after client.

    round t:  select -> for each client: put its start into the model, train, encode
              -> decode, check, guard -> aggregate -> checkpoint

Payloads are encoded and decoded as if they travelled, so what is measured is what a network would
carry. Clients of one adapter config share a model; models share the frozen weights of the base.
Everything random is keyed by (seed, round, client), so a round that is run again gives the same
bits, and a resumed run those of one that was never stopped (on the CPU, with the same libraries).

Limits: one process, no time-outs; the accepted uploads of a round are in memory. Each round starts
a new optimizer. Downloads are fp32, whatever the dtype of the uploads. No differential privacy.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from plait.core.init import seeded
from plait.federated import adapter as adapters
from plait.federated.adapter import StateDict
from plait.federated.guard import Guard, GuardOptions, TooFewUpdates
from plait.federated.methods import (
    Algorithm,
    Client,
    FedEx,
    FedIt,
    State,
    aggregation_error,
    weights_of,
)
from plait.federated.partition import select
from plait.federated.payload import (
    DTYPES,
    Header,
    Reason,
    Rejected,
    Round,
    Upload,
    check_name,
    pack,
    pack_tensors,
    rank_of,
    unpack,
    unpack_tensors,
)
from plait.federated.state import Checkpoint, Checkpoints, ClientStore, config_hash

_TRUNK = "trunk:"  # before the keys of a client's trunk among its private tensors


@dataclass(frozen=True)
class Trained:
    """What a client says of its local training.

    examples: training examples, its weight in the mean. metrics: such as the mean loss.
    """

    examples: int
    metrics: dict[str, float] = field(default_factory=dict)


Train = Callable[[nn.Module, str, int], Trained]  # (model, client, round)
Deliver = Callable[[str, int, bytes], Sequence[bytes]]  # (client, round, upload)
Progress = Callable[[int, int, int, str], None]  # (round, clients done, clients in all, client)


@dataclass(frozen=True)
class LocalOptions:
    """Options of a run in one process.

    run: its name. rounds: of the whole run. fraction: share of the clients in a round. seed: of
    the selection and of what is random in training. dtype: of the uploads. guard: see there.
    keep: server checkpoints.
    """

    run: str = "run"
    rounds: int = 10
    fraction: float = 1.0
    seed: int = 0
    dtype: str = "fp32"
    guard: GuardOptions = field(default_factory=GuardOptions)
    keep: int = 2

    def __post_init__(self) -> None:
        check_name("run", self.run)
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}. Give 1 or more.")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"sampling.fraction = {self.fraction}. Give a share above 0 and up to 1."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} is none of {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round.

    up, down: of the tensors, as sent. up_formula, down_formula: by the method's formula, for a
    client of the last round. up_frame, down_frame: with digests, headers and names.
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
    weights: client -> w_i. capped: clients whose claimed examples were cut by the guard. rejected:
    (client, reason, text), in the order of the clients. failed: client -> its exception.
    traffic: client -> bytes. aggregation_error: layer -> of fedit's mean, where A and B are sent
    with one rank.
    """

    round: int
    selected: list[str]
    accepted: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    capped: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    aggregation_error: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Kind:
    """Clients of one adapter config: their model, its first state, and what it declares."""

    model: nn.Module
    first: StateDict
    client: Client


class Federation:
    """A federated run in one process; `step` runs a round, `run` all that are left.

    Args:
        base: the base model. It is shared and frozen; its weights do not change.
        configs: client -> peft config of its adapter.
        method: of `plait.federated.algorithm`.
        train: a client's local training, on the model it is given; see `LocalTraining`. What it
            raises is a failure of that client and not of the run.
        folder: for the checkpoints and the clients' private states.
        options: see LocalOptions.
        facts: what else decides the result, such as the data; a resumed run must have the same.
        resume: go on from the newest checkpoint; from the start where there is none.
        deliver: what arrives of an upload; for tests of faults. None: the upload, once.
        progress: called after each client.

    Raises:
        ValueError: clients or adapters that the method cannot serve, a checkpoint that is there
            without `resume`, or one of another config.
    """

    def __init__(
        self,
        base: nn.Module,
        configs: Mapping[str, PeftConfig],
        method: Algorithm,
        train: Train,
        folder: str | Path,
        options: LocalOptions | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
        deliver: Deliver | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.method, self.train, self.options = method, train, options or LocalOptions()
        self.folder = Path(folder)
        self.deliver = deliver or (lambda client, round, data: [data])
        self.progress = progress
        self.mean = self.options.guard.mean(method)
        described = {name: _described(config) for name, config in sorted(configs.items())}
        self._kinds: dict[str, _Kind] = {}
        self._of: dict[str, _Kind] = {}
        self.clients: dict[str, Client] = {}
        for name, text in described.items():
            check_name("client", name)
            if text not in self._kinds:
                self._kinds[text] = self._kind(base, configs[name])
            self._of[name] = self._kinds[text]
            self.clients[name] = replace(self._of[name].client, id=name)
        method.check(self.clients)
        own = {k: v for k, v in asdict(self.options).items() if k not in ("rounds", "keep")}
        self._config = config_hash(
            {"method": [method.key, asdict(method)], "options": own, "clients": described}
            | {"facts": dict(facts or {})}
        )
        widest = self._of[max(self.clients, key=lambda c: (rank_of(self.clients[c]), c))]
        self._checkpoints = Checkpoints(self.folder / "server", self.options.keep)
        self.frozen = method.fingerprint(widest.first)
        found = self._checkpoints.latest(self._config)
        if found is not None and not resume:
            raise ValueError(
                f"{self._checkpoints.folder}: holds round {found.state.round} of a run. Resume it, "
                "or use another folder."
            )
        self._last = found or Checkpoint(
            self.options.run, method.key, self._config, method.start(widest.first, widest.client)
        )
        self.guard = Guard(self.options.guard, copy.deepcopy(self._last.rejections))

    def _kind(self, base: nn.Module, config: PeftConfig) -> _Kind:
        # The copy has its own modules and the base's own parameters: W0 is in memory once.
        own = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        wanted = copy.deepcopy(config)
        if isinstance(wanted, LoraConfig) and wanted.init_lora_weights is not True:
            raise ValueError(
                f"federated: init_lora_weights = {wanted.init_lora_weights!r}: clients start at "
                "draws keyed by the method's seed. Use True."
            )
        model: Any = get_peft_model(own, wanted)  # type: ignore[arg-type]
        if any(p.requires_grad for p in base.parameters()):
            raise ValueError(
                "federated: the adapter trains a weight of the base model (bias), and clients "
                "share it. Set bias = 'none', or name its module in modules_to_save."
            )
        self.method.check_model(model)
        adapters.freeze(model, self.method.frozen)
        first = adapters.read(model)
        if isinstance(wanted, LoraConfig):  # upstream draws from the global generator
            first |= adapters.drawn(model, (self.method.seed, 0))
        return _Kind(model, first, Client.of("", model))

    # What it knows ------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Completed rounds."""
        return self._last.state.round

    @property
    def state(self) -> State:
        """The server's state of the method."""
        return self._last.state

    def model_of(self, client: str) -> nn.Module:
        """A client's model as it would start the next round; valid until the next call or step.

        For `private_policy` "reset" and "redraw" that is with the private part started anew.
        """
        model, _, _ = self._put(client)
        return model.eval()

    # A round ------------------------------------------------------------------------------------

    def run(self, done: Callable[[RoundRecord], None] | None = None) -> None:
        """All rounds that are left.

        Args:
            done: see `step`.

        Raises:
            TooFewUpdates: see `step`.
        """
        while self.round < self.options.rounds:
            self.step(done)

    def step(self, done: Callable[[RoundRecord], None] | None = None) -> RoundRecord:
        """One round.

        Args:
            done: called with the record before the checkpoint is written: after a crash in between
                the round is run again, to the same record.

        Raises:
            TooFewUpdates: fewer accepted updates than guard.min_updates; the state stays.
            FloatingPointError: the aggregate is not finite; the state stays.
        """
        number, last = self.round + 1, self._last
        # From the checkpoint: a round that failed and is run again counts once.
        self.guard = Guard(self.options.guard, copy.deepcopy(last.rejections))
        names = select(list(self.clients), self.options.fraction, self.options.seed, number)
        record, seen = RoundRecord(number, names), set[str]()
        expected = Round(
            self.options.run,
            number,
            self.method,
            {name: self.clients[name] for name in names},
            {name: last.last_accepted.get(name, 0) for name in names},
            self.options.dtype,
            self.frozen,
            seen,
        )
        uploads: dict[str, StateDict] = {}
        claimed, digests = {}, {}
        for index, name in enumerate(names, 1):
            for upload in self._answers(name, expected, record):
                seen.add(name)
                uploads[name], digests[name] = upload.tensors, upload.sha256
                claimed[name] = upload.header.n_examples
            if self.progress is not None:
                self.progress(number, index, len(names), name)
        sizes = {
            name: self.method.size(uploads[name], self.clients[name], last.state.tensors)
            for name in uploads
        }
        for name, rejected in self.guard.screen(sizes).items():
            self._note(record, rejected)
            del uploads[name], claimed[name]
        self._require(record, uploads)
        counts = self.guard.counts(claimed)
        record.accepted = sorted(uploads)
        record.capped = [name for name in record.accepted if counts[name] < claimed[name]]
        record.weights = weights_of(counts)
        record.aggregation_error = self._aggregation_error(uploads, record.weights)
        state = self.method.aggregate(uploads, record.weights, last.state, self.clients, self.mean)
        _finite(state)
        if done is not None:
            done(record)
        after = replace(
            last,
            state=state,
            last_accepted={**last.last_accepted, **dict.fromkeys(uploads, number)},
            trunks={**last.trunks, **dict.fromkeys(uploads, number - 1)},
            rejections=copy.deepcopy(self.guard.rejections),
            accepted={name: digests[name] for name in record.accepted},
        )
        self._checkpoints.save(after)
        self._last = after
        return record

    def _answers(self, name: str, expected: Round, record: RoundRecord) -> Iterator[Upload]:
        """Train a client; what it sent and passed the checks. All else is noted."""
        if self.guard.quarantined(name):
            text = f"rejected {self.guard.options.quarantine_after} times or more in this run"
            self._note(record, Rejected(Reason.QUARANTINED, name, text))
            return
        try:
            data = self._client(name, expected.number, record)
        except Exception as error:
            record.failed[name] = f"{type(error).__name__}: {error}"
            return
        for sent in self.deliver(name, expected.number, data):
            try:
                upload = unpack(sent, expected, name)
            except Rejected as rejected:
                self._note(record, rejected)
            else:
                yield upload

    def _note(self, record: RoundRecord, rejected: Rejected) -> None:
        self.guard.count(rejected)
        record.rejected.append((rejected.client, rejected.reason.value, str(rejected)))

    def _require(self, record: RoundRecord, uploads: Mapping[str, StateDict]) -> None:
        try:
            self.guard.require(uploads, record.round)
        except TooFewUpdates as error:
            listed = [f"{name} failed: {text}" for name, text in record.failed.items()]
            listed += [text for _, _, text in record.rejected]
            raise TooFewUpdates("\n  ".join([str(error), *listed])) from None

    def _aggregation_error(
        self, uploads: Mapping[str, StateDict], weights: Mapping[str, float]
    ) -> dict[str, float]:
        if not isinstance(self.method, FedIt | FedEx):
            return {}
        return aggregation_error(uploads, weights, self.clients)

    # A client -----------------------------------------------------------------------------------

    def _store(self, client: str) -> ClientStore:
        return ClientStore(self.folder / "clients", self.options.run, client)

    def _first(self, client: str) -> StateDict:
        kind = self._of[client]
        if self.method.init == "common":
            return kind.first
        return kind.first | adapters.drawn(kind.model, (self.method.seed, 0, client))

    def _put(self, client: str) -> tuple[nn.Module, StateDict, tuple[int, int]]:
        """The model at a client's start, the client's trunk, and bytes down (tensors, frame)."""
        kind, last, declared = self._of[client], self._last, self.clients[client]
        saved = self._store(client).load(last.last_accepted.get(client, 0))
        kept, trunk = None, {}
        if saved is not None:
            kept = {k: x for k, x in saved.items() if not k.startswith(_TRUNK)}
            trunk = {k[len(_TRUNK) :]: x for k, x in saved.items() if k.startswith(_TRUNK)}
        down = self.method.payload_down(last.state, declared, last.trunks.get(client, 0))
        header = {"run": self.options.run, "round": self.round + 1, "client": client}
        frame = pack_tensors(header, down)
        received = unpack_tensors(frame)[1]
        trunk = self.method.apply(
            kind.model,
            received,
            declared,
            round=self.round + 1,
            first=self._first(client),
            kept=kept,
            trunk=trunk,
        )
        kind.model.zero_grad(set_to_none=True)
        return kind.model, trunk, (_bytes(received), len(frame))

    def _client(self, name: str, number: int, record: RoundRecord) -> bytes:
        """Train a client; its upload."""
        declared = self.clients[name]
        model, trunk, (down, down_frame) = self._put(name)
        model.train()
        with keyed_randomness(self.options.seed, "train", number, name):
            trained = self.train(model, name, number)
        local = adapters.read(model)
        private = self.method.private(local, declared)
        kept = private | {f"{_TRUNK}{key}": x for key, x in trunk.items()}
        self._store(name).save(number, kept)  # before the answer
        up = self.method.payload_up(local, declared)
        header = Header(
            self.method.key,
            self.options.run,
            number,
            name,
            self._last.last_accepted.get(name, 0),
            rank_of(declared),
            self.options.dtype,
            trained.examples,
            self.method.fingerprint(local),
        )
        data = pack(header, up)
        size = DTYPES[self.options.dtype].itemsize
        cohort = [self.clients[c] for c in self._last.accepted]
        record.metrics[name] = dict(trained.metrics)
        record.traffic[name] = Traffic(
            size * sum(x.numel() for x in up.values()),
            size * self.method.numbers_up(declared),
            len(data),
            down,
            4 * self.method.numbers_down(declared, cohort),
            down_frame,
        )
        return data


def _described(config: PeftConfig) -> str:
    """A peft config as text; equal configs give equal texts."""

    def plain(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)

    return json.dumps({**config.to_dict(), "class": type(config).__name__}, sort_keys=True,
                      default=plain)  # fmt: skip


def _bytes(tensors: StateDict) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _finite(state: State) -> None:
    for key, x in state.tensors.items():
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"round {state.round}: the aggregate of {key} has NaN or infinite values, though "
                "no update had. Lower guard.max_norm_ratio."
            )


@contextmanager
def keyed_randomness(*key: object) -> Iterator[None]:
    """The global generators, as dropout uses them, at a state of their own; put back after."""
    gen = seeded(*key)
    with torch.random.fork_rng():
        torch.set_rng_state(gen.get_state())
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(gen.initial_seed())
        yield


# Local training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalTraining:
    """A client's local training: AdamW, new in each round, on the loss that the model returns.

    Attributes:
        rows: client -> its examples.
        collate: makes a batch, the model's keywords, from a list of examples.
        steps: optimizer steps in a round; or
        epochs: passes over the client's rows in a round.
        batch_size: in examples. learning_rate, weight_decay: AdamW's. max_grad_norm: 0: none.
        seed: of the order of the rows, keyed by round and client.
    """

    rows: Mapping[str, Sequence[Any]]
    collate: Callable[[list[Any]], Mapping[str, Tensor]]
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"local: steps = {self.steps}, epochs = {self.epochs}. Give one of them."
            )
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"local.{name} = {value}. Give 1 or more.")

    def steps_of(self, client: str) -> int:
        """Optimizer steps of a client in a round."""
        per_epoch = math.ceil(len(self.rows[client]) / self.batch_size)
        return self.steps or (self.epochs or 0) * per_epoch

    def __call__(self, model: nn.Module, client: str, round: int) -> Trained:
        """Train; the weight is the number of the client's rows.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        device = next(model.parameters()).device
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        total, steps = 0.0, self.steps_of(client)
        for _, batch in zip(range(steps), self._batches(client, round), strict=False):
            loss = model(**{key: x.to(device) for key, x in batch.items()}).loss
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value}. Lower local.learning_rate, or look at the rows."
                )
            loss.backward()
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            total += value
        return Trained(len(self.rows[client]), {"loss": total / steps, "steps": steps})

    def _batches(self, client: str, round: int) -> Iterator[Mapping[str, Tensor]]:
        """Batches without end, each pass in an order of its own."""
        rows, gen = self.rows[client], seeded(self.seed, "rows", round, client)
        while True:
            order = torch.randperm(len(rows), generator=gen).tolist()
            for start in range(0, len(order), self.batch_size):
                yield self.collate([rows[i] for i in order[start : start + self.batch_size]])
