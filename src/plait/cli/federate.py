"""`plait federate simulate FILE`, `plait federate report RUN`: federated runs in one process."""

import argparse
import shlex
import sys

from plait.cli import _deploy

TOO_FEW = 3  # exit code of a round with too few updates


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "federate",
        help="federated fine-tuning, simulated or on a network",
        description="Federated fine-tuning. `simulate` does all on this machine and sends nothing "
        "over a network. With a server and clients it takes `certs`, `serve`, `join` and `run`.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    simulate = actions.add_parser("simulate", help="run all rounds of a config file")
    simulate.add_argument("file", help="the config file; see examples/federated/")
    simulate.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="set a key of the config"
    )
    simulate.add_argument(
        "--resume", action="store_true", help="go on after the last checkpoint in output.dir"
    )
    report = actions.add_parser("report", help="show finished runs side by side")
    report.add_argument("runs", nargs="+", help="run folders")
    for action in (simulate, report, *_deploy.add_actions(actions)):
        action.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # keeps one that stands before the action
            help="show tracebacks of errors",
        )
    return parser


def run(args: argparse.Namespace) -> int:
    """Simulate or report; 3 where a round had too few updates, 130 after Ctrl-C."""
    if args.action == "simulate":
        return _simulate(args)
    return _report(args) if args.action == "report" else _deploy.run_action(args)


def _simulate(args: argparse.Namespace) -> int:
    from plait.cli import console
    from plait.cli._show import Status, quiet
    from plait.federated.guard import TooFewUpdates
    from plait.federated.server import RoundRecord
    from plait.run.federate import load_federate_config, simulate

    screen = console()
    config = load_federate_config(args.file, args.overrides)
    screen.print(config.dump(), soft_wrap=True)
    again = shlex.join(["plait", "federate", "simulate", args.file, *args.overrides, "--resume"])

    def show(record: RoundRecord) -> None:
        losses = [m["loss"] for m in record.metrics.values() if "loss" in m]
        text = f"round {record.round}: {len(record.accepted)} of {len(record.selected)} updates"
        if losses:
            text += f", training loss {sum(losses) / len(losses):.4g}"
        faults = [f"{client} {reason}" for client, reason, _ in record.rejected]
        faults += [f"{client} failed" for client in record.failed]
        screen.print(f"{text}{', ' if faults else ''}{', '.join(faults)}", soft_wrap=True)

    try:
        with quiet(), Status(screen, "clients") as status:
            folder = simulate(
                config,
                args.resume,
                progress=lambda round, done, total, client: status(done, total),
                done=show,
            )
    except TooFewUpdates as error:
        if args.debug:
            raise
        print(f"plait federate: {error}\nGo on with: {again}", file=sys.stderr)
        return TOO_FEW
    except KeyboardInterrupt:
        print(f"\nfederate: stopped.\nGo on with: {again}", file=sys.stderr)
        return 130
    _show([str(folder.path)])
    screen.print(f"run folder: {folder.path}", soft_wrap=True)
    return 0


def _report(args: argparse.Namespace) -> int:
    _show(args.runs)
    return 0


def _show(runs: list[str]) -> None:
    from rich.table import Table

    from plait.cli import console
    from plait.run.federate import load_federate_config
    from plait.run.federate_report import (
        RESULTS,
        TRAFFIC,
        fault_lines,
        result_rows,
        summary,
        traffic_rows,
    )
    from plait.run.folder import RunFolder

    screen = console()
    folders = [RunFolder.open(path) for path in runs]
    names = [load_federate_config(folder.config).federated.method for folder in folders]
    found = [summary(folder, name) for folder, name in zip(folders, names, strict=True)]
    for title, head, rows in (
        ("held-out loss, over the clients", RESULTS, result_rows(found)),
        ("bytes, over all rounds and clients", TRAFFIC, traffic_rows(found)),
    ):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        screen.print(table)
    for folder, s in zip(folders, found, strict=True):
        for line in fault_lines(s):
            screen.print(f"{folder.path}: {line}", soft_wrap=True)
