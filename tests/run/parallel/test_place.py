"""Which process this is: what launchers' environments say, and what they do not."""

import re
from typing import Any

import pytest
from torch.utils.data import BatchSampler

from plait.run.config import config_from_dict
from plait.run.parallel.place import Place, find_place, first_node
from plait.run.parallel.ranks import join
from plait.run.parallel.rows import Shares
from plait.run.prepare import planned_steps, training_arguments

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


def test_torchrun() -> None:
    assert find_place({**TORCHRUN}) == Place(3, 4, 1)
    assert find_place({**TORCHRUN, **SRUN, "SLURM_PROCID": "0"}) == Place(3, 4, 1)
    assert find_place({}) is None
    assert find_place({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None  # a script without srun


def test_srun_is_translated() -> None:
    environment = {**SRUN}
    assert find_place(environment) == Place(3, 4, 1)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert environment["MASTER_PORT"] == "29956"
    assert find_place({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None
    environment = {**SRUN, "MASTER_ADDR": "login", "MASTER_PORT": "1"}
    find_place(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("login", "1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a-1,b-2", "a-1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("rack1-[3,5]-ib", "rack1-3-ib"),
        ("", ""),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"WORLD_SIZE": "2"}, "incomplete: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "incomplete: MASTER_ADDR is not set"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, LOCAL_RANK=1, WORLD_SIZE=4. RANK counts from 0"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'. It should be a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"MPI launcher \(OMPI_COMM_WORLD_SIZE=2\)"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "does not say where the first process is"),
    ],
)
def test_refused(environment: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        find_place(environment)


def test_other_numbers_than_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config_from_dict({"parallel": {"processes": 3}})
    with pytest.raises(ValueError, match=r"parallel.processes is 3, and 1 process was started"):
        join(cfg)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"processes is 3, and 4 processes were started"):
        join(cfg)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="the launcher set ACCELERATE_USE_DEEPSPEED"):
        join(config_from_dict({}))


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"training": {"auto_find_batch_size": True}}, "auto_find_batch_size is True, which would"),
        ({"training": {"deepspeed": "x.json"}}, "training.deepspeed is 'x.json', which hides its"),
        ({"method": {"name": "tied"}}, "parallel.kind is fsdp2, and method.name is tied: its blo"),
        (
            {"objective": {"name": "dpo"}},
            "objective.name is dpo, whose trainer divides the rows in its own way.",
        ),
        ({"chain": {"links": 2}}, "parallel.kind is fsdp2, and there is a chain: its links"),
        (
            {"optimizer": {"name": "lora_rite"}},
            "is fsdp2, and optimizer.name is lora_rite: it comp",
        ),
    ],
)
def test_what_processes_cannot_have_is_refused(sections: dict[str, Any], text: str) -> None:
    cfg = config_from_dict({"parallel": {"processes": 2, "kind": "fsdp2"}, **sections})
    with pytest.raises(ValueError, match=re.escape(text)):
        training_arguments(cfg)  # plait check, too


def test_sharding_takes_several() -> None:
    with pytest.raises(ValueError, match=r"parallel\.kind is fsdp2, and there is one process"):
        training_arguments(config_from_dict({"parallel": {"kind": "fsdp2"}}))


def test_planned_steps_count_the_rows_of_all_processes() -> None:
    training = {"per_device_train_batch_size": 3, "num_train_epochs": 2.0}
    assert planned_steps(training, 25) == 18
    assert planned_steps(training, 25, processes=4) == 6
    assert planned_steps({**training, "dataloader_drop_last": True}, 25, processes=4) == 4


def test_rows_are_shared_out_evenly_and_once() -> None:
    batches = BatchSampler(range(14), batch_size=2, drop_last=False)
    shares = [list(Shares(batches, 4, rank)) for rank in range(4)]
    assert {len(share) for share in shares} == {len(Shares(batches, 4, 0))} == {2}
    for step, rows in enumerate([range(8), range(8, 14)]):
        assert [row for share in shares for row in share[step]] == list(rows)
        assert {len(share[step]) for share in shares} <= {1, 2}
    few = BatchSampler(range(9), batch_size=2, drop_last=False)
    assert [list(Shares(few, 4, rank))[1] for rank in range(4)] == [[], [], [], [8]]
    whole = BatchSampler(range(14), batch_size=2, drop_last=True)
    assert [list(Shares(whole, 4, rank)) for rank in range(4)] == [
        [[2 * r, 2 * r + 1]] for r in range(4)
    ]


def test_deepspeed_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"config: parallel.kind is deepspeed, which hides its"):
        config_from_dict({"parallel": {"kind": "deepspeed"}})
