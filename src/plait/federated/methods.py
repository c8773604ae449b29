"""Federated fine-tuning as pure functions on state dicts: what is shared, how it is averaged.

Client i of the accepted set holds A_i (r_i, in), B_i (out, r_i), D_i = s_i B_i A_i in each layer;
w_i = n_i / sum n, normalised in fp64. Sums run over clients in sorted id order with fp32
accumulators (fp64 of fp64), so the order of arrival changes no bit.

    fedit     A = sum w_i A_i,  B = sum w_i B_i                                not exact
    ffa       A = A0 frozen,    B = sum w_i B_i                                exact
    fedsa     A = sum w_i A_i,  B_i private       fedalora  B = sum w_i B_i,   A_i private
    fedavg    the same for any parameters, by name patterns `share` and `keep`
    fedalora_het   B_bar += sum w_i P_i,  P_i = B2_i B1_i (out, q);   A_i, M_i private
    zeropad   fedit on factors padded to the largest rank, client i gets its first r_i ranks
    hetlora   zeropad with weights ||B_i A_i||_F / sum_j ||B_j A_j||_F, per layer
    flexlora  SVD of D = sum w_i D_i; client i gets its best rank-r_i part
    flora     trunk += [B_1 | .. | B_K] [w_1 s_1 A_1; ..]; adapters start anew      exact
    fedex     fedit, and trunk += s sum w_i (B_i - B)(A_i - A)                 exact

Exact: the new common function is W0 + sum w_i D_i. The trunk is a frozen pair beside each layer,
W0 is never edited. Sources: fedit 2305.05644, ffa ICLR 2024, fedsa 2410.01463, fedalora
2509.25414, flora 2409.05976, hetlora 2401.06432, flexlora 2402.11505, fedex 2410.09432.

Limits: HetLoRA without its rank pruning. Ranks and scalings are those declared by the server's
config, never guessed from a shape. Tensors outside the adapted layers (a new head) are averaged by
w in every method, unless `head="private"`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from plait.core.config import did_you_mean
from plait.core.export import PlainUpdate, plain_factors, product_svd
from plait.core.init import kaiming, seeded
from plait.federated import adapter as adapters
from plait.federated.adapter import Layer, StateDict, matches

Private = Literal["keep", "reset", "redraw"]
Updates = Mapping[str, StateDict]  # client id -> payload; may load each payload when asked for it
# (updates, weights, reference) -> one payload; reference: what the clients started from.
Mean = Callable[[Updates, Mapping[str, float], StateDict], StateDict]


@dataclass(frozen=True)
class Client:
    """What the server's config declares of a client.

    id: its name. layers: adapted layers, in the order of the model. shapes: key -> shape of all
    that trains, as `adapter.trained` gives it.
    """

    id: str
    layers: Mapping[str, Layer]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, id: str, model: nn.Module, adapter: str = "default") -> "Client":
        """Read a client from a model that is wrapped with its config; a meta model will do."""
        return cls(id, adapters.layers_of(model, adapter), adapters.trained(model, adapter))

    @classmethod
    def lora(cls, id: str, layers: Mapping[str, Layer]) -> "Client":
        """A client with plain LoRA in each layer and nothing else that trains."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, x in layers.items():
            shapes |= {f"{name}/A": (x.r, x.in_features), f"{name}/B": (x.out_features, x.r)}
        return cls(id, layers, shapes)

    @property
    def head(self) -> tuple[str, ...]:
        """Keys of what trains outside the adapted layers."""
        return tuple(k for k in self.shapes if k.rpartition("/")[0] not in self.layers)


@dataclass(frozen=True)
class State:
    """What the server keeps of the method. round: completed rounds."""

    round: int = 0
    tensors: StateDict = field(default_factory=dict)


def weights_of(counts: Mapping[str, int]) -> dict[str, float]:
    """w_i = n_i / sum n in fp64, by sorted client id.

    Raises:
        ValueError: a count below 1, or no client.
    """
    for client, n in counts.items():
        if n < 1:
            raise ValueError(f"weights: client {client!r} has {n} examples. Leave it out.")
    if not counts:
        raise ValueError("weights: no client is left. Nothing can be averaged.")
    total = sum(counts.values())
    return {client: counts[client] / total for client in sorted(counts)}


def weighted_mean(
    updates: Updates, weights: Mapping[str, float], reference: StateDict
) -> StateDict:
    """sum w_i x_i of each tensor, one client at a time in id order; `reference` is not used."""
    total: StateDict = {}
    for client in sorted(updates):
        for key, x in updates[client].items():
            x = x.to(_wide(x))
            if key not in total:
                total[key] = torch.zeros_like(x)
            total[key].add_(x, alpha=weights[client])
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Mapped(Mapping[str, StateDict]):
    """Updates through a function of (client id, payload), computed when asked for."""

    def __init__(self, updates: Updates, function: Callable[[str, StateDict], StateDict]) -> None:
        self.updates, self.function = updates, function

    def __getitem__(self, client: str) -> StateDict:
        return self.function(client, self.updates[client])

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


