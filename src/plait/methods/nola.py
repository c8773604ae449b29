"""NOLA: the factors are mixtures of random bases that a seed makes; only the weights are trained.

    A = A0 + sum_i a_i A_i / sqrt(ka)     B = sum_j b_j B_j / sqrt(kb)     dW = s B A
    a: (ka,)   b: (kb,)   A_i: (r, in), B_j: (out, r) with entries in [-1, 1)   s = lora_alpha / r

Start: a = b = 0 and A0 Kaiming-uniform, so that dW = 0 and b has a gradient. a0=False is the
paper's form: no A0, a ~ N(0, 1). The bases are shared by all layers of a shape and made when
first used, from NumPy's raw Philox stream: the same numbers on every device and in every dtype,
and no global generator is touched (the released code reseeds it in every forward). A checksum of
their first values is saved in the config and compared at load. arXiv 2310.02556; the 1 / sqrt(k)
is that of the released GPT and LLaMA code.

The file holds a and b: ka + kb numbers per layer, whatever in, out and r are. dW has rank r but
lies on a curve of dimension ka + kb: read the count with that in mind. With `keep_bases=False`
each forward generates the bases, a few at a time: less memory, more time.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.core import DeltaConfig, FrozenLinear, LowRankDelta, option, register
from plait.core.init import gaussian
from plait.methods._bases import basis, first_values, inner, mixture, values


@dataclass
class NolaConfig(DeltaConfig):
    """Options of NOLA."""

    lora_alpha: float | None = option(None, "s = lora_alpha / r; None: r / 4.", above=0)  # type: ignore[assignment]
    num_basis_A: int = option(256, "ka, bases of A.", least=1)
    num_basis_B: int = option(256, "kb, bases of B.", least=1)
    a0: bool = option(True, "A frozen A0 below the mixture; False: the paper's form.")
    basis_dtype: Literal["float32", "bfloat16"] = option("float32", "How bases are rounded, kept.")
    keep_bases: bool = option(True, "Keep bases in memory; False: make them in each forward.")
    checksums: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Of the first basis values; leave it alone."}
    )

    def __post_init__(self) -> None:
        self.lora_alpha = self.r / 4 if self.lora_alpha is None else self.lora_alpha  # type: ignore
        super().__post_init__()


@register(
    "nola",
    NolaConfig,
    paper="2310.02556",
    formula="dW = s (sum_j b_j B_j) (A0 + sum_i a_i A_i)",
    rank="r, on a curve of dimension ka + kb",
)
class Nola(LowRankDelta):
    """See the module."""

    no_pairs = "its factors are mixtures of fixed bases"
    closed = (("a",), ("b",))
    reads = ("a", "b", "A0")
    closes_by = ()
    config: NolaConfig

    def __init__(self, base: FrozenLinear, config: NolaConfig, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        r, n_in, n_out = config.r, base.in_features, base.out_features
        rounded = getattr(torch, config.basis_dtype)
        self.bases = [
            basis(config.seed, f"A:{r}x{n_in}", config.num_basis_A, r, n_in, rounded),
            basis(config.seed, f"B:{n_out}x{r}", config.num_basis_B, n_out, r, rounded),
        ]
        ka, kb = config.num_basis_A, config.num_basis_B
        self.a = nn.Parameter(torch.zeros(ka) if config.a0 else gaussian(gen, ka, std=1.0))
        self.b = nn.Parameter(torch.zeros(kb))
        A0 = values(config.seed, f"{base.name}/A0:{r}x{n_in}", 0, r * n_in)
        self.A0 = nn.Buffer(torch.from_numpy(A0).view(r, n_in) / n_in**0.5, persistent=False)
        for one in self.bases:
            # One dict for all layers, saved with the config; a copy may have another seed.
            checksum, name = first_values(one), f"{config.seed}/{one.tag}"
            if config.checksums.setdefault(name, checksum) != checksum:
                raise ValueError(
                    f"nola: the basis {one.tag} of seed {config.seed} has the checksum {checksum}, "
                    f"the adapter was trained with {config.checksums[name]}. Use the numpy and "
                    "plait that it was trained with."
                )

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """ka + kb."""
        return config.num_basis_A + config.num_basis_B

    @property
    def rank_groups(self) -> int:
        """One; the mixtures are not made to count it."""
        return 1

    def close(self, plan: Any) -> None:
        """Inner products with the bases."""
        of_A, of_B = self.bases
        plan.pull_A = lambda _, dA: (inner(dA, of_A, self.config.keep_bases).to(self.a),)
        plan.pull_B = lambda _, dB: (inner(dB, of_B, self.config.keep_bases).to(self.b),)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The mixtures, fp32 (fp64 on an fp64 base) whatever the base is."""
        keep = self.config.keep_bases
        A, B = (mixture(w, one, keep) for w, one in zip((self.a, self.b), self.bases, strict=True))
        return (A + self.A0 if self.config.a0 else A), B
