"""Mixes: a constant mix is its matrix; what depends on the input says so."""

from typing import Any

import pytest
import torch

import plait
from plait.core.mix import Matrix, Pairing, TaskTable, TokenRouter, as_mix
from plait.core.route import Rows
from plait.testing import tiny
from plait.testing.case import Case
from plait.testing.helpers import deltas, relative, wrap

TASKS = ["law", "care"]


def test_what_a_method_declares() -> None:
    M, router = tiny.numbers(2, 4), TokenRouter(tiny.numbers(2, 6))
    assert isinstance(as_mix(None), Pairing)
    matrix = as_mix(M)
    assert isinstance(matrix, Matrix)
    assert matrix.M is M
    assert as_mix(router) is router


@pytest.mark.parametrize(
    ("mix", "choice", "ids"),
    [
        (Pairing(), {}, None),
        (Matrix(tiny.numbers(3, 4)), {}, None),
        (TaskTable(TASKS), {"task": "law"}, [0, 0, 0]),
        (TaskTable(TASKS), {"task": "care"}, [1, 1, 1]),
        *((TokenRouter(torch.zeros(2, 6, dtype=torch.float64), kind), {"approx": "mean"}, None)
          for kind in ("reduce", "expand", "pair")),
    ],
    ids=["one", "matrix", "task law", "task care", "reduce", "expand", "pair"],
)  # fmt: skip
def test_the_matrix_is_what_a_call_does(mix: Any, choice: Any, ids: list[int] | None) -> None:
    """A router with G = 0 is uniform."""
    z, x = tiny.numbers(3, 4), tiny.numbers(3, 6, key=1)
    rows = Rows(task_ids=None if ids is None else torch.tensor(ids))
    M = mix.constant(4, **choice)
    expected = z if M is None else z @ M.T
    assert relative(mix(z, x, rows), expected) < 1e-12


def test_what_depends_on_the_input_has_no_matrix() -> None:
    table, router = TaskTable(TASKS), TokenRouter(tiny.numbers(2, 6))
    assert (table.depends_on, list(table.tasks)) == ("task", TASKS)
    assert (router.depends_on, list(router.tasks)) == ("token", [])
    assert (Pairing().depends_on, Matrix(tiny.numbers(2, 2)).depends_on) == (None, None)
    with pytest.raises(plait.NotMergeable, match=r"depends on the token\. Use merge\(approx="):
        router.constant(4, task="law")
    with pytest.raises(plait.NotMergeable, match=r"depends on the task\. Name one of law, care"):
        table.constant(4, approx="mean")
    with pytest.raises(ValueError, match=r"Task 'art' is not in this adapter\. It has: law, care"):
        table.constant(4, task="art")


@pytest.mark.parametrize(
    ("case", "depends_on", "names"),
    [
        (Case("cola"), None, []),
        (Case("dual_lora"), None, []),
        (Case("fedalora_het"), None, []),
        (Case("hydra"), "token", []),
        (Case("shared_b", {"routing": "task", "tasks": TASKS}), "task", TASKS),
    ],
    ids=str,
)
def test_a_delta_says_what_its_mix_says(case: Case, depends_on: Any, names: list[str]) -> None:
    delta = deltas(wrap(case))[0]
    assert (delta.depends_on, list(delta.tasks)) == (depends_on, names)
    if depends_on is None:
        assert (delta.folded() is None) == isinstance(delta, plait.DenseDelta)
    else:
        with pytest.raises(plait.NotMergeable, match=f"{case.key} cannot be merged: its update"):
            delta.folded()
