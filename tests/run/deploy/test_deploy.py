"""Flower's programs: settings and messages without them, and short runs of real processes.

What takes minutes is in test_deploy_long.py.
"""

import datetime
import importlib
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("psutil", reason="needs plait[federated]")

from plait.federated.engines.flower.switches import OFF
from plait.run.deploy import certs
from plait.run.deploy import deployment as deploy
from plait.run.deploy import join as joining
from plait.run.deploy import program as programs
from plait.run.deploy.deployment import DeployConfig, DeployError, Deployment
from plait.run.deploy.join import join
from plait.run.deploy.program import Program, Signals
from plait.run.deploy.serve import serve
from plait.run.deploy.submit import submit
from plait.run.federated.report import client_rows
from plait_cli import main
from tests.support.deployed import Background, cleaned, deployment, toy

# Without processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["h", "h:0", "h:65536", "https://h:1", "a b:1", ":1", "::1:5"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match=r"deploy\.address is .* Give host:port"):
        Deployment(DeployConfig(address=address))


def test_addresses(tmp_path: Path) -> None:
    six = Deployment(DeployConfig(address="[::1]:8443"))
    assert (six.host, six.port, six.loopback) == ("::1", 8443, True)
    assert Deployment(DeployConfig(address="localhost:1")).loopback
    assert not Deployment(DeployConfig(address="10.0.0.7:1")).loopback
    (tmp_path / "home").write_text("")
    with pytest.raises(ValueError, match=r"deploy\.home is .*, which is a file"):
        Deployment(DeployConfig(home=str(tmp_path / "home")))


def test_switches_are_off_unless_the_user_set_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*OFF, *deploy.POLL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    found = Deployment(DeployConfig(home=str(tmp_path))).environment()
    assert found["FLWR_TELEMETRY_ENABLED"] == "1"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"
    assert found["FLWR_HOME"] == str(tmp_path)


def test_a_missing_file_and_missing_programs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Deployment(DeployConfig(certs=str(tmp_path), home=str(tmp_path / "home")))
    with pytest.raises(ValueError, match=r"has no ca\.crt \(the CA certificate\)"):
        own.prepare()
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ImportError, match=r'pip install "plait\[federated\]"'):
        own.program("flwr")


def test_without_psutil_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in ("program", "serve", "join", "submit"):
        monkeypatch.delitem(sys.modules, f"plait.run.deploy.{name}")
    for name in ("serve", "join", "submit"):
        with pytest.raises(ImportError, match=r'Install it with: pip install "plait\[federated\]"'):
            importlib.import_module(f"plait.run.deploy.{name}")


TEXTS = {
    "Exit Code: 305. .. certificate verify failed: certificate has expired (_ssl.c:1006)": (
        "the certificate has expired"
    ),
    "Exit Code: 305. certificate verify failed: certificate is not yet valid (_s": "clocks right",
    "certificate verify failed: IP address mismatch, certificate is not valid for '10.0.0.7'. (_": (
        "does not name the host"
    ),
    "certificate verify failed: unable to get local issuer certificate (_": "is not signed by",
    "Exit Code: 305. [SSL: WRONG_VERSION_NUMBER] wrong version number": "does not speak TLS",
    "Exit Code: 302. Unable to parse the private key file.": "cannot work so",
    "Exit Code: 606. Upgrade": "cannot work so",
}


@pytest.mark.parametrize("last", TEXTS)
def test_what_no_second_try_can_change_is_an_error_at_once(tmp_path: Path, last: str) -> None:
    own = Deployment(DeployConfig(certs=str(tmp_path), home=str(tmp_path / "home")))
    with pytest.raises(ValueError, match=TEXTS[last]):
        joining._give_up(own, tmp_path / "a", last, late=False)


@pytest.mark.parametrize(
    ("last", "error", "text"),
    [
        ("Exit Code: 305. [code: 2004] Failed to activate SuperNode.", ValueError, "is refused"),
        ("", ValueError, "Set the clocks"),
        ("OSError: address in use", DeployError, "cannot be started: OSError"),
    ],
)
def test_what_may_pass_is_an_error_later(
    tmp_path: Path, last: str, error: type[Exception], text: str
) -> None:
    own = Deployment(DeployConfig(certs=str(tmp_path), home=str(tmp_path / "home")))
    joining._give_up(own, tmp_path / "a", last, late=False)
    with pytest.raises(error, match=text):
        joining._give_up(own, tmp_path / "a", last, late=True)


def test_the_answer_is_the_json_at_the_end() -> None:
    assert deploy._last_object('note\n{\n "success": true\n}\n') == {"success": True}
    assert deploy._last_object("{broken\n") is None
    assert deploy._last_object("") is None


def test_clients_in_rounds() -> None:
    rounds = [
        {
            "round": 1,
            "selected": ["a", "b"],
            "accepted": ["a"],
            "rejected": [["b", "non_finite", "NaN"]],
            "failed": {},
            "traffic": {"a": {"up_frame": 10, "down_frame": 20}, "b": {"up_frame": 1}},
        },
        {
            "round": 2,
            "selected": ["a", "b"],
            "accepted": [],
            "rejected": [],
            "failed": {"a": "away", "b": "away"},
            "traffic": {"a": {"up_frame": 0, "down_frame": 5}},
        },
    ]
    assert client_rows(rounds) == [("a", 1, 1, 0, 1, 10, 25), ("b", "-", 1, 1, 1, 1, 0)]


def test_held_signals_come_later() -> None:
    done = []

    def work() -> None:
        with Signals() as signals, signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["whole"]


