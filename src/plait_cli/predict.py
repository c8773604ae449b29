"""`plait predict RUN --input FILE --output FILE`: predict the rows of a file."""

import argparse

from plait_cli._options import check_counts


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "predict",
        help="predict the rows of a file with a trained run",
        description="Predict each row of a file and write the rows as JSON lines: with the class "
        "and the probabilities of all classes, with a number, or with the text that continues the "
        "prompt. The file has the columns of the training rows; answers may be missing.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="the rows: jsonl, or another format of data.train by its ending",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the JSON lines to write")
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="the task of all rows, for a run with routing: task; default: the task column",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="default: evaluation.batch_size"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: evaluation.max_new_tokens"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="another data.* or evaluation.* setting, such as data.truncate=true; "
        "model.trust_remote_code=true runs code that comes with the base model",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, and say how many rows were written."""
    check_counts(args, "batch-size", "max-new-tokens")
    from plait.run.infer.predict import predict_run
    from plait_cli import console
    from plait_cli._show import Status

    screen = console()
    with Status(screen, "rows") as status:
        rows = predict_run(
            args.run_folder,
            args.input,
            args.output,
            task=args.task,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            force=args.force,
            overrides=args.overrides,
            progress=status,
        )
    screen.print(f"{rows:,} rows written to {args.output}", soft_wrap=True)
    return 0
