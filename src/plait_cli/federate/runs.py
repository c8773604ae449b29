"""What `plait federate` does on this machine: simulate, report, export, status, resume."""

import argparse
import shlex
import sys
from dataclasses import asdict

from rich.table import Table

from plait.federated.guard import TooFewUpdates
from plait.run.deploy.deployment import Deployment
from plait.run.federated.config import load_federate_config
from plait.run.federated.folder import FederatedFolder
from plait.run.federated.report import (
    Summary,
    client_rows,
    fault_lines,
    summary,
    tables,
    write_comparison,
)
from plait_cli import console
from plait_cli._show import Status
from plait_cli.federate import network
from plait_cli.federate.network import config_of

TOO_FEW = 3  # exit code of a round with too few updates


def simulate(args: argparse.Namespace) -> int:
    """Run all rounds on this machine; return 3 after too few updates, 130 after Ctrl-C."""
    from plait.run.federated import engines

    screen = console()
    config = load_federate_config(args.file, args.overrides)
    if args.verbose:
        screen.print(config.dump(), soft_wrap=True)
    again = shlex.join(["plait", "federate", "simulate", args.file, *args.overrides, "--resume"])
    try:
        with Status(screen, "clients") as status:
            folder = engines.simulate(
                config,
                args.resume,
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


def report(args: argparse.Namespace) -> int:
    """Show runs side by side, and write the comparison if asked to."""
    summaries = _show(args.runs)
    if args.out:
        out = write_comparison(args.out, summaries)
        console().print(f"written: {out}", soft_wrap=True)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the clients' adapters as plain LoRAs."""
    from plait.run.federated.export import Choices, ClientExport, export_clients

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
        for text in x.held_out:
            print(f"    {text}")
        for title, reasons in x.readers.items():
            if reasons:
                print(f"    {title}: {'; '.join(reasons)}")

    names = ("max_rank", "server", "compact", "dtype", "lossy")
    choices = Choices(**{name: getattr(args, name) for name in names})
    export_clients(
        args.run_folder, args.out, args.client, choices, overrides=args.overrides, done=show
    )
    print(f"written: {args.out}")
    return 0


def status(args: argparse.Namespace) -> int:
    """Show the runs of the server, and the rounds and clients of the run folder."""
    screen, config = console(), config_of(args)
    deployment = Deployment(config.deploy)
    known = deployment.runs()
    if known is None:
        screen.print(f"{deployment.address} does not answer.", soft_wrap=True)
    else:
        table = Table("run", "status", "since", "details", title=f"runs at {deployment.address}")
        for row in known:
            details = row["status-details"].removeprefix("N/A")
            table.add_row(row["run-id"], row["status"], row["pending-at"], details)
        screen.print(table)
    folder = FederatedFolder(config.output.dir)
    rounds = [line for line in folder.read_rounds() if line["kind"] == "round"]
    if not rounds:
        screen.print(f"{folder.path}: no round is complete.", soft_wrap=True)
        return 0
    last, total = rounds[-1], config.local.rounds
    screen.print(
        f"{folder.path}: round {last['round']} of {total}, {len(last['accepted'])} of "
        f"{len(last['selected'])} updates",
        soft_wrap=True,
    )
    table = Table("client", "last update", "last answer", "rejected", "failed", "up", "down")
    for row in client_rows(rounds):
        table.add_row(*map(str, row))
    screen.print(table)
    return 0


def resume(args: argparse.Namespace) -> int:
    """Continue a run, here if its private states are here, else on the network."""
    folder = FederatedFolder(config_of(args).output.dir)
    if args.local or folder.clients.is_dir():  # private states are those of a simulation
        args.resume = True
        return simulate(args)
    return network.run(args, resume=True)


def _show(runs: list[str]) -> list[Summary]:
    screen, summaries = console(), []
    for path in runs:
        folder = FederatedFolder.open(path)
        config = load_federate_config(folder.config)
        summaries.append(summary(folder, config.federated.method, asdict(config)))
    for title, head, rows in tables(summaries):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        screen.print(table)
    for s in summaries:
        lines = fault_lines(s) + ([f"privacy: {s.privacy}"] if s.privacy else [])
        for line in lines:
            screen.print(f"{s.path}: {line}", soft_wrap=True, markup=False)
    return summaries
