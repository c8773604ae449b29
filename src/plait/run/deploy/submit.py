"""`plait federate run`: write the Flower app of a run, submit it, show its log, await its end."""

import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.run.deploy.deployment import LINK, DeployError, Deployment, Say
from plait.run.deploy.program import TICK, Program, Signals

TOO_FEW = 3  # exit code: too few updates or nodes
_APP = Path(__file__).with_name("app")


def write_app(folder: str | Path, config: str | Path) -> Path:
    """Write the Flower app of a run, for `flwr run FOLDER`; return the folder.

    Args:
        folder: where to write it; files of an earlier app are replaced. config: the run's YAML,
            which travels to every node unchanged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        shutil.copyfile(_APP / name, folder / name)
    shutil.copyfile(config, folder / "run.yaml")
    return folder


def submit(
    deployment: Deployment, app: Path, say: Say, settings: Mapping[str, bool | int | str] = {}
) -> int:
    """Submit a run and follow it to its end; Ctrl-C stops it.

    Args:
        deployment: where the server is. app: folder of the Flower app.
        say: called with each message to the user, and each line of the run's log.
        settings: of the app's config; they replace those of its pyproject.toml.

    Returns:
        The exit code: 0: completed, 1: failed or stopped, 3: too few updates or nodes, 130: Ctrl-C.

    Raises:
        DeployError: the SuperLink does not answer.
    """
    deployment.prepare()
    if not deployment.answers():
        raise DeployError(
            f"{deployment.address} does not answer. Start it with `plait federate serve FILE`."
        )
    options = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    run = ""
    with Signals() as signals:
        try:
            with signals.held():  # else a run could start whose id is lost
                words = ["run", str(app), LINK, *(["-c", options] if options else [])]
                run = deployment.flwr(*words)["run-id"]
            say(f"run {run}")
            return _follow(deployment, run, say)
        except KeyboardInterrupt:
            if run:
                say(f"Stopping run {run}.")
                _stop(deployment, run, say)
            return 130


def _follow(deployment: Deployment, run: str, say: Say) -> int:
    """Show the log of a run to its end; return the exit code."""
    log = deployment.home / "logs" / f"run-{run}.log"
    shown = 0
    while True:
        stream = Program(
            [deployment.program("flwr"), "log", run, LINK, "--stream"], deployment, log
        )
        number = 0
        try:
            running = True
            while running:
                running = stream.running()
                for line in stream.lines():
                    number += 1
                    if number > shown:  # an interrupted stream restarts from the first line
                        shown = number
                        say(line)
                time.sleep(TICK)
        finally:
            stream.stop()
        state = _state(deployment, run)
        status, details = state["status"], state["status-details"].removeprefix("N/A")
        if status.startswith("finished"):
            break
        time.sleep(1.0)
    if status == "finished:completed":
        say(f"run {run}: completed")
        return 0
    say(f"run {run}: {status.partition(':')[2] or status}. {details}".rstrip())
    return TOO_FEW if re.search(r"\bTooFew\w*: ", details) else 1


def _state(deployment: Deployment, run: str) -> dict[str, Any]:
    """Return the SuperLink's record of a run; retry for up to a minute if it does not answer."""
    end = time.monotonic() + 60.0
    while True:
        try:
            return deployment.flwr("list", LINK, "--run-id", run)["runs"][0]
        except DeployError:
            if time.monotonic() > end:
                raise
        time.sleep(2.0)


def _stop(deployment: Deployment, run: str, say: Say) -> None:
    try:
        deployment.flwr("stop", run, LINK)
    except DeployError as error:
        say(f"It may still run: {error} See `plait federate status FILE`.")
