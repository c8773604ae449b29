"""The layout: imports go one way, method files stay short, nothing dangerous, nothing twice."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from plait.upstream.table import BASELINES
from tests.support import ROOT

SRC = ROOT / "src" / "plait"
CLI = ROOT / "src" / "plait_cli"
FILES = sorted([*SRC.rglob("*.py"), *CLI.rglob("*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# What a folder may import of plait; "" is the package's own __init__ and _version.
ALLOWED = {
    "kernels": {"kernels"},
    "core": {"core", "kernels", "_version"},
    "gates": {"gates", "core", "kernels"},
    "upstream": {"upstream", "core"},
    "methods": {"methods", "gates", "core"},
    "chain": {"chain", "upstream", "core"},
    "optim": {"optim", "upstream", "core"},
    "inspect": {"inspect"},
    "federated": {"federated", "gates", "upstream", "core", "inspect"},
    "run": {
        "run",
        "core",
        "gates",
        "upstream",
        "methods",
        "chain",
        "optim",
        "inspect",
        "federated",
        "assets",
        "_version",
    },
    "assets": {"assets", "run"},
    "testing": {"testing", "core", "gates", "methods", "upstream"},
    "cli": {"run", "core", "methods", "federated", "upstream"},
}
# Who may import these: heavy, optional, or another layer's business.
ONLY = {
    "peft": {
        "together.py",
        "core",
        "gates",
        "upstream",
        "chain",
        "optim",
        "federated",
        "run",
        "testing",
    },
    "transformers": {"callback.py", "core", "upstream", "chain", "run", "assets", "cli", "testing"},
    "pytest": {"testing"},
    "datasets": {"run"},
    "accelerate": {"run"},
    "matplotlib": {
        "run/card.py",
        "run/demo.py",
        "run/inspect/pictures.py",
        "run/federated/pictures.py",
    },
    "jinja2": {
        "run/card.py",
        "run/compare/page.py",
        "run/data/templates.py",
        "run/data/tokens.py",
    },
    "scipy": {"run/compare"},
    "statsmodels": {"run/compare"},
    "rich": {"cli", "run/callbacks.py"},
    "yaml": {"run/config"},
    "pydantic": {"run/config"},
    "bitsandbytes": set(),
    "trl": set(),
    "lm_eval": {"run/harness.py"},
    "gguf": {"run/serving/gguf.py"},
    "vllm": {"run/serving/vllm.py"},
    "triton": {"kernels"},
    "flwr": {"federated/engines/flower", "run/deploy/app"},
    "ray": {"federated/engines/flower"},
    "cryptography": {"run/deploy/certs.py"},
    "psutil": {"run/deploy/program.py"},
    "opacus": {"federated/privacy.py"},
    "plait_cli": {"cli", "__main__.py"},
    "pickle": {"run/adapter.py"},  # the name of its error
}
PRIVATE = ("peft.tuners", "peft.utils", "peft.mapping")
# `lora` is the default method and the format of exports, `full` is no method of peft's.
UPSTREAM = set(BASELINES) - {"lora", "full"}
# PiSSA's start is an option of plait's own methods, and a row of the support matrix.
OWN_WORDS = {(place, "pissa") for place in ("core/free.py", "methods/cola.py", "run/support.py")}
OWN_WORDS.add(("__init__.py", "adalora"))  # drive_adalora, a public name
METHOD_IMPORTS = {"plait", "torch", "dataclasses", "typing", "math", "warnings", "collections"}


def place(path: Path) -> str:
    """Path inside the package; "cli/" for the package of the command line."""
    if path.is_relative_to(CLI):
        return f"cli/{path.relative_to(CLI).as_posix()}"
    return path.relative_to(SRC).as_posix()


def folder(path: Path) -> str:
    """First part of the path inside the package, "" for its own files; more if that has rules."""
    whole = place(path).rpartition("/")[0]
    return whole if whole in ALLOWED else whole.partition("/")[0]


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of all imported modules."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where something comes from"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def wrong_imports(path: Path, tree: ast.AST) -> list[str]:
    """Imports against the rules above."""
    wrong = []
    for name in imported(tree):
        top, _, rest = name.partition(".")
        if top == "plait" and folder(path) in ALLOWED:
            part = rest.partition(".")[0]
            if part and (SRC / part).is_dir() and part not in ALLOWED[folder(path)]:
                wrong.append(name)
        here = place(path)
        inside = {here, *(p.as_posix() for p in Path(here).parents)}
        if top in ONLY and not inside & ONLY[top]:
            wrong.append(name)
        method = folder(path) == "methods" and not path.name.startswith("_")
        if method and top not in METHOD_IMPORTS:
            wrong.append(name)
    return wrong


def forbidden(tree: ast.AST) -> list[str]:
    """Calls and statements that load code, hide errors, or write behind autograd's back."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"bare except, line {node.lineno}")
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign) else targets
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr.endswith("_") else targets
        names = [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)]
        if any(n.endswith(".data") and n != "self.data" for n in names):
            found.append(f"write through .data: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in {"eval", "exec", "os.system", "torch.load", "torch.save", "compile", "assert_"}:
            found.append(f"{name}, line {node.lineno}")
        if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}:
            found.append(f"{name}, line {node.lineno}")
        if keywords.get("shell") == "True" or keywords.get("weights_only") == "False":
            found.append(f"{name}(shell or weights_only), line {node.lineno}")
        if keywords.get("safe_serialization") == "False":
            found.append(f"{name}(safe_serialization), line {node.lineno}")
        if name in {"torch.manual_seed", "random.seed", "np.random.seed", "set_seed"}:
            found.append(f"{name}, line {node.lineno}")
    return found


