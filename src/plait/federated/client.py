"""The clients' side: adapters on one base model, private states, local training, answers.

    order  ->  put the round's start into the model  ->  train  ->  store what is private
           ->  measure, if the order asks for it  ->  reply

A `Roster` holds the models: clients with the same adapter config share a model whose adapter is
swapped, and all models share the frozen weights of the base. A `Site` answers for all clients of a
machine, or for one. Everything random is keyed by (seed, round, client), so an order that is
answered twice gives the same bits (on the CPU, with the same libraries and number of threads).

Limits: each round starts a new optimizer. A site answers one order at a time.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from plait.core.bridge import keep_masters
from plait.core.init import seeded
from plait.federated import adapter as adapters
from plait.federated.adapter import StateDict
from plait.federated.methods import Algorithm, Client, State
from plait.federated.payload import Header, check_name, pack, rank_of
from plait.federated.protocol import Order, Reply
from plait.federated.state import ClientStore, config_hash
from plait.options import check_options, option

_TRUNK = "trunk:"  # before the keys of a client's trunk among its private tensors


@dataclass(frozen=True)
class Trained:
    """What a client reports of its local training.

    examples: number of training examples, its weight in the mean. metrics: such as the mean loss.
    """

    examples: int
    metrics: dict[str, float] = field(default_factory=dict)


Train = Callable[[nn.Module, str, int], Trained]  # (model, client, round)
Evaluate = Callable[[nn.Module, str], Mapping[str, Any]]  # (model, client) -> metrics


@dataclass
class _Kind:
    """Clients with the same adapter config: their model, its first state, what it declares."""

    model: nn.Module
    first: StateDict
    client: Client


class Roster:
    """The clients of a run, and a model for each of their adapter configs.

    Args:
        base: the base model. It is shared and frozen; its weights do not change.
        configs: client -> peft config of its adapter.
        method: of `plait.federated.algorithm`.

    Raises:
        ValueError: the method cannot federate an adapter, or a name cannot name a file.
    """

    def __init__(
        self, base: nn.Module, configs: Mapping[str, PeftConfig], method: Algorithm
    ) -> None:
        self.method = method
        self.described = {name: _described(config) for name, config in sorted(configs.items())}
        self._kinds: dict[str, _Kind] = {}
        self._of: dict[str, _Kind] = {}
        self.clients: dict[str, Client] = {}
        for name, text in self.described.items():
            check_name("client", name)
            if text not in self._kinds:
                self._kinds[text] = self._kind(base, configs[name])
            self._of[name] = self._kinds[text]
            self.clients[name] = replace(self._of[name].client, id=name)
        method.check_configs(configs)

    def _kind(self, base: nn.Module, config: PeftConfig) -> _Kind:
        # The copy has its own modules and the base's own parameters: W0 is in memory once.
        copied = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        adapter = copy.deepcopy(config)
        if isinstance(adapter, LoraConfig) and adapter.init_lora_weights is not True:
            raise ValueError(
                f"federated: init_lora_weights = {adapter.init_lora_weights!r}: clients start at "
                "draws keyed by the method's seed. Use True."
            )
        model: Any = get_peft_model(copied, adapter)  # type: ignore[arg-type]
        if any(p.requires_grad for p in base.parameters()):
            raise ValueError(
                "federated: the adapter trains a weight of the base model (bias), and clients "
                "share it. Set bias = 'none', or name its module in modules_to_save."
            )
        keep_masters(model)
        self.method.check_model(model)
        adapters.freeze(model, self.method.frozen)
        first = adapters.read(model)
        if isinstance(adapter, LoraConfig):  # upstream draws from the global generator
            first |= adapters.drawn(model, (self.method.seed, 0))
        return _Kind(model, first, Client.of("", model))

    def model(self, client: str) -> nn.Module:
        """The model that a client shares with all others that have its config."""
        return self._of[client].model

    def first(self, client: str) -> StateDict:
        """A client's whole local state before round 1."""
        kind = self._of[client]
        if self.method.init == "common":
            return kind.first
        return kind.first | adapters.drawn(kind.model, (self.method.seed, 0, client))

    def digest(self, client: str) -> str:
        """Of the method and of a client's adapter config."""
        method = [self.method.key, asdict(self.method)]
        return config_hash({"method": method, "adapter": self.described[client]})

    def start(self) -> tuple[State, str]:
        """The server's state before round 1, of the largest rank, and the frozen fingerprint.

        Raises:
            ValueError: clients that the method cannot serve together.
        """
        self.method.check(self.clients)
        widest = max(self.clients, key=lambda c: (rank_of(self.clients[c]), c))
        kind = self._of[widest]
        return self.method.start(kind.first, kind.client), self.method.fingerprint(kind.first)


