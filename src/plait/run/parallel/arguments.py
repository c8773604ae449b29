"""What several processes need of the training section, and what of it they cannot have."""

from typing import Any

from plait.run.config import RunConfig
from plait.run.parallel import ranks
from plait.run.parallel.sharded import fsdp_options

# A key of `training` -> the values that several processes take, and why no other.
_TAKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "train_sampling_strategy": (
        (None, "random", "sequential"),
        "would order the rows of each process by itself",
    ),
    "auto_find_batch_size": ((None, False), "would change the batch of one process alone"),
    "average_tokens_across_devices": (
        (None, True),
        "would weight tokens by the process that has them",
    ),
    "save_on_each_node": ((None, False), "would write the run folder twice"),
    "deepspeed": (
        (None,),
        "hides its optimizer steps from the schedules and penalties of methods",
    ),
    "fsdp": ((None, False, "", []), "is set by parallel.kind: fsdp2"),
}


def group_options(cfg: RunConfig) -> dict[str, Any]:
    """Return what several processes add to the keywords of TrainingArguments.

    Raises ValueError for a key of `training` that does not work with them.
    """
    if cfg.objective.name != "sft":
        raise ValueError(
            f"{cfg.source.at('objective.name')} is {cfg.objective.name}, whose trainer divides the "
            "rows in its own way. Train in one process."
        )
    for key, (taken, reason) in _TAKEN.items():
        value = cfg.training.get(key)
        if value not in taken:
            raise ValueError(
                f"{cfg.source.at(f'training.{key}')} is {value!r}, which {reason}. Leave it out, "
                "or train in one process."
            )
    options: dict[str, Any] = {}
    # All processes draw equal buffers from equal seeds: DDP need not send them in each forward.
    options["ddp_broadcast_buffers"] = cfg.training.get("ddp_broadcast_buffers", False)
    # The order of the rows is that of one process, although each draws dropout for itself.
    seed = cfg.training.get("data_seed")
    options["data_seed"] = cfg.training["seed"] if seed is None else seed
    if not ranks.on_accelerator(cfg):
        options["use_cpu"] = True
    return options | fsdp_options(cfg) if cfg.parallel.kind == "fsdp2" else options
