"""Programs that run beside this one and end with everything they started, and the signals to it."""

import re
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from plait.run.deploy.deployment import Deployment, without_colors

try:
    import psutil
except ImportError as error:
    raise ImportError(
        f"federate: psutil cannot be imported ({error}). Install it with: "
        'pip install "plait[federated]"'
    ) from error

TICK = 0.2  # seconds between two looks at a program


class Program:
    """A program with everything it starts, and one log file for all of it; they end together.

    Its children may lead sessions of their own, and are orphaned when it dies. So every call of
    `running` notes the processes that it has started by then.
    """

    def __init__(self, command: Iterable[str], deployment: Deployment, log: Path):
        self.log = log
        with log.open("ab") as file:
            self._offset = file.tell()
            self.process = subprocess.Popen(
                list(command),
                env=deployment.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; we end the program
                umask=0o077,  # its state and its logs are its user's alone
            )
        self._known: set[psutil.Process] = set()
        self._rest = b""

    def running(self) -> bool:
        """Whether the program itself runs."""
        with suppress(psutil.Error):
            self._known.add(psutil.Process(self.process.pid))
        for process in list(self._known):
            with suppress(psutil.Error):
                self._known.update(process.children(recursive=True))
        return self.process.poll() is None

    def lines(self) -> list[str]:
        """Return the complete lines added to its log since the last call, without colours."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *complete, self._rest = (self._rest + new).split(b"\n")
        return [without_colors(line.decode(errors="replace")) for line in complete]

    def stop(self, grace: float = 10.0) -> None:
        """Terminate it, kill it after `grace` seconds, then do the same to what it started."""
        if self.running():
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        children = [p for p in self._known if p.pid != self.process.pid]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in filter(_lives, children):
                with suppress(psutil.Error):
                    end(process)
            until = time.monotonic() + 2.0
            while any(map(_lives, children)) and time.monotonic() < until:
                time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def exit_text(lines: list[str]) -> str:
    """Extract from a log what a program of flwr reported about its end; "" if nothing."""
    report: list[str] = []
    for line in lines:
        if "Exit Code:" in line:
            report = [line[line.index("Exit Code:") :].strip() + "."]
        elif report and not line.strip():
            break
        elif report:
            report.append(line.strip())
    if not report:  # a traceback, or argparse
        report = [line.strip() for line in lines if re.match(r"\S*(Error|error)\b", line)][-1:]
    return " ".join(report)


class Signals:
    """Within the `with`, Ctrl-C, SIGTERM and a closed terminal all raise KeyboardInterrupt.

    Only the first one raises. Later ones are ignored, so that they cannot cut the clean-up short;
    the clean-up has time limits of its own. Within `held` the first one waits.
    """

    def __init__(self) -> None:
        self._held = self._waiting = self._done = False

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._act) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _act(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._waiting = True
        elif not self._done:
            self._done = True
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay the signal until the block has ended."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            self._done = True
            raise KeyboardInterrupt