# The base of all methods ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A federated method: five functions, and what it says of itself.

    Attributes:
        key: its name in configs. exact: whether the new common function is W0 + sum w_i D_i.
        uses: the adapter's method it needs; "lora" is upstream's LoRA, "" any.
        ranks: whether clients may have different ranks. robust: whether another mean can replace
            the weighted one. private: what a client's own factors do at a round's start.
        head: whether what trains outside the adapted layers is averaged or stays private.
        init: whether factors that are drawn anew are common to all clients or each client's own.
        seed: of all draws.
    """

    key: ClassVar[str]
    exact: ClassVar[str]
    uses: ClassVar[str] = "lora"
    ranks: ClassVar[bool] = False
    robust: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()  # patterns of what does not train

    private_policy: Private = "keep"
    head: Literal["shared", "private"] = "shared"
    init: Literal["common", "per_client"] = "common"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("private_policy", Private), ("init", _INIT), ("head", _HEAD)):
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(
                    f"{self.key}: {name} = {value!r} is not known. Use one of {known}."
                )

    # What a method states ---------------------------------------------------------------------

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """Key -> shape of a client's upload."""
        raise NotImplementedError

    def up(self, layer: Layer) -> int:
        """Numbers that a client sends for one layer, by formula."""
        raise NotImplementedError

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """Numbers that a client gets for one layer, by formula.

        Args:
            layer: the client's. cohort: this layer of the clients of the last round.
        """
        return self.up(layer)

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
        raise NotImplementedError

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """What a client needs at the start of the round after `state`.

        Args:
            state: the server's. client: the receiver.
            held: completed rounds that the client's trunk holds, for methods with one.
        """
        return {}

    # What follows from it -----------------------------------------------------------------------

    def check(self, clients: Mapping[str, Client]) -> None:
        """Refuse clients that the method cannot serve.

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
            raise ValueError(
                f"{self.key}: {name} has r = {layer.r}, s = {layer.scaling:g} on client "
                f"{client.id!r} and r = {other.r}, s = {other.scaling:g} on {first.id!r}. It needs "
                "one rank and scaling; flora, flexlora, zeropad, hetlora and fedalora_het take "
                "different ranks."
            )

    def check_model(self, model: nn.Module, adapter: str = "default") -> None:
        """Refuse an adapter that the method cannot federate.

        Raises:
            ValueError: with the reason.
        """
        config: Any = model.peft_config[adapter]  # type: ignore[index]
        reason = refusal(self, config)
        if reason:
            raise ValueError(reason)

    def start(self, first: StateDict, client: Client) -> State:
        """The server's state before round 1.

        Args:
            first: whole local state of a fresh adapter of the largest rank. client: whose it is.
        """
        return State(0, {key: first[key] for key in self.share(client)})

    def heads(self, client: Client) -> dict[str, tuple[int, ...]]:
        """Key -> shape of what is averaged outside the adapted layers."""
        keys = client.head if self.head == "shared" else ()
        return {key: client.shapes[key] for key in keys}

    def shared(self, state: StateDict, client: Client) -> StateDict:
        """The part of a local state that comes from the server."""
        return {key: state[key] for key in self.share(client)}

    def private(self, state: StateDict, client: Client) -> StateDict:
        """The part of a local state that stays on the client, with its buffers and counters."""
        given = self.shared(state, client)
        return {k: x for k, x in state.items() if k not in given and not matches(k, self.frozen)}

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
            own = self.private(first, client)
            state = {key: x for key, x in state.items() if key not in own} | kept
        if self.private_policy == "redraw":
            state |= self.private({**first, **draw()}, client)
        return state | {key: x for key, x in down.items() if key in state}

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
        """Put the client's trunk on the model, where the method has one."""
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
        return norm({k: x - reference[k] if k in reference else x for k, x in update.items()})


_INIT = Literal["common", "per_client"]
_HEAD = Literal["shared", "private"]


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all tensors together, in fp64."""
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors.values()))


def product_norm(A: Tensor, B: Tensor) -> float:
    """||B A||_F of A (r, in) and B (out, r), from two (r, r) matrices, in fp64."""
    A, B = A.double(), B.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def refusal(algorithm: Algorithm, config: Any) -> str | None:
    """Why a federated method does not work with an adapter's config; None where it does.

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


# No exchange ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Local(Algorithm):
    """Every client trains alone, for the same rounds and local steps: the lower reference."""

    key: ClassVar[str] = "local"
    exact: ClassVar[str] = "-"
    uses: ClassVar[str] = ""
    ranks: ClassVar[bool] = True

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """Nothing."""
        return {}

    def heads(self, client: Client) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def up(self, layer: Layer) -> int:
        """0."""
        return 0

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """One round more."""
        return State(state.round + 1)


