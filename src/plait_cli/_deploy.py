"""The actions of `plait federate` for a network: certs, serve, join, run, status, resume."""

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.run.deploy.deployment import Deployment
    from plait.run.federated.conduct import FederateConfig

_FILE = "the config file; the same for the server and all clients, see examples/federated/"
_MORE = """\
Three steps make a federation, all with one config file:
  1  plait federate certs certs --host SERVER --clients a,b     once, anywhere
  2  plait federate serve FILE                                  on the server; stays
     plait federate join FILE --client a                        on the machine of client a; stays
  3  plait federate run FILE                                    on the server, for each run
`status` shows what became of it, `resume` goes on after a stop or a failure.
"""


def add_actions(actions: "argparse._SubParsersAction") -> list[argparse.ArgumentParser]:
    """Describe the actions."""
    found = []

    def add(
        name: str, act: Callable[[argparse.Namespace], int], help: str, text: str
    ) -> argparse.ArgumentParser:
        action = actions.add_parser(
            name,
            help=help,
            description=text,
            epilog=_MORE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.set_defaults(act=partial(_guarded, act))
        found.append(action)
        return action

    certs = add(
        "certs",
        _certs,
        "make test certificates and the clients' keys",
        "Make a test CA, the server's certificate and a key pair for each client. The server gets\n"
        "server.crt, server.key, ca.crt and all .pub files; each client gets ca.crt and its own\n"
        "key, over a channel that you trust. Keep ca.key to yourself. It is a CA for tests and\n"
        "private networks: its key lies unencrypted in the folder, and nothing can be revoked.\n"
        "Nothing is ever overwritten.",
    )
    certs.add_argument("folder", help="where to put them; deploy.certs of the config file")
    certs.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or IP address that clients reach the server by; may be given several times. "
        "Without it only client keys are made",
    )
    certs.add_argument(
        "--clients",
        default="",
        metavar="A,B,..",
        help="names of the clients, as in the config file's partition",
    )
    certs.add_argument(
        "--days", type=int, default=30, help="until the certificates expire (default: 30)"
    )

    serve = add(
        "serve",
        _serve,
        "start the server, which waits for clients and runs",
        "Start the server (Flower's SuperLink) at deploy.address and let in the clients whose\n"
        ".pub files lie in deploy.certs, also those that are put there later. It runs until\n"
        "Ctrl-C.",
    )
    serve.add_argument("file", help=_FILE)
    serve.add_argument(
        "--bind",
        metavar="HOST",
        help="listen on this interface instead of deploy.address, such as 0.0.0.0 behind a router",
    )

    join = add(
        "join",
        _join,
        "start a client, which trains when a run asks it to",
        "Load the model and this client's data, and connect to the server (as a Flower SuperNode\n"
        "with the client's key). It runs until Ctrl-C, waits for a server that is away, and comes\n"
        "back when the connection is lost.",
    )
    join.add_argument("file", help=_FILE)
    join.add_argument("--client", required=True, metavar="NAME", help="which client this is")
    join.add_argument(
        "--patience",
        type=float,
        metavar="S",
        help="give up when the server has refused this client for so many seconds (default: 90; "
        "after a crash the server refuses its return for up to 60)",
    )

    run = add(
        "run",
        _run,
        "run all rounds on the clients that have joined",
        "Submit the run to the server, show its log and wait for its end. Exit code:\n"
        "0 completed, 1 failed, 2 config error, 3 too few clients or updates, 130 after Ctrl-C,\n"
        "which stops the run.",
    )
    run.add_argument("file", help=_FILE)

    status = add(
        "status",
        _status,
        "show runs, rounds, clients, rejections and bytes",
        "Show the runs that the server knows of, where it answers, and what the run folder says\n"
        "of rounds, clients, rejections and bytes.",
    )
    status.add_argument("file", help="the config file, or a run folder", metavar="FILE|DIR")

    resume = add(
        "resume",
        _resume,
        "go on after the last checkpoint of the server",
        "Go on with a run after its last checkpoint: as `run` does on a network, or as\n"
        "`simulate --resume` where the run folder has the private states of a simulation.",
    )
    resume.add_argument("file", help="the config file, or a run folder", metavar="FILE|DIR")
    resume.add_argument(
        "--local", action="store_true", help="simulate, whatever the run folder has"
    )

    for action in (serve, join, run, resume):
        action.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="set a key of the config"
        )
    return found


