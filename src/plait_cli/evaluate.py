"""`plait evaluate RUN`: metrics of a trained run on held-out rows, or on tasks of the harness."""

import argparse

from plait_cli._options import check_counts


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained run",
        description="Measure a trained run on held-out rows and write its eval.json.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="other data, or another evaluation.* setting; eval.json is then not written. "
        "model.trust_remote_code=true runs code that comes with the base model",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="which rows; default: test, else validation",
    )
    parser.add_argument(
        "--harness",
        metavar="TASK,...",
        help='tasks of the EleutherAI evaluation harness (pip install "plait[eval]")',
    )
    parser.add_argument(
        "--harness-path", metavar="FOLDER", help="a folder with more task files for --harness"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="with --harness: the task of a run with routing: task"
    )
    parser.add_argument(
        "--limit", type=int, metavar="ROWS", help="with --harness: only the first rows of a task"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the metrics, one a line."""
    check_counts(args, "limit")
    if args.harness is None and (args.harness_path or args.limit or args.task):
        raise ValueError(
            "--limit, --task and --harness-path belong to --harness. Give --harness TASK."
        )
    from plait.run.card import metric_rows
    from plait.run.config import REMOTE_CODE
    from plait.run.evaluate import evaluate_run
    from plait.run.harness import harness_run
    from plait_cli import console
    from plait_cli._show import Status

    if args.harness is not None:
        if args.split or any(not text.startswith(REMOTE_CODE) for text in args.overrides):
            raise ValueError(
                "--harness brings its own data; data.* and --split do not apply. Leave them out."
            )
        tasks = [task.strip() for task in args.harness.split(",") if task.strip()]
        results = harness_run(
            args.run_folder, tasks, args.limit, args.harness_path, args.overrides, args.task
        )
        for task, metrics in results.items():
            print(task)
            _print([(name, f"{value:.4g}") for name, value in metrics.items()])
        return 0
    screen = console()
    with Status(screen, "rows") as status:
        metrics = evaluate_run(args.run_folder, args.split, args.overrides, progress=status)
    print(f"{metrics['split']}, {metrics['rows']} rows")
    _print(metric_rows(metrics))
    return 0


def _print(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
