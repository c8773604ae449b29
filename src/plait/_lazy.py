"""Load plait's methods when they are first needed, and no later than peft is.

`import plait` takes a moment only: torch, peft and the methods are loaded when one of them is first
used. Registration must not be missed by somebody who imports plait and then works with peft alone,
and must not begin while a module of plait is half imported. So the imports of peft and of plait's
modules are counted, and when the last one under way is complete and peft is there, the rest of
plait is imported, once. While another thread is in the middle of importing plait, it does that.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def load_with_peft(load: Callable[[], object]) -> None:
    """Call `load` once: now if peft is imported already, else when it has been.

    load: imports everything that registers something with peft.
    """
    if "peft" in sys.modules:
        load()
    else:
        sys.meta_path.insert(0, _Watch(load))


class _Watch:
    """Finds nothing itself: it counts the imports of peft and of plait's modules."""

    def __init__(self, load: Callable[[], object]) -> None:
        self.load = load
        self.depth = 0
        self.lock = threading.Lock()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that counts."""
        if name != "peft" and not name.startswith("plait."):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    counted: Any = _Counted(spec.loader, self)
                    spec.loader = counted
                return spec
        return None

    def count(self, step: int) -> bool:
        """Count an import that begins (1) or ends (-1); True if it is time to load the rest."""
        with self.lock:
            self.depth += step
            if self.depth or "peft" not in sys.modules or self not in sys.meta_path:
                return False
            sys.meta_path.remove(self)
            return True


class _Counted:
    """The loader of one module, in all but that its import is counted."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module by its own loader, which it keeps; then load the rest if it is time."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.watch.count(1)
        try:
            self.loader.exec_module(module)
        except BaseException:
            self.watch.count(-1)
            raise
        if self.watch.count(-1):
            self.watch.load()
