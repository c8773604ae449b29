"""Methods of other people: modules that register them, imported when the user asks for it.

`plait --import MODULE_OR_FILE` is the user's own command line. `plugins:` in a run file is imported
by `plait check` and `plait train`, which the user gives that file; the config.yaml of a run folder,
which may come from somebody else, imports nothing.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from plait.run.config.yaml import Source, check_value


def import_plugin(name: str) -> None:
    """Import a module by its name, or a file that ends in .py under the name of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: there is no such module, or it cannot be imported.
        ValueError: another module has the name of the file.
    """
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"plugin {name}: cannot be imported ({error}). Give an installed module, or a file "
                "by plait --import FILE.py"
            ) from error
        return
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"plugin {name}: there is no such file. Correct the path.")
    if path.stem in sys.modules:
        if getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
            return
        raise ValueError(
            f"plugin {name}: a module named {path.stem} is loaded already. Rename the file."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None  # a .py file has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def check_plugins(raw: Any, source: Source, trusted: bool) -> list[str]:
    """Check the `plugins` list of a run file; import them if the file is the user's own.

    Raises:
        ValueError: no list of module names, or the file is not trusted and one is not imported.
        ImportError: one that cannot be imported.
    """
    names = check_value(list[str], raw, "plugins", source) if raw else []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(
                f"{source.at('plugins')} has {name!r}, which is no name of a module. Give an "
                "importable module; a file is named on the command line: plait --import FILE.py"
            )
        if name in sys.modules:
            continue
        if not trusted:
            raise ValueError(
                f"{source.at('plugins')} names {name}, which is not imported: the config of a run "
                f"folder runs no code. If you trust it, name it: plait --import {name} VERB ..."
            )
        try:
            import_plugin(name)
        except ImportError as error:
            raise ImportError(f"{source.at('plugins')}: {error}") from error
    return names
