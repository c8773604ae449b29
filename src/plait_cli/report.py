"""`plait report`: what a comparison found, or what published results say, with intervals."""

import argparse
import json
import sys
from pathlib import Path

from plait_cli._options import need_compare


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "report",
        help="the report of a comparison, or published results with intervals and verdicts",
        description="Show what `plait compare` found. With --peft-results: compare published runs "
        "with one of them: the interval of each accuracy and of each difference, p-values adjusted "
        "for the number of runs, a verdict, and the difference that such a test can see.",
    )
    parser.add_argument(
        "study", nargs="?", metavar="DIR", help="the folder of a comparison, or its results.json"
    )
    parser.add_argument(
        "--peft-results",
        nargs="+",
        metavar="FILE",
        help="result files of peft's method_comparison: .json with one run, .jsonl with one a line",
    )
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="the published run to compare with: its experiment's name, or the end of it",
    )
    parser.add_argument(
        "--test-rows",
        type=int,
        metavar="N",
        help="rows of the test; default: the smallest number of which all accuracies are shares",
    )
    parser.add_argument(
        "--correlation",
        type=float,
        default=0.0,
        metavar="R",
        help="assumed correlation of two runs' answers to a row, default 0",
    )
    parser.add_argument(
        "--seed-spread",
        type=float,
        default=0.0,
        metavar="POINTS",
        help="assumed standard deviation of the accuracy over seeds, in points, default 0",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write the report into DIR, as HTML, Markdown and JSON"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print a report, or write it."""
    if (args.study is None) == (args.peft_results is None):
        raise ValueError("Give the folder of a comparison, or --peft-results and --reference.")
    return _published(args) if args.study is None else _study(args)


def _study(args: argparse.Namespace) -> int:
    with need_compare("plait report"):
        from plait.run.compare import outcome, tables
    from plait.core.files import check_place
    from plait.run.compare.report import markdown, write_report

    results = outcome.read(args.study)
    try:
        text, sentences = markdown(results), list(tables.conclusions(results))
        page = None if args.out is None else write_report(results, check_place(args.out))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        if args.debug:
            raise
        raise ValueError(
            f"{args.study}: the results are damaged ({type(error).__name__}: {error}). Make them "
            "again with: plait compare FILE"
        ) from None
    if page is None:
        sys.stdout.write(text)
        return 0
    for sentence in sentences:
        print(sentence)
    print(f"report: {page}, and as .md and in peft's form beside it")
    return 0


def _published(args: argparse.Namespace) -> int:
    with need_compare("plait report"):
        from plait.run.compare.published import compare_published, read_published
    from plait.core.files import check_place, write_atomic
    from plait.run.compare import page

    if args.reference is None:
        raise ValueError("--reference is missing. Give the run to compare with.")
    if args.test_rows is not None and args.test_rows < 1:
        raise ValueError(f"--test-rows is {args.test_rows}. Give 1 or more.")
    study = compare_published(
        read_published(args.peft_results),
        args.reference,
        test_rows=args.test_rows,
        correlation=args.correlation,
        seed_spread=args.seed_spread / 100,
    )
    if args.out is None:
        sys.stdout.write(page.markdown(study))
        return 0
    folder: Path = check_place(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.md": page.markdown(study),
        "report.html": page.html(study),
        "report.json": json.dumps(page.as_json(study), indent=1) + "\n",
    }
    for name, text in contents.items():
        write_atomic(folder / name, text)
    for paragraph in page.summary(study):
        print(paragraph)
    print(f"report: {folder / 'report.html'}, and as .md and .json beside it")
    return 0