@dataclass(frozen=True, kw_only=True)
class Central(Local):
    """One trainer on the pooled data, with as many examples seen: the upper reference."""

    key: ClassVar[str] = "central"


# Averages ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Average(Algorithm):
    """Shared tensors are averaged, the others stay: the ground of fedit, ffa, fedsa, fedalora."""

    robust: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]]  # shared parameters of a layer

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """The named parameters of each layer, and the head."""
        layers = {k: s for k, s in client.shapes.items() if k not in client.head}
        own = {k: s for k, s in layers.items() if k.rpartition("/")[2] in self.names}
        return own | self.heads(client)

    def up(self, layer: Layer) -> int:
        """r in for A and r out for B, of those that are shared."""
        sides = {"A": layer.in_features, "B": layer.out_features}
        return layer.r * sum(sides[name] for name in self.names)

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """The mean of each shared tensor; without updates the state stays."""
        tensors = mean(updates, weights, state.tensors) if len(updates) else state.tensors
        return State(state.round + 1, tensors)

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """All of the state."""
        return dict(state.tensors)


@dataclass(frozen=True, kw_only=True)
class FedIt(Average):
    """FedIT: A and B are averaged, each by itself."""

    key: ClassVar[str] = "fedit"
    exact: ClassVar[str] = "no"
    names: ClassVar[tuple[str, ...]] = ("A", "B")