def _say(text: str) -> None:
    print(text, flush=True)


def _config(args: argparse.Namespace) -> "FederateConfig":
    """The config of a file or of a run folder, whose file it then stands for."""
    from plait.run.federated.conduct import load_federate_config
    from plait.run.folder import RunFolder

    if Path(args.file).is_dir():
        args.file = str(RunFolder.open(args.file).config)
    return load_federate_config(args.file, getattr(args, "overrides", ()))


def _certs(args: argparse.Namespace) -> int:
    from plait.run.deploy.certs import make_certs

    clients = [name.strip() for name in args.clients.split(",") if name.strip()]
    made = make_certs(args.folder, args.host, clients, args.days)
    _say(f"{args.folder}: {', '.join(path.name for path in made)}")
    if args.host:
        _say("To the server: server.crt, server.key, ca.crt and all .pub files. Keep ca.key.")
    for name in clients:
        _say(f"To client {name}: ca.crt and {name}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from plait.run.deploy.deployment import Deployment, serve

    serve(Deployment(_config(args).deploy), _say, args.bind)
    return 0


def _join(args: argparse.Namespace) -> int:
    from plait.run.deploy.deployment import PATIENCE, Deployment, join
    from plait.run.deploy.resident import Resident
    from plait.run.federated.conduct import trainer
    from plait_cli._show import quiet

    config = _config(args)
    deployment = Deployment(config.deploy)
    deployment.file(args.client, f"the private key of client {args.client!r}")  # before it loads
    private, folder = deployment.home / "clients" / args.client, Resident.folder()
    try:
        with (
            quiet(),
            trainer(config, private, args.client) as answer,
            Resident(folder / "trainer", answer) as resident,
        ):
            patience = PATIENCE if args.patience is None else args.patience
            join(deployment, args.client, resident.address, _say, patience)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _run(args: argparse.Namespace, resume: bool = False) -> int:
    from plait.run.deploy.deployment import Deployment

    config = _config(args)
    return _submit(config, Deployment(config.deploy), resume)


def _submit(config: "FederateConfig", deployment: "Deployment", resume: bool) -> int:
    from plait.core.files import write_atomic
    from plait.federated.engines.flower import write_app
    from plait.run.deploy.deployment import submit

    deployment.prepare()
    file = deployment.home / "run.yaml"
    write_atomic(file, config.dump())  # with the overrides
    app = write_app(deployment.home / "app", file)
    return submit(deployment, app, _say, {"resume": resume})


def _status(args: argparse.Namespace) -> int:
    from rich.table import Table

    from plait.run.deploy.deployment import Deployment, client_rows, runs
    from plait.run.federated.report import read_rounds
    from plait.run.folder import RunFolder
    from plait_cli import console

    screen = console()
    config = _config(args)
    deployment = Deployment(config.deploy)
    known = runs(deployment)
    if known is None:
        screen.print(f"{deployment.address} does not answer.", soft_wrap=True)
    else:
        table = Table("run", "status", "since", "details", title=f"runs at {deployment.address}")
        for row in known:
            details = row["status-details"].removeprefix("N/A")
            table.add_row(row["run-id"], row["status"], row["pending-at"], details)
        screen.print(table)
    folder = RunFolder(Path(config.output.dir))
    rounds = [row for row in read_rounds(folder.metrics) if row["kind"] == "round"]
    if not rounds:
        screen.print(f"{folder.path}: no round is complete.", soft_wrap=True)
        return 0
    last, of = rounds[-1], config.local.rounds
    screen.print(
        f"{folder.path}: round {last['round']} of {of}, {len(last['accepted'])} of "
        f"{len(last['selected'])} updates",
        soft_wrap=True,
    )
    table = Table("client", "last update", "last answer", "rejected", "failed", "up", "down")
    for row in client_rows(rounds):
        table.add_row(*map(str, row))
    screen.print(table)
    return 0


def _resume(args: argparse.Namespace) -> int:
    folder = Path(_config(args).output.dir)
    if not (args.local or (folder / "clients").is_dir()):  # private states, of a simulation alone
        return _run(args, resume=True)
    from plait_cli.federate import simulate

    return simulate(args, resume=True)


def _guarded(act: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run an action; 1 where Flower fails."""
    from plait.run.deploy.deployment import DeployError

    try:
        return act(args)
    except DeployError as error:
        if args.debug:
            raise
        print(f"plait federate {args.action}: {error}", file=sys.stderr)
        return 1
