"""Gates: what multiplies the rank axis, one file a gate. Importing them registers their names.

`alloc`, `droplora` and `sora` can be named in any method's `gates`. `screening` belongs to
dual_module, and `prune` removes ranks whose gate is zero.
"""

from plait.gates import alloc, drop, prune, screening, sparse

__all__ = ["alloc", "drop", "prune", "screening", "sparse"]
