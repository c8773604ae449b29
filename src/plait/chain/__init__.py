"""Chains of adapters: train a link, tie it into the model, start a new one.

`ChainPlan` describes a chain. `ChainCallback` runs it under Trainer and TRL, `start` in your own
training loop, `plait train` from a run file. One engine serves all recipes (chain/recipes.py).
"""

from plait.chain.callback import ChainCallback
from plait.chain.engine import (
    Chain,
    chain_of,
    load,
    merge,
    remove,
    save,
    save_stacked,
    start,
)
from plait.chain.ledger import Ledger, Record
from plait.chain.links import chain_support
from plait.chain.plan import ChainPlan, ChainSchedule, chain_schedule

__all__ = [
    "Chain",
    "ChainCallback",
    "ChainPlan",
    "ChainSchedule",
    "Ledger",
    "Record",
    "chain_of",
    "chain_schedule",
    "chain_support",
    "load",
    "merge",
    "remove",
    "save",
    "save_stacked",
    "start",
]