@dataclass(frozen=True, kw_only=True)
class FfaLora(Average):
    """FFA-LoRA: A stays at its common start, B is averaged."""

    key: ClassVar[str] = "ffa"
    exact: ClassVar[str] = "yes"
    names: ClassVar[tuple[str, ...]] = ("B",)
    frozen: ClassVar[tuple[str, ...]] = ("A",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "common":
            raise ValueError(f"ffa: init = {self.init!r}: its frozen A is common. Use 'common'.")


@dataclass(frozen=True, kw_only=True)
class FedSaLora(Average):
    """FedSA-LoRA: A is averaged, B never leaves the client."""

    key: ClassVar[str] = "fedsa"
    exact: ClassVar[str] = "no common dW"
    names: ClassVar[tuple[str, ...]] = ("A",)


@dataclass(frozen=True, kw_only=True)
class FedALora(Average):
    """Fed-ALoRA for equal ranks: B is averaged, A never leaves the client."""

    key: ClassVar[str] = "fedalora"
    exact: ClassVar[str] = "no common dW"
    names: ClassVar[tuple[str, ...]] = ("B",)


@dataclass(frozen=True, kw_only=True)
class FedAvg(Average):
    """Any parameters of any adapter, by patterns of their names or keys.

    share: patterns of what is averaged; empty: all that `keep` does not name. keep: patterns of
    what stays private; empty: all that `share` does not name. A key that both or neither name is an
    error, as is a pattern that fits nothing.
    """

    key: ClassVar[str] = "fedavg"
    exact: ClassVar[str] = "no"
    uses: ClassVar[str] = "any"
    shared_names: tuple[str, ...] = ()
    private_names: tuple[str, ...] = ()

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """By the patterns."""
        keys = [k for k in client.shapes if k not in client.head or self.head == "shared"]
        wanted, kept = self.shared_names, self.private_names
        for pattern in (*wanted, *kept):
            if not any(matches(key, [pattern]) for key in client.shapes):
                names = sorted({key.rpartition("/")[2] for key in client.shapes})
                raise ValueError(
                    f"fedavg: the pattern {pattern!r} fits no parameter. There are: "
                    f"{', '.join(names)}."
                )
        found = {}
        for key in keys:
            ours = matches(key, wanted) if wanted else not matches(key, kept)
            theirs = matches(key, kept) if kept else not matches(key, wanted or ("*",))
            if key in client.head and not matches(key, (*wanted, *kept)):
                ours, theirs = True, False
            if ours == theirs:
                state = "both shared and private" if ours else "neither shared nor private"
                raise ValueError(
                    f"fedavg: {key} is {state} by shared_names = {list(wanted)}, private_names = "
                    f"{list(kept)}. Name it in one of them."
                )
            if ours:
                found[key] = client.shapes[key]
        return found

    def numbers_up(self, client: Client) -> int:
        """The shapes of what is shared."""
        return sum(map(math.prod, self.share(client).values()))

    def numbers_down(self, client: Client, cohort: Iterable[Client] = ()) -> int:
        """As up."""
        return self.numbers_up(client)

    def check(self, clients: Mapping[str, Client]) -> None:
        """Also refuse shared tensors of different shapes."""
        super().check(clients)
        shapes = {client.id: self.share(client) for client in clients.values()}
        first = shapes[min(shapes)]
        for client, own in shapes.items():
            apart = [key for key in {*own, *first} if own.get(key) != first.get(key)]
            if apart:
                raise ValueError(
                    f"fedavg: {min(apart)} has the shape {own.get(min(apart))} on client "
                    f"{client!r} and {first.get(min(apart))} on {min(shapes)!r}. Give all clients "
                    "one config, or keep it private."
                )
        if not first:
            raise ValueError("fedavg: nothing is shared. Name parameters, or use local.")

    def check_model(self, model: nn.Module, adapter: str = "default") -> None:
        """Also refuse to average what a client's own mask acts on."""
        super().check_model(model, adapter)
        masked = adapters.screened(model, adapter)
        share = self.share(Client.of("", model, adapter))
        hit = sorted({key.rpartition("/")[2] for key in share} & set(masked))
        if hit:
            key = model.peft_config[adapter].key  # type: ignore[index]
            raise ValueError(
                f"fedavg: {', '.join(hit)} of {key}: each client screens these ranks by its own "
                f"importance, so rank k is on here and off there. Keep them private: "
                f"private_names: {list(masked)}."
            )


def fedavg_for(model: nn.Module, adapter: str = "default", **options: Any) -> FedAvg:
    """fedavg that shares all that makes sense: all but what a client's own mask acts on.

    Args:
        model: wrapped. adapter: its name. options: of FedAvg.

    Raises:
        ValueError: the adapter cannot be federated, with the reason.
    """
    found = FedAvg(private_names=adapters.screened(model, adapter), **options)
    found.check_model(model, adapter)
    return found


# Unequal ranks ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FedALoraHet(Algorithm):
    """Fed-ALoRA for unequal ranks, on the adapter `fedalora_het`.

    payload: "product" sends P = B2 B1 (out, q), one shape for all clients; "auto" sends B2, B1
    where that is smaller.
    """

    key: ClassVar[str] = "fedalora_het"
    exact: ClassVar[str] = "in B_bar"
    uses: ClassVar[str] = "fedalora_het"
    ranks: ClassVar[bool] = True
    robust: ClassVar[bool] = True
    common_rank: int = 16
    payload: Literal["product", "auto"] = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.payload not in ("product", "auto"):
            raise ValueError(
                f"fedalora_het: payload = {self.payload!r} is not known. Use 'product' or 'auto'."
            )

    def _check_layer(
        self, name: str, layer: Layer, other: Layer, client: Client, first: Client
    ) -> None:
        super()._check_layer(name, layer, other, client, first)
        if layer.scaling != other.scaling:
            raise ValueError(
                f"fedalora_het: {name} has s = {layer.scaling:g} on client {client.id!r} and "
                f"{other.scaling:g} on {first.id!r}, and one B_bar is read with both. Give "
                "lora_alpha = 2 r on all, or leave it out."
            )
        width = client.shapes[f"{name}/M"][0]
        if width != self.common_rank:
            raise ValueError(
                f"fedalora_het: {name} of client {client.id!r} has common_rank = {width}, the "
                f"server {self.common_rank}. Give one common_rank."
            )

    def wider(self, clients: Mapping[str, Client]) -> list[str]:
        """Clients whose rank is above common_rank, which gains them no rank."""
        q = self.common_rank
        return sorted(c.id for c in clients.values() if any(x.r > q for x in c.layers.values()))

    def factored(self, layer: Layer) -> bool:
        """Whether a layer's update is sent as B2, B1."""
        q = self.common_rank
        factors = layer.r * (layer.out_features + q)
        return self.payload == "auto" and factors < layer.out_features * q

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """P (out, q), or B1 (r, q) and B2 (out, r)."""
        q, found = self.common_rank, {}
        for name, layer in client.layers.items():
            if self.factored(layer):
                found[f"{name}/B1"] = (layer.r, q)
                found[f"{name}/B2"] = (layer.out_features, layer.r)
            else:
                found[f"{name}/P"] = (layer.out_features, q)
        return found | self.heads(client)

    def up(self, layer: Layer) -> int:
        """Q out, or r (out + q)."""
        q = self.common_rank
        if self.factored(layer):
            return layer.r * (layer.out_features + q)
        return q * layer.out_features

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """Q out."""
        return self.common_rank * layer.out_features

    def start(self, first: StateDict, client: Client) -> State:
        """B_bar and the head as the adapter has them."""
        return State(0, self.shared(first, client))

    def shared(self, state: StateDict, client: Client) -> StateDict:
        """B_bar of each layer, and the head."""
        return {k: state[k] for k in (*(f"{n}/B_bar" for n in client.layers), *self.heads(client))}

    def private(self, state: StateDict, client: Client) -> StateDict:
        """A and M; B1 and B2 start every round anew."""
        given = {f"{name}/{x}" for name in client.layers for x in ("B_bar", "B1", "B2")}
        given |= set(self.heads(client))
        return {key: x for key, x in state.items() if key not in given}

    def payload_up(self, state: StateDict, client: Client) -> StateDict:
        """P = B2 B1, or the two."""
        found = {}
        for key in self.share(client):
            name, _, last = key.rpartition("/")
            product = last == "P" and name in client.layers
            found[key] = self._product(state, name) if product else state[key]
        return found

    @staticmethod
    def _product(state: StateDict, name: str) -> Tensor:
        B1, B2 = state[f"{name}/B1"], state[f"{name}/B2"]
        return B2.to(_wide(B2)) @ B1.to(_wide(B1))

    def products(self, updates: Updates, clients: Mapping[str, Client]) -> Mapped:
        """The updates with every P formed, so that all have one shape."""

        def formed(client: str, update: StateDict) -> StateDict:
            names = clients[client].layers
            found = {
                f"{n}/P": update[f"{n}/P"] if f"{n}/P" in update else self._product(update, n)
                for n in names
            }
            return found | {key: update[key] for key in self.heads(clients[client])}

        return Mapped(updates, formed)

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """B_bar + the mean of P; without updates B_bar stays."""
        if not len(updates):
            return State(state.round + 1, state.tensors)
        client, old = clients[min(clients)], state.tensors
        heads = {key: old[key] for key in self.heads(client)}
        bars = {name: old[f"{name}/B_bar"] for name in client.layers}
        start = {f"{name}/P": torch.zeros_like(x) for name, x in bars.items()}
        step = mean(self.products(updates, clients), weights, start | heads)
        new = {f"{name}/B_bar": x + step[f"{name}/P"] for name, x in bars.items()}
        return State(state.round + 1, new | {key: step[key] for key in heads})

    def size(self, update: StateDict, client: Client, reference: StateDict) -> float:
        """Norm of the P of all layers, formed or not, and of the head's change."""
        whole = {k: x for k, x in update.items() if k.rpartition("/")[2] not in ("B1", "B2")}
        total = super().size(whole, client, reference) ** 2
        for name, layer in client.layers.items():
            if self.factored(layer):
                total += product_norm(update[f"{name}/B1"], update[f"{name}/B2"]) ** 2
        return math.sqrt(total)

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """B_bar and the head."""
        return dict(state.tensors)

    def begin(
        self,
        down: StateDict,
        client: Client,
        round: int,
        first: StateDict,
        kept: StateDict | None,
        draw: Callable[[], StateDict],
    ) -> StateDict:
        """B2 = 0 and B1 drawn anew, but for "reset", which starts from the first B1."""
        state = super().begin(down, client, round, first, kept, draw)
        if self.private_policy == "redraw" or (self.private_policy == "keep" and kept is not None):
            fresh = draw()
            state |= {f"{name}/B1": fresh[f"{name}/B1"] for name in client.layers}
        return state


@dataclass(frozen=True, kw_only=True)
class Factors(Algorithm):
    """Methods that send both factors and treat their product."""

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """A and B of each layer, and the head."""
        found: dict[str, tuple[int, ...]] = {}
        for name, x in client.layers.items():
            found |= {f"{name}/A": (x.r, x.in_features), f"{name}/B": (x.out_features, x.r)}
        return found | self.heads(client)

    def up(self, layer: Layer) -> int:
        """R (in + out)."""
        return layer.pair

    def size(self, update: StateDict, client: Client, reference: StateDict) -> float:
        """Norm of the D_i of all layers and of the head's change."""
        total = super().size({k: update[k] for k in self.heads(client)}, client, reference) ** 2
        for name, x in client.layers.items():
            total += (x.scaling * product_norm(update[f"{name}/A"], update[f"{name}/B"])) ** 2
        return math.sqrt(total)

    def mean_heads(
        self, updates: Updates, weights: Mapping[str, float], clients: Mapping[str, Client]
    ) -> StateDict:
        """The weighted mean of what is outside the adapted layers."""
        heads = tuple(self.heads(clients[min(clients)]))
        return weighted_mean(
            Mapped(updates, lambda _, update: {key: update[key] for key in heads}), weights, {}
        )


def stacked(
    updates: Updates, weights: Mapping[str, float], clients: Mapping[str, Client], name: str
) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R), R = sum r_i, with B A = sum w_i D_i of one layer."""
    rows, columns = [], []
    for client in sorted(updates):
        A, B = updates[client][f"{name}/A"], updates[client][f"{name}/B"]
        rows.append(weights[client] * clients[client].layers[name].scaling * A.to(_wide(A)))
        columns.append(B.to(_wide(B)))
    return torch.cat(rows), torch.cat(columns, dim=1)


@dataclass(frozen=True, kw_only=True)
class ZeroPad(Factors):
    """Factors padded with zeros to the largest rank and averaged by w.

    Ranks that no accepted client has keep their last values: zeros on both sides would never learn
    again. The server keeps s B, so that clients of unequal scalings read one matrix.
    """

    key: ClassVar[str] = "zeropad"
    exact: ClassVar[str] = "no"
    ranks: ClassVar[bool] = True

    def start(self, first: StateDict, client: Client) -> State:
        """A and s B of the largest rank, and the head."""
        tensors = self.shared(first, client)
        for name, x in client.layers.items():
            tensors[f"{name}/B"] = x.scaling * tensors[f"{name}/B"]
        return State(0, tensors)

    def shares(
        self, updates: Updates, weights: Mapping[str, float], clients: Mapping[str, Client]
    ) -> Mapping[str, Mapping[str, float]]:
        """Layer -> client -> p_i."""
        return dict.fromkeys(clients[min(clients)].layers, weights)

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """sum p_i A_i and sum p_i s_i B_i, padded."""
        if not len(updates):
            return State(state.round + 1, state.tensors)
        first = clients[min(clients)]
        shares = self.shares(updates, weights, clients)
        tensors = {k: x.clone() for k, x in state.tensors.items() if k not in self.heads(first)}
        for name in first.layers:
            known = max(clients[client].layers[name].r for client in updates)
            tensors[f"{name}/A"][:known] = 0
            tensors[f"{name}/B"][:, :known] = 0
        for client in sorted(updates):
            update = updates[client]
            for name, layer in clients[client].layers.items():
                p, A, B = shares[name][client], tensors[f"{name}/A"], tensors[f"{name}/B"]
                A[: layer.r].add_(update[f"{name}/A"].to(A), alpha=p)
                B[:, : layer.r].add_(update[f"{name}/B"].to(B), alpha=p * layer.scaling)
        return State(state.round + 1, tensors | self.mean_heads(updates, weights, clients))

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """The first r_i ranks, B for the client's own scaling, and the head."""
        s = state.tensors
        found = {key: s[key] for key in self.heads(client)}
        for name, x in client.layers.items():
            found[f"{name}/A"] = s[f"{name}/A"][: x.r].contiguous()
            found[f"{name}/B"] = (s[f"{name}/B"][:, : x.r] / x.scaling).contiguous()
        return found


