"""`plait federate join`: run the SuperNode of one client, and restart it when it ends."""

import json
import re
import socket
import time
from pathlib import Path

from plait.run.deploy.certs import CA
from plait.run.deploy.deployment import DeployError, Deployment, Say
from plait.run.deploy.program import TICK, Program, Signals, exit_text

PATIENCE = 90.0  # seconds; a lost SuperNode counts as online for up to 60
_ACCEPTED = re.compile(r"SuperNode ID: (\d+)")
_ACTIVATION = "[code: 2004]"  # the key is unknown, or its last SuperNode counts as online
_SETTINGS = {302, 303, 304, 600, 602, 603, 604, 605, 606}  # exit codes that trying again keeps


def join(
    deployment: Deployment, client: str, trainer: Path, say: Say, patience: float = PATIENCE
) -> None:
    """Run the client's SuperNode until Ctrl-C or SIGTERM, and restart it when it ends.

    Args:
        deployment: where the server is. client: its name, which is also that of its key.
        trainer: the socket of the resident trainer, which gets the orders.
        say: called with each message to the user.
        patience: seconds for which a SuperNode that the server refuses is restarted.

    Raises:
        ValueError: the key is missing or refused, or the server's certificate cannot be trusted.
        DeployError: the SuperNode cannot be started.
    """
    key = deployment.file(client, f"the private key of client {client!r}")
    deployment.prepare()
    log = deployment.home / "logs" / f"node-{client}.log"
    say(f"{client}: connecting to {deployment.address}, log file {log}")
    since, delay = time.monotonic(), 1.0  # since: the last moment without a refusal
    with Signals():
        try:
            while True:
                accepted, last = _node(deployment, client, key, trainer, log, say)
                if accepted:
                    since, delay = time.monotonic(), 1.0
                    say(f"{client}: the SuperNode ended. {last} Starting it again.")
                left = since + patience - time.monotonic()
                _give_up(deployment, key, last, left <= 0)
                if not accepted:
                    say(
                        f"{client}: not accepted, trying again for {left:.0f} s. "
                        f"{_short(key, last)}"
                    )
                time.sleep(max(min(delay, left), 0.0))
                delay = min(2 * delay, 15.0)
        except KeyboardInterrupt:
            say(f"{client}: leaving.")


def _node(
    deployment: Deployment, client: str, key: Path, trainer: Path, log: Path, say: Say
) -> tuple[bool, str]:
    """Run one SuperNode to its end; return whether it was accepted, and what it said of its end."""
    settings = {"client": client, "trainer": str(trainer)}
    node = Program(
        [
            *(deployment.program("flower-supernode"), "--superlink", deployment.address),
            *("--root-certificates", str(deployment.file(CA, "the CA certificate"))),
            *("--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(_free_port())),
            *("--node-config", " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())),
        ],
        deployment,
        log,
    )
    accepted, waiting, shown = False, False, []
    try:
        while True:
            running = node.running()
            for line in node.lines():
                shown.append(line)
                if match := _ACCEPTED.search(line):
                    accepted = True
                    say(f"{client}: accepted, node {match[1]}")
                elif "Connection attempt failed" in line and not waiting | accepted:
                    waiting = not deployment.answers()  # else a part of the program itself
                    if waiting:
                        say(f"{client}: {deployment.address} does not answer; waiting for it")
            del shown[:-40]
            if not running:
                return accepted, exit_text(shown)
            time.sleep(TICK)
    finally:
        node.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _give_up(deployment: Deployment, key: Path, last: str, late: bool) -> None:
    """Raise if another attempt cannot help, or (late) if there have been enough."""
    code = re.search(r"Exit Code: (\d+)", last)
    if "certificate verify failed" in last:
        raise ValueError(deployment.distrust(last.partition("verify failed: ")[2].split("(_")[0]))
    if "[SSL" in last:
        raise ValueError(
            f"{deployment.address}: what answers there does not speak TLS ({last}). Correct "
            "deploy.address."
        )
    if code and (int(code[1]) in _SETTINGS or "[code: 1001]" in last):
        raise ValueError(f"the SuperNode cannot work so: {last}")
    if late and _ACTIVATION in last:
        raise ValueError(
            f"{deployment.address}: the key {key} is refused. It is not registered, or another "
            f"SuperNode with it is online. Put {key.name}.pub into the server's certs folder, or "
            "stop the other one."
        )
    if late and not last:
        raise ValueError(
            f"{deployment.address}: the SuperNode is sent away without a reason. Set the clocks "
            "right: they may differ by 5 minutes."
        )
    if late:
        raise DeployError(f"the SuperNode cannot be started: {last}")


def _short(key: Path, last: str) -> str:
    if _ACTIVATION in last:
        return (
            f"The key {key.name} is not registered, or its last SuperNode was lost and counts as "
            "online for up to 60 s."
        )
    return last
