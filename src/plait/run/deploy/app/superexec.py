"""Flower's SuperExec, with a warm start of the client programs: it forks them.

    SuperNode -> SuperExec -> fork server, which has imported flwr -> a client program per message

flwr 1.40 and 1.41 start the command flwr-clientapp for every message, which imports flwr for longer
than most of plait's messages take. A fork is often there before its message is, and asks again
after 0.05 s and not after 1 s. This program takes the arguments of flower-superexec; it is started
by `supernode.py`.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from typing import Any

from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supernode.runtime.run_clientapp import run_clientapp

_pull: Any = pull_and_inflate_object_from_tree
_pull.__kwdefaults__["initial_backoff"] = 0.05  # seconds, doubled each time; in the forks too


class ForkExecutor(SubprocessExecutor):
    """Starts client programs by a fork, all others as flwr does."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        # With these two the fork server knows all that this file imports, too.
        self.context.set_forkserver_preload(
            [SubprocessExecutor.__module__, run_clientapp.__module__]
        )
        forkserver.ensure_running()  # it imports them while nobody waits

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a program."""
        if spec.task_type is not TaskType.CLIENT_APP:
            return super().launch(spec)
        given = {
            "runtime_api_address": spec.runtime_api_address,
            "token": spec.token,
            "insecure": spec.insecure,
            "certificates": validate_and_resolve_root_certificates(
                spec.root_certificates_path, spec.insecure
            ),
            "parent_pid": spec.parent_pid,
            "runtime_dependency_install": spec.runtime_dependency_install,
        }
        # daemon: it is told to end with this program, which does not wait for it
        self.context.Process(target=run_clientapp, kwargs=given, daemon=True).start()
        return LaunchResult.accepted()


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a fork server has one thread; numpy starts more
    from flwr.supercore.cli import flower_superexec  # 0.5 s that client programs do without
    from flwr.supercore.superexec import run_superexec

    module: Any = run_superexec
    if not hasattr(module, "get_executor"):
        raise RuntimeError("flwr's run_superexec has no get_executor. Install flwr < 1.42.")
    module.get_executor = lambda *given, **options: ForkExecutor()
    sys.exit(flower_superexec())
