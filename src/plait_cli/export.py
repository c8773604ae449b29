"""`plait export RUN --to lora|merged|gguf`: take a run to stock peft, servers, transformers."""

import argparse
from typing import TYPE_CHECKING

from plait_cli._options import add_form, check_counts

if TYPE_CHECKING:
    from plait.run.export import ExportReport


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a run as a plain LoRA, for llama.cpp, or merged",
        description="Write a run as a plain LoRA that stock peft and servers load, as GGUF for "
        "llama.cpp, or merged into its base model. Errors are measured and printed before "
        "anything is written; an export "
        "that leaves out more than 1 % of a layer's update, or moves a held-out metric by more "
        "than its noise, is refused.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument(
        "--to", choices=("lora", "merged", "gguf"), required=True, help="what to write"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write; default RUN/lora, RUN/merged, RUN/gguf"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="K", help="largest rank of a layer")
    size.add_argument("--energy", type=float, metavar="E", help="share of ||dW||^2 to keep, 0 to 1")
    add_form(parser, size)
    parser.add_argument(
        "--task", metavar="NAME", help='which task, with routing="task"; all: one folder each'
    )
    parser.add_argument(
        "--approx", choices=("mean",), help="replace a token router by uniform weights"
    )
    parser.add_argument(
        "--weighted",
        action="store_true",
        help="cut the ranks that change the layers' outputs on training rows least",
    )
    parser.add_argument(
        "--distill",
        type=int,
        default=0,
        metavar="STEPS",
        help="then train the exported factors to match the run's logits on training rows",
    )
    parser.add_argument(
        "--requantise",
        action="store_true",
        help="--to merged on a quantised base: quantise the result again; else 16 bits",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="other rows to measure on"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what is lost, write, print what stock peft reads."""
    check_counts(args, "rank")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise ValueError(f"--energy {args.energy} is no share. Give more than 0 and up to 1.")
    from functools import partial

    from plait.run.export import export_run, export_tasks
    from plait_cli import console
    from plait_cli._show import Status

    screen = console()
    export = partial(export_run, task=args.task)
    with Status(screen, "held-out metric") as status:
        out, reports = (export_tasks if args.task == "all" else export)(
            args.run_folder,
            args.to,
            args.out,
            rank=args.rank,
            energy=args.energy,
            max_rank=args.max_rank,
            approx=args.approx,
            server=args.server,
            compact=args.compact,
            dtype=args.dtype,
            lossy=args.lossy,
            requantise=args.requantise,
            force=args.force,
            overrides=args.overrides,
            announce=_announce,
            progress=status,
            command=_command(args),
            weighted=args.weighted,
            distill=args.distill,
        )
    for report in reports if isinstance(reports, list) else [reports]:
        of_task = f" ({report.task})" if report.task else ""
        how = "read back from the GGUF file" if args.to == "gguf" else "read back without plait"
        print(f"stock check  {report.stock_error:.2e} at most, {how}{of_task}")
    print(f"written      {out}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command line of these arguments, for the card."""
    import shlex

    words = ["plait", "export", args.run_folder, "--to", args.to]
    if args.server != "all":
        words += ["--for", args.server]
    for name in ("rank", "energy", "max_rank", "dtype", "task", "approx"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    flags = ("compact", "lossy", "weighted", "requantise")
    words += [f"--{name}" for name in flags if getattr(args, name)]
    words += ["--distill", str(args.distill)] if args.distill else []
    return shlex.join([*words, *args.overrides])


def _announce(report: "ExportReport") -> None:
    """Print the losses of an export before it is written or refused."""
    if report.task:
        print(f"task         {report.task}")
    ranks = [layer.rank for layer in report.layers]
    if ranks:
        held = f"; {report.rank} in the file" if min(ranks) < report.rank else ""
        print(f"layers       {len(ranks)}, rank {min(ranks)} to {max(ranks)}{held}")
        print(f"weight error {report.weight_error:.2%} of a layer's update at most")
    if report.rounding:
        print(f"rounding     {report.rounding:.2e} of a layer's update at most")
    print(
        f"logit error  {report.logit_error:.2e} at most on {report.rows} rows; "
        f"the adapter moves logits by up to {report.logit_shift:.2e}"
    )
    for form, error in report.forms.items():
        what = "packed again" if form.endswith("bit") else "as a plain checkpoint"
        print(f"{form:<12} {what}: logits off by up to {error:.2e}")
    if report.held_out is not None:
        print(f"held out     {report.held_out.rows} rows of {report.held_out.split}")
        for text in report.held_out.said():
            print(f"             {text}")
    for title, reasons in report.readers.items():
        print(f"{title:<12} {'; '.join(reasons) or 'reads it right'}")
    if not report.exact and ranks:
        print("not exact: raise --rank or --energy, or use --to merged where it is offered")
