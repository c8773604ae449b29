"""`plait federate serve`: run the SuperLink and let the clients' keys in."""

import socket
import time
from pathlib import Path

from plait.run.deploy.certs import CA, SERVER, SERVER_KEY
from plait.run.deploy.deployment import LINK, DeployError, Deployment, Say, is_loopback
from plait.run.deploy.program import TICK, Program, Signals, exit_text

_START = 120.0  # seconds that a SuperLink may take to start


def serve(deployment: Deployment, say: Say, bind: str | None = None) -> None:
    """Run the SuperLink until Ctrl-C or SIGTERM; register keys added to the certs folder meanwhile.

    Args:
        deployment: where it runs. say: called with each message to the user.
        bind: the interface to listen on; None: the host of deploy.address.

    Raises:
        ValueError: certificates are missing, expired, or do not name the host.
        DeployError: the port is taken, or the SuperLink ended by itself.
    """
    bind = bind or deployment.host
    files = {CA: "the CA certificate", SERVER: "the server's certificate", SERVER_KEY: "its key"}
    ca, cert, key = (str(deployment.file(name, use)) for name, use in files.items())
    command = [
        *(deployment.program("flower-superlink"), "--host", bind, "--port", str(deployment.port)),
        *("--ssl-ca-certfile", ca, "--ssl-certfile", cert, "--ssl-keyfile", key),
        *("--database", str(deployment.home / "state.db"), "--enable-supernode-auth"),
    ]
    if deployment.environment()["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1":
        command.append("--disable-runtime-dependency-installation")
    deployment.prepare()
    _check_free(bind, deployment.port)
    with Signals():
        link = Program(command, deployment, deployment.home / "logs" / "superlink.log")
        try:
            _wait_ready(deployment, link)
            say(f"SuperLink: {deployment.address}, log file {link.log}")
            registered: set[Path] = set()
            _register_new(deployment, registered, say)
            if not registered:
                say(f"No client has a key: there is no .pub file in {deployment.certs}.")
            _say_next(deployment, bind, say)
            while link.running():
                _register_new(deployment, registered, say)
                time.sleep(1.0)
            raise DeployError(
                f"the SuperLink ended with exit code {link.process.returncode}. See {link.log}."
            )
        except KeyboardInterrupt:
            say("Stopping the SuperLink. Keys and the list of runs are kept.")
        finally:
            link.stop()


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DeployError(
                f"deploy.address: nothing can listen on {host}:{port} ({error.strerror}). Stop "
                "what does, give another port, or --bind an interface of this machine."
            ) from None


def _wait_ready(deployment: Deployment, link: Program) -> None:
    end = time.monotonic() + _START
    while not deployment.answers():
        if not link.running():
            raise DeployError(
                f"the SuperLink did not start: {exit_text(link.lines())} See {link.log}."
            )
        if time.monotonic() > end:
            raise DeployError(f"the SuperLink is not ready after {_START:g} s. See {link.log}.")
        time.sleep(TICK)


def _register_new(deployment: Deployment, registered: set[Path], say: Say) -> None:
    for path in sorted(set(deployment.certs.glob("*.pub")) - registered):
        try:
            deployment.flwr("supernode", "register", str(path), LINK)
            say(f"registered: {path.stem}")
        except DeployError as error:
            if "already in use" not in str(error):
                say(f"not registered: {path.stem}. {error}")
        registered.add(path)


def _say_next(deployment: Deployment, bind: str, say: Say) -> None:
    if not (deployment.loopback and is_loopback(bind)):
        say(
            f"WARNING: {bind} can be reached from other machines. The Control API authenticates "
            "nobody: whoever reaches this port can submit runs, which are code that every client "
            "executes, and register keys. Keep it inside a private network (VPN)."
        )
    else:
        say(
            "The Control API authenticates nobody: every user of this machine can submit runs, "
            "which are code that every client executes, and register keys."
        )
    say(
        "Next, on each client: plait federate join FILE --client NAME\n"
        "Then, here: plait federate run FILE\n"
        "Ctrl-C ends the SuperLink."
    )
