"""Each check of the contract can fail: methods that break one thing, and what catches them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plait
from plait.core import DeltaConfig, LowRankDelta, registry
from plait.core.init import gaussian, kaiming
from plait.core.mix import TokenRouter
from plait.core.route import NOWHERE, Rows
from plait.testing import CHECKS, Case, checks

Control = tuple[type[LowRankDelta], Callable[[Case], None], str, type[BaseException]]
CONTROLS: list[Control] = []


def caught_by(
    check: Callable[[Case], None], says: str, error: type[BaseException] = AssertionError
) -> Callable[[type], type]:
    """The check that must fail on a class, and what it must say."""

    def note(cls: type) -> type:
        CONTROLS.append((cls, check, says, error))
        return cls

    return note


@dataclass
class PlainConfig(DeltaConfig):
    """No options of its own."""


class Plain(LowRankDelta):
    """LoRA, in order. Every class below breaks one thing of it."""

    config_cls: ClassVar[type[DeltaConfig]] = PlainConfig
    case: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(kaiming(gen, config.r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, config.r))

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        """r (in + out)."""
        return config.r * (in_features + out_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.A, self.B


@caught_by(checks.start_is_the_base, "a fresh adapter changes the output")
@caught_by(checks.quantised_bases_work, "8 bit: a fresh adapter changes it")
class StartsElsewhere(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.B = nn.Parameter(gaussian(gen, *self.B.shape, std=0.1))


@caught_by(checks.random_start_differs, "init_weights=False starts at the base model")
class HasNoRandomStart(Plain):
    def randomize(self, gen: torch.Generator) -> None:
        pass


@caught_by(checks.starts_are_reproducible, "is drawn anew")
@caught_by(checks.random_state_is_kept, "torch's global generator moved")
class DrawsFromTheGlobalGenerator(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(torch.rand(self.A.shape))


@caught_by(checks.random_state_is_kept, "numpy's global generator moved")
class DrawsInEvents(Plain):
    def after_step(self) -> None:
        np.random.random()


@caught_by(checks.only_the_delta_trains, "training changed .*q_proj.weight")
class EditsTheBase(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        base.weight.mul_(1.01)


@caught_by(checks.only_the_delta_trains, "a Delta's parameter does not train")
class FreezesAFactor(Plain):
    def train(self, mode: bool = True) -> "FreezesAFactor":
        self.A.requires_grad_(False)
        return super().train(mode)


@caught_by(checks.gradients_reach_everything, "no gradient in three steps")
@caught_by(checks.loss_falls, "in 30 steps")
class IsDead(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(torch.zeros_like(self.A))


@caught_by(checks.loss_falls, "evaluation mode gives loss")
class TrainsAnotherFunction(Plain):
    def gate(self) -> Tensor:
        return torch.full((len(self.A),), float(self.training))


@caught_by(checks.optimizers_agree, "stale values after a step")
class CachesByVersion(Plain):
    """A fused optimizer writes without raising the version."""

    key: Any = None

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.training:
            return self.A, self.B
        if self.key != (self.B._version, self.B.data_ptr()):
            self.key = (self.B._version, self.B.data_ptr())
            self.cached = self.B.detach().clone()
        return self.A, self.cached


@caught_by(checks.micro_batches_add_up, "accumulation is not one batch")
@caught_by(checks.rows_are_independent, "a row depends on its batch")
class CentersTheBatch(Plain):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return super().down(x - x.mean(0), A)


@caught_by(checks.rows_are_independent, "later tokens are seen")
class LooksAhead(Plain):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return super().down(x + x.mean(-2, keepdim=True), A)


@caught_by(checks.mixed_batch_is_separate_runs, "rows of default differ")
class DependsOnTheBatchSize(Plain):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return super().down(x, A) / len(x)


class HasAStep(Plain):
    """A schedule, in order: the update grows by a tenth in each step."""

    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.count_steps()
        self.n = 0

    def gate(self) -> Tensor:
        return torch.full((len(self.A),), 1 + 0.1 * self.steps)


@caught_by(checks.resume_is_exact, "differs after a resume")
class ForgetsItsStep(HasAStep):
    def after_step(self) -> None:
        self.n += 1

    def gate(self) -> Tensor:
        return torch.full((len(self.A),), 1 + 0.1 * self.n)


@caught_by(checks.events_fire, "t = 0 after three steps")
class IsNeverCalled(HasAStep):
    needs_events = False  # type: ignore[assignment]


@caught_by(checks.events_fire, "t = 6 after three steps")
class CountsTwice(HasAStep):
    def after_step(self) -> None:
        assert self.t is not None
        self.t += 1


class HasExperts(Plain):
    """Two A that are summed."""

    case: ClassVar[dict[str, Any]] = {"experts": ("A",)}

    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(torch.stack([self.A.detach()] * 2))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.sum(0), self.B

    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        return config.r * (2 * in_features + out_features)


@caught_by(checks.experts_part, r"A\[1\] equals A\[0\]")
class HasCopiesForExperts(HasExperts):
    pass


@caught_by(checks.experts_part, "A parted")
class HasExpertsThatPart(HasExperts):
    case: ClassVar[dict[str, Any]] = {"alike": ("A",)}

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A[0] + 2 * self.A[1], self.B


@caught_by(checks.storages_are_distinct, "is expanded")
class HasOneTensorForAllExperts(HasExperts):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(self.A[:1].detach().clone().expand(2, -1, -1))


@caught_by(checks.storages_are_distinct, "shares memory with")
class SharesBetweenLayers(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = nn.Parameter(POOL[: self.A.numel()].view_as(self.A))


POOL = torch.randn(1000, generator=torch.Generator().manual_seed(0))


@caught_by(checks.forward_is_weight, r"forward is not weight\(\)")
@caught_by(checks.merge_is_exact, "merged differs")
class MergesAnotherWeight(Plain):
    def weight(self, **choice: Any) -> Tensor:
        return 0.5 * super().weight(**choice)


@caught_by(checks.merge_is_exact, "the class fact `mergeable` is wrong")
class MiscallsItself(Plain):
    mergeable = False


@caught_by(checks.fast_is_naive, "output differs")
class ScalesTheFastForm(Plain):
    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return 1.001 * super().forward(x, task_ids)


@caught_by(checks.fast_is_naive, "x differs")
class CutsTheGradient(Plain):
    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return super().forward(x.detach(), task_ids)


@caught_by(checks.fast_is_naive, "output differs")
class ScalesTheJointForm(Plain):
    def joint(self, *args: Any) -> Tensor:
        return 1.001 * super().joint(*args)


@caught_by(checks.fast_is_naive, "A differs")
class StatesAnotherGradient(Plain):
    closed = (("A",), ("B",))
    reads = ("A", "B")

    def close(self, plan: Any) -> None:
        plan.pull_A = lambda leaves, dA: (1.001 * dA,)


@caught_by(checks.optimizers_agree, "stale values after a step")
class StatesHalfOfWhatItReads(Plain):
    closed = (("A",), ("B",))
    reads = ("A",)

    def close(self, plan: Any) -> None:
        pass


@caught_by(checks.fast_is_naive, "output differs")
@caught_by(checks.forward_is_weight, "forward is not the loop over terms")
class RoutesWithoutSoftmax(Plain):
    """A router whose weights do not sum to one."""

    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.G = nn.Parameter(kaiming(gen, 2, base.in_features))
        self.A = nn.Parameter(kaiming(gen, 2 * config.r, base.in_features))

    def mix(self) -> TokenRouter:
        return WithoutSoftmax(self.G)


class WithoutSoftmax(TokenRouter):
    def __call__(self, z: Tensor, x: Tensor, rows: Rows = NOWHERE) -> Tensor:
        w = (x @ self.G.to(x.dtype).T).sigmoid()
        return (w.unsqueeze(-2) @ z.unflatten(-1, (2, -1))).squeeze(-2)


@caught_by(checks.shapes_are_free, "too many indices", IndexError)
class WantsThreeAxes(Plain):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return super().down(x[:, :, :], A)


@caught_by(checks.counts_are_the_formula, "the formula says")
class Miscounts(Plain):
    @classmethod
    def count(cls, config: Any, in_features: int, out_features: int) -> int:
        return config.r * in_features


@caught_by(checks.counts_are_the_formula, "of dW is above the stated 1")
class MisstatesItsRank(Plain):
    def rank(self) -> int:
        return 1


@caught_by(checks.save_and_load, "the loaded adapter differs")
class DoesNotSaveItsStart(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        W = torch.zeros_like(base.weight) if base.blank else base.weight
        self.A0 = nn.Buffer(W[: config.r].clone(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A + self.A0, self.B


@caught_by(checks.save_and_load, "a decomposition at load")
class DecomposesAtLoad(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        Vh = torch.linalg.svd(base.weight, full_matrices=False).Vh
        self.A = nn.Parameter(Vh[: config.r].contiguous())


@caught_by(checks.two_adapters_coexist, "adding an adapter changed the active one")
class SharesBetweenAdapters(Plain):
    made: ClassVar[dict[str, nn.Parameter]] = {}

    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        self.A = self.made.setdefault(base.name, self.A)


@caught_by(checks.export_is_as_declared, "the export differs")
class ExportsAnotherScale(Plain):
    def folded(self, task: Any = None, approx: Any = None) -> tuple[Tensor, Tensor]:
        A, B = super().folded(task, approx)
        return 1.1 * A, B


@caught_by(checks.export_is_as_declared, "the class fact `exact_export` is wrong")
class PromisesAnExport(RoutesWithoutSoftmax):
    mergeable = False


@caught_by(checks.half_precision_is_bounded, "relative error")
class RoundsTwice(Plain):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return super().down(x, A).mul(8).round().div(8)


@caught_by(checks.half_precision_trains, "not finite")
class Overflows(Plain):
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return super().down(x, A)
        return (super().down(x, A).half() * 1e6).to(x.dtype) * 1e-6


@caught_by(checks.checkpointing_changes_nothing, "another gradient under gradient checkpointing")
class CountsItsForwards(Plain):
    calls = 0

    def gate(self) -> Tensor:
        self.calls += 1
        return torch.full((len(self.A),), 1.0 + self.calls)


@caught_by(checks.quantised_bases_work, "", RuntimeError)
class ReadsThePackedWeight(Plain):
    def __init__(self, base: Any, config: Any, gen: torch.Generator) -> None:
        super().__init__(base, config, gen)
        weight = base.read.__self__.get_base_layer().weight
        self.A = nn.Parameter(weight[: config.r].detach().float().view_as(self.A).clone())


@dataclass
class LenientConfig(DeltaConfig):
    """Repairs what it should refuse."""

    def __post_init__(self) -> None:
        if isinstance(self.r, int):
            self.r = max(1, self.r)
        super().__post_init__()


@caught_by(checks.config_is_strict, "DID NOT RAISE", pytest.fail.Exception)
class TakesAnyRank(Plain):
    config_cls: ClassVar[type[DeltaConfig]] = LenientConfig


@dataclass
class ForgetfulConfig(DeltaConfig):
    """Loses an option on the way to the file."""

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "seed"}


@caught_by(checks.config_is_strict, "seed was lost")
class LosesAnOption(Plain):
    config_cls: ClassVar[type[DeltaConfig]] = ForgetfulConfig


REGISTERED: list[str] = []  # peft keeps its types for the process: a new key each time


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Plain]], Case]:
    """Register a class for the length of a test."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    def make(cls: type[Plain]) -> Case:
        key = f"control_{len(REGISTERED)}_{cls.__name__.lower()}"
        REGISTERED.append(key)
        config = dataclass(type(f"{cls.__name__}Config", (cls.config_cls,), {}))
        copied = type(cls.__name__, (cls,), {"__module__": __name__})
        plait.register(key, config, paper="none")(copied)
        return Case(key, **cls.case)

    return make


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", [Plain, HasAStep], ids=lambda cls: cls.__name__)
def test_the_sound_ones_pass(register: Any, cls: type[Plain], check: Any) -> None:
    check(register(cls))


@pytest.mark.parametrize(
    ("cls", "check", "says", "error"),
    [
        pytest.param(*control, id=f"{control[0].__name__}-{control[1].__name__}")
        for control in CONTROLS
    ],
)
def test_the_broken_ones_fail(register: Any, cls: Any, check: Any, says: str, error: Any) -> None:
    with pytest.raises(error, match=says):
        check(register(cls))


def test_every_check_has_a_control() -> None:
    assert {check for _, check, _, _ in CONTROLS} == set(CHECKS)
