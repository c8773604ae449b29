"""What an export is asked for: the choices of its caller, checked before anything is loaded."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from plait.options import did_you_mean
from plait.upstream.servers import SERVERS, VLLM_RANKS

ALL = "all"  # --for: no server in particular
LLAMACPP = "llamacpp"

Form = Literal["lora", "merged", "gguf"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What shapes the factors of a plain LoRA, and means nothing for merged weights.
_OF_FACTORS = {
    "rank": "--rank",
    "energy": "--energy",
    "compact": "--compact",
    "dtype": "--dtype",
    "weighted": "--weighted",
    "distill": "--distill",
}


@dataclass(frozen=True)
class Request:
    """The choices of an export; each is described at `export_run`.

    Raises:
        ValueError: choices that mean nothing together, or a value that is not known.
    """

    to: Form
    rank: int | None = None
    energy: float | None = None
    approx: Literal["mean"] | None = None
    server: str = ALL
    compact: bool = False
    dtype: str | None = None
    lossy: bool | None = None
    command: str = ""
    weighted: bool = False
    distill: int = 0
    requantise: bool = False

    @classmethod
    def of(cls, to: Form, *, max_rank: int | None = None, **choices: Any) -> "Request":
        """Return the request of a caller. max_rank: a rank that is checked against the server."""
        if max_rank is None:
            return cls(to, **choices)
        if choices.pop("rank", None) is not None or choices.get("energy") is not None:
            raise ValueError("--max-rank is a largest rank itself. Leave out --rank and --energy.")
        check_max_rank(max_rank, choices.get("server", ALL))
        return cls(to, rank=max_rank, **choices)

    def __post_init__(self) -> None:
        if self.to not in get_args(Form):
            raise ValueError(
                f"--to {self.to} is not known. {did_you_mean(self.to, get_args(Form))}"
            )
        if self.to == "merged":
            used = [flag for name, flag in _OF_FACTORS.items() if getattr(self, name)]
            used += ["--for"] if self.server != ALL else []
            if used:
                verb = "belongs" if len(used) == 1 else "belong"
                raise ValueError(f"{' and '.join(used)} {verb} to --to lora. Leave it out.")
        elif self.requantise:
            raise ValueError("--requantise belongs to --to merged. Leave it out.")
        if self.to == "gguf" and self.server not in (ALL, LLAMACPP):
            raise ValueError(f"--to gguf is for llama.cpp alone. Leave out --for {self.server}.")
        check_server(self.server)
        if self.distill < 0:
            raise ValueError(f"--distill {self.distill}: give 0 or more steps.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"--dtype {self.dtype} is not known. {did_you_mean(self.dtype, DTYPES)}"
            )

    @property
    def sized(self) -> bool:
        """Whether the caller said how much of the update to keep."""
        return self.rank is not None or self.energy is not None

    @property
    def remedy(self) -> str:
        """What to do instead of an export that loses too much."""
        if self.to == "merged":
            return "Export a plain LoRA instead (--to lora)"
        more = "raise or leave out --rank, --energy or --max-rank"
        return (
            "Export it merged instead (--to merged), which holds the whole update; "
            f"{more if self.sized else 'give a larger --rank'}"
        )

    def choice(self, task: str | None) -> dict[str, Any]:
        """Return what merging takes: the task and the approximation, where there are any."""
        given = {"task": task, "approx": self.approx}
        return {name: value for name, value in given.items() if value is not None}


def check_server(server: str) -> None:
    """Raise ValueError for a server that plait does not know."""
    if server not in (ALL, *SERVERS):
        raise ValueError(f"--for {server} is not known. {did_you_mean(server, (ALL, *SERVERS))}")


def check_max_rank(max_rank: int, server: str) -> None:
    """Raise ValueError for a largest rank that a server cannot be started with."""
    if max_rank < 1:
        raise ValueError(f"--max-rank {max_rank}: give 1 or more.")
    if server == "vllm" and max_rank not in VLLM_RANKS:
        known = ", ".join(map(str, VLLM_RANKS))
        raise ValueError(f"--max-rank {max_rank}: vLLM's --max-lora-rank is one of {known}.")
