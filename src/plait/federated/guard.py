"""The guard: which updates enter a round, with what weight, and robust averages.

    norm filter     rejects, of 3 or more updates, norms above max_norm_ratio x the median, or x 1
                    where the median is 0; of any number, norms above 1e18
    agreement       of 5 or more updates, by the changes that they make and the cosines of these:
      direction     rejects a change whose median cosine with the others is below -0.1 x that of
                    most, where most agree (median 0.05 or more)
      copies        k changes of nearly one direction weigh as one: each w_i / k
      length        w_i x max_pull x median / norm for a norm above max_pull x the median
    counts          n_i is capped at max_count_ratio x the lower median of the claimed counts
    quarantine      a client with quarantine_after rejections is excluded
    median          of each number over the clients            unweighted
    trimmed_mean    of each number, without the `trim` share at either end   unweighted
    krum            the update with the least sum of squared distances to its n - f - 2 nearest
    multi_krum      the mean of the n - f updates with the least sums     unweighted

Blanchard et al. 2017 (Krum), Yin et al. 2018 (median, trimmed mean); less weight for copies is the
idea of FoolsGold (Fung et al. 2018), here without its history, so that it is off once most updates
are alike. Agreement changes weights and not updates, so it serves every method that takes weights;
where it finds nothing, the mean has the bits of the plain one. The robust averages need all updates
in memory and equal shapes; they ignore n_i, so that false claims have no effect.

Limits: what agrees with most passes; so does all that is sent where most clients have nothing in
common. `hetlora` takes weights from norms, so that only rejections act there. Robust averages
tolerate flipped signs, and bias the mean if honest clients have dissimilar data. Nothing tolerates
a malicious majority.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from plait.federated.adapter import StateDict
from plait.federated.agreement import Agreement
from plait.federated.methods import ALGORITHMS, Algorithm, Mean, Updates, weighted_mean
from plait.federated.payload import Reason, Rejected
from plait.options import check_options, did_you_mean, option

FEW = 3  # updates from which on a norm filter has a median to compare with
LARGEST = 1e18  # norm of an update; squares and products of larger ones leave the range of fp32
MANY = 5  # updates from which on they are compared with each other
CONSENSUS = 0.05  # median cosine from which on most clients can be said to agree
OPPOSED = -0.1  # an update is opposed below this share of the median cosine
COPY = 0.04  # 1 - cosine of two copies is below this share of the usual one
ALIKE = 1e-6  # 1 - cosine at which most updates are the same but for rounding
# They do not exclude a client: faults of the transport, and what honest but unlike data can cause.
_HARMLESS = frozenset(
    {Reason.WRONG_RUN, Reason.STALE_ROUND, Reason.DUPLICATE, Reason.UNKNOWN_CLIENT}
    | {Reason.QUARANTINED, Reason.OPPOSED}
)


class TooFewUpdates(RuntimeError):
    """A round has fewer accepted updates than it needs."""


# Means ------------------------------------------------------------------------------------------


def _stacks(updates: Updates) -> dict[str, Tensor]:
    """Key -> (clients, ..), in id order, fp32 (fp64 of fp64)."""
    rows = [updates[client] for client in sorted(updates)]
    wide = torch.promote_types(next(iter(rows[0].values())).dtype, torch.float32)
    return {key: torch.stack([row[key].to(wide) for row in rows]) for key in rows[0]}


def median(updates: Updates, weights: Mapping[str, float], reference: StateDict) -> StateDict:
    """The median of each number over the clients; the mean of the middle two for an even count."""
    medians = {}
    for key, x in _stacks(updates).items():
        ordered, n = x.sort(0).values, len(x)
        medians[key] = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return medians


def trimmed_mean(
    updates: Updates, weights: Mapping[str, float], reference: StateDict, *, trim: float = 0.2
) -> StateDict:
    """The mean of each number without its ceil(trim n) largest and smallest values.

    Raises:
        ValueError: nothing would be left.
    """
    n = len(updates)
    cut = math.ceil(round(trim * n, 9))  # .07 x 100 is above 7 in floating point
    if n - 2 * cut < 1:
        raise ValueError(
            f"guard: trimmed_mean with trim = {trim} leaves none of {n} updates. Lower guard.trim "
            "or raise min_updates."
        )
    return {k: x.sort(0).values[cut : n - cut].mean(0) for k, x in _stacks(updates).items()}


def krum(
    updates: Updates,
    weights: Mapping[str, float],
    reference: StateDict,
    *,
    faulty: int = 1,
    multi: bool = False,
) -> StateDict:
    """The update with the least distance to its n - faulty - 2 nearest others; ties by client id.

    multi: the mean of the n - faulty best updates instead.

    Raises:
        ValueError: fewer than 2 faulty + 3 updates, for which Krum guarantees nothing.
    """
    n = len(updates)
    if n < 2 * faulty + 3:
        raise ValueError(
            f"guard: krum with faulty = {faulty} needs {2 * faulty + 3} updates, here are {n}. "
            "Lower guard.faulty or raise min_updates."
        )
    stacks = _stacks(updates)
    flat = torch.cat([x.reshape(n, -1) for x in stacks.values()], dim=1).double()
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distances.sort(1).values[:, 1 : n - faulty - 1]  # the first is the update itself
    order = nearest.sum(1).argsort(stable=True)
    best = order[: n - faulty if multi else 1].sort().values
    return {key: x[best].mean(0) for key, x in stacks.items()}


AGGREGATORS = ("mean", "median", "trimmed_mean", "krum", "multi_krum")


# The guard --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GuardOptions:
    """Options of the guard. aggregator: one of AGGREGATORS."""

    max_norm_ratio: float = option(
        10.0,
        "Largest norm of an update, in that of the median update; .inf: no limit.",
        least=1,
        infinite=True,
    )
    max_count_ratio: float = option(
        10.0,
        "Cap on the examples that a client claims, in the median of all; .inf: no cap.",
        least=1,
        infinite=True,
    )
    agreement: bool | None = option(
        None,
        "Reject updates against most others, count equal ones once, and let long ones count less; "
        "null: yes, with the mean and without privacy.",
    )
    max_pull: float = option(
        3.0,
        "With agreement: norm of a change from which on it counts less, in that of the median one; "
        ".inf: none.",
        least=1,
        infinite=True,
    )
    aggregator: str = option("mean", "mean, median, trimmed_mean, krum or multi_krum.")
    trim: float = option(
        0.2, "trimmed_mean: share of the updates left out at each end.", least=0, below=0.5
    )
    faulty: int = option(1, "krum: number of clients that may send faulty updates.", least=0)
    quarantine_after: int = option(3, "Rejections after which a client is excluded.", least=1)
    min_updates: int = option(1, "Accepted updates that a round needs.", least=1)

    def __post_init__(self) -> None:
        if self.aggregator not in AGGREGATORS:
            raise ValueError(
                f"guard.aggregator = {self.aggregator!r} is not known. "
                f"{did_you_mean(self.aggregator, AGGREGATORS)}"
            )
        check_options(self, "guard")

    def compares(self, private: bool) -> bool:
        """Whether the updates of a round are compared with each other.

        Args:
            private: whether the run has differential privacy.
        """
        if self.agreement is None:
            return self.aggregator == "mean" and not private
        return self.agreement

    def mean(self, method: Algorithm) -> Mean:
        """The mean that a method uses under these options.

        Raises:
            ValueError: a robust average, for a method whose mean cannot be replaced.
        """
        if self.aggregator != "mean" and not method.robust:
            robust = [key for key, cls in ALGORITHMS.items() if cls.robust]
            raise ValueError(
                f"guard.aggregator = {self.aggregator!r}: {method.key} does not average one "
                f"payload shape. Use 'mean', or one of {', '.join(robust)}."
            )
        means: dict[str, Mean] = {
            "mean": weighted_mean,
            "median": median,
            "trimmed_mean": partial(trimmed_mean, trim=self.trim),
            "krum": partial(krum, faulty=self.faulty),
            "multi_krum": partial(krum, faulty=self.faulty, multi=True),
        }
        return means[self.aggregator]


def _opposed(found: Agreement) -> dict[str, Rejected]:
    """The rejections of changes against most others; none where most have nothing in common."""
    medians = found.medians()
    most, rejections = statistics.median(medians), {}
    for name, cosine in zip(found.names, medians, strict=True) if most >= CONSENSUS else ():
        if cosine < OPPOSED * most:
            text = f"median cosine {cosine:.3g} with the other changes, {most:.3g} is usual"
            rejections[name] = Rejected(Reason.OPPOSED, name, text)
    return rejections


def _copies(found: Agreement, kept: Sequence[int]) -> dict[int, int]:
    """Client number -> how many of the kept ones, itself included, send nearly its direction.

    No two honest trainings are that near, unless most pairs are: then nobody is a copy.
    """
    among = set(kept)
    columns = [(j, peer) for j, peer in enumerate(found.peers) if peer in among]
    apart = {i: [1 - float(found.cosines[i, j]) for j, p in columns if p != i] for i in kept}
    usual = statistics.median(x for row in apart.values() for x in row)
    least = COPY * usual if usual > ALIKE else 0.0
    return {i: 1 + sum(x < least for x in row) for i, row in apart.items()}


def weigh(weights: Mapping[str, float], votes: Mapping[str, float]) -> dict[str, float]:
    """Weights times votes, of sum 1; unchanged if all votes are 1."""
    if not votes:
        return dict(weights)
    shares = {client: weight * votes.get(client, 1.0) for client, weight in weights.items()}
    total = sum(shares.values())
    return {client: share / total for client, share in shares.items()}


@dataclass
class Guard:
    """Counts the rejections of a run, and decides what depends on all updates of a round.

    options: see GuardOptions. rejections: client -> reason -> how often; the server saves it.
    """

    options: GuardOptions = field(default_factory=GuardOptions)
    rejections: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, rejected: Rejected) -> None:
        """Count a rejection for the client that the transport named."""
        reasons = self.rejections.setdefault(rejected.client, {})
        reasons[rejected.reason.value] = reasons.get(rejected.reason.value, 0) + 1

    def quarantined(self, client: str) -> bool:
        """Whether a client is excluded, because its updates were rejected too often."""
        reasons = self.rejections.get(client, {})
        faults = sum(n for reason, n in reasons.items() if Reason(reason) not in _HARMLESS)
        return faults >= self.options.quarantine_after

    def quarantine(self, client: str) -> Rejected:
        """The rejection of a quarantined client."""
        text = f"rejected {self.options.quarantine_after} times or more in this run"
        return Rejected(Reason.QUARANTINED, client, text)

    def screen(self, sizes: Mapping[str, float]) -> dict[str, Rejected]:
        """Client -> rejection, among the updates that passed the checks of the payload.

        A quarantined client is rejected whatever it sends, and does not affect the median.

        Args:
            sizes: client -> norm of its update, `Algorithm.size`.
        """
        free = [n for c, n in sizes.items() if n <= LARGEST and not self.quarantined(c)]
        ratio, few = self.options.max_norm_ratio, len(free) < FEW
        middle = 0.0 if few else statistics.median(free)
        rejections = {}
        for client in sorted(sizes):
            size = sizes[client]
            if not size <= LARGEST:  # NaN, too
                text = f"norm {size:.4g}, above {LARGEST:g}"
                rejections[client] = Rejected(Reason.NORM_OUTLIER, client, text)
            elif not few and not size <= ratio * (middle or 1.0):
                text = f"norm {size:.4g}, above {ratio:g} x "
                text += f"the median {middle:.4g} of " if middle else "1, for the median is 0 of "
                text += f"{len(free)} updates"
                rejections[client] = Rejected(Reason.NORM_OUTLIER, client, text)
            elif self.quarantined(client):
                rejections[client] = self.quarantine(client)
        return rejections

    def judge(self, found: Agreement) -> tuple[dict[str, Rejected], dict[str, float]]:
        """Client -> rejection, and client -> factor of its weight, where that is below 1.

        Fewer than `MANY` updates have no majority to compare with.

        Args:
            found: of the updates that passed `screen`.
        """
        if len(found.names) < MANY:
            return {}, {}
        rejections = _opposed(found)
        kept = [i for i, name in enumerate(found.names) if name not in rejections]
        most = self.options.max_pull * statistics.median(found.norms[i] for i in kept)
        votes = {}
        for i, copies in _copies(found, kept).items():
            long = most > 0 and found.norms[i] > most
            vote = (most / found.norms[i] if long else 1.0) / copies
            if vote < 1:
                votes[found.names[i]] = vote
        return rejections, votes

    def counts(self, claimed: Mapping[str, int]) -> dict[str, int]:
        """The claimed numbers of examples, capped by their lower median.

        Of two clients, the smaller claim is that median.
        """
        if not claimed:
            return {}
        cap = self.options.max_count_ratio * statistics.median_low(claimed.values())
        return {client: n if n <= cap else int(cap) for client, n in claimed.items()}

    def require(self, accepted: Iterable[str], round: int) -> None:
        """Raise if a round has too few updates.

        Raises:
            TooFewUpdates: fewer than min_updates, with the reasons counted so far.
        """
        number = len(list(accepted))
        if number >= self.options.min_updates:
            return
        reasons: dict[str, int] = {}
        for by_reason in self.rejections.values():
            for reason, n in by_reason.items():
                reasons[reason] = reasons.get(reason, 0) + n
        text = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())) or "none"
        raise TooFewUpdates(
            f"round {round}: {number} updates were accepted, {self.options.min_updates} are needed "
            f"(rejections of the run: {text}). Check the clients, or lower "
            "guard.min_updates."
        )
