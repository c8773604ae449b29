"""Methods that average what is shared and leave the rest on the client, and the two references.

    fedit   A = sum w_i A_i,  B = sum w_i B_i                 not exact: B A is no sum w_i B_i A_i
    ffa     A = A0 frozen,    B = sum w_i B_i                                            exact
    fedsa   A = sum w_i A_i,  B_i private       fedalora  B = sum w_i B_i,   A_i private
    fedavg  the same for any parameters, by patterns

A (r, in), B (out, r), of one rank and scaling on all clients. Sources: fedit 2305.05644, ffa ICLR
2024, fedsa 2410.01463, fedalora 2509.25414.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from plait.federated import adapter as adapters
from plait.federated.adapter import matches
from plait.federated.methods.base import Algorithm
from plait.federated.methods.updates import Client


@dataclass(frozen=True, kw_only=True)
class Local(Algorithm):
    """Every client trains alone, for the same rounds and local steps: the lower reference."""

    key: ClassVar[str] = "local"
    exact: ClassVar[str] = "-"
    names: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[str] = ""
    ranks: ClassVar[bool] = True
    robust: ClassVar[bool] = False

    def heads(self, client: Client) -> dict[str, tuple[int, ...]]:
        """None: nothing is exchanged."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Central(Local):
    """One trainer on the pooled data, with as many examples seen: the upper reference."""

    key: ClassVar[str] = "central"


@dataclass(frozen=True, kw_only=True)
class FedIt(Algorithm):
    """FedIT: A and B are averaged, each by itself."""

    key: ClassVar[str] = "fedit"
    exact: ClassVar[str] = "no"
    mean_of_factors: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class FfaLora(Algorithm):
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
class FedSaLora(Algorithm):
    """FedSA-LoRA: A is averaged, B never leaves the client."""

    key: ClassVar[str] = "fedsa"
    exact: ClassVar[str] = "no common dW"
    names: ClassVar[tuple[str, ...]] = ("A",)


@dataclass(frozen=True, kw_only=True)
class FedALora(Algorithm):
    """Fed-ALoRA for equal ranks: B is averaged, A never leaves the client."""

    key: ClassVar[str] = "fedalora"
    exact: ClassVar[str] = "no common dW"
    names: ClassVar[tuple[str, ...]] = ("B",)


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Any parameters of any adapter, by patterns of their names or keys.

    shared_names: patterns of what is averaged; empty: all that `private_names` does not name.
    private_names: patterns of what stays private; empty: all that `shared_names` does not name. A
    key that both or neither name is an error, as is a pattern that fits nothing.
    """

    key: ClassVar[str] = "fedavg"
    exact: ClassVar[str] = "no"
    uses: ClassVar[str] = "any"
    shared_names: tuple[str, ...] = ()
    private_names: tuple[str, ...] = ()

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        """One seed, for some adapters act on bases that are drawn from it and never sent."""
        seeds = {getattr(configs[name], "seed", None): name for name in sorted(configs)}
        if len(seeds) > 1:
            raise ValueError(
                f"fedavg: clients {' and '.join(map(repr, seeds.values()))} have the adapter's "
                f"seed = {' and '.join(map(str, seeds))}, so their parameters may act on unlike "
                "bases. Give all one seed; init = 'per_client' draws the private factors apart."
            )

    def share(self, client: Client) -> dict[str, tuple[int, ...]]:
        """By the patterns."""
        keys = [k for k in client.shapes if k not in client.head or self.head == "shared"]
        shared, private = self.shared_names, self.private_names
        for pattern in (*shared, *private):
            if not any(matches(key, [pattern]) for key in client.shapes):
                names = sorted({key.rpartition("/")[2] for key in client.shapes})
                raise ValueError(
                    f"fedavg: the pattern {pattern!r} fits no parameter. There are: "
                    f"{', '.join(names)}."
                )
        shapes = {}
        for key in keys:
            ours = matches(key, shared) if shared else not matches(key, private)
            theirs = matches(key, private) if private else not matches(key, shared or ("*",))
            if key in client.head and not matches(key, (*shared, *private)):
                ours, theirs = True, False
            if ours == theirs:
                state = "both shared and private" if ours else "neither shared nor private"
                raise ValueError(
                    f"fedavg: {key} is {state} by shared_names = {list(shared)}, private_names = "
                    f"{list(private)}. Name it in one of them."
                )
            if ours:
                shapes[key] = client.shapes[key]
        return shapes

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
        for client, share in shapes.items():
            apart = [key for key in {*share, *first} if share.get(key) != first.get(key)]
            if apart:
                raise ValueError(
                    f"fedavg: {min(apart)} has the shape {share.get(min(apart))} on client "
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
    method = FedAvg(private_names=adapters.screened(model, adapter), **options)
    method.check_model(model, adapter)
    return method