def module(path: Path) -> str:
    """Dotted name of a file of src/."""
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_when_run(tree: ast.AST) -> list[str]:
    """As `imported`, without what only a type checker reads."""
    guarded = {
        id(node)
        for check in ast.walk(tree)
        if isinstance(check, ast.If) and ast.unparse(check.test) == "TYPE_CHECKING"
        for node in ast.walk(check)
    }
    statements = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded
    ]
    return [name for node in statements for name in imported(node)]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, at any depth; imports: module -> modules."""
    reached: dict[str, set[str]] = {}
    for start in imports:
        todo, seen = [start], set()
        while todo:
            new = imports[todo.pop()] - seen
            seen |= new
            todo += new
        reached[start] = seen
    groups = {
        tuple(sorted(m for m in reached[name] if name in reached[m]))
        for name in imports
        if name in reached[name]
    }
    return sorted(map(list, groups))


def project_imports() -> dict[str, set[str]]:
    """Module -> modules of plait that it imports anywhere; a re-exported name counts as its own."""
    modules = {module(path): path for path in FILES}
    defined = {
        (module(path), alias.asname or alias.name): f"{node.module}"
        for path in FILES
        if path.name == "__init__.py"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    graph = {}
    for name, path in modules.items():
        targets = set()
        for target in imported_when_run(TREES[path]):
            package, _, last = target.rpartition(".")
            targets.add(target if target in modules else package if package in modules else "")
            targets.add(defined.get((package, last), ""))
        graph[name] = (targets & set(modules)) - {name}
    return graph


def named_upstream(path: Path, tree: ast.AST) -> list[str]:
    """Strings and identifiers that name one of peft's methods, except functions of upstream/."""
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("plait.upstream")
        for alias in node.names
    }
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = {id(value) for value in statements if isinstance(value, ast.Constant)}
    texts = []
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts += re.findall(r"\w+", node.value)
        elif isinstance(node, ast.Name | ast.Attribute | ast.alias | ast.FunctionDef):
            name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node), "name")
            texts += getattr(node, name).split(".")
    return [
        text
        for text in texts
        if text not in ours
        for word in text.lower().split("_")
        if word.removesuffix("config").removesuffix("model").removesuffix("layer") in UPSTREAM
        and (place(path), word) not in OWN_WORDS
    ]


def bodies(tree: ast.AST) -> list[tuple[str, str]]:
    """Name and normalised body of each function of five statements or more."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if sum(isinstance(n, ast.stmt) for b in body for n in ast.walk(b)) >= 5:
            found.append((node.name, "\n".join(ast.dump(b) for b in body)))
    return found


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_go_one_way(path: Path) -> None:
    assert not wrong_imports(path, TREES[path])


@pytest.mark.parametrize("path", FILES, ids=place)
def test_nothing_dangerous(path: Path) -> None:
    # A run seeds itself; the recipe of the shipped model too.
    seeds = {"run/train.py", "run/prepare.py", "run/generate.py", "assets/pretrain.py"}
    seeds |= {"testing/tiny.py"}
    found = forbidden(TREES[path])
    if place(path) in seeds:
        found = [f for f in found if "seed" not in f]
    assert not found


def test_method_files_are_short() -> None:
    for path in (SRC / "methods").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name


def test_only_the_bridge_knows_the_inside_of_peft() -> None:
    """Besides `upstream/`, which reads the layers of peft's own methods."""
    inside = {
        place(path)
        for path, tree in TREES.items()
        for name in imported(tree)
        if folder(path) != "upstream" and name.startswith(PRIVATE)
    }
    assert inside == {"core/bridge.py"}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_upstream_methods_are_named_in_upstream_alone(path: Path) -> None:
    assert folder(path) == "upstream" or not named_upstream(path, TREES[path])


