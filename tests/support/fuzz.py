"""Damaged inputs, and acts on them in a process of bounded time and memory."""

import contextlib
import copy
import faulthandler
import io
import os
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from plait_cli import main

SECONDS, GROWTH = 30, 512 * 1024**2  # of one input; beside what the libraries take
LONG = float(os.environ.get("PLAIT_FUZZ_SECONDS", "0"))  # CPU seconds of a target

# Inputs -----------------------------------------------------------------------------------------

ODD_TEXT = st.sampled_from(
    [
        *("", " ", "\x00", "\ud800", "a" * 300, "ä" * 300, "(a+)+$", "../../x", "/dev/zero"),
        *("/dev/null", "/proc/self/mem", ".", "/", "~", "https://x.y/z", "%s%n", "{x}"),
        *("{0.__class__}", "9" * 400, "nan", "no", "1e999", "-0", "\u202e", "a\nb"),
        *("builtin:tiny", "builtin:shift?n=3", "lora"),
    ]
)
ODD_NUMBER = st.sampled_from(
    [
        *(0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e-300, 1e308),
        *(float("nan"), float("inf"), float("-inf")),
    ]
)
ODD: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBER, ODD_TEXT, st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: Any = ()
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    found = [path] if path else []
    for key, value in inner:
        found += _places(value, (*path, key))
    return found


@st.composite
def changed(draw: Any, trees: Sequence[Any], most: int = 3) -> Any:
    """One of the trees with values replaced, taken out, or set under another name."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, most))):
        places = _places(tree)
        if not places:
            return tree
        *path, last = draw(st.sampled_from(places))
        parent = tree
        for key in path:
            parent = parent[key]
        act = draw(st.sampled_from(("set", "set", "set", "remove", "add")))
        if act == "set":
            parent[last] = draw(ODD)
        elif act == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            name = draw(st.one_of(ODD_TEXT, st.text(max_size=8)))
            parent[name] = draw(ODD)
        else:
            parent.append(draw(ODD))
    return tree


@st.composite
def damaged(draw: Any, seeds: Sequence[bytes], words: Sequence[bytes] = (), most: int = 4) -> bytes:
    """One of the texts with bytes changed, taken out, put in, doubled or cut off."""
    data = draw(st.sampled_from(list(seeds)))
    for _ in range(draw(st.integers(1, most))):
        a = draw(st.integers(0, len(data)))
        b = min(len(data), a + draw(st.sampled_from((0, 1, 1, 2, 4, 16, 200))))
        act = draw(st.sampled_from(("put", "put", "drop", "double", "cut")))
        if act == "put":
            what = draw(
                st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(words or [b"\0"]))
            )
            data = data[:a] + what + data[b:]
        elif act == "drop":
            data = data[:a] + data[b:]
        elif act == "double":
            data = data[:b] + data[a:b] * draw(st.sampled_from((1, 2, 30))) + data[b:]
        else:
            data = data[:a]
    return data


# Acts -------------------------------------------------------------------------------------------


def command(*words: str | Path) -> None:
    """Run `plait WORDS` in this process; it has to end with exit code 0 or 2, in time."""
    out, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = error.code
    text = out.getvalue()
    assert code in (0, 2), f"exit code {code}: {text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    assert time.monotonic() - start < SECONDS


def contained(act: Callable[[TextIO], None], log: Path) -> None:
    """Call `act` in a process of its own; AssertionError with what it raised, or with where it was.

    Its memory may grow by GROWTH. If one input takes longer than SECONDS, the process ends.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            with log.open("w") as file:
                _, hard = resource.getrlimit(resource.RLIMIT_DATA)
                resource.setrlimit(resource.RLIMIT_DATA, (_data() + GROWTH, hard))
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                try:
                    act(file)
                    code = 0
                except BaseException:
                    faulthandler.cancel_dump_traceback_later()
                    traceback.print_exc(file=file)
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = log.read_text(errors="replace")
    assert status == 0, f"the process ended with {status}\n{text[:2000]}\n..\n{text[-6000:]}"


def _data() -> int:
    """Bytes of data that this process has reserved."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmData")


def fuzz(inputs: st.SearchStrategy[Any], act: Callable[[Any], None], log: Path, short: int) -> int:
    """Call `act` with many inputs in a contained process; returns their number.

    Args:
        inputs: what is drawn. act: raises if the answer is wrong. log: a file for what went wrong.
        short: inputs of the short form; PLAIT_FUZZ_SECONDS is the CPU time of the long one.
    """
    counted = log.with_suffix(".count")

    def run(file: TextIO) -> None:
        count, start = 0, time.process_time()

        def one(data: Any) -> None:
            nonlocal count
            count += 1
            faulthandler.dump_traceback_later(SECONDS + 5, exit=True, file=file)
            act(data)
            faulthandler.cancel_dump_traceback_later()

        for number in range(10**9):
            _run(one, inputs, 100 if LONG else short, number)
            counted.write_text(str(count))
            if time.process_time() - start >= LONG:
                return

    contained(run, log)
    return int(counted.read_text())


def _run(act: Callable[[Any], None], inputs: Any, examples: int, number: int) -> None:
    phases = [Phase.generate, Phase.shrink] if LONG else [Phase.generate]
    options = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    seed(number)(options(given(inputs)(act)))()
