"""One row for each of peft's own methods, and full fine-tuning, under the names of a run file.

A row holds the config class in `peft`, the options that make it that method, the defaults it shares
with plait's own methods (so that a comparison changes one thing at a time), and what the method
works with: a field `no_...` is None where it works, else the reason that errors and `plait methods
--matrix` show. All options of the config class can be given under their own names. To add a method
of peft's, add a row here and nothing else; this module imports neither torch nor peft.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.upstream.options import Sizes, check_pissa, check_vblora, fill_adalora
from plait.upstream.types import own_targets, peft_types, type_of

# The common defaults of plait's methods (r = 8, alpha = 16), given to every baseline of the family.
_LORA = {"r": 8, "lora_alpha": 16}

# Options of a saved LoRA that make the scale of a layer another one than lora_alpha / r.
UNEVEN = ("rank_pattern", "alpha_pattern", "use_rslora")

# Reasons that several rows share.
_APPROXIMATE = "approximate"
_NO_ADAPTER = "full fine-tuning has no adapter. Use lora"


@dataclass(frozen=True)
class Baseline:
    """One method of peft's, or full fine-tuning.

    What it is. key: the name in `method.name`. config: name of the config class in `peft`, None for
    full fine-tuning. paper: arXiv id. parameters: trained numbers of one layer. rank: the largest
    that dW can have. names: other names that papers use.

    How its config is made. fixed: options that define the method and cannot be given. start: what
    `init_lora_weights` begins with if it defines the method. defaults: options that differ from
    peft's default. renamed: common option -> peft's name of it. complete: fills in what depends on
    other options and on the planned optimizer steps (None if unknown). check_layers: raises
    ValueError if a layer has sizes that the method cannot adapt; gets the options and the layers.

    What it works with; None: it does. no_chain: a chain of adapters. no_federation: averaging over
    clients. no_pairs: optimizers of free pairs (A, B). lora_names: whether its factors are
    parameters named lora_A and lora_B. no_export: an exact plain LoRA. no_quantised: reasons
    against the values "8bit" and "4bit" of `model.quantization`. no_best_checkpoint:
    `training.load_best_model_at_end`. no_early_stopping: `training.early_stopping_patience`.
    no_reference: a frozen copy beside it, which DPO and KTO compare with. mergeable: whether dW can
    go into the base weight.
    """

    key: str
    config: str | None
    paper: str
    formula: str
    summary: str
    parameters: str
    rank: str
    no_chain: str | None
    no_federation: str | None
    no_export: str | None
    no_pairs: str | None = "it has no pairs (A, B) of free factors"
    lora_names: bool = False
    no_quantised: Mapping[str, str] = field(default_factory=dict)
    no_best_checkpoint: str | None = None
    no_early_stopping: str | None = None
    no_reference: str | None = None
    mergeable: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    complete: Callable[[dict[str, Any], int | None], None] | None = None
    check_layers: Callable[[Mapping[str, Any], Sizes], None] | None = None
    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name that papers give the method: here the same as the key."""
        return self.key

    @property
    def exact_export(self) -> bool:
        """Whether a plain LoRA holds the update exactly."""
        return self.no_export is None

    def describes(self, config: Any) -> bool:
        """Whether a config of this row's class has the options that define the method."""
        start = str(getattr(config, "init_lora_weights", ""))
        options = all(getattr(config, name) == value for name, value in self.fixed.items())
        return options and start.startswith(self.start)


