"""`plait chat RUN`: talk to a trained run."""

import argparse
import sys
from collections.abc import Iterator

from plait_cli._options import add_sampling, check_sampling

_HELP = "/reset begins a new conversation, /exit ends it."


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a trained run",
        description="Talk to a trained run through its chat template. Each line of the standard "
        f"input is a message; answers are printed as they are generated. {_HELP}",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_sampling(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="such as data.chat_template=chatml for a run without a chat template, or "
        "model.trust_remote_code=true, to run code that comes with the base model",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Answer each line until /exit or the end of the input."""
    check_sampling(args)
    from plait.run.infer.chat import open_chat

    chat = open_chat(
        args.run_folder,
        args.system,
        task=args.task,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        overrides=args.overrides,
    )
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP)
    for line in _lines(interactive):
        if line == "/exit":
            break
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command. {_HELP}", file=sys.stderr)
        elif line:
            try:
                chat.say(line, _write)
            except ValueError as error:
                if not interactive:
                    raise
                print(f"plait chat: {error} {_HELP}", file=sys.stderr)
            print(flush=True)
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the lines of the standard input, in a terminal after a prompt."""
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _write(text: str) -> None:
    print(text, end="", flush=True)
