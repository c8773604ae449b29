"""Run llama.cpp's converters, all in this one process: a process each costs four CPU seconds.

    python llamacpp_convert.py SOURCE JOBS.json

SOURCE: a checkout of llama.cpp. JOBS.json: a list of jobs, each the name of a script and its
arguments. The file is replaced by a list with the message of each job that failed, else null.

The vocabulary is no subject of these tests, and llama.cpp knows no tokenizer of theirs: the models
are written without one.
"""

import contextlib
import importlib
import io
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any


def main(source: Path, jobs: Path) -> None:
    """Run the jobs."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    _leave_out_vocabularies()
    results = []
    for script, *arguments in json.loads(jobs.read_text(encoding="utf-8")):
        sys.argv = [script, *arguments]
        told = io.StringIO()
        failure = None
        with contextlib.redirect_stderr(told):
            try:
                runpy.run_path(str(source / script), run_name="__main__")
            except SystemExit as end:
                failure = told.getvalue() if end.code else None
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        results.append(failure)
    jobs.write_text(json.dumps(results), encoding="utf-8")


def _leave_out_vocabularies() -> None:
    base = importlib.import_module("conversion.base").ModelBase
    prepare = base.__init__

    def set_vocab(model: Any) -> None:
        model._set_vocab_none()
        model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    def init(model: Any, *args: Any, **kwargs: Any) -> None:
        prepare(model, *args, **kwargs)
        if type(model).__name__ != "LoraModel":  # an adapter has none in any case
            model.set_vocab = types.MethodType(set_vocab, model)

    base.__init__ = init


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
