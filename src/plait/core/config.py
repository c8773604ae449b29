"""DeltaConfig: peft's words for every method of plait, strictly checked."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from packaging.version import Version
from peft import PeftConfig, PeftType

from plait._version import __version__
from plait.options import check_option, did_you_mean, option

__all__ = ["DeltaConfig", "check_option", "did_you_mean", "option"]


@dataclass
class DeltaConfig(PeftConfig):
    """Options that every method shares. A method's config adds its own.

    Raises:
        ValueError: a value out of range, with the option's name, the value and the remedy.
    """

    key: ClassVar[str] = ""  # the registry key, set by plait.register
    delta_cls: ClassVar[Any] = None  # the method's Delta, set likewise
    total_steps_needed: ClassVar[bool] = False

    r: int = option(8, "Rank of the update.", least=1)
    lora_alpha: float = option(16, "Numerator of the scaling s.", above=0)
    lora_dropout: float = option(
        0.0, "Dropout on the update's input, a fraction.", least=0, below=1
    )
    target_modules: list[str] | set[str] | str | None = option(
        None, 'Layers to adapt: name endings, a regular expression, or "all-linear".'
    )
    exclude_modules: list[str] | set[str] | str | None = option(
        None, "Layers to leave out: name endings or a regular expression."
    )
    layers_to_transform: list[int] | int | None = option(
        None, "Indices of the blocks to adapt; None: all."
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the list of blocks, with layers_to_transform."
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Layer name ending or pattern -> another r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Layer name ending or pattern -> other lora_alpha."}
    )
    modules_to_save: list[str] | None = option(
        None, "Other modules to train and save, such as a new head."
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "Rows of the embedding to train beside the update."
    )
    bias: Literal["none", "all", "plait_only"] = option(
        "none", "Biases to train: none, all, or those of the adapted layers."
    )
    gates: list[str | dict[str, Any]] | None = option(
        None, "Further gates on the rank axis: names, or mappings of name and options."
    )
    seed: int = option(0, "Seed of all draws of this adapter.")
    init_weights: bool = option(
        True, "True: the method's start. False: a random start with dW != 0, for tests."
    )
    total_steps: int | None = option(
        None,
        "Planned optimizer steps, for methods with a schedule. plait train and PlaitCallback fill "
        "it in.",
        least=1,
    )
    plait_version: str = option(__version__, "Version that wrote the config; leave it alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[f"PLAIT_{self.key.upper()}"] if self.key else None
        if Version(self.plait_version) > Version(__version__):
            raise ValueError(
                f"This adapter was written by plait {self.plait_version}; {__version__} is "
                "installed. Install that version or a newer one."
            )
        for name in ("target_modules", "exclude_modules"):  # peft's convention: sets, not lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be used with target_modules as a string. "
                "Give target_modules as a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern was given without layers_to_transform. Give both.")
        for f in fields(self):
            check_option(f.name, f.type, f.metadata, getattr(self, f.name))
        for pattern, rank in self.rank_pattern.items():
            check_option(f"rank_pattern[{pattern!r}]", int, {"least": 1}, rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_option(f"alpha_pattern[{pattern!r}]", float, {"above": 0}, alpha)
        if self.delta_cls is not None:
            self.delta_cls.check_gates(self)

    def to_dict(self) -> dict[str, Any]:
        """The options as a dictionary that json can write; sets become sorted lists."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """Build from a saved dictionary; unlike upstream, an unknown key is an error.

        Raises:
            ValueError: another method's config, or keys that this version does not know.
        """
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ValueError(
                    f"{cls.__name__}: {name} is not known to plait {__version__}. "
                    f"{did_you_mean(name, known)} "
                    f"The config was written by plait {kwargs.get('plait_version', 'unknown')}; "
                    "install that version or remove the key."
                )
        peft_type = f"PLAIT_{cls.key.upper()}"
        if str(kwargs.get("peft_type", peft_type)).removeprefix("PeftType.") != peft_type:
            raise ValueError(
                f"This adapter is of type {kwargs['peft_type']}, not {peft_type}. "
                "Load it with the config class of its own method, or by PeftModel.from_pretrained."
            )
        return cls(**kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Read a saved config; Deltas built from it wait for the saved weights (no SVD)."""
        config: Any = super().from_pretrained(*args, **kwargs)
        config.awaits_weights = True
        return config

    # Not fields: whether Deltas built from this config wait for weights from a file; the number of
    # micro-batches in an optimizer step, None until plait.set_micro_batches is called.
    awaits_weights: ClassVar[bool] = False
    micro_batches: ClassVar[int | None] = None