@dataclass(frozen=True, kw_only=True)
class HetLora(ZeroPad):
    """HetLoRA: as zeropad, weighted by the norm of each client's product, layer by layer."""

    key: ClassVar[str] = "hetlora"

    def shares(
        self, updates: Updates, weights: Mapping[str, float], clients: Mapping[str, Client]
    ) -> Mapping[str, Mapping[str, float]]:
        """||D_i||_F / sum_j ||D_j||_F; w where all are zero."""
        norms: dict[str, dict[str, float]] = {name: {} for name in clients[min(clients)].layers}
        for client in sorted(updates):
            update = updates[client]
            for name, layer in clients[client].layers.items():
                size = product_norm(update[f"{name}/A"], update[f"{name}/B"])
                norms[name][client] = layer.scaling * size
        found = {}
        for name, sizes in norms.items():
            total = sum(sizes.values())
            found[name] = {c: n / total for c, n in sizes.items()} if total else weights
        return found


@dataclass(frozen=True, kw_only=True)
class FlexLora(Factors):
    """FlexLoRA: each client gets the best part of its rank of D = sum w_i D_i."""

    key: ClassVar[str] = "flexlora"
    exact: ClassVar[str] = "up to truncation"
    ranks: ClassVar[bool] = True

    def start(self, first: StateDict, client: Client) -> State:
        """D = 0: nothing but the head."""
        return State(0, {key: first[key] for key in self.heads(client)})

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """U S (out, k) and V^T (k, in) of D, k up to the largest rank."""
        if not len(updates):
            return State(state.round + 1, state.tensors)
        updates = dict(updates)  # all at once, layer by layer
        tensors = self.mean_heads(updates, weights, clients)
        for name in clients[min(clients)].layers:
            widest = max(client.layers[name].r for client in clients.values())
            U, S, Vh = product_svd(*stacked(updates, weights, clients, name))
            tensors[f"{name}/US"] = (U * S)[:, :widest].contiguous()
            tensors[f"{name}/Vh"] = Vh[:widest].contiguous()
        return State(state.round + 1, tensors)

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """A = V^T, B = U S / s_i, r_i ranks; where D has fewer, LoRA's start for the others."""
        s = state.tensors
        found = {key: s[key] for key in self.heads(client)}
        for name, x in client.layers.items() if f"{next(iter(client.layers))}/Vh" in s else ():
            A, B = s[f"{name}/Vh"][: x.r], s[f"{name}/US"][:, : x.r] / x.scaling
            if len(A) < x.r:
                gen = seeded(self.seed, self.key, state.round, name)
                A = torch.cat([A, kaiming(gen, x.r - len(A), x.in_features).to(A)])
                B = torch.cat([B, B.new_zeros(len(B), x.r - B.shape[1])], dim=1)
            found |= {f"{name}/A": A.contiguous(), f"{name}/B": B.contiguous()}
        return found


