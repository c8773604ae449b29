"""`plait federate simulate FILE`, `report RUN ..`, `export RUN OUT`: federated runs."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from plait_cli import _deploy

if TYPE_CHECKING:
    from plait.run.federated.report import Summary

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
    simulate_ = actions.add_parser("simulate", help="run all rounds of a config file")
    simulate_.add_argument("file", help="the config file; see examples/federated/")
    simulate_.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="set a key of the config"
    )
    simulate_.add_argument(
        "--resume", action="store_true", help="go on after the last checkpoint in output.dir"
    )
    report = actions.add_parser("report", help="show finished runs side by side")
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("--out", metavar="FOLDER", help="write comparison.md and .png there")
    export = actions.add_parser("export", help="write the clients' adapters as plain LoRAs")
    export.add_argument("run_folder", metavar="RUN", help="the run folder")
    export.add_argument("out", metavar="OUT", help="the folder to write, one folder a client in it")
    export.add_argument("--client", metavar="NAME", help="this client alone")
    simulate_.set_defaults(act=lambda args: simulate(args, args.resume))
    report.set_defaults(act=_report)
    export.set_defaults(act=_export)
    for action in (simulate_, report, export, *_deploy.add_actions(actions)):
        action.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # keeps one that stands before the action
            help="show tracebacks of errors",
        )
    return parser


def run(args: argparse.Namespace) -> int:
    """Do an action; 3 where a round had too few updates, 130 after Ctrl-C."""
    return args.act(args)


def simulate(args: argparse.Namespace, resume: bool) -> int:
    """Run all rounds on this machine; 3 where a round had too few updates, 130 after Ctrl-C."""
    from plait.federated.guard import TooFewUpdates
    from plait.run.federated import conduct as federate
    from plait_cli import console
    from plait_cli._show import Status, quiet

    screen = console()
    config = federate.load_federate_config(args.file, args.overrides)
    screen.print(config.dump(), soft_wrap=True)
    again = shlex.join(["plait", "federate", "simulate", args.file, *args.overrides, "--resume"])

    try:
        with quiet(), Status(screen, "clients") as status:
            folder = federate.simulate(
                config,
                resume,
                progress=lambda round, done, total, client: status(done, total),
                done=lambda record: screen.print(str(record), soft_wrap=True),
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
    found = _show(args.runs)
    if args.out:
        from plait.run.federated.report import write_comparison
        from plait_cli import console

        out = write_comparison(args.out, found)
        console().print(f"written: {out}", soft_wrap=True)
    return 0


def _export(args: argparse.Namespace) -> int:
    from plait.run.federated.export import ClientExport, export_clients
    from plait_cli._show import quiet

    def show(x: ClientExport) -> None:
        if x.refused:
            print(f"{x.client}: not exported: {x.refused}")
            return
        least, most = x.ranks
        rank = f"rank {most}" if least == most else f"rank {least} to {most}"
        print(
            f"{x.client}: {x.layers} layers, {rank}, {x.error:.2%} of a layer's update left out at "
            f"most; read back by peft, logits off by {x.logit_error:.2e} of {x.logit_shift:.2e}"
        )

    with quiet():
        export_clients(args.run_folder, args.out, args.client, done=show)
    print(f"written: {args.out}")
    return 0


def _show(runs: list[str]) -> "list[Summary]":
    from dataclasses import asdict

    from rich.table import Table

    from plait.run.federated.conduct import load_federate_config
    from plait.run.federated.report import fault_lines, summary, tables
    from plait.run.folder import RunFolder
    from plait_cli import console

    screen, found = console(), []
    for path in runs:
        folder = RunFolder.open(path)
        config = load_federate_config(folder.config)
        found.append(summary(folder, config.federated.method, asdict(config)))
    for title, head, rows in tables(found):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        screen.print(table)
    for s in found:
        lines = fault_lines(s) + ([f"privacy: {s.privacy}"] if s.privacy else [])
        for line in lines:
            screen.print(f"{s.path}: {line}", soft_wrap=True, markup=False)
    return found
