"""What the environment of a launcher says: which process this is, of how many, and who is first.

torchrun, accelerate and `plait train --processes` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. srun sets names of its own, which are translated. No torch is loaded here.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_PORTS = 1000  # srun's jobs meet at a port from 29500 on that their number chooses


@dataclass(frozen=True)
class Place:
    """A process: its number from 0, the number of all, its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def find_place(environment: MutableMapping[str, str] | None = None) -> Place | None:
    """Return the place that a launcher gave this process; None without a launcher.

    environment: os.environ unless given; srun's names are added to it as torch's.

    Raises ValueError for an environment of several processes that does not say how to meet.
    """
    environment = os.environ if environment is None else environment
    if "RANK" not in environment and _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        environment.update(_of_slurm(environment))
    if "RANK" not in environment:
        for name in _MPI:
            if _number(environment, name) > 1:
                raise ValueError(
                    f"The environment is that of an MPI launcher ({name}={environment[name]}), "
                    "which plait does not read. Start the processes with torchrun, srun or: plait "
                    "train FILE --processes N"
                )
        if _number(environment, "WORLD_SIZE") <= 1:
            return None
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise ValueError(
            f"The environment of a launcher is incomplete: {', '.join(missing)} is not set. Start "
            "the processes with torchrun or: plait train FILE --processes N"
        )
    place = Place(*(_number(environment, name) for name in _NEEDED[:3]))
    if not 0 <= place.rank < place.size or place.local_rank < 0:
        raise ValueError(
            f"The environment of a launcher is wrong: RANK={place.rank}, LOCAL_RANK="
            f"{place.local_rank}, WORLD_SIZE={place.size}. RANK counts from 0 to WORLD_SIZE - 1."
        )
    return place


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "0"
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise ValueError(f"The environment variable {name} is {text!r:.60}. It should be a number.")
    return int(text)


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch reads, from what srun sets for a process of a job step."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    first = environment.get("MASTER_ADDR") or first_node(nodes)
    if not first or "SLURM_PROCID" not in environment or "SLURM_LOCALID" not in environment:
        raise ValueError(
            "srun's environment does not say where the first process is. Set MASTER_ADDR to its "
            'machine, such as $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1).'
        )
    port = 29500 + _number(environment, "SLURM_JOB_ID") % _PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": first,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_node(nodes: str) -> str:
    """Return the first machine of a node list of SLURM: a[07-09,12],b -> a07."""
    match = re.match(r"([\w.-]+?)?(?:\[(\w+)[^\]]*\]([\w.-]*))?(?:,|$)", nodes)
    return "" if match is None else "".join(part or "" for part in match.groups())