# Methods with a trunk ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trunked(Factors):
    """Methods that add to a frozen pair beside W0 in each round.

    tolerance: largest part of the trunk that a round may leave out to keep its rank low (relative
    Frobenius norm); 0: none, it is compressed where its rank passes min(in, out), which is exact.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"{self.key}: tolerance = {self.tolerance}. Give 0 or more, below 1.")

    def grow(self, trunk: StateDict, step: StateDict) -> StateDict:
        """The trunk after one more step, by the same operations on the server and on a client.

        Args:
            trunk: `<layer>/trunk_A` (R, in), `<layer>/trunk_B` (out, R); empty at the start.
            step: `<layer>/step_A`, `<layer>/step_B`, or `<layer>/step` (out, in).
        """
        new: StateDict = {}
        for name in dict.fromkeys(key.rpartition("/")[0] for key in step):
            A, B = _pair(step, name)
            if f"{name}/trunk_A" in trunk:
                A = torch.cat([trunk[f"{name}/trunk_A"], A])
                B = torch.cat([trunk[f"{name}/trunk_B"], B], dim=1)
            most = min(A.shape[1], len(B))
            energy = 1 - self.tolerance**2 if self.tolerance else None
            if len(A) > most or energy is not None:
                A, B, _, _ = plain_factors(PlainUpdate(A, B, 1.0), min(most, len(A)), energy)
            new |= {f"{name}/trunk_A": A.contiguous(), f"{name}/trunk_B": B.contiguous()}
        return new

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """The last step for a client that holds the ones before, the whole trunk for others."""
        wanted = {state.round: (), state.round - 1: _STEP}.get(held, _TRUNK)
        return {k: x for k, x in state.tensors.items() if k.rpartition("/")[2] in wanted}

    def next_trunk(self, trunk: StateDict, down: StateDict) -> StateDict:
        """What a client holds after a payload, from what it held."""
        whole = {k: x for k, x in down.items() if k.rpartition("/")[2] in _TRUNK}
        step = {k: x for k, x in down.items() if k.rpartition("/")[2] in _STEP}
        return whole or (self.grow(trunk, step) if step else trunk)

    def set_trunk(
        self, model: nn.Module, trunk: StateDict, down: StateDict, adapter: str
    ) -> StateDict:
        """Beside each layer, scaling 1."""
        trunk = self.next_trunk(trunk, down)
        names = dict.fromkeys(key.rpartition("/")[0] for key in trunk)
        pairs = {n: (trunk[f"{n}/trunk_A"], trunk[f"{n}/trunk_B"]) for n in names}
        adapters.set_trunk(model, pairs, adapter)
        return trunk

    def _after(self, state: State, averaged: StateDict, step: StateDict) -> State:
        trunk = {k: x for k, x in state.tensors.items() if k.rpartition("/")[2] in _TRUNK}
        return State(state.round + 1, averaged | step | self.grow(trunk, step))


_TRUNK = ("trunk_A", "trunk_B")
_STEP = ("step_A", "step_B", "step")


def _pair(step: StateDict, name: str) -> tuple[Tensor, Tensor]:
    """A step as factors; a dense one as the identity and itself."""
    if f"{name}/step" not in step:
        return step[f"{name}/step_A"], step[f"{name}/step_B"]
    D = step[f"{name}/step"]
    if D.shape[1] <= len(D):
        return torch.eye(D.shape[1]).to(D), D
    return D, torch.eye(len(D)).to(D)


def _step(name: str, A: Tensor, B: Tensor) -> StateDict:
    """A step as it is sent: as factors, or dense where that is smaller."""
    if A.numel() + B.numel() > A.shape[1] * len(B):
        return {f"{name}/step": B @ A}
    return {f"{name}/step_A": A, f"{name}/step_B": B}


@dataclass(frozen=True, kw_only=True)
class Flora(Trunked):
    """FLoRA: the clients' factors are stacked and added to the trunk, the adapters start anew."""

    key: ClassVar[str] = "flora"
    exact: ClassVar[str] = "yes"
    ranks: ClassVar[bool] = True

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """sum_j r_j (in + out), or in out where that is smaller."""
        return min(sum(other.pair for other in cohort), layer.dense)

    def start(self, first: StateDict, client: Client) -> State:
        """No trunk: nothing but the head."""
        return State(0, {key: first[key] for key in self.heads(client)})

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """The trunk with sum w_i D_i added."""
        if not len(updates):
            return _idle(state)
        updates = dict(updates)  # all at once, layer by layer
        step: StateDict = {}
        for name in clients[min(clients)].layers:
            step |= _step(name, *stacked(updates, weights, clients, name))
        return self._after(state, self.mean_heads(updates, weights, clients), step)

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """The step or the trunk, and the head."""
        heads = {key: state.tensors[key] for key in self.heads(client)}
        return super().payload_down(state, client, held) | heads

    def private(self, state: StateDict, client: Client) -> StateDict:
        """A private head; the adapter starts anew."""
        return {key: x for key, x in state.items() if key not in self.shared(state, client)}

    def begin(
        self,
        down: StateDict,
        client: Client,
        round: int,
        first: StateDict,
        kept: StateDict | None,
        draw: Callable[[], StateDict],
    ) -> StateDict:
        """From the second round on a new A, and B = 0."""
        state = super().begin(down, client, round, first, kept, draw)
        return state | (draw() if round > 1 else {})


