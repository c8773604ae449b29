"""Code of other people, which runs only when the user asks for it in this very call.

Plugins are modules that register methods; a model can bring code along, too.

`plait --import MODULE_OR_FILE` is the user's own command line. `plugins:` in a run file is imported
by `plait check` and `plait train`, which the user gives that file; the config.yaml of a run folder,
which may come from somebody else, imports nothing. `model.trust_remote_code` counts likewise: in
the user's own run file or on the command line, never in the config.yaml of a run folder.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plait.options import shown
from plait.run.config.sections import ModelConfig
from plait.run.config.yaml import Source, check_value

REMOTE_CODE = "model.trust_remote_code"
# Modules that the user asked for in this process -> what makes import_plugin do so in another one.
IMPORTED: dict[str, str] = {}


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
        IMPORTED[name] = name
        return
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"plugin {name}: there is no such file. Correct the path.")
    if path.stem in sys.modules:
        if getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
            IMPORTED[path.stem] = str(path.resolve())
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
    IMPORTED[path.stem] = str(path.resolve())


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
                f"{source.at('plugins')} has {shown(name)}, which is not a module name. Give "
                "an importable module; a file is named on the command line: plait --import FILE.py"
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


def check_remote_code(model: ModelConfig, file: str | Path, overrides: Sequence[str]) -> None:
    """Refuse `model.trust_remote_code` in the config of a run folder, which runs no code.

    file: that config. overrides: of the command line, where the key counts.

    Raises:
        ValueError: the file sets it, and the command line does not.
    """
    said = any(text.partition("=")[0] == REMOTE_CODE for text in overrides)
    if model.trust_remote_code and not said:
        raise ValueError(
            f"{file}: {REMOTE_CODE} is true, and the config of a run folder runs no code. If you "
            f"trust the code that {shown(model.name)} brings along, add {REMOTE_CODE}=true to the "
            f"command; if it needs none, {REMOTE_CODE}=false."
        )
