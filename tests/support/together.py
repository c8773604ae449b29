"""Runs of `plait train` in several processes that share one group.

    python tests/support/together.py JOBS SIZE

JOBS is a JSON file: a list of {config, resume, rank, step, act, only, shard}. In step `step`,
process `rank` does what `act` says. only: what some processes change of the config. shard:
accelerate's FSDP2 works on CPUs, too. Each process writes the errors of its runs, null where there
is none, into JOBS.RANK. This process forks into the others, so libraries are imported once.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState


def stop(model: Any) -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def break_weight(model: Any) -> None:
    """Make the loss of this process NaN, after what all have agreed on."""
    rows = model.get_input_embeddings().weight
    rows.data[:] = float("nan")


@contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Let accelerate turn FSDP on for CPUs as it does for GPUs; it is DDP there otherwise."""
    shared, real = PartialState._shared_state, AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind = shared.get("distributed_type")
        if kind == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        try:
            real(self, *args, **kwargs)
        finally:
            if kind is not None:
                shared["distributed_type"] = kind

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = real


ACTS: dict[str, Callable[[Any], None]] = {"stop": stop, "nan": break_weight}


def run_jobs(file: Path, rank: int, size: int) -> None:
    """Run all jobs as one of the processes."""
    from plait.run import train as train_module
    from plait.run.config import config_from_dict
    from plait.run.parallel import ranks
    from plait.run.train import train
    from tests.support.runs import At

    torch.set_num_threads(1)
    jobs = json.loads(file.read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(120 + 30 * len(jobs), exit=True)  # a hang is an error
    errors: list[str | None] = []
    train_module.write_loss_curve = lambda folder, title: None  # it takes a third of a short run
    for job in jobs:
        callbacks = []
        if job.get("rank") == rank:
            callbacks = [At(job["step"], ACTS[job["act"]])]
        config = job["config"]
        for key, value in job.get("only", {}).get(str(rank), {}).items():
            config[key] |= value
        try:
            with sharding_on_cpus() if job.get("shard") else nullcontext():
                train(config_from_dict(config), job.get("resume", False), callbacks)
            errors.append(None)
        except (Exception, KeyboardInterrupt) as error:
            if not (isinstance(error, KeyboardInterrupt) or ranks.is_agreed(error)):
                raise  # the others wait: they end with this process
            errors.append(f"{type(error).__name__}: {error}")
    Path(f"{file}.{rank}").write_text(json.dumps(errors), encoding="utf-8")


def main() -> int:
    """Fork into the processes; the first one stays."""
    file, size = Path(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # what transformers set in the process that this one was forked from
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                run_jobs(file, rank, size)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main())
