"""New Python processes that need not import torch and transformers once more.

Importing them takes five seconds. Here one process does it, and forks for every call. The fork has
imported nothing of plait, and peft only if it is asked to.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

LIBRARIES = "import torch, transformers, accelerate, safetensors.torch, transformers.modeling_utils"
PROGRAM = """
import json, os, runpy, sys, traceback
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate(("/dev/null", job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        sys.path[:], sys.argv[:] = job["path"], job["argv"]
        sys.stdin = open(0)
        code = 0
        try:
            if job["code"] is None:
                runpy.run_path(job["argv"][0], run_name="__main__")
            else:
                exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@cache
def _process(libraries: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", libraries + PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    atexit.register(process.kill)
    return process


def python(
    *argv: str | Path,
    code: str | None = None,
    peft: bool = False,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script (argv[0] is its path), or code with arguments, in a new process.

    Args:
        argv: sys.argv of the process; with `code` without its first entry.
        peft: the process has imported peft already.
    """
    process = _process(LIBRARIES + (", peft" if peft else ""))
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        words = [str(word) for word in argv]
        job = {
            "code": code,
            "argv": words if code is None else ["-c", *words],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ),
            "path": [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *_standard_path()],
            "out": f"{folder}/out",
            "err": f"{folder}/err",
        }
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(words, status, out, err)


@cache
def _standard_path() -> list[str]:
    """sys.path of an interpreter that is started with -P."""
    code = "import sys, json; print(json.dumps(sys.path))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout)
