"""Flower's simulation: all clients of a federated run on this machine, in worker processes of Ray.

    server's part, in the calling thread -> GridExchange -> Flower's thread -> Ray worker -> answer

Ray restarts a worker that dies. Until it is back, Flower may hand it orders that never arrive. A
worker marks each order that it receives by an empty file, so that the exchange can tell an order
whose worker died while answering from one that was never delivered.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from plait.federated.engines.flower.exchange import LIMIT, ORDER, RECORD, REPLY, GridExchange
from plait.federated.engines.workers import Deadlines
from plait.federated.protocol import Answer, Exchange, Reply, failure

# flwr after the exchange, which says what to install where it is missing, and sets its switches.
from flwr.app import ConfigRecord, Context, Message, RecordDict  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip

T = TypeVar("T")
_HELLO = 300.0  # seconds for all clients of a simulation to say their names
_STOP = "stop"  # the file whose presence tells the workers to end


def simulate(
    conduct: Callable[[Exchange], T],
    make: Callable[[], Answer],
    clients: Sequence[str],
    *,
    home: str | Path,
    workers: int = 2,
    threads: int = 1,
    deadlines: Deadlines | None = None,
) -> T:
    """Run a whole federation on this machine, with Flower's simulation on Ray.

    Args:
        conduct: the server's part; it runs in the calling thread and is given the exchange.
        make: builds an answerer for all clients; a picklable function of no arguments. Each worker
            process calls it once and keeps the answerer: private states must be files.
        clients: their names; client number i, by name, is Flower's partition i.
        home: folder that Flower writes to in place of ~/.flwr.
        workers: processes. threads: torch's, in each of them.
        deadlines: how long a reply may take; None: `Deadlines(600, 60)`.

    Returns:
        What `conduct` returned.

    Raises:
        RuntimeError: Ray runs already in this process, or the simulation ended by itself.
        Exception: whatever `conduct` raises, unchanged.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise ValueError(f"engine.{name} = {value}. Give 1 or more.")
    names = sorted(clients)
    with _ray(Path(home), workers) as folder:
        app = ClientApp()
        respond = partial(_respond, make, names, threads, str(folder))
        for register in (app.query, app.train, app.evaluate):
            register()(respond)
        # Ray restarts a worker that dies; the pool itself would leave its place empty.
        resources = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}
        with _runtime(app, len(names), resources, folder) as (grid, check):
            exchange = GridExchange(
                grid,
                names,
                wait=_HELLO,
                deadlines=deadlines,
                ready=True,
                at_once=workers,  # so that no order's time runs while it waits for a worker
                check=check,
                delivered=lambda key: (folder / key).exists(),
            )
            return conduct(exchange)


