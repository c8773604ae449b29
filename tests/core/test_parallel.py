"""Two processes, under DDP and FSDP2: every method trains and is saved as in one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import plait
from plait.testing import tiny
from plait.testing.helpers import relative
from tests.support import ROOT, parallel
from tests.support.parallel import CASES, CONTROLS, REFUSED, REFUSED_STEPS, UPSTREAM_FAILS

pytestmark = pytest.mark.slow  # two processes import transformers
RUNS = [("ddp", name) for name in (*CASES, *CONTROLS)]
RUNS += [("fsdp", name) for _, name in RUNS if name not in UPSTREAM_FAILS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written."""
    to = tmp_path_factory.mktemp("parallel")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests" / "support" / "parallel.py"), str(to)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return to


Ends = dict[str, dict[str, dict[str, Tensor]]]  # process -> case -> what it ended with


@pytest.fixture(scope="module")
def ends(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """`one`, `ddp0`, `ddp1`, `fsdp0`, `fsdp1`."""
    to = tmp_path_factory.mktemp("one")
    found: Ends = {"one": {n: parallel.run(n, "one", to / n) for n in (*CASES, *CONTROLS)}}
    for process in ("ddp0", "ddp1", "fsdp0", "fsdp1"):
        found[process] = {}
        for key, value in load_file(folder / f"{process}.safetensors").items():
            name, _, what = key.partition("/")
            found[process].setdefault(name, {})[what] = value
    return found


def test_every_method_is_a_case_and_in_the_table() -> None:
    keys = {case.key for case in CASES.values()}
    assert keys == {method.key for method in plait.list_methods()}
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    table = page.partition("### Several processes")[2].partition("```")[0]
    assert {key for key in keys if f"`{key}`" in table} == keys


@pytest.mark.parametrize(("mode", "name"), RUNS)
def test_two_processes_are_one(mode: str, name: str, ends: Ends) -> None:
    one, first, second = ends["one"][name], ends[f"{mode}0"][name], ends[f"{mode}1"][name]
    assert relative((first["losses"] + second["losses"]) / 2, one["losses"]) < 1e-5
    states = [{k for k in end if k.startswith("state/")} for end in (one, first, second)]
    assert states[0]
    assert states[0] == states[1] == states[2]
    for key in states[0]:
        assert torch.equal(first[key], second[key]), f"the processes drifted apart: {key}"
        bound = 1e-3 if "Ubar" in key or "Ibar" in key else 1e-4
        assert relative(first[key].double(), one[key].double()) < bound, key


@pytest.mark.parametrize("name", [name for mode, name in RUNS if mode == "fsdp"])
def test_parameters_are_sharded(name: str, ends: Ends) -> None:
    first, second = ends["fsdp0"][name], ends["fsdp1"][name]
    assert first["held"] + second["held"] == first["all"] == ends["one"][name]["held"]
    assert max(first["held"], second["held"]) < 0.6 * first["all"]


@pytest.mark.parametrize(("mode", "name"), RUNS)
def test_saved_adapter_loads_in_one_process(mode: str, name: str, folder: Path, ends: Ends) -> None:
    model: Any = PeftModel.from_pretrained(tiny.llama(), folder / mode / name).eval()
    tasks = name in CASES and "tasks" in CASES[name].options
    own = {"task_ids": torch.arange(8) % 2} if tasks else {}
    with torch.no_grad():
        found = model(input_ids=tiny.tokens(8), **own).logits
    for process in range(2):
        assert relative(found, ends[f"{mode}{process}"][name]["logits"]) < 1e-6
    assert (
        relative(found, parallel.make(name).eval()(input_ids=tiny.tokens(8), **own).logits) > 1e-4
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_schedules_ran(mode: str, ends: Ends) -> None:
    """Else equality would say nothing."""
    end = ends[f"{mode}0"]

    def of(name: str, what: str) -> list[Tensor]:
        return [t for key, t in end[name].items() if what in key]

    assert any(not bool(t.all()) for t in of("dual_module", "keep"))
    assert any(not bool(t.all()) for t in of("sora", ".g"))
    for name in ("alloc", "alloc-pissa"):
        live = [int(t.sum()) for t in of(name, "live_ranks")]
        assert len(set(live)) > 1
    if mode == "ddp":
        pruned = of("adalora", "lora_E")
        assert sum(int((t == 0).sum()) for t in pruned) == 2 * len(pruned)


SAVE = r"the parameters are sharded \(FSDP2\)\. Save the adapter .*get_model_state_dict .*one proc"
TEXTS = {
    "merge": rf"dW of model.*q_proj: {SAVE}",
    "merge dense": rf"dW of model.*q_proj: {SAVE}",
    "export": rf"to_lora: {SAVE}",
    "export lora": rf"to_lora: {SAVE}",
    "prune": rf"prune: {SAVE}",
    "add": r"adapter 'b' on model.*q_proj: .*\(FSDP2\)\. Add adapters first, then call fully_shard",
    "sum": rf"add_weighted_adapter: {SAVE}",
    "chain": r"chain: model.*q_proj: .*\(FSDP2\)\. Train in one process or with DDP",
    "chain lora": r"chain: model.*q_proj: .*\(FSDP2\)\. Train in one process or with DDP",
    "lora_rite": r"q_proj: a factor is sharded \(FSDP2\)\. Keep the adapter out of sharding",
    "lorsum": r"q_proj: a factor is sharded \(FSDP2\)\. Keep the adapter out of sharding",
    "adalora": "RuntimeError: The size of tensor a",  # upstream's own penalty, in its forward
    "tied": "tied_delta.default.A' is shared with a parameter already|tied: A of .* is no longer",
}


@pytest.mark.parametrize(
    "what", [*REFUSED, *REFUSED_STEPS, *(f"{what}, whole" for what in REFUSED), "tied"]
)
def test_what_cannot_be_is_refused(what: str, folder: Path) -> None:
    found = json.loads((folder / "refused.json").read_text(encoding="utf-8"))
    assert re.search(TEXTS[what.removesuffix(", whole")], found[what]), found[what]
