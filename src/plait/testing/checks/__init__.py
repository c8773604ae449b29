"""The contract: every check takes a `Case` and raises AssertionError with what is wrong."""

from collections.abc import Callable

from plait.testing.case import Case
from plait.testing.checks.adapters import (
    export_is_as_declared,
    merge_is_exact,
    mixed_batch_is_separate_runs,
    save_and_load,
    two_adapters_coexist,
)
from plait.testing.checks.options import (
    config_is_strict,
)
from plait.testing.checks.precision import (
    checkpointing_changes_nothing,
    half_precision_is_bounded,
    half_precision_trains,
    quantised_bases_work,
)
from plait.testing.checks.training import (
    events_fire,
    experts_part,
    gradients_reach_everything,
    loss_falls,
    micro_batches_add_up,
    only_the_delta_trains,
    optimizers_agree,
    random_start_differs,
    random_state_is_kept,
    resume_is_exact,
    start_is_the_base,
    starts_are_reproducible,
    storages_are_distinct,
)
from plait.testing.checks.update import (
    counts_are_the_formula,
    fast_is_naive,
    forward_is_weight,
    rows_are_independent,
    shapes_are_free,
)

CHECKS: list[Callable[[Case], None]] = [
    start_is_the_base,
    random_start_differs,
    starts_are_reproducible,
    only_the_delta_trains,
    gradients_reach_everything,
    loss_falls,
    optimizers_agree,
    micro_batches_add_up,
    resume_is_exact,
    events_fire,
    experts_part,
    storages_are_distinct,
    random_state_is_kept,
    forward_is_weight,
    fast_is_naive,
    shapes_are_free,
    rows_are_independent,
    counts_are_the_formula,
    merge_is_exact,
    save_and_load,
    two_adapters_coexist,
    mixed_batch_is_separate_runs,
    export_is_as_declared,
    half_precision_is_bounded,
    half_precision_trains,
    checkpointing_changes_nothing,
    quantised_bases_work,
    config_is_strict,
]