def test_no_import_circle() -> None:
    assert not circles(project_imports())


def test_core_holds_what_at_least_two_modules_use() -> None:
    graph = project_imports()
    for name in graph:
        if name.startswith("plait.core."):
            users = [m for m, targets in graph.items() if name in targets and m != "plait.core"]
            assert len(users) > 1, f"{name} has one user: {users}"


def test_a_folder_has_at_most_18_modules() -> None:
    for folder_path in {path.parent for path in FILES}:
        modules = [p for p in folder_path.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= 18, f"{folder_path} holds {len(modules)} modules. Split it."


def test_nothing_below_run_imports_run() -> None:
    above = ("plait.run", "plait.assets", "plait.__main__", "plait_cli")
    for name, targets in project_imports().items():
        if not name.startswith(above):
            assert not [t for t in targets if t.startswith(("plait.run", "plait_cli"))], name


def test_nothing_stands_twice() -> None:
    """No two functions of five statements or more have the same body."""
    seen = defaultdict(list)
    for path, tree in TREES.items():
        for name, body in bodies(tree):
            seen[body].append(f"{place(path)}:{name}")
    assert not [places for places in seen.values() if len(places) > 1]


def test_every_module_says_what_it_is() -> None:
    for path, tree in TREES.items():
        assert isinstance(tree, ast.Module)
        assert ast.get_docstring(tree) or place(path) == "_version.py", place(path)


def imported_tests(tree: ast.AST) -> list[str]:
    """Test modules that a file imports: what tests share belongs in tests/support."""
    return [name for name in imported(tree) if name.startswith("tests.") and ".test_" in name]


def test_no_test_module_imports_another() -> None:
    tests = ROOT / "tests"
    for path in sorted([*tests.rglob("test_*.py"), *(tests / "support").glob("*.py")]):
        assert not imported_tests(ast.parse(path.read_text(encoding="utf-8"))), path


# The rules can be broken -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["from tests.run.test_train import x", "import tests.optim.test_pairs"]
)
def test_imports_of_test_modules_are_found(code: str) -> None:
    assert imported_tests(ast.parse(code))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("core/x.py", "from plait.methods import cola"),
        ("core/x.py", "import plait.run.config"),
        ("federated/x.py", "from plait.run.folder import replace_dir"),
        ("federated/x.py", "import flwr"),
        ("federated/engines/flower/x.py", "from plait.run.folder import replace_dir"),
        ("run/deploy/app/x.py", "from plait_cli import main"),
        ("kernels/x.py", "from plait.core.delta import Delta"),
        ("run/x.py", "from plait_cli import main"),
        ("inspect/x.py", "from plait.run.folder import RunFolder"),
        ("methods/x.py", "import numpy as np"),
        ("methods/x.py", "import peft"),
        ("methods/x.py", "from plait.testing import Case"),
        ("run/x.py", "from plait.testing import tiny"),
        ("core/x.py", "import pytest"),
        ("run/x.py", "def f():\n    import matplotlib"),
        ("core/x.py", "from rich.table import Table"),
    ],
)
def test_wrong_imports_are_found(file: str, code: str) -> None:
    assert wrong_imports(SRC / file, ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "import pickle\npickle.loads(b)",
        "try:\n    f()\nexcept:\n    pass",
        "p.data.add_(1)",
        "p.data = q",
        "p.data += q",
        "subprocess.run(c, shell=True)",
        "torch.manual_seed(0)",
        "model.save_pretrained(d, safe_serialization=False)",
    ],
)
def test_dangerous_code_is_found(code: str) -> None:
    assert forbidden(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        'if method == "vera":\n    pass',
        "from peft import AdaLoraConfig",
        "import peft\npeft.VBLoRAConfig()",
        "config.use_dora",
        'raise ValueError("dora has no pairs")',
        "def drive_adalora():\n    'Doc.'",
    ],
)
def test_names_of_upstream_are_found(code: str) -> None:
    assert named_upstream(SRC / "run" / "x.py", ast.parse(code))
    doc = "'AdaLoRA and vera.'\nfrom plait.upstream.adalora import drive_adalora\ndrive_adalora()"
    assert not named_upstream(SRC / "run" / "x.py", ast.parse(doc))


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]
    late = ast.parse("def f():\n    from plait.run import x\nif TYPE_CHECKING:\n    import y")
    assert imported_when_run(late) == ["plait.run.x"]


def test_copies_are_found() -> None:
    body = "    a = 1\n    b = a\n    for c in b:\n        a += c\n    return a\n"
    one, two = bodies(ast.parse(f"def f():\n{body}\ndef g():\n    'Doc.'\n{body}"))
    assert one[1] == two[1]