class Site:
    """Answers the orders for the clients of a roster; `answer` is an `Answer` of `protocol`.

    Args:
        roster: the clients.
        train: a client's local training of the model; see `LocalTraining`. Its exceptions become
            failed replies of that client.
        folder: of the private states.
        run: the name of the run. seed: of randomness in training.
        evaluate: measures a client's model; it changes no weight and draws no random number. None:
            orders to evaluate fail.
    """

    def __init__(
        self,
        roster: Roster,
        train: Train,
        folder: str | Path,
        *,
        run: str = "run",
        seed: int = 0,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.roster, self.train, self.evaluate = roster, train, evaluate
        self.folder, self.run, self.seed = Path(folder), check_name("run", run), seed

    def answer(self, order: bytes) -> bytes:
        """Carry out an order; every fault becomes a reply that reports it."""
        started, name = time.monotonic(), ""
        try:
            asked, down = Order.unpack(order)
            name = asked.client
            if asked.kind == "hello":
                name, *others = self.roster.clients
                reply = Reply(name, metrics={"clients": [name, *others]})
            elif asked.kind == "evaluate":
                reply = Reply(name, metrics=self._evaluate(asked, down))
            else:
                reply = self._train(asked, down)
        except Exception as error:
            reply = Reply(name, failed=_describe(error))
        return replace(reply, seconds=time.monotonic() - started).pack()

    def put(self, order: Order, down: StateDict) -> tuple[nn.Module, StateDict]:
        """Put a client's start of a round into its model.

        Returns:
            The model, valid until the next call, and the client's trunk.

        Raises:
            ValueError: the order is for another run, another config or an unknown client.
            StateError: the generation that it names is missing or damaged.
        """
        name, roster = order.client, self.roster
        if order.run != self.run or name not in roster.clients:
            raise ValueError(
                f"the order is for client {name!r} of run {order.run!r}; here are "
                f"{', '.join(roster.clients)} of run {self.run!r}. Give both sides one config."
            )
        if order.config != roster.digest(name):
            raise ValueError(
                f"client {name!r} has another method or adapter than the server. Give both sides "
                "one config."
            )
        saved = self._store(name).load(order.generation)
        kept, trunk = None, {}
        if saved is not None:
            kept = {k: x for k, x in saved.items() if not k.startswith(_TRUNK)}
            trunk = {k[len(_TRUNK) :]: x for k, x in saved.items() if k.startswith(_TRUNK)}
        model = roster.model(name)
        trunk = roster.method.apply(
            model,
            down,
            roster.clients[name],
            round=order.round,
            first=roster.first(name),
            kept=kept,
            trunk=trunk,
        )
        model.zero_grad(set_to_none=True)
        return model, trunk

    def stored(self, client: str, round: int) -> StateDict:
        """What a client stored after a round: its private part, without its trunk."""
        return stored(self.folder, self.run, client, round)

    def _store(self, client: str) -> ClientStore:
        return ClientStore(self.folder, self.run, client)

    def _evaluate(self, order: Order, down: StateDict) -> dict[str, Any]:
        model, _ = self.put(order, down)
        return self._measured(model, order.client)

    def _measured(self, model: nn.Module, client: str) -> dict[str, Any]:
        if self.evaluate is None:
            raise ValueError("this site has nothing to evaluate with. Give Site(evaluate=..).")
        return dict(self.evaluate(model.eval(), client))

    def _train(self, order: Order, down: StateDict) -> Reply:
        name, method = order.client, self.roster.method
        model, trunk = self.put(order, down)
        model.train()
        with keyed_randomness(self.seed, "train", order.round, name):
            trained = self.train(model, name, order.round)
        local, declared = adapters.read(model), self.roster.clients[name]
        private = method.private(local, declared)
        for key, x in private.items():  # the server cannot see them, and every round starts there
            if not torch.isfinite(x).all():
                raise FloatingPointError(
                    f"{key}, which stays on the client, has NaN or infinite values after training. "
                    "Lower local.learning_rate, or look at the rows."
                )
        kept = private | {f"{_TRUNK}{k}": x for k, x in trunk.items()}
        self._store(name).save(order.round, kept)  # before the answer
        header = Header(
            method.key,
            self.run,
            order.round,
            name,
            order.generation,
            rank_of(declared),
            order.dtype,
            trained.examples,
            method.fingerprint(local),
        )
        upload = pack(header, method.payload_up(local, declared))
        held_out: dict[str, Any] = {}
        if order.measure:  # the upload is packed: measuring cannot change it
            try:
                held_out = self._measured(model, name)
            except Exception as error:
                held_out = {"failed": _describe(error)}
        return Reply(name, upload, dict(trained.metrics), held_out)


def stored(folder: str | Path, run: str, client: str, round: int) -> StateDict:
    """What a client stored after a round: its private part, without its trunk.

    Args:
        folder: of the private states. run, client: names. round: 1, 2, ...

    Raises:
        StateError: it is missing or damaged.
    """
    saved = ClientStore(folder, run, client).read(round)
    return {k: x for k, x in saved.items() if not k.startswith(_TRUNK)}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _described(config: PeftConfig) -> str:
    """A peft config as text; equal configs give equal texts."""

    def plain(value: Any) -> Any:
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)

    return json.dumps({**config.to_dict(), "class": type(config).__name__}, sort_keys=True,
                      default=plain)  # fmt: skip


