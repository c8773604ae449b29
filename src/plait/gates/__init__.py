"""Gates: what multiplies the rank axis, one file a gate. Importing this registers them all.

`alloc`, `droplora` and `sora` can be named in any method's `gates`. `screening` belongs to
dual_module, and `prune` removes ranks whose gate is zero.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
