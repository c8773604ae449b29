"""A federation on a network: Flower's programs, what they are told, and what they answer.

    serve    one SuperLink: the server, and the place where runs are submitted
    join     one SuperNode for one client; it is started again when it was refused or lost
    submit   one run: start, show its log, wait for what really became of it

flwr is not imported. Its programs are those beside the Python interpreter; each is the head of a
session of its own, and what it starts ends with it. They keep everything in `deploy.home`, talk
over TLS, know their clients by keys, and send nothing to anybody else: see `federated.switches`.

Nobody is authenticated at the Control API, the part of the SuperLink where runs are submitted and
keys are registered: whoever reaches its port, and has or ignores the CA certificate, can run code
on all clients. The port belongs on the loopback interface or in a private network.

Limits: POSIX. One SuperLink for one `deploy.home`.
"""

import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import psutil

from plait.core.files import write_atomic
from plait.federated.engines.switches import OFF
from plait.run.deploy.certs import CA, SERVER, SERVER_KEY

Say = Callable[[str], object]

POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # seconds; 1 by default, twice in a message
_SUPERNODE = Path(__file__).with_name("app") / "supernode.py"
LINK = "plait"  # the connection's name in flwr's config.toml
PATIENCE = 90.0  # seconds; a lost SuperNode counts as online for up to 60
TOO_FEW = 3  # exit code: too few updates or nodes
_START = 120.0  # seconds that a SuperLink may take to start
_CALL = 120.0  # seconds that a call of flwr may take
_TICK = 0.2
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class DeployError(RuntimeError):
    """A program of Flower failed, or does not answer; nothing that a setting would put right."""


@dataclass(kw_only=True)
class DeployConfig:
    """Where a federation's server is. address: host:port that clients reach it by. certs: folder
    of certificates and keys. home: folder of Flower's programs: their state, settings and logs.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}  # pydantic's: an error
    address: str = "127.0.0.1:8443"
    certs: str = "certs"
    home: str = "runs/flower"


class Deployment:
    """A checked DeployConfig: its paths, and the programs' environment and arguments.

    Raises ValueError for an address that is no host:port, or a home that is a file.
    """

    def __init__(self, config: DeployConfig):
        self.address = config.address
        self.host, self.port = _address(config.address)
        self.certs = Path(config.certs).expanduser().absolute()
        self.home = Path(config.home).expanduser().absolute()
        for key, path in (("certs", self.certs), ("home", self.home)):
            if path.exists() and not path.is_dir():
                raise ValueError(f"deploy.{key} is {str(path)!r}, which is a file. Give a folder.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)

    def file(self, name: str, use: str) -> Path:
        """A file of the certs folder.

        Raises ValueError where it is missing.
        """
        path = self.certs / name
        if not path.is_file():
            raise ValueError(
                f"deploy.certs is {str(self.certs)!r}, which has no {name} ({use}). Make it with "
                "`plait federate certs`, or copy it from where it was made."
            )
        return path

    def program(self, name: str) -> str:
        """The path of one of flwr's programs.

        Raises ImportError where flwr is not installed.
        """
        path = Path(sys.executable).parent / name
        if not path.is_file():
            raise ImportError(
                f"{name} is not beside {sys.executable}: flwr is not installed. Install it with: "
                'pip install "plait[federated]"'
            )
        return str(path)

    def environment(self) -> dict[str, str]:
        """Of all programs: flwr's switches, its home, and its other programs on the path."""
        found = {**OFF, **POLL, **os.environ, "FLWR_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", "")])
        return found

    def prepare(self) -> None:
        """Make the home, for its user alone, and flwr's config file in it."""
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)
        text = (
            "# Written by plait federate.\n"
            f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\n'
            f"address = {json.dumps(self.address)}\n"
            f"root-certificates = {json.dumps(str(self.file(CA, 'the CA certificate')))}\n"
        )
        write_atomic(self.home / "config.toml", text)

    def flwr(self, *words: str) -> dict[str, Any]:
        """Call `flwr WORDS --format json`; return its answer.

        Raises:
            DeployError: it says that it failed (its exit code does not), or says nothing.
        """
        try:
            done = subprocess.run(
                [self.program("flwr"), *words, "--format", "json"],
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=_CALL,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise DeployError(f"flwr {words[0]}: no answer in {_CALL:g} seconds.") from None
        answer = _last_object(done.stdout)
        if answer is None:
            raise DeployError(
                f"flwr {words[0]}: exit code {done.returncode}. {_plain(done.stdout + done.stderr)}"
            )
        if not answer.get("success"):
            raise DeployError(f"flwr {words[0]}: {_plain(str(answer.get('error-message')))}")
        return answer

    def answers(self) -> bool:
        """Whether the SuperLink answers.

        Raises ValueError for a certificate that is not to be trusted.
        """
        context = ssl.create_default_context(cafile=self.file(CA, "the CA certificate"))
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=5, context=context)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except ssl.SSLCertVerificationError as error:
            raise ValueError(self.distrust(error.verify_message)) from None
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def distrust(self, text: str) -> str:
        """What is wrong with the server's certificate; text: as OpenSSL says it."""
        lower, again = text.lower(), "Make new ones with `plait federate certs`"
        if "expired" in lower:
            return f"{self.address}: the certificate has expired. {again}, for server and clients."
        if "not yet valid" in lower:
            return f"{self.address}: the certificate is not valid yet. Set the clocks right."
        if "mismatch" in lower:
            return (
                f"{self.address}: the certificate does not name the host {self.host!r} ({text}). "
                f"{again} and --host {self.host}, or correct deploy.address."
            )
        return (
            f"{self.address}: the certificate is not signed by {self.certs / CA} ({text}). Copy "
            f"{CA} from the server's certs folder."
        )


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\s/\[\]]+)):(\d{1,5})", text)
    port = int(match[3]) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise ValueError(
            f"deploy.address is {text!r}. Give host:port, with a port from 1 to 65535, such as "
            "127.0.0.1:8443 or [::1]:8443."
        )
    return match[1] or match[2], port


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as only it sees itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _plain(text: str) -> str:
    """Without colours and frames, on one line."""
    return " ".join(re.sub(r"[─│╭╮╰╯✅❌]", " ", _ANSI.sub("", text)).split())


