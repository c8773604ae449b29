"""A federation on a network: where Flower's programs live, what they are told, what they answer.

    serve    one SuperLink: the server, and the place where runs are submitted
    join     one SuperNode for one client; it is restarted after a refusal or a lost connection
    submit   one run: start it, show its log, wait for its result

flwr is not imported. Its programs lie beside the Python interpreter; each runs in a session of its
own, and whatever it starts ends with it. They keep everything in `deploy.home`, talk over TLS, know
the clients by their keys, and report to nobody else: see `federated.engines.flower.switches`.

The Control API, the part of the SuperLink where runs are submitted and keys are registered,
authenticates nobody: whoever reaches its port, and has or ignores the CA certificate, can run code
on all clients. The port belongs on the loopback interface or in a private network.

Limits: POSIX. One SuperLink for one `deploy.home`.
"""

import http.client
import ipaddress
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.files import write_atomic
from plait.federated.engines.flower.switches import OFF
from plait.options import option
from plait.run.deploy.certs import CA

Say = Callable[[str], object]

POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}  # seconds; flwr's default of 1 adds up
LINK = "plait"  # the connection's name in flwr's config.toml
_CALL = 120.0  # seconds that a call of flwr may take
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class DeployError(RuntimeError):
    """A program of Flower failed or does not answer, and no change of the config would help."""


@dataclass(kw_only=True)
class DeployConfig:
    """Where a federation's server is."""

    address: str = option("127.0.0.1:8443", "host:port at which clients reach the server.")
    certs: str = option("certs", "Folder of certificates and keys.")
    home: str = option(
        "runs/flower", "Folder in which Flower's programs keep their state and logs."
    )


class Deployment:
    """A checked DeployConfig: its paths, and the environment and arguments of Flower's programs.

    Raises:
        ValueError: the address is not host:port, or `certs` or `home` is a file.
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
        """Return the path of a file in the certs folder; `use` describes it in the error.

        Raises:
            ValueError: the file is missing.
        """
        path = self.certs / name
        if not path.is_file():
            raise ValueError(
                f"deploy.certs is {str(self.certs)!r}, which has no {name} ({use}). Make it with "
                "`plait federate certs`, or copy it from where it was made."
            )
        return path

    def program(self, name: str) -> str:
        """Return the path of one of flwr's programs.

        Raises:
            ImportError: flwr is not installed.
        """
        path = Path(sys.executable).parent / name
        if not path.is_file():
            raise ImportError(
                f"{name} is not beside {sys.executable}: flwr is not installed. Install it with: "
                'pip install "plait[federated]"'
            )
        return str(path)

    def environment(self) -> dict[str, str]:
        """Return the environment of all programs: flwr's switches, its home, its other programs."""
        variables = {**OFF, **POLL, **os.environ}
        variables |= {"FLWR_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        folders = [str(Path(sys.executable).parent), variables.get("PATH", "")]
        return variables | {"PATH": os.pathsep.join(folders)}

    def prepare(self) -> None:
        """Make the home folder, accessible to its user alone, with flwr's config file in it.

        A home that exists keeps its mode; what plait and flwr add to it is private.
        """
        for folder in (self.home, self.home / "logs", self.home / "clients"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = (
            "# Written by plait federate.\n"
            f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\n'
            f"address = {json.dumps(self.address)}\n"
            f"root-certificates = {json.dumps(str(self.file(CA, 'the CA certificate')))}\n"
        )
        write_atomic(self.home / "config.toml", text)

    def flwr(self, *words: str) -> dict[str, Any]:
        """Call `flwr WORDS --format json` and return its answer.

        Raises:
            DeployError: the answer reports a failure (the exit code does not), or there is none.
        """
        try:
            done = subprocess.run(
                [self.program("flwr"), *words, "--format", "json"],
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=_CALL,
                start_new_session=True,
                umask=0o077,
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

        Raises:
            ValueError: its certificate cannot be trusted.
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

    def runs(self) -> list[dict[str, Any]] | None:
        """Return the runs that the SuperLink knows, newest first; None if it does not answer."""
        if not (self.certs / CA).is_file() or not self.answers():
            return None
        self.prepare()
        return self.flwr("list", LINK)["runs"]

    def distrust(self, text: str) -> str:
        """Explain why the server's certificate is refused; text: OpenSSL's reason."""
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
    """Whether a host is an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_colors(text: str) -> str:
    """Remove the escape codes of a terminal."""
    return _ANSI.sub("", text)


def _plain(text: str) -> str:
    """Remove colours and frames, and put the text on one line."""
    return " ".join(re.sub(r"[─│╭╮╰╯✅❌]", " ", without_colors(text)).split())


def _last_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object at the end of a text."""
    for start in (match.start() for match in re.finditer(r"^\{", text, re.MULTILINE)):
        try:
            answer = json.loads(text[start:])
        except ValueError:
            continue
        return answer if isinstance(answer, dict) else None
    return None
