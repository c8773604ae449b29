"""`plait federate ACTION`: federated runs, simulated on this machine or on a network.

`runs` holds what the actions on this machine and on run folders do, `network` those of a network.
"""

import argparse
import importlib
import sys

from plait_cli._options import add_form

_FILE = "the config file; the same for the server and all clients, see examples/federated/"
_MORE = """\
Three steps make a federation, all with one config file:
  1  plait federate certs certs --host SERVER --clients a,b     once, anywhere
  2  plait federate serve FILE                                  on the server; stays
     plait federate join FILE --client a                        on the machine of client a; stays
  3  plait federate run FILE                                    on the server, for each run
`status` shows its progress; `resume` continues it after a stop or a failure.
"""


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "federate",
        help="federated fine-tuning, simulated or on a network",
        description="Federated fine-tuning. `simulate` does all on this machine and sends nothing "
        "over a network. With a server and clients it takes `certs`, `serve`, `join` and `run`.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in (*_add_runs(actions), *_add_network(actions)):
        action.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # keeps one that stands before the action
            help="show tracebacks of errors",
        )
        action.add_argument(
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,
            help="print the resolved config, and what libraries say",
        )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run an action.

    Returns 1 if Flower fails, 2 for a damaged state, 3 after too few updates, 130 after Ctrl-C.
    """
    act = getattr(importlib.import_module(f"plait_cli.federate.{args.module}"), args.action)
    try:
        return act(args)
    except RuntimeError as error:
        from plait.federated.state import StateError
        from plait.run.deploy.deployment import DeployError

        if args.debug or not isinstance(error, DeployError | StateError):
            raise
        print(f"plait federate {args.action}: {error}", file=sys.stderr)
        return 2 if isinstance(error, StateError) else 1


def _add_runs(actions: "argparse._SubParsersAction") -> list[argparse.ArgumentParser]:
    simulate = actions.add_parser("simulate", help="run all rounds of a config file")
    simulate.add_argument("file", help="the config file; see examples/federated/")
    _add_overrides(simulate)
    simulate.add_argument(
        "--resume", action="store_true", help="continue after the last checkpoint in output.dir"
    )
    report = actions.add_parser("report", help="show finished runs side by side")
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("--out", metavar="FOLDER", help="write comparison.md and .png there")
    export = actions.add_parser("export", help="write the clients' adapters as plain LoRAs")
    export.add_argument("run_folder", metavar="RUN", help="the run folder")
    export.add_argument("out", metavar="OUT", help="the folder to write, with a folder per client")
    export.add_argument("--client", metavar="NAME", help="this client alone")
    add_form(export)
    _add_overrides(
        export, "model.trust_remote_code=true, to run code that comes with the base model"
    )
    for action in (simulate, report, export):
        action.set_defaults(module="runs")
    return [simulate, report, export]


def _add_overrides(action: argparse.ArgumentParser, help: str = "set a key of the config") -> None:
    action.add_argument("overrides", nargs="*", metavar="section.key=value", help=help)


def _add_network(actions: "argparse._SubParsersAction") -> list[argparse.ArgumentParser]:
    added = []

    def add(name: str, help: str, text: str, module: str = "network") -> argparse.ArgumentParser:
        action = actions.add_parser(
            name,
            help=help,
            description=text,
            epilog=_MORE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.set_defaults(module=module)
        added.append(action)
        return action

    certs = add(
        "certs",
        "make test certificates and the clients' keys",
        "Make a test CA, the server's certificate and a key pair for each client. The server gets\n"
        "server.crt, server.key, ca.crt and all .pub files; each client gets ca.crt and its own\n"
        "key, over a channel that you trust. Keep ca.key to yourself. This CA is for tests and\n"
        "private networks: its key lies unencrypted in the folder, and no certificate can be\n"
        "revoked. Existing files are never overwritten.",
    )
    certs.add_argument("folder", help="where to put them; deploy.certs of the config file")
    certs.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or IP address at which clients reach the server; may be given several times. "
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
        "start the server, which waits for clients and runs",
        "Start the server (Flower's SuperLink) at deploy.address and accept the clients whose\n"
        ".pub files are in deploy.certs, also those that are added later. It runs until Ctrl-C.",
    )
    serve.add_argument("file", help=_FILE)
    serve.add_argument(
        "--bind",
        metavar="HOST",
        help="listen on this interface instead of deploy.address, such as 0.0.0.0 behind a router",
    )

    join = add(
        "join",
        "start a client, which trains when a run asks it to",
        "Load the model and this client's data, and connect to the server (as a Flower SuperNode\n"
        "with the client's key). It runs until Ctrl-C, waits for a server that is offline, and\n"
        "reconnects after a lost connection.",
    )
    join.add_argument("file", help=_FILE)
    join.add_argument("--client", required=True, metavar="NAME", help="which client this is")
    join.add_argument(
        "--patience",
        type=float,
        metavar="S",
        help="give up when the server has refused this client for S seconds (default: 90; after a "
        "crash the server refuses its return for up to 60)",
    )

    run = add(
        "run",
        "run all rounds on the clients that have joined",
        "Submit the run to the server, show its log and wait until it ends. Exit code:\n"
        "0 completed, 1 failed, 2 config error, 3 too few clients or updates, 130 after Ctrl-C,\n"
        "which stops the run.",
    )
    run.add_argument("file", help=_FILE)

    status = add(
        "status",
        "show runs, rounds, clients, rejections and bytes",
        "Show the runs that the server knows, if it answers, and the rounds, clients, rejections\n"
        "and bytes recorded in the run folder.",
        "runs",
    )
    status.add_argument("file", help="the config file, or a run folder", metavar="FILE|DIR")

    resume = add(
        "resume",
        "continue after the last checkpoint of the server",
        "Continue a run after its last checkpoint: on a network as `run` does, or as\n"
        "`simulate --resume` if the run folder has the private states of a simulation.",
        "runs",
    )
    resume.add_argument("file", help="the config file, or a run folder", metavar="FILE|DIR")
    resume.add_argument(
        "--local", action="store_true", help="simulate, whatever the run folder contains"
    )

    for action in (serve, join, run, resume):
        _add_overrides(action)
    return added