@contextmanager
def _ray(home: Path, workers: int) -> Iterator[Path]:
    """Run Ray on this machine, quietly; yields a private folder for the marks of its workers.

    Ray opens its own folder to all users, so it gets one inside a folder that stays private. Its
    ports are open to all, so it asks for a token, which lies in the private folder.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f'federated: Ray cannot be imported ({error}). Run pip install "plait[federated]".'
        ) from error
    from flwr.supercore import telemetry

    if ray.is_initialized():
        raise RuntimeError("federated: Ray runs in this process. Call ray.shutdown() first.")
    # flwr reads this variable when it is imported, which may have been before OFF was applied.
    telemetry.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]
    home.mkdir(parents=True, exist_ok=True)
    flower, user_home = logging.getLogger("flwr"), os.path.expanduser("~")
    had_level, had_signal = flower.level, signal.getsignal(signal.SIGTERM)
    folder = Path(tempfile.mkdtemp(prefix="plait-ray-"))
    flower.setLevel(logging.CRITICAL)  # what fails is in the replies
    try:
        with (
            _environment(FLWR_HOME=str(home.absolute()), HOME=str(_ray_home(folder / "home"))),
            _token(folder / "token"),
        ):
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                runtime_env={
                    "env_vars": {
                        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
                        "HOME": user_home,
                    }
                },
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "ray"),
            )
            os.environ["HOME"] = user_home
            try:
                yield folder
            finally:
                ray.shutdown()
    finally:
        flower.setLevel(had_level)
        if had_signal is not None:
            signal.signal(signal.SIGTERM, had_signal)
        shutil.rmtree(folder, ignore_errors=True)


def _ray_home(folder: Path) -> Path:
    """A home folder for Ray's processes, whose file says that this is no cloud.

    Without that file Ray's dashboard process, which always runs, asks the metadata services of
    three clouds where it is, even if its reports are switched off.
    """
    folder.mkdir()
    (folder / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    return folder


@contextmanager
def _token(file: Path) -> Iterator[None]:
    """Let Ray's processes of this simulation ask each other for a token, if this Ray can.

    Ray keeps mode and token from its first look at the environment, and this process may have
    loaded Ray before: then it would answer without the token that its workers ask for.
    """
    try:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore
    except ImportError:  # older than 2.52
        yield
        return

    def look_again() -> None:
        AuthenticationTokenLoader.instance().reset_cache()
        Config.initialize("")

    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file), RAY_AUTH_TOKEN=None):
        look_again()
        yield
    look_again()


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set variables of the environment, None: unset, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextmanager
def _runtime(
    app: ClientApp, nodes: int, resources: dict[str, Any], folder: Path
) -> Iterator[tuple[Grid, Callable[[], None]]]:
    """Run Flower's simulation in a thread; yields its grid and a check that raises if it has ended.

    Flower runs a server program in a thread of its own and replaces its errors. This program hands
    out the grid and waits, so that the caller's thread does the work and raises its own errors.
    """
    from flwr.simulation import run_simulation

    opened, done, faults = SimpleQueue[Grid | None](), threading.Event(), list[BaseException]()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        opened.put(grid)
        done.wait()

    def run() -> None:
        try:
            run_simulation(server, app, nodes, backend_config={"client_resources": resources})
        except BaseException as error:
            faults.append(error)
        finally:
            opened.put(None)

    def check() -> None:
        if not thread.is_alive():
            cause = faults[0] if faults else None
            raise RuntimeError(f"federated: Flower's simulation ended: {cause}") from cause

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        grid = opened.get()
        if grid is None:
            thread.join()
            check()
        assert grid is not None
        yield grid, check
    finally:
        (folder / _STOP).touch()
        done.set()
        thread.join()


_answers: dict[str, Answer] = {}  # folder of the simulation -> answer, built by the first order


def _respond(
    make: Callable[[], Answer],
    names: list[str],
    threads: int,
    folder: str,
    message: Message,
    context: Context,
) -> Message:
    """The client program of a simulation, in a worker process."""
    name = names[int(context.node_config["partition-id"])]
    if message.metadata.message_type == "query":
        data = Reply(name).pack()
    else:
        torch.set_num_threads(threads)
        record: Any = message.content.config_records[RECORD]
        (Path(folder) / message.metadata.message_id).touch()
        try:
            with _watched(record[LIMIT], Path(folder) / _STOP):
                if folder not in _answers:
                    _answers[folder] = make()
                data = _answers[folder](record[ORDER])
        except Exception as error:
            data = failure(name, f"{type(error).__name__}: {error}")
    return Message(RecordDict({RECORD: ConfigRecord({REPLY: data})}), reply_to=message)


@contextmanager
def _watched(limit: float, stop: Path) -> Iterator[None]:
    """End this process after `limit` seconds, or once the file `stop` exists.

    A worker that hangs would never work for another client, and Ray would wait for it at the end.
    """
    done = threading.Event()

    def watch() -> None:
        until = time.monotonic() + limit
        while not done.wait(0.2):
            if time.monotonic() > until or stop.exists():
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