@contextmanager
def keyed_randomness(*key: object) -> Iterator[None]:
    """Seed the global generators, which dropout uses, by a key; restore them afterwards."""
    gen = seeded(*key)
    with torch.random.fork_rng():
        torch.set_rng_state(gen.get_state())
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(gen.initial_seed())
        yield


# Local training ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """Options of a client's local training."""

    steps: int | None = option(None, "Optimizer steps in a round; or give epochs.", least=1)
    epochs: int | None = option(
        None, "Passes over the client's rows in a round; or give steps.", least=1
    )
    batch_size: int = option(8, "Examples in a batch.", least=1)
    learning_rate: float = option(1e-3, "AdamW's learning rate.", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay.", least=0)
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0: not clipped.", least=0
    )

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"local: steps = {self.steps}, epochs = {self.epochs}. Give one of them."
            )
        check_options(self, "local")


@dataclass(frozen=True)
class LocalTraining(LocalOptions):
    """A client's local training: AdamW, new in each round, on the loss that the model returns.

    Attributes:
        rows: client -> its examples.
        collate: makes a batch, the model's keywords, from a list of examples.
        seed: of the order of the rows, keyed by round and client.
    """

    rows: Mapping[str, Sequence[Any]]
    collate: Callable[[list[Any]], Mapping[str, Tensor]]
    seed: int = 0

    def steps_of(self, client: str) -> int:
        """Optimizer steps of a client in a round."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * math.ceil(len(self.rows[client]) / self.batch_size)

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
        """Endless batches; each pass over the rows has its own order."""
        rows, gen = self.rows[client], seeded(self.seed, "rows", round, client)
        while True:
            order = torch.randperm(len(rows), generator=gen).tolist()
            for start in range(0, len(order), self.batch_size):
                yield self.collate([rows[i] for i in order[start : start + self.batch_size]])
