"""`plait train FILE`: train one run and show what it changed."""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.run.config import RunConfig


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
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="train in N processes on this machine; the same as parallel.processes=N",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, or start the processes that do; return 130 after Ctrl-C, 1 if the loss became NaN."""
    from plait.run.config import load_config
    from plait.run.parallel.place import find_place

    place = find_place()
    if args.processes is not None:
        args.overrides.append(f"parallel.processes={args.processes}")
    with _told_once(place is not None and place.local_rank > 0):
        cfg = load_config(args.file, args.overrides, import_plugins=True)
    processes = cfg.parallel.processes or 1
    if place is None and processes > 1:
        from plait.run.parallel.launcher import launch

        on_cpu = cfg.training.get("use_cpu", False)
        return launch(_words(args), processes, on_cpu, args.verbose)
    if place is None or place.rank == 0:
        return _run(args, cfg)
    return _follow(cfg, args.resume)


def _words(args: argparse.Namespace) -> list[str]:
    """The command line of each of several processes."""
    flags = [f"--{name}" for name in ("resume", "verbose", "debug") if getattr(args, name)]
    modules = [word for module in args.modules or () for word in ("--import", module)]
    return [*modules, "train", args.file, *args.overrides, *flags]


@contextmanager
def _told_once(silent: bool) -> Iterator[None]:
    """Let an error that all processes make be said by the first one.

    silent: this process is not the first, or not of its machine.
    """
    try:
        yield
    except Exception:
        if silent:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
        raise


def _follow(cfg: "RunConfig", resume: bool) -> int:
    """Train as one of several processes that is not the first: it prints its own errors only."""
    warnings.simplefilter("ignore")
    from plait.run.parallel import ranks
    from plait.run.train import train

    try:
        train(cfg, resume=resume)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        with _told_once(ranks.is_agreed(error) or ranks.lost(error)):
            raise
    return 0


def _run(args: argparse.Namespace, cfg: "RunConfig") -> int:
    """Train and show it."""
    from plait.run.callbacks import ProgressBar  # loads torch: after the answer to a mistake
    from plait.run.card import comparison_rows, early_stop, kept_step
    from plait.run.config import dump_config
    from plait.run.parallel import ranks
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
    except RuntimeError as error:
        if args.debug or not ranks.lost(error):
            raise
        bar.close()
        print(
            "plait train: another process of this run is gone, so this one stops. Continue it "
            f"from its last checkpoint with: {again}",
            file=sys.stderr,
        )
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
