"""The check that needs a second process: what one process saves, another one loads."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file

from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import adamw, choices, logits, steps, task_ids, tasks, wrap
from plait.upstream.export import to_lora

PROGRAM = Path(__file__).with_name("fresh_program.py")


def load(path: Path) -> ModuleType:
    """Import a Python file, for example one that registers a method, under its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def works_in_a_new_process(cases: Sequence[Case]) -> None:
    """`fresh_process` as a check."""
    with TemporaryDirectory() as folder:
        problems = fresh_process(cases, Path(folder))
    assert not problems, "; ".join(f"{name} {problem}" for name, problem in problems.items())


def fresh_process(cases: Sequence[Case], folder: Path) -> dict[str, str]:
    """Load trained adapters in a new process, and their exports in peft without plait.

    Args:
        cases: all share one new process, since importing the libraries takes most of the time.
        folder: an empty folder to work in.

    Returns:
        Case -> what is wrong; empty if everything is right.

    Raises:
        AssertionError: the new process failed; the message is its error output.
    """
    tiny.llama().save_pretrained(folder / "base")
    save_file({"input_ids": tiny.tokens()}, folder / "inputs.safetensors")
    places = {folder / f"case{number}": case for number, case in enumerate(cases)}
    for place, case in places.items():
        save_trained(case, place)
    types = run_program(folder, cases)
    problems = {}
    for place, case in places.items():
        problem = difference(place, types[place.name], f"PLAIT_{case.key.upper()}")
        if problem:
            problems[str(case)] = problem
    return problems


def save_trained(case: Case, place: Path) -> None:
    """Train three steps; save the adapter, its export if it has one, and both their logits."""
    model = wrap(case)
    steps(model, adamw(model, case.lr), 3)
    model.save_pretrained(place / "adapter")
    saved = {"logits": logits(model), **task_ids(model, 4)}
    if case.method.exact_export or tasks(model):
        to_lora(model, **choices(model)[0]).write(place / "export")
        first_task = {name: torch.zeros_like(ids) for name, ids in task_ids(model, 4).items()}
        saved["exported"] = logits(model, **first_task)
    tensors = {name: value.contiguous() for name, value in saved.items()}
    save_file(tensors, place / "saved.safetensors")


def run_program(folder: Path, cases: Sequence[Case]) -> dict[str, str]:
    """Run the program of the new process; name of a case's folder -> peft type it was loaded as."""
    modules = [sys.modules[case.method.config.__module__] for case in cases]
    methods = {
        module.__name__: module.__file__
        for module in modules
        if not module.__name__.startswith("plait.")
    }
    done = subprocess.run(
        [sys.executable, "-P", PROGRAM, folder, json.dumps(methods)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def difference(place: Path, kind: str, expected_kind: str) -> str | None:
    """What the new process loaded otherwise than it was saved; None if nothing."""
    loaded, saved = (load_file(place / f"{name}.safetensors") for name in ("loaded", "saved"))
    if kind != expected_kind:
        return f"loaded as {kind}"
    if not torch.equal(loaded["logits"], saved["logits"]):
        return "differs in a new process"
    if "exported" in saved:
        error = float((loaded["exported"] - saved["exported"]).abs().max())
        if error >= 1e-4:
            return f"the export is off by {error} in stock peft"
    return None