@dataclass(frozen=True, kw_only=True)
class FedEx(Trunked):
    """FedEx-LoRA: FedIT, and what its averages miss goes to the trunk."""

    key: ClassVar[str] = "fedex"
    exact: ClassVar[str] = "yes"

    def down(self, layer: Layer, cohort: Sequence[Layer] = ()) -> int:
        """R (in + out), and K r (in + out) for the residual or in out where that is smaller."""
        return layer.pair + min(sum(other.pair for other in cohort), layer.dense)

    def aggregate(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        state: State,
        clients: Mapping[str, Client],
        mean: Mean = weighted_mean,
    ) -> State:
        """A, B averaged; s sum w_i (B_i - B)(A_i - A) added to the trunk."""
        if not len(updates):
            return _idle(state)
        updates = dict(updates)  # all at once, layer by layer
        average = weighted_mean(updates, weights, {})
        step: StateDict = {}
        for name, layer in clients[min(clients)].layers.items():
            A, B = average[f"{name}/A"], average[f"{name}/B"]
            rows, columns = [], []
            for client in sorted(updates):
                factor = weights[client] * layer.scaling
                rows.append(updates[client][f"{name}/A"].to(A) - A)
                columns.append(factor * (updates[client][f"{name}/B"].to(B) - B))
            step |= _step(name, torch.cat(rows), torch.cat(columns, dim=1))
        return self._after(state, average, step)

    def payload_down(self, state: State, client: Client, held: int = 0) -> StateDict:
        """A and B, and the residual or the trunk."""
        average = {key: state.tensors[key] for key in self.share(client)}
        return average | super().payload_down(state, client, held)


