"""Which client of a federated run has which adapter: its peft config, with its rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft import PeftConfig

from plait.run.config import RunConfig, did_you_mean
from plait.run.federated.config import FederateConfig
from plait.run.model import Base
from plait.run.prepare import method_config


def client_configs(
    config: FederateConfig,
    run: RunConfig,
    base: Base,
    steps: Mapping[str, int | None],
    tasks: list[str] | None,
) -> dict[str, PeftConfig]:
    """Client -> peft config of its adapter.

    Args:
        config: of the federated run. run: of a single run, with the same method.
        base: the base model. steps: client -> its optimizer steps in all rounds, None if unknown.
        tasks: names of the data's tasks.

    Raises:
        ValueError: ranks that do not fit the clients, or what `method_config` refuses.
    """
    configs = {}
    for client, rank in _ranks(config, list(steps)).items():
        options = dict(config.method.options)
        if rank is not None:
            options["r"] = rank
        if config.federated.scaling is not None:
            options["lora_alpha"] = config.federated.scaling * options["r"]
        if options.get("target_modules", "all-linear") == "all-linear":
            options["target_modules"] = list(base.layers)
        own = replace(run, method=replace(config.method, options=options))
        adapter = method_config(own, base, steps[client], tasks)
        assert adapter is not None  # `full` has no rank and is refused
        configs[client] = adapter
    return configs


def _ranks(config: FederateConfig, clients: Sequence[str]) -> dict[str, int | None]:
    ranks = config.federated.ranks
    if isinstance(ranks, list):
        if len(ranks) != len(clients):
            raise ValueError(
                f"federated.ranks has {len(ranks)} ranks for {len(clients)} clients. Give one for "
                "each, or one for all."
            )
        ranks = dict(zip(sorted(clients), ranks, strict=True))
    if isinstance(ranks, dict):
        for name in ranks:
            if name not in clients:
                raise ValueError(
                    f"federated.ranks names {name!r}, which is not a client. "
                    f"{did_you_mean(name, clients)}"
                )
        missing = sorted(set(clients) - set(ranks))
        if missing:
            raise ValueError(f"federated.ranks does not name client {missing[0]!r}. Give its rank.")
        of_client: dict[str, int | None] = {name: ranks[name] for name in clients}
    else:
        of_client = dict.fromkeys(clients, ranks)
    for name, rank in of_client.items():
        if rank is not None and rank < 1:
            raise ValueError(f"federated.ranks: client {name!r} has rank {rank}. Give 1 or more.")
    return of_client
