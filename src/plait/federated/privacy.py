"""Client-level differential privacy: clipped updates, Gaussian noise, and what it adds up to.

    x = x0 + (sum_i clip(x_i - x0, C) + z C N(0, I)) / (q n)     clip(d, C) = d min(1, C / ||d||)

x0: what the clients started from; ||d|| over all shared tensors of a client together; n clients, q
the probability that one takes part, C `clip`, z `noise`. The divisor is the expected number of
clients and every client weighs the same: weights by examples would depend on private numbers and
change the sensitivity. Neighbouring: the data of one client added or removed (McMahan et al. 2018).

The accountant is opacus' RDP of the Poisson-subsampled Gaussian (extra `plait[privacy]`), so
clients must be drawn by `partition.select(.., poisson=True)`, or all take part.

What it needs, and what it does not protect: the server sees every update in the clear and adds the
noise, so it must be trusted; `key` and the sampling seed must stay with the server. Numbers of
examples, who answered when, and failed rounds are not hidden. Noise in floating point has known
attacks on its last bits (Mironov 2012). Private factors are never sent and need no noise.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass

import numpy as np
import torch
from torch import Tensor

from plait.federated.adapter import StateDict
from plait.federated.guard import GuardOptions
from plait.federated.methods import ALGORITHMS, Algorithm, FedALoraHet, Mean, Updates, norm
from plait.options import check_options, option

# Orders of the Renyi divergence; the best one is reported.
ORDERS: list[float] = [
    *(1 + k / 10 for k in range(1, 100)),
    *range(11, 64),
    80,
    96,
    128,
    192,
    256,
    512,
]


def clip(change: StateDict, bound: float) -> StateDict:
    """Scale a change so that its norm over all tensors is `bound` at most."""
    size = norm(change)
    factor = 1.0 if size <= bound else bound / size
    return {key: factor * x for key, x in change.items()}


def gaussian_noise(key: str, round: int, name: str, like: Tensor) -> Tensor:
    """N(0, 1) in the shape of a tensor, from (key, round, name) alone: a resumed round repeats it.

    The generator is Philox with 128 bits of SHA-256 of these as its key, not torch's, whose seed
    has 32 bits.
    """
    seed = hashlib.sha256(f"{key}/{round}/{name}".encode()).digest()[:16]
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "big")))
    return torch.from_numpy(random.standard_normal(tuple(like.shape))).to(like)


@dataclass(frozen=True)
class PrivacyReport:
    """(epsilon, delta) of a run so far, and the quantities that it follows from.

    epsilon: for the stated delta. order: of the divergence that gives it. clip, noise: C and z.
    rate: probability that a client takes part. clients: n. rounds: with noise, failed ones
    included.
    """

    epsilon: float
    delta: float
    order: float
    clip: float
    noise: float
    rate: float
    clients: int
    rounds: int

    def __str__(self) -> str:
        return (
            f"({self.epsilon:.3g}, {self.delta:g})-DP for one client of {self.clients}: "
            f"{self.rounds} rounds, sampling rate {self.rate:g} (Poisson), clip {self.clip:g}, "
            f"noise multiplier {self.noise:g}. The server is trusted."
        )


@dataclass(frozen=True)
class Privacy:
    """Options of differential privacy.

    key: a `Server` joins it with the hash of its config, so runs that share a secret draw different
        noise. Two runs of one config draw the same noise: if their data differ, give each its own
        secret.
    """

    clip: float = option(MISSING, "C, the largest norm of an update.", above=0)
    noise: float = option(MISSING, "z, the standard deviation of the noise in units of C.", above=0)
    key: str = option(MISSING, "Secret behind the noise, 16 characters or more.")
    delta: float = option(1e-5, "Of (epsilon, delta); below 1 / n clients.", above=0, below=1)

    def __post_init__(self) -> None:
        check_options(self, "privacy")
        if len(self.key) < 16:
            raise ValueError(
                f"privacy.key has {len(self.key)} characters: whoever guesses it can subtract "
                "the noise. Give 16 or more, such as secrets.token_hex(16)."
            )

    def check(self, method: Algorithm, guard: GuardOptions, clients: int) -> None:
        """Raise for a setting that the guarantee does not cover.

        Raises:
            ValueError: with the reason.
        """
        if not method.robust:
            robust = [key for key, cls in ALGORITHMS.items() if cls.robust]
            raise ValueError(
                f"privacy: {method.key} does not average one payload shape, so no norm bounds what "
                f"a client changes. Use one of {', '.join(robust)}."
            )
        if isinstance(method, FedALoraHet) and method.payload != "product":
            raise ValueError(
                'privacy: fedalora_het with payload = "auto" sends factors, whose product is not '
                'clipped by their norms. Use payload = "product".'
            )
        if guard.aggregator != "mean":
            raise ValueError(
                f"privacy: guard.aggregator = {guard.aggregator!r} has another sensitivity than "
                "the mean. Use 'mean'; clipping bounds a bad update too."
            )
        if guard.agreement:
            raise ValueError(
                "privacy: guard.agreement = True lets other updates decide on one. Remove it; "
                "clipping bounds a bad update too."
            )
        if math.isfinite(guard.max_norm_ratio):
            raise ValueError(
                f"privacy: guard.max_norm_ratio = {guard.max_norm_ratio:g} lets one client's norm "
                "decide on another's update. Set it to inf; clipping bounds norms."
            )
        if self.delta >= 1 / clients:
            raise ValueError(
                f"privacy.delta = {self.delta:g} with {clients} clients allows to publish one of "
                f"them whole. Give less than {1 / clients:g}."
            )

    def mean(self, expected: float, round: int) -> Mean:
        """The private mean of a round, which replaces the weighted mean.

        Args:
            expected: q n, the expected number of clients. round: 1, 2, ...
        """

        def private(
            updates: Updates, weights: Mapping[str, float], reference: StateDict
        ) -> StateDict:
            total = {k: torch.zeros_like(x, dtype=torch.float64) for k, x in reference.items()}
            for client in sorted(updates):
                update = updates[client]
                change = {key: update[key].double() - x.double() for key, x in reference.items()}
                for key, x in clip(change, self.clip).items():
                    total[key] += x
            average = {}
            for key, x in reference.items():
                noise = self.noise * self.clip * gaussian_noise(self.key, round, key, total[key])
                wide = torch.promote_types(x.dtype, torch.float32)
                average[key] = (x.double() + (total[key] + noise) / expected).to(wide)
            return average

        return private

    def report(self, rate: float, clients: int, rounds: int) -> PrivacyReport:
        """(epsilon, delta) after a number of rounds.

        Args:
            rate: q, probability that a client takes part. clients: n. rounds: noised so far.

        Raises:
            ImportError: the extra is not installed.
            ValueError: rate out of range.
        """
        if not 0 < rate <= 1:
            raise ValueError(f"privacy: sampling rate = {rate}. Give a share above 0 and up to 1.")
        try:
            from opacus.accountants.analysis import rdp  # type: ignore[import-not-found]
        except ImportError:
            raise ImportError(
                "privacy: the accountant needs opacus. Install it with: "
                'pip install "plait[privacy]"'
            ) from None
        spent = rdp.compute_rdp(q=rate, noise_multiplier=self.noise, steps=rounds, orders=ORDERS)
        epsilon, order = rdp.get_privacy_spent(orders=ORDERS, rdp=spent, delta=self.delta)
        return PrivacyReport(
            float(epsilon), self.delta, float(order), self.clip, self.noise, rate, clients, rounds
        )
