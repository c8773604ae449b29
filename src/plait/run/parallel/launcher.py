"""Start the processes of a run on this machine, with torch's own launcher."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_STOPPED = 130  # exit code of a run that a signal stopped


def launch(words: Sequence[str], processes: int, on_cpu: bool, verbose: bool = False) -> int:
    """Run `python -m plait WORDS` in so many processes; return the exit code of the run.

    If one dies, the others are stopped, after 30 seconds with SIGKILL. A signal is passed on to all
    of them. Without GPUs the cores are shared out, unless OMP_NUM_THREADS is set.

    on_cpu: train on the CPU, even if there are GPUs.

    Raises ValueError if there are fewer GPUs than processes.
    """
    devices = torch.cuda.device_count()
    if devices and not on_cpu and processes > devices:
        raise ValueError(
            f"--processes {processes} needs a GPU for each, and this machine has {devices}. Start "
            f"{devices}, or train on the CPU: training.use_cpu=true"
        )
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if not devices or on_cpu:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        environment |= {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
    os.environ |= environment
    if not verbose:  # what plait's processes print says it
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"plait-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "plait", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has said why
            return failure.exitcode
        print(
            f"plait train: process {rank} was killed by {signal.Signals(-failure.exitcode).name}, "
            "so all were stopped. Continue with --resume from the last checkpoint.",
            file=sys.stderr,
        )
        return 1
    except SignalException:
        return _STOPPED
    return 0
