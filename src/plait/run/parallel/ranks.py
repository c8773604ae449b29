"""The group of the processes of a run: joining it, and what its members agree on.

One process is a group of its own, in which nothing is exchanged. What is exchanged here are JSON
and numbers over gloo on the CPU, whatever carries the gradients; nothing is pickled.
"""

import builtins
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from plait.run.config import RunConfig
from plait.run.parallel.place import Place, find_place

_SECONDS = 1800  # that a process waits for the others, unless training.ddp_timeout says otherwise
_TRUE = ("1", "true", "yes")  # of a variable of the environment
_control: Any = None  # the gloo group of what is agreed on


def size() -> int:
    """The number of processes that joined."""
    return 1 if _control is None else dist.get_world_size()


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if _control is None else dist.get_rank()


def is_first() -> bool:
    """Whether this process makes the folder, writes and prints."""
    return rank() == 0


def join(cfg: RunConfig) -> None:
    """Join the processes that a launcher started, if it did; a second call changes nothing.

    Raises ValueError if they are not as many as parallel.processes, or cannot meet, and where an
    accelerator's backend is not the one that was asked for.
    """
    global _control
    place, asked = find_place() or Place(), cfg.parallel.processes
    if asked is not None and asked != place.size:
        started = "1 process was" if place.size == 1 else f"{place.size} processes were"
        error = ValueError(
            f"{cfg.source.at('parallel.processes')} is {asked}, and {started} started. Start "
            f"{asked} with the launcher, or let plait do it: plait train FILE --processes {asked}"
        )
        raise told(error)
    if place.size == 1 or _control is not None:
        return
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        if os.environ.get(name, "").lower() in _TRUE:
            raise told(
                ValueError(
                    f"parallel: the launcher set {name}, and the run file decides how a model is "
                    "sharded. Set parallel.kind to fsdp2 or ddp and launch without it."
                )
            )
    seconds = timedelta(seconds=cfg.training.get("ddp_timeout") or _SECONDS)
    backend = cfg.training.get("ddp_backend")
    if on_accelerator(cfg):
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"parallel: process {place.rank} is number {place.local_rank + 1} on this machine, "
                f"which has {torch.cuda.device_count()} GPUs. Start one process for each GPU, or "
                "set training.use_cpu: true."
            )
        torch.cuda.set_device(place.local_rank)
        backend = backend or "cuda:nccl,cpu:gloo"
    backend = backend or "gloo"
    try:
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=seconds)
        control = dist.new_group(backend="gloo", timeout=seconds)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"parallel: process {place.rank} of {place.size} could not join the others at {where} "
            f"({reason}). Check that all were started and that the address is the machine of the "
            "first."
        ) from error
    if dist.get_world_size() != place.size:
        raise ValueError(
            f"parallel: {place.size} processes were started, and torch's process group has "
            f"{dist.get_world_size()}. Start each run with a launcher of its own."
        )
    _control = control


def on_accelerator(cfg: RunConfig) -> bool:
    """Whether a run's processes train on GPUs."""
    by_environment = os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE
    return torch.cuda.is_available() and not (cfg.training.get("use_cpu") or by_environment)


def leave() -> None:
    """Leave the group, at the end of a program."""
    global _control
    if _control is not None:
        _control = None
        dist.destroy_process_group()


# What is exchanged ------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in their order; a value is anything that JSON holds."""
    if _control is None:
        return [value]
    sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(sent)]), group=_control)
    most = int(max(lengths))
    padded = torch.cat([sent, torch.zeros(most - len(sent), dtype=torch.uint8)])
    received = [torch.zeros(most, dtype=torch.uint8) for _ in range(size())]
    dist.all_gather(received, padded, group=_control)
    return [
        json.loads(bytes(one[: int(length)].numpy()))
        for one, length in zip(received, lengths, strict=True)
    ]


def of_first(value: Any) -> Any:
    """Return the first process' value."""
    return gather(value)[0]


def any_of(flag: bool) -> bool:
    """Whether the flag of any process is set."""
    return bool(total(int(flag)))


def total(number: int) -> int:
    """The sum over all processes."""
    if _control is None:
        return number
    summed = torch.tensor([number])
    dist.all_reduce(summed, group=_control)
    return int(summed)


def add_up(rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Add up arrays of all processes: each holds zeros where another one has the values."""
    if _control is not None:
        for values in rows.values():
            dist.all_reduce(torch.from_numpy(values), group=_control)
    return rows


# Errors -----------------------------------------------------------------------------------------


@contextmanager
def agreed() -> Iterator[None]:
    """Let an error of one process end all of them, with one message.

    Nothing may be exchanged within the context: all meet at its end. A process whose own part went
    well raises an error of the same built-in class with the text of the first that failed.
    """
    if _control is None:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    kind = next(c for c in type(mine).__mro__ if c.__module__ == "builtins").__name__
    number = getattr(mine, "errno", None)
    found = gather(None if mine is None else [kind, str(mine), number])
    failed = [i for i, one in enumerate(found) if one is not None]
    if not failed:
        return
    if mine is not None:
        raise told(mine)
    kind, text, number = found[failed[0]]
    error: Exception = getattr(builtins, kind)(f"process {failed[0]}: {text}")
    if isinstance(error, OSError):
        error.errno = number
    raise told(error)


_AGREED = "plait_agreed"


def told(error: Exception) -> Exception:
    """Mark an error as one that all processes raise."""
    setattr(error, _AGREED, True)
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise this error, so that the first one alone says it."""
    return getattr(error, _AGREED, False)


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and size() > 1 and any(sign in text for sign in _LOST)


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")


def check_same(what: str, value: Any, remedy: str) -> None:
    """Raise ValueError on all processes if a value is not the same on all of them."""
    values = gather(value)
    if any(one != values[0] for one in values):
        other = next(i for i, one in enumerate(values) if one != values[0])
        error = ValueError(
            f"parallel: {what} is {values[0]!r:.80} for process 0 and {values[other]!r:.80} for "
            f"process {other}. {remedy}"
        )
        raise told(error)
