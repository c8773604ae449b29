"""`plait export RUN --to lora|merged`: take a run to stock peft, to a server, to transformers."""

import argparse

from plait_cli._options import check_counts


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a run as a plain LoRA or merged",
        description="Write a run as a plain LoRA that stock peft and servers load, or merged into "
        "its base model. Errors are measured and printed before anything is written.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument("--to", choices=("lora", "merged"), required=True, help="what to write")
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write; default RUN/lora, RUN/merged"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="K", help="largest rank of a layer")
    size.add_argument("--energy", type=float, metavar="E", help="share of ||dW||^2 to keep, 0 to 1")
    parser.add_argument("--task", metavar="NAME", help='which task, with routing="task"')
    parser.add_argument("--approx", choices=("mean",), help="take a token router as uniform")
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
    from plait.run.export import ExportReport, export_run

    def announce(report: ExportReport) -> None:
        ranks = [layer.rank for layer in report.layers]
        if ranks:
            print(f"layers       {len(ranks)}, rank {min(ranks)} to {max(ranks)}")
            print(f"weight error {report.weight_error:.2%} of a layer's update at most")
        print(
            f"logit error  {report.logit_error:.2e} at most on {report.rows} rows; "
            f"the adapter moves logits by up to {report.logit_shift:.2e}"
        )
        if not report.exact:
            print("not exact: raise --rank or --energy, or use --to merged where it is offered")

    out, report = export_run(
        args.run_folder,
        args.to,
        args.out,
        rank=args.rank,
        energy=args.energy,
        task=args.task,
        approx=args.approx,
        force=args.force,
        overrides=args.overrides,
        announce=announce,
    )
    print(f"stock check  {report.stock_error:.2e} at most, read back without plait")
    print(f"written      {out}")
    return 0