class Rows(dict[str, Baseline]):
    """Rows by key; every type of the installed peft has one, too, under `peft:TYPE`."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or type_of(key) is not None

    def __missing__(self, key: str) -> Baseline:
        kind = type_of(key)
        if kind is None:
            raise KeyError(key)
        return _typed(key, kind)

    def get(self, key: Any, default: Any = None) -> Any:
        """The row of a key, or the default."""
        try:
            return self[key]
        except KeyError:
            return default


def _typed(key: str, kind: str) -> Baseline:
    """The row of a type: what no row of its own says is refused."""
    return Baseline(
        key,
        peft_types()[kind],
        "",
        f"as peft's {kind} has it",
        f"peft's method of type {kind}, under its own options.",
        "those of its config",
        "min(in, out)",
        no_chain=f"{kind} has no place in a chain. Use lora",
        no_federation=f"{kind} is neither upstream's LoRA nor a method of plait",
        no_export=_APPROXIMATE,
        no_reference=None,
        defaults={"target_modules": None} if own_targets(kind) else {},
    )


BASELINES: dict[str, Baseline] = Rows(
    (row.key, row)
    for row in (
        Baseline(
            "lora",
            "LoraConfig",
            "2106.09685",
            "dW = (alpha / r) B A",
            "Low-rank adaptation.",
            "r (in + out)",
            "r",
            no_chain=None,
            no_federation=None,
            no_export=None,
            no_pairs=None,
            lora_names=True,
            defaults=_LORA,
        ),
        Baseline(
            "rslora",
            "LoraConfig",
            "2312.03732",
            "dW = (alpha / sqrt(r)) B A",
            "LoRA with a scale that stays stable as the rank grows.",
            "r (in + out)",
            "r",
            no_chain=None,
            no_federation=None,
            no_export=None,
            no_pairs=None,
            lora_names=True,
            fixed={"use_rslora": True},
            defaults=_LORA,
        ),
        Baseline(
            "pissa",
            "LoraConfig",
            "2404.02948",
            "dW = (alpha / r) (B A - B0 A0), B0 A0 the principal part of W",
            "LoRA started at the leading singular vectors; the base holds the residual.",
            "r (in + out)",
            "2 r",
            no_chain="pissa edits the base weight at its start, so a disabled adapter is not the "
            "base. Use lora",
            no_federation="pissa edits the base weight at its start, so the clients' base models "
            "differ. Use lora",
            no_export=None,
            no_pairs=None,
            lora_names=True,
            no_quantised=dict.fromkeys(("8bit", "4bit"), "it splits the base weight"),
            start="pissa",
            defaults={**_LORA, "init_lora_weights": "pissa_niter_4"},
            check_layers=check_pissa,
        ),
        Baseline(
            "dora",
            "LoraConfig",
            "2402.09353",
            "W' = m (W + (alpha / r) B A) / norm(W + (alpha / r) B A), norm per output row",
            "LoRA for the direction of each row, a trained length for its size.",
            "r (in + out) + out",
            "min(in, out)",
            no_chain="dora rescales the rows of the whole weight, so its update is no sum of "
            "links. Use lora",
            no_federation="dora's magnitudes rescale the whole weight, so its update is no s B A. "
            "Use lora",
            no_export=_APPROXIMATE,
            no_pairs="its magnitude depends on dW",
            lora_names=True,
            no_quantised={
                "8bit": "upstream's start leaves an 8-bit layer without its scales (peft 0.21.2)"
            },
            fixed={"use_dora": True},
            defaults=_LORA,
        ),
        Baseline(
            "adalora",
            "AdaLoraConfig",
            "2303.10512",
            "dW = (alpha / r) B diag(E) A, entries of E pruned by importance",
            "LoRA whose rank is moved between layers on a schedule. `r` is target_r, the rank "
            "left at the end on average; init_r is 1.5 r unless given.",
            "init_r (in + out + 1)",
            "init_r",
            no_chain="adalora's schedule spans the training and cannot start anew. Use lora",
            no_federation="adalora moves ranks between layers by each client's own gradients. Use "
            "lora",
            no_export=None,
            no_pairs="its gate E belongs to single ranks",
            no_best_checkpoint="peft 0.21.2 cannot load an adapter of other ranks into the one in "
            "training",
            no_early_stopping="its ranks reach target_r only near the planned last step",
            no_reference="peft 0.21.2 holds one adapter of it that is not frozen",
            defaults={"lora_alpha": 16, "target_r": 8},
            renamed={"r": "target_r"},
            complete=fill_adalora,
        ),
        Baseline(
            "vera",
            "VeraConfig",
            "2310.11454",
            "dW = diag(b) B diag(d) A, A and B frozen and shared by all layers",
            "Two trained vectors a layer around one frozen random pair.",
            "r + out",
            "r",
            no_chain="vera shares its factors between layers, so no layer starts anew by itself. "
            "Use lora",
            no_federation="vera is neither upstream's LoRA nor a method of plait",
            no_export=_APPROXIMATE,
            renamed={"lora_dropout": "vera_dropout"},
        ),
        Baseline(
            "vblora",
            "VBLoRAConfig",
            "2405.15179",
            "dW = B A, rows and columns cut into mixtures of vectors of one shared bank",
            "All factors are top-k mixtures of one trained vector bank.",
            "r (in + out) num_vectors / vector_length, and the bank",
            "r",
            no_chain="vblora's factors share one bank between layers, so no layer starts anew by "
            "itself. Use lora",
            no_federation="vblora is neither upstream's LoRA nor a method of plait",
            no_export=_APPROXIMATE,
            renamed={"lora_dropout": "vblora_dropout"},
            check_layers=check_vblora,
        ),
        Baseline(
            "unilora",
            "UniLoraConfig",
            "2506.00799",
            "dW = B A, all entries of A and B read from one vector theta_d",
            "One trained vector, projected by a fixed sparse map to every factor.",
            "none; theta_d_length for the model",
            "r",
            no_chain="unilora's factors share one vector between layers, so no layer starts anew "
            "by itself. Use lora",
            no_federation="unilora is neither upstream's LoRA nor a method of plait",
            no_export=_APPROXIMATE,
            no_quantised=dict.fromkeys(
                ("8bit", "4bit"),
                "its scales take the base weight's type, which is not a float (peft 0.21.2)",
            ),
            renamed={"lora_dropout": "unilora_dropout"},
        ),
        Baseline(
            "full",
            None,
            "",
            "dW free",
            "Full fine-tuning: every weight of the model is trained, no adapter.",
            "in out",
            "min(in, out)",
            no_chain=_NO_ADAPTER,
            no_federation=_NO_ADAPTER,
            no_export="it has no adapter",
            no_pairs="it trains whole weights",
            no_quantised=dict.fromkeys(("8bit", "4bit"), "packed weights cannot be trained"),
        ),
    )
)


def baseline_of(config: Any) -> Baseline | None:
    """The row of a peft config: the last one of its class whose defining options it has.

    Args:
        config: a PeftConfig, or None for full fine-tuning.

    Returns:
        None for a config of any other method.
    """
    classes = [None] if config is None else [cls.__name__ for cls in type(config).__mro__]
    for name in classes:
        rows = [row for row in BASELINES.values() if row.config == name and row.describes(config)]
        if rows:
            return rows[-1]
    return None


def start_kind(config: Any) -> Literal["drawn", "data", "residual", "other"]:
    """What `init_lora_weights` of a LoraConfig does.

    Returns:
        "drawn": A and B are drawn and the base weight stays, as it does with "data", where they are
        made from training rows; "residual": a part of the base weight moves into the adapter;
        "other": any other start.
    """
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, str) or start in ("gaussian", "orthogonal"):
        return "drawn"
    if start == "eva":
        return "data"
    return "residual" if start.startswith(("pissa", "olora", "corda", "lora_ga")) else "other"


def saved_options(config: Any) -> dict[str, Any]:
    """Return the options of a config as those of its trained adapter are saved.

    An adapter that started with a part of the base weight is saved as a LoRA of twice the rank and
    the same scaling. EVA chooses ranks by layer, and each layer's alpha with them: these are left
    out.
    """
    options = config.to_dict()
    if start_kind(config) == "residual":
        options["r"] *= 2
        options["lora_alpha"] *= 2**0.5 if options.get("use_rslora") else 2
        options["init_lora_weights"] = True
    if options.get("init_lora_weights") == "eva":
        del options["rank_pattern"], options["alpha_pattern"]
    return options