def _last_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text ends with."""
    for start in (match.start() for match in re.finditer(r"^\{", text, re.MULTILINE)):
        try:
            found = json.loads(text[start:])
        except ValueError:
            continue
        return found if isinstance(found, dict) else None
    return None


# Processes --------------------------------------------------------------------------------------


class Program:
    """A program and all that it starts, with one log file; they end together.

    What it starts may sit in sessions of their own, and be orphaned when it dies: `running` looks
    who is there and remembers them.
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
                start_new_session=True,  # Ctrl-C is ours; we tell it when to end
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
        """The whole lines that its log has got since the last call, without colours."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [_ANSI.sub("", line.decode(errors="replace")) for line in whole]

    def stop(self, grace: float = 10.0) -> None:
        """End it, in order if it does so within `grace` seconds, and then whatever is left."""
        if self.running():
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        left = [p for p in self._known if p.pid != self.process.pid]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in filter(_lives, left):
                with suppress(psutil.Error):
                    end(process)
            until = time.monotonic() + 2.0
            while any(map(_lives, left)) and time.monotonic() < until:
                time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; an orphan that has ended and that nobody waits for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Signals:
    """Ctrl-C, SIGTERM and a closed terminal all raise KeyboardInterrupt, within the `with`.

    The first one does. Later ones are ignored: what runs then cleans up, and has its own limits.
    held: while it is, the first one waits.
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
        """Let what must not be cut short come to its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            self._done = True
            raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# The server -------------------------------------------------------------------------------------


def serve(deployment: Deployment, say: Say, bind: str | None = None) -> None:
    """Run the SuperLink until Ctrl-C or SIGTERM; keys that are new in the certs folder get in.

    bind: the interface to listen on, where it is not the address' host.

    Raises:
        ValueError: certificates are missing, expired, or do not name the host.
        DeployError: the port is taken, or the SuperLink ended by itself.
    """
    bind = bind or deployment.host
    uses = {CA: "the CA certificate", SERVER: "the server's certificate", SERVER_KEY: "its key"}
    ca, cert, key = (str(deployment.file(name, use)) for name, use in uses.items())
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
                f"the SuperLink did not start: {_exit_text(link.lines())} See {link.log}."
            )
        if time.monotonic() > end:
            raise DeployError(f"the SuperLink is not ready after {_START:g} s. See {link.log}.")
        time.sleep(_TICK)


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


# A client ---------------------------------------------------------------------------------------

_ACCEPTED = re.compile(r"SuperNode ID: (\d+)")
_ACTIVATION = "[code: 2004]"  # the key is unknown, or its last SuperNode counts as online
_SETTINGS = {302, 303, 304, 600, 602, 603, 604, 605, 606}  # exit codes that trying again keeps


def join(
    deployment: Deployment, client: str, trainer: Path, say: Say, patience: float = PATIENCE
) -> None:
    """Run the client's SuperNode until Ctrl-C or SIGTERM, and start it again when it ends.

    trainer: the address of the resident trainer, which gets the orders. patience: seconds for which
    a SuperNode that is refused tries again.

    Raises:
        ValueError: the key is missing or refused, or the server's certificate is not to be trusted.
        DeployError: the SuperNode cannot be started.
    """
    key = deployment.file(client, f"the private key of client {client!r}")
    deployment.prepare()
    log = deployment.home / "logs" / f"node-{client}.log"
    say(f"{client}: connecting to {deployment.address}, log file {log}")
    since, delay = time.monotonic(), 1.0  # since: when it was not refused
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
    """Run one SuperNode to its end; return whether it was accepted, and its last words."""
    settings = {"client": client, "trainer": str(trainer)}
    node = Program(
        [
            *(sys.executable, "-P", str(_SUPERNODE), "--superlink", deployment.address),
            *("--root-certificates", str(deployment.file(CA, "the CA certificate"))),
            *("--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(_free_port())),
            *("--node-config", " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())),
        ],
        deployment,
        log,
    )
    accepted, waiting, said = False, False, []
    try:
        while True:
            running = node.running()
            for line in node.lines():
                said.append(line)
                if match := _ACCEPTED.search(line):
                    accepted = True
                    say(f"{client}: accepted, node {match[1]}")
                elif "Connection attempt failed" in line and not waiting | accepted:
                    waiting = not deployment.answers()  # else it is the program's own part
                    if waiting:
                        say(f"{client}: {deployment.address} does not answer; waiting for it")
            del said[:-40]
            if not running:
                return accepted, _exit_text(said)
            time.sleep(_TICK)
    finally:
        node.stop()


def _exit_text(lines: list[str]) -> str:
    """What a program of flwr said of its end, "" for nothing."""
    found: list[str] = []
    for line in lines:
        if "Exit Code:" in line:
            found = [line[line.index("Exit Code:") :].strip() + "."]
        elif found and not line.strip():
            break
        elif found:
            found.append(line.strip())
    if not found:  # a traceback, or argparse
        found = [line.strip() for line in lines if re.match(r"\S*(Error|error)\b", line)][-1:]
    return " ".join(found)


def _give_up(deployment: Deployment, key: Path, last: str, late: bool) -> None:
    """Raise where trying again cannot help, or has gone on for long enough."""
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


# A run ------------------------------------------------------------------------------------------


def submit(
    deployment: Deployment, app: Path, say: Say, settings: Mapping[str, bool | int | str] = {}
) -> int:
    """Run an app; return 0: completed, 1: failed or stopped, 3: too few updates or nodes, 130.

    settings: of the app's config, instead of those in its pyproject.toml. Ctrl-C stops the run.

    Raises DeployError where the SuperLink does not answer.
    """
    deployment.prepare()
    if not deployment.answers():
        raise DeployError(
            f"{deployment.address} does not answer. Start it with `plait federate serve FILE`."
        )
    given = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    run = ""
    with Signals() as signals:
        try:
            with signals.held():  # else there would be a run that nobody knows of
                words = ["run", str(app), LINK, *(["-c", given] if given else [])]
                run = deployment.flwr(*words)["run-id"]
            say(f"run {run}")
            return _follow(deployment, run, say)
        except KeyboardInterrupt:
            if run:
                say(f"Stopping run {run}.")
                _stop(deployment, run, say)
            return 130


def _follow(deployment: Deployment, run: str, say: Say) -> int:
    """Show a run's log to its end; return its exit code."""
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
                    if number > shown:  # a stream that was cut off begins anew
                        shown = number
                        say(line)
                time.sleep(_TICK)
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
    """What the SuperLink says of a run; it may be away for a minute."""
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


def runs(deployment: Deployment) -> list[dict[str, Any]] | None:
    """The runs that the SuperLink knows of, newest first; None where it does not answer."""
    if not (deployment.certs / CA).is_file() or not deployment.answers():
        return None
    deployment.prepare()
    return deployment.flwr("list", LINK)["runs"]


def client_rows(rounds: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Of each client: name, round of its last update and answer, how often it was rejected and
    failed, bytes up and down. An update that was rejected is an answer, a failure is none.

    rounds: the lines of metrics.jsonl of the kind "round".
    """
    found: dict[str, list[Any]] = {}
    for row in rounds:
        rejected = [client for client, _, _ in row["rejected"]]
        for name in row["selected"]:
            own = found.setdefault(name, ["-", "-", 0, 0, 0, 0])
            if name in row["accepted"]:
                own[0] = row["round"]
            if name not in row["failed"]:
                own[1] = row["round"]
            own[2] += rejected.count(name)
            own[3] += name in row["failed"]
            traffic = row["traffic"].get(name, {})
            own[4] += traffic.get("up_frame", 0)
            own[5] += traffic.get("down_frame", 0)
    return [(name, *own) for name, own in sorted(found.items())]
