"""The command line: `plait VERB`, the same as `python -m plait VERB`.

Each module of this package is a verb, with `add_parser(subparsers)` and `run(args) -> int`; a name
with a leading underscore is what verbs share. Loading torch and peft takes seconds: modules import
plait inside `run`, and what loads torch after the config file was read, so that help or a mistake
is answered at once.
"""

import argparse
import errno
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait_cli._quiet import quiet

if TYPE_CHECKING:
    from rich.console import Console

# What a user can put right: said on one line, exit code 2. All else is a failure, exit code 1.
_USER_ERRORS = (
    ValueError,
    TypeError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


_LONGEST = 400  # characters of a library's error
# Of an OSError that is none of these classes: a path that cannot be one, and no room on the disk.
_USER_ERRNO = (errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ, errno.EINVAL)
_USER_ERRNO += (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns 0 for success, 2 for a user's error, 1 for any other failure, 130 when interrupted.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:  # argparse stops taking overrides at the first option among them
        if "overrides" not in args or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    try:
        with quiet(args.verbose):
            if args.modules:
                from plait.run.config import import_plugin

                for module in args.modules:
                    import_plugin(module)
            return args.run(args)
    except BrokenPipeError:
        # The reader of our output (`| head`) went away; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _USER_ERRORS as error:
        return _report(args, error, 2)
    except KeyboardInterrupt:
        print(f"plait {args.verb}: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        return _report(args, error, 2 if error.errno in _USER_ERRNO else 1)
    except Exception as error:
        return _report(args, error, 1)


def console() -> "Console":
    """Return the console for standard output; text is printed as it is, without markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def _report(args: argparse.Namespace, error: BaseException, code: int) -> int:
    """Print an error on stderr, with the traceback when --debug is given."""
    if args.debug:
        import traceback

        traceback.print_exception(error)
        return code
    name = "" if code == 2 else f"{type(error).__name__}: "
    print(f"plait {args.verb}: {name}{_text(error)}", file=sys.stderr)
    if code == 1:
        print("Run it with --debug to see where.", file=sys.stderr)
    return code


def _text(error: BaseException) -> str:
    """Return an error's text; that of a library on one line, cut off where it is long."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    if module.partition(".")[0] in ("plait", "plait_cli"):  # a line for each mistake
        return str(error)
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class _Version(argparse.Action):
    """Prints the version, read when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from plait._version import __version__

        print(f"plait {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plait", description="Fine-tune with many LoRA methods.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        metavar="MODULE",
        help="import a module, or a file ending in .py, that registers a method; repeatable",
    )
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for entry in pkgutil.iter_modules(__path__):
        if entry.name.startswith("_"):  # what several verbs share
            continue
        module = importlib.import_module(f"{__name__}.{entry.name}")
        subparser = module.add_parser(subparsers)
        subparser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        subparser.add_argument(
            "--verbose",
            action="store_true",
            help="print the resolved config, and what libraries say",
        )
        subparser.set_defaults(run=module.run)
    return parser
