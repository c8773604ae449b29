"""What `plait federate` does on a network: certs, serve, join, run."""

import argparse
import json
import shutil
from pathlib import Path

from plait.core.files import write_atomic
from plait.run.deploy.deployment import Deployment
from plait.run.federated.config import FederateConfig, load_federate_config
from plait.run.federated.folder import FederatedFolder
from plait_cli._options import check_counts


def config_of(args: argparse.Namespace) -> FederateConfig:
    """The config of a file or of a run folder, whose file then replaces it in the arguments."""
    overrides = getattr(args, "overrides", [])
    if not Path(args.file).is_dir():
        return load_federate_config(args.file, overrides)
    folder = FederatedFolder.open(args.file)
    args.file = str(folder.config)
    config, here = load_federate_config(args.file, overrides), folder.path.resolve()
    asked = any(text.startswith("output.dir=") for text in overrides)
    # It was moved, or the working folder is another one.
    if not asked and Path(config.output.dir).resolve() != here:
        args.overrides = [*overrides, f"output.dir={json.dumps(str(here))}"]
        config = load_federate_config(args.file, args.overrides)
    return config


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def certs(args: argparse.Namespace) -> int:
    """Make certificates and keys."""
    check_counts(args, "days")
    from plait.run.deploy.certs import make_certs

    clients = [name.strip() for name in args.clients.split(",") if name.strip()]
    made = make_certs(args.folder, args.host, clients, args.days)
    say(f"{args.folder}: {', '.join(path.name for path in made)}")
    if args.host:
        say("To the server: server.crt, server.key, ca.crt and all .pub files. Keep ca.key.")
    for name in clients:
        say(f"To client {name}: ca.crt and {name}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Run the server until Ctrl-C."""
    from plait.run.deploy.serve import serve

    serve(Deployment(config_of(args).deploy), say, args.bind)
    return 0


def join(args: argparse.Namespace) -> int:
    """Run a client until Ctrl-C."""
    from plait.run.deploy.join import PATIENCE, join
    from plait.run.deploy.resident import Resident
    from plait.run.federated.clients import client_process

    config = config_of(args)
    deployment = Deployment(config.deploy)
    deployment.file(args.client, f"the private key of client {args.client!r}")  # before it loads
    deployment.prepare()
    private, folder = deployment.home / "clients" / args.client, Resident.folder()
    try:
        with (
            client_process(config, private, args.client) as answer,
            Resident(folder / "trainer", answer) as resident,
        ):
            patience = PATIENCE if args.patience is None else args.patience
            join(deployment, args.client, resident.address, say, patience)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def run(args: argparse.Namespace, resume: bool = False) -> int:
    """Submit a run and wait for its end."""
    from plait.run.deploy.submit import submit, write_app

    config = config_of(args)
    deployment = Deployment(config.deploy)
    deployment.prepare()
    file = deployment.home / "run.yaml"
    write_atomic(file, config.dump())  # with the overrides
    app = write_app(deployment.home / "app", file)
    return submit(deployment, app, say, {"resume": resume})
