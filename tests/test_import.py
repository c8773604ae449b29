"""`import plait` is light, and whoever has done it can use peft with every method."""

import importlib.resources
import inspect
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

import plait
from plait.testing import tiny
from tests.support import warm

HEAVY = "{'torch', 'peft', 'transformers'} & set(sys.modules)"
KNOWS = """
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
from plait.run.config.schema import methods
missing = [m for m in methods() if not any(str(k).endswith("PLAIT_" + m.upper()) for k in known)]
assert not missing, missing
"""


def python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_with_torch(code: str, *args: str) -> None:
    """Run code in a process that has torch and transformers loaded, but neither peft nor plait."""
    done = warm.python(*args, code=code)
    assert done.returncode == 0, done.stderr


def test_importing_plait_and_reading_a_config_load_nothing_heavy(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    code = (
        "import sys, plait, inspect\n"
        "from plait.run.config import load_config, starter_config\n"
        "open(sys.argv[1], 'w').write(starter_config())\n"
        "load_config(sys.argv[1], ['method.r=4'])\n"
        "assert plait.__version__ and 'DualLoraConfig' in dir(plait)\n"
        f"print({HEAVY})"
    )
    assert python(code, str(file)) == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import plait\nfrom peft import PeftModel",
        "import peft\nimport plait",
        "import plait.core.events",
        "import plait.gates.alloc",
        "from plait.callback import PlaitCallback",
        "import plait.run.optimizers",
    ],
)
def test_methods_are_registered_in_every_order_of_imports(first: str) -> None:
    watching = "assert not any(type(f).__name__ == '_Watch' for f in sys.meta_path)"
    python_with_torch(f"import sys\n{first}\n{KNOWS}\n{watching}")


@pytest.mark.slow
def test_an_import_that_fails_does_not_stop_the_watch() -> None:
    python_with_torch(
        "import plait\n"
        "try:\n    import plait.nowhere\n"
        "except ModuleNotFoundError as error:\n    assert error.name == 'plait.nowhere'\n"
        "try:\n    plait.nothing\n"
        "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
        f"{KNOWS}"
    )


def test_threads_see_every_method() -> None:
    python_with_torch(
        "import threading, plait\n"
        "errors = []\n"
        "def use(n):\n"
        "    try:\n"
        "        if n % 2:\n"
        "            from peft import PeftType\n"
        "            PeftType['PLAIT_DUAL_LORA']\n"
        "        else:\n"
        "            import peft\n"
        "            peft.PeftType['PLAIT_COLA']\n"
        "    except BaseException as error:\n"
        "        errors.append(error)\n"
        "threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\n"
        "assert not errors, errors"
    )


@pytest.mark.slow
def test_threads_that_use_names_at_once_get_the_same_ones() -> None:
    python_with_torch(
        "import threading, plait\n"
        "seen = []\n"
        "names = ['DualLoraConfig', 'find', 'PlaitCallback', 'chain'] * 3\n"
        "def use(name):\n    seen.append((name, id(getattr(plait, name))))\n"
        "threads = [threading.Thread(target=use, args=(name,)) for name in names]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]\n"
        "assert len(seen) == 12 and len(set(seen)) == 4, seen\n"
        f"{KNOWS}"
    )


def _rank(config: Any) -> tuple[int, str]:
    return config.r, str(config.peft_type)


def test_a_config_reaches_a_spawned_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rank, kind = pool.apply(_rank, (plait.DualLoraConfig(r=6),))
    assert rank == 6
    assert kind.endswith("PLAIT_DUAL_LORA")


def test_peft_alone_loads_an_adapter_after_import_plait(tmp_path: Path) -> None:
    config = plait.DualLoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / "adapter")
    python(
        "import sys, plait\n"
        f"assert not {HEAVY}\n"
        "from peft import PeftModel\n"
        "from plait.testing import tiny\n"
        "model = PeftModel.from_pretrained(tiny.llama(), sys.argv[1])\n"
        "assert model.peft_config['default'].r == 4",
        str(tmp_path / "adapter"),
    )
    assert isinstance(PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter"), PeftModel)


def test_modules_keep_their_own_loader() -> None:
    """Sources, resources and `python -m` work as they do without the watch."""
    python(
        "import importlib.resources, inspect, plait, plait.run.config.schema as s\n"
        "for loader in (s.__loader__, s.__spec__.loader):\n"
        "    assert type(loader).__name__ == 'SourceFileLoader'\n"
        "assert 'def read_type' in inspect.getsource(s)\n"
        "assert importlib.resources.files('plait.run.config').joinpath('schema.json').is_file()"
    )
    done = subprocess.run(
        [sys.executable, "-m", "plait", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"plait {plait.__version__}\n"


def test_every_public_name_is_there() -> None:
    for name in plait.__all__:
        assert getattr(plait, name) is not None
    assert set(plait.__all__) <= set(dir(plait))
    assert inspect.ismodule(plait.methods)
    assert importlib.resources.files("plait.run").is_dir()
