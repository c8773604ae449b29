"""`plait rate FILE --from RUN`: the learning rate of a method, carried over from a finished run."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "rate",
        help="predict a method's learning rate from a tuned run of another one",
        description="Print the learning rate at which the layers of a run change as much per step "
        "as those of a finished run do at its own rate. Both need the same base, rows and batch; "
        "each makes a few steps on its training rows. Nothing is written.",
    )
    parser.add_argument("file", help="run file of the other method")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. method.r=16")
    parser.add_argument(
        "--from",
        dest="anchor",
        metavar="RUN",
        required=True,
        help="folder of a finished run whose learning rate was tuned, such as one of LoRA",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the rate and how it was found."""
    from plait.run.config import load_config

    cfg = load_config(args.file, args.overrides, import_plugins=True)

    from plait.run.compare.transfer import STEPS, carried_rate
    from plait.run.compare.tuning import around
    from plait_cli import console

    found, screen = carried_rate(cfg, args.anchor), console()
    name = cfg.method.name
    lines = [
        f"{args.anchor}: its layers' outputs change by {found.target:.3g} of W x in {STEPS} steps"
    ]
    lines += [f"{name} at the rate {rate:.3g}: {change:.3g}" for rate, change in found.tries]
    lines.append(f"learning rate of {name}: {found.rate:.3g}")
    low, _, high = around(found.rate)
    lines.append(f"It is a prediction: try {low:g} and {high:g} beside it, on validation rows.")
    for line in lines:
        screen.print(line, soft_wrap=True, highlight=False)
    return 0
