"""The base of all federated methods: what travels, what stays, and a mean of each shared tensor."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from safetensors.torch import save
from torch import nn

from plait.federated import adapter as adapters
from plait.federated.adapter import Layer, StateDict, matches
from plait.federated.methods.updates import (
    Accepted,
    Change,
    Client,
    Mean,
    State,
    Updates,
    norm,
    product_norm,
    weighted_mean,
    wide,
)

Private = Literal["keep", "reset", "redraw"]
Head = Literal["shared", "private"]
Init = Literal["common", "per_client"]

ALGORITHMS: dict[str, type["Algorithm"]] = {}  # key -> class, of every subclass that has a key


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A federated method. By default it averages the parameters in `names`.

    A subclass with a key is known to config files under that key.

    Attributes:
        key: its name in configs. exact: whether the new common function is W0 + sum w_i D_i.
        names: of a layer's parameters that are sent.
        uses: the adapter's method it needs; "lora" is upstream's LoRA, "" any.
        ranks: whether clients may have different ranks. robust: whether another mean can replace
            the weighted one. frozen: patterns of what does not train.
        mean_of_factors: whether it averages A and B separately, so that the server reports how far
            the mean of the factors is from the mean of the products.
        private_policy: what happens to a client's private factors at the start of a round.
        head: whether what trains outside the adapted layers is averaged or stays private.
        init: whether redrawn factors are common to all clients or each client's own.
        seed: of all draws.
    """

    key: ClassVar[str]
    exact: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = ("A", "B")
    uses: ClassVar[str] = "lora"
    ranks: ClassVar[bool] = False
    robust: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ()
    mean_of_factors: ClassVar[bool] = False

    private_policy: Private = "keep"
    head: Head = "shared"
    init: Init = "common"
    seed: int = 0

    def __init_subclass__(cls) -> None:
        if "key" in vars(cls):
            ALGORITHMS[cls.key] = cls

    def __post_init__(self) -> None:
        for name, kind in (("private_policy", Private), ("init", Init), ("head", Head)):
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(
                    f"{self.key}: {name} = {value!r} is not known. Use one of {known}."
                )

    # What a method states ---------------------------------------------------------------------

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """Key -> shape of a client's upload: the named parameters of each layer, and the head."""
        shapes = {k: s for k, s in client.shapes.items() if k not in client.head}
        named = {k: s for k, s in shapes.items() if k.rpartition("/")[2] in self.names}
        return named | self.heads(client)

    def up(self, layer: Layer) -> int:
        """Numbers that a client sends for one layer: r in for A and r out for B, if sent."""
        sides = {"A": layer.in_features, "B": layer.out_features}
        return layer.r * sum(sides[name] for name in self.names)

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """Numbers that a client gets for one layer, by formula.

        Args:
            layer: the client's. cohort: this layer of the clients of the last round.
        """
        return self.up(layer)

    def start(self, first: StateDict, client: Client) -> State:
        """The server's state before round 1.

        Args:
            first: whole local state of a fresh adapter of the largest rank. client: whose it is.
        """
        return State(0, self.shared(first, client))

    def combine(self, accepted: Accepted, old: StateDict) -> StateDict:
        """The server's next tensors, from updates and its last ones; see `aggregate`."""
        return accepted.mean(accepted.updates, accepted.weights, old)

    def unchanged(self, old: StateDict) -> StateDict:
        """The server's next tensors after a round without updates."""
        return old

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """What a client gets at the start of the round after `state`.

        Args:
            state: the server's. client: the receiver.
            held: completed rounds that the client's trunk holds, for methods with one.
        """
        return dict(state.tensors)

    def pairs(self, client: Client) -> list[tuple[str, str, float]]:
        """Keys of A and B, and s, of uploads whose size is that of s B A, not of their change."""
        return []

    def renewed(self, round: int, kept: bool) -> tuple[str, ...]:
        """Names of factors that are redrawn at a round's start, whatever `private_policy` says.

        Args:
            round: the one that begins. kept: whether the client has a private part to continue.
        """
        return ()

    # What follows from it -----------------------------------------------------------------------

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """The server's next state, from the accepted updates.

        Args:
            updates: client id -> upload. weights: from `weights_of`, of the same clients.
            state: of the last round. clients: id -> what the config declares.
            mean: replaces the weighted mean where the method is `robust`.
        """
        if not len(updates):
            return State(state.round + 1, self.unchanged(state.tensors))
        accepted = Accepted(updates, weights, clients, mean)
        return State(state.round + 1, self.combine(accepted, state.tensors))

    def check(self, clients: Mapping[str, Client]) -> None:
        """Raise if the method cannot serve these clients.

        Raises:
            ValueError: no client, or ranks, scalings, layers or shapes that differ.
        """
        if not clients:
            raise ValueError(f"{self.key}: there is no client. Give one or more.")
        first = clients[min(clients)]
        for client in clients.values():
            if list(client.layers) != list(first.layers):
                raise ValueError(
                    f"{self.key}: clients {first.id!r} and {client.id!r} adapt different layers. "
                    "Give all the same target_modules."
                )
            for name, layer in client.layers.items():
                self._check_layer(name, layer, first.layers[name], client, first)
            heads = [{k: c.shapes[k] for k in c.head} for c in (first, client)]
            if heads[0] != heads[1]:
                raise ValueError(
                    f"{self.key}: clients {first.id!r} and {client.id!r} train different tensors "
                    f"outside the adapted layers ({heads[0]}, {heads[1]}). Give all the same head."
                )

    def _check_layer(
        self, name: str, layer: Layer, other: Layer, client: Client, first: Client
    ) -> None:
        if (layer.in_features, layer.out_features) != (other.in_features, other.out_features):
            raise ValueError(
                f"{self.key}: {name} has different sizes on clients {first.id!r} and "
                f"{client.id!r}. Give all the same base model."
            )
        if not self.ranks and (layer.r, layer.scaling) != (other.r, other.scaling):
            *most, last = [key for key, cls in ALGORITHMS.items() if cls.ranks and cls.uses]
            raise ValueError(
                f"{self.key}: {name} has r = {layer.r}, s = {layer.scaling:g} on client "
                f"{client.id!r} and r = {other.r}, s = {other.scaling:g} on {first.id!r}. It needs "
                f"one rank and scaling; {', '.join(most)} and {last} take different ranks."
            )

    def check_model(self, model: nn.Module, adapter: str = "default") -> None:
        """Raise if the method cannot federate this adapter.

        Raises:
            ValueError: with the reason.
        """
        config: Any = model.peft_config[adapter]  # type: ignore[index]
        reason = refusal(self, config)
        if reason:
            raise ValueError(reason)

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        """Raise if the method cannot serve these adapters together: client -> peft config.

        Raises:
            ValueError: with the reason.
        """

    def heads(self, client: Client) -> dict[str, tuple[int, ...]]:
        """Key -> shape of what is averaged outside the adapted layers."""
        keys = client.head if self.head == "shared" else ()
        return {key: client.shapes[key] for key in keys}

    def shared(self, state: StateDict, client: Client) -> StateDict:
        """The part of a local state that comes from the server."""
        return {key: state[key] for key in self.share(client)}

    def private(self, state: StateDict, client: Client) -> StateDict:
        """The part of a local state that stays on the client, with its buffers and counters."""
        shared = self.shared(state, client)
        return {k: x for k, x in state.items() if k not in shared and not matches(k, self.frozen)}

    def payload_up(self, state: StateDict, client: Client) -> StateDict:
        """What a client sends, from its local state after training."""
        return self.shared(state, client)

    def begin(
        self,
        down: StateDict,
        client: Client,
        round: int,
        first: StateDict,
        kept: StateDict | None,
        draw: Callable[[], StateDict],
    ) -> StateDict:
        """The whole local state that a round starts from.

        Args:
            down: from `payload_down`. client: the receiver. round: the one that begins, 1, 2, ...
            first: the client's state before round 1.
            kept: its private part after its last accepted round; None: never accepted.
            draw: gives a fresh start of the adapter.
        """
        state = dict(first)
        if self.private_policy == "keep" and kept is not None:
            # Without what the adapter has dropped since, such as averages of a finished schedule.
            private = self.private(first, client)
            state = {key: x for key, x in state.items() if key not in private} | kept
        if self.private_policy == "redraw":
            state |= self.private({**first, **draw()}, client)
        state |= {key: x for key, x in down.items() if key in state}
        renewed = self.renewed(round, kept is not None)
        return state | ({k: x for k, x in draw().items() if matches(k, renewed)} if renewed else {})

    def apply(
        self,
        model: nn.Module,
        down: StateDict,
        client: Client,
        *,
        round: int,
        first: StateDict,
        kept: StateDict | None = None,
        trunk: StateDict | None = None,
        adapter: str = "default",
    ) -> StateDict:
        """Put the start of a round into a model; returns the client's trunk.

        Args:
            model: wrapped with the client's config.
            down: from `payload_down`. client: the receiver. round: the one that begins, 1, 2, ...
            first, kept: as in `begin`. trunk: what the last call returned; None: nothing yet.
            adapter: its name.
        """
        key = (self.seed, round - 1, *((client.id,) if self.init == "per_client" else ()))
        state = self.begin(
            down, client, round, first, kept, lambda: adapters.drawn(model, key, adapter)
        )
        adapters.write(model, state, adapter)
        return self.set_trunk(model, trunk or {}, down, adapter)

    def set_trunk(
        self, model: nn.Module, trunk: StateDict, down: StateDict, adapter: str
    ) -> StateDict:
        """Put the client's trunk on the model, if the method has one."""
        return {}

    def fingerprint(self, state: StateDict) -> str:
        """SHA-256 of what is frozen and common, compared in every round; "" without any."""
        frozen = {k: x for k, x in state.items() if matches(k, self.frozen)}
        return hashlib.sha256(save(frozen)).hexdigest() if frozen else ""

    def numbers_up(self, client: Client) -> int:
        """Numbers that a client sends in a round, by formula."""
        heads = sum(map(math.prod, self.heads(client).values()))
        return sum(self.up(layer) for layer in client.layers.values()) + heads

    def numbers_down(self, client: Client, cohort: Iterable[Client] = ()) -> int:
        """Numbers that a client of the last round gets, by formula.

        Args:
            client: the receiver. cohort: the clients that were accepted in the last round.
        """
        cohort = list(cohort)
        heads = sum(map(math.prod, self.heads(client).values()))
        layers = client.layers.items()
        return heads + sum(self.down(x, [c.layers[name] for c in cohort]) for name, x in layers)

    def size(self, update: StateDict, client: Client, reference: StateDict) -> float:
        """Norm of an update, for the guard: of its change, or of what it adds.

        Args:
            update: the upload. client: its sender. reference: tensors of the server's state.
        """
        pairs = self.pairs(client)
        factors = {key for A, B, _ in pairs for key in (A, B)}
        rest = {k: x for k, x in update.items() if k not in factors}
        total = norm({k: x - reference[k] if k in reference else x for k, x in rest.items()}) ** 2
        for A, B, s in pairs:
            total += (s * product_norm(update[A], update[B])) ** 2
        return math.sqrt(total)

    def change(self, update: StateDict, client: Client, down: StateDict) -> Change:
        """What an update adds, in one form for all clients, whatever their ranks.

        Args:
            update: the upload. client: its sender.
            down: what it received, from `payload_down`. A tensor that is missing there started at
                zero, and so did the product of a pair.
        """
        pairs = self.pairs(client)
        factors = {key for A, B, _ in pairs for key in (A, B)}
        rest = {key: wide(x) for key, x in update.items() if key not in factors}
        tensors = {key: x - down[key] if key in down else x for key, x in rest.items()}
        products = {}
        for key_A, key_B, s in pairs:
            A, B = wide(update[key_A]), s * wide(update[key_B])
            if key_A in down and key_B in down:
                A = torch.cat([A, down[key_A].to(A)])
                B = torch.cat([B, -s * down[key_B].to(B)], dim=1)
            products[key_A.rpartition("/")[0]] = A, B
        return Change(tensors, products)


def refusal(algorithm: Algorithm, config: Any) -> str | None:
    """Why a federated method does not work with an adapter's config; None if it does.

    Args:
        algorithm: the method. config: peft's.
    """
    if algorithm.uses == "":
        return None
    key = getattr(config, "key", "") or str(config.peft_type.value).lower()
    reason = adapters.refusal(config)
    if reason is None and algorithm.uses not in ("any", key):
        reason = f"it needs the adapter {algorithm.uses}, not {key}"
        if algorithm.uses == "lora":
            reason += ". Use fedavg, which averages any parameters"
    return f"{algorithm.key}: {reason}." if reason else None