def _idle(state: State) -> State:
    """After a round without updates: no step."""
    kept = {k: x for k, x in state.tensors.items() if k.rpartition("/")[2] not in _STEP}
    return State(state.round + 1, kept)


ALGORITHMS: dict[str, type[Algorithm]] = {
    cls.key: cls
    for cls in (
        Local, Central, FedIt, FfaLora, FedSaLora, FedALora, FedALoraHet,
        Flora, HetLora, ZeroPad, FlexLora, FedEx, FedAvg,
    )
}  # fmt: skip


def algorithm(key: str, **options: Any) -> Algorithm:
    """A federated method by its key.

    Example:
        >>> from plait.federated import algorithm
        >>> algorithm("fedalora_het", common_rank=8).exact
        'in B_bar'

    Args:
        key: of the table above. options: of its class.

    Raises:
        ValueError: unknown key or option, or a value that is not allowed.
    """
    if key not in ALGORITHMS:
        raise ValueError(
            f"federated.method = {key!r} is not known. {did_you_mean(key, ALGORITHMS)}"
        )
    known = [f.name for f in fields(ALGORITHMS[key])]
    for name in options:
        if name not in known:
            raise ValueError(f"{key}: {name} is not known. {did_you_mean(name, known)}")
    return ALGORITHMS[key](**options)


def aggregation_error(
    updates: Updates, weights: Mapping[str, float], clients: Mapping[str, Client]
) -> dict[str, float]:
    """||sum w B A - (sum w B)(sum w A)||_F / ||sum w B A||_F of each layer; 0 where all is zero.

    Args:
        updates: client id -> A and B of each layer, of one rank. weights, clients: as elsewhere.
    """
    average, found = weighted_mean(updates, weights, {}), {}
    for name, layer in clients[min(clients)].layers.items():
        A, B = stacked(updates, weights, clients, name)
        mean_A, mean_B = average[f"{name}/A"], layer.scaling * average[f"{name}/B"]
        # By triangles, not product_norm: the gap may be a small difference of large products.
        sides = torch.cat([A, mean_A]).double().T, torch.cat([B, -mean_B], dim=1).double()
        Ra, Rb = (torch.linalg.qr(side, mode="r").R for side in sides)
        gap, whole = float(torch.linalg.norm(Rb @ Ra.T)), product_norm(A, B)
        found[name] = gap / whole if whole else 0.0
    return found
