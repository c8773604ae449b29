"""`plait train FILE`: train one run and show what it changed."""

import argparse
import shlex
import sys


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "train", help="train a run", description="Train the run that a config file describes."
    )
    parser.add_argument("file", help="the config file; write one with: plait init FILE")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="set a key of the config"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run in its output.dir"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Train; return 130 after Ctrl-C, 1 if the loss or a weight became NaN or infinite."""
    from plait.run.config import dump_config, load_config

    cfg = load_config(args.file, args.overrides, import_plugins=True)

    from plait.run.callbacks import ProgressBar  # loads torch: after the answer to a mistake
    from plait.run.card import comparison_rows, early_stop, kept_step
    from plait.run.train import train
    from plait_cli import console
    from plait_cli._show import Status, comparison

    screen = console()
    bar = ProgressBar(screen)
    if args.verbose:
        screen.print(dump_config(cfg), soft_wrap=True)
    again = shlex.join(["plait", "train", args.file, *args.overrides, "--resume"])
    try:
        with Status(screen, "held-out metric") as status:
            folder = train(
                cfg, args.resume, [bar], status, lambda line: screen.print(line, soft_wrap=True)
            )
    except KeyboardInterrupt as stopped:
        bar.close()
        print(f"\n{stopped or 'training: stopped.'}\nContinue it with: {again}", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        bar.close()
        if args.debug:
            raise
        print(f"plait train: {error}", file=sys.stderr)
        return 1
    finally:
        bar.close()
    run = folder.read_facts()
    percent = 100 * run["trainable"] / run["parameters"]
    print(
        f"{run['trainable']:,} trainable parameters ({percent:.3g} %), {run['steps']} steps in "
        f"{run['seconds']:.1f} s"
    )
    if early_stop(run) is not None:
        print(f"stopped early: {early_stop(run)}")
    if kept_step(run) is not None:
        print(f"weights kept: {kept_step(run)}")
    rows = comparison_rows(folder.read_evaluation())
    if rows:
        screen.print(comparison(rows))
    else:
        screen.print("No held-out metric: data.validation and data.test are not set.")
    screen.print(f"run folder: {folder.path}", soft_wrap=True)
    if folder.lora.is_dir():
        screen.print(f"plain LoRA for stock peft and servers: {folder.lora}", soft_wrap=True)
    return 0
