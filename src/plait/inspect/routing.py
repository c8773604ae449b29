"""What a token router does: how it loads its experts and how sure it is.

    load_i           mean over tokens of w_i; the loads sum to 1
    entropy          mean over tokens of H(w) = -sum w_i ln w_i, in nats; ln n: every token takes
                     all experts alike, 0: each takes one
    load entropy     H(load); ln n: the experts share the work evenly
    first_i          share of tokens with w_i the largest (ties: the first)

H(load) - entropy >= 0 is the mutual information of token and expert: 0 where the router gives every
token the same weights, whatever they are.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """H = -sum p ln p over the last axis, in nats; 0 ln 0 = 0."""
    return -torch.special.xlogy(p, p).sum(-1)


@dataclass
class Load:
    """Sums over tokens, taken batch by batch.

    Attributes:
        n: number of experts.
        tokens: how many were counted.
    """

    n: int
    tokens: int = 0
    _weights: Tensor = field(init=False)
    _first: Tensor = field(init=False)
    _entropy: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._weights = torch.zeros(self.n, dtype=torch.float64)
        self._first = torch.zeros(self.n, dtype=torch.float64)

    def add(self, w: Tensor) -> None:
        """Count the weights w (tokens, n) of some tokens."""
        w = w.detach().to("cpu", torch.float64)
        self.tokens += len(w)
        self._weights += w.sum(0)
        self._first += torch.bincount(w.argmax(-1), minlength=self.n)
        self._entropy += float(entropy(w).sum())

    @property
    def load(self) -> Tensor:
        """Mean weights (n,)."""
        return self._weights / self.tokens

    @property
    def first(self) -> Tensor:
        """Share of tokens that weigh each expert most, (n,)."""
        return self._first / self.tokens

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's weights, nats."""
        return self._entropy / self.tokens

    @property
    def load_entropy(self) -> float:
        """Entropy of the load, nats."""
        return float(entropy(self.load))