def test_a_second_signal_does_not_cut_the_cleaning_short() -> None:
    done = []
    with Signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("cleaned")
    assert done == ["cleaned"]


# With processes ---------------------------------------------------------------------------------

needs_flwr = pytest.mark.skipif(
    not (Path(deploy.sys.executable).parent / "flwr").is_file(), reason="flwr is not installed"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A running SuperLink that knows no key."""
    folder = tmp_path_factory.mktemp("deploy")
    own = deployment(folder, ["a"])
    (own.certs / "a.pub").rename(folder / "a.pub")
    with cleaned(folder) as running:
        running.append(Background(folder / "serve.txt", serve, own))
        running[0].wait_for("Next, ")
        assert "authenticates nobody" in running[0].shown
        assert "No client has a key" in running[0].shown
        yield own


@needs_flwr
def test_an_unregistered_key_is_refused_in_the_end(server: Deployment, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=r"the key .*a is refused. It is not registered"):
        join(server, "a", tmp_path / "socket", said.append, patience=0)
    assert not any("accepted" in text for text in said)


@needs_flwr
def test_a_server_of_another_ca_is_not_trusted(server: Deployment, tmp_path: Path) -> None:
    with cleaned(tmp_path):
        own = deployment(tmp_path, ["a"], server.port)
        with pytest.raises(ValueError, match=r"not signed by .*ca\.crt"):
            join(own, "a", tmp_path / "socket", lambda text: None)
        with pytest.raises(ValueError, match=r"not signed by .*ca\.crt"):
            own.answers()


@needs_flwr
def test_a_failing_run_and_one_with_too_few_nodes_have_exit_codes(
    server: Deployment, tmp_path: Path
) -> None:
    app, said = toy(tmp_path / "toy"), []
    assert submit(server, app, said.append, {"mode": "fail"}) == 1
    assert "failed. ServerApp failed with exception: OverflowError: it does not fit" in said[-1]
    assert any("mode fail" in text for text in said)  # the log was streamed
    assert submit(server, app, said.append, {"mode": "few", "nodes": 2}) == 3
    assert "TooFewNodes: fewer than 2 nodes are online" in said[-1]
    found = server.runs()
    assert found is not None
    assert [row["status"] for row in found] == ["finished:failed"] * 2


@needs_flwr
def test_the_port_is_taken(server: Deployment, tmp_path: Path) -> None:
    own = deployment(tmp_path, [], server.port)
    with pytest.raises(DeployError, match="nothing can listen on 127"):
        serve(own, print)


@pytest.fixture
def expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """What looks like a server, with a certificate of the day before yesterday."""
    monkeypatch.setattr(certs, "_SLACK", datetime.timedelta(days=2))
    monkeypatch.setattr(certs, "_check", lambda *given: None)
    certs.make_certs(tmp_path / "certs", ["127.0.0.1"], ["a"], days=-1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "certs" / "server.crt", tmp_path / "certs" / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True)
            except OSError:
                connection.close()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    yield Deployment(
        DeployConfig(
            address=f"127.0.0.1:{port}", certs=str(tmp_path / "certs"), home=str(tmp_path / "home")
        )
    )
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@needs_flwr
def test_an_expired_certificate(expired: Deployment, tmp_path: Path) -> None:
    with cleaned(tmp_path), pytest.raises(ValueError, match="the certificate has expired"):
        join(expired, "a", tmp_path / "socket", lambda text: None)
    with pytest.raises(ValueError, match="the certificate has expired"):
        expired.answers()


@needs_flwr
def test_without_a_server_a_run_is_not_submitted(tmp_path: Path) -> None:
    own = deployment(tmp_path, ["a"])
    with pytest.raises(DeployError, match="does not answer"):
        submit(own, tmp_path, print)
    assert own.runs() is None


# The commands -----------------------------------------------------------------------------------


def test_the_commands_say_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fed.yaml").write_text(
        "method: {name: lora, target_modules: [q_proj]}\n"
        "data: {train: 'builtin:shift?n=8'}\npartition: {clients: [a]}\nlocal: {steps: 1}\n"
        "deploy: {address: '127.0.0.1:1'}\n"
    )
    assert main(["federate", "join", "fed.yaml", "--client", "a"]) == 2
    assert "has no a (the private key of client 'a')" in capsys.readouterr().err
    assert main(["federate", "serve", "fed.yaml", "deploy.certs=other"]) == 2
    assert "/other', which has no ca.crt" in capsys.readouterr().err
    assert main(["federate", "serve", "fed.yaml", "deploy.address=x"]) == 2
    assert "fed.yaml: deploy.address is 'x'" in capsys.readouterr().err
    assert main(["federate", "status", "fed.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "127.0.0.1:1 does not answer." in shown
    assert "no round is complete" in shown
    assert main(["federate", "resume", str(tmp_path), "--local"]) == 2
    assert "no run is here" in capsys.readouterr().err


def test_help_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("certs", "serve", "join", "run", "status", "resume"):
        with pytest.raises(SystemExit):
            main(["federate", action, "--help"])
        assert "plait federate join FILE --client a" in capsys.readouterr().out


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    own = deployment(tmp_path, [])
    own.prepare()
    # The grandchild has a session of its own and does not listen to SIGTERM.
    script = f"setsid sh -c 'trap : TERM; while :; do sleep 0.1; done' {tmp_path} & wait"
    with cleaned(tmp_path):
        program = Program(["sh", "-c", script], own, tmp_path / "log")
        while len(program._known) < 3:
            assert program.running()
            time.sleep(0.05)
        known = [p for p in program._known if p.pid != program.process.pid]
        program.stop(grace=1.0)
        assert not [p for p in known if programs._lives(p)]
