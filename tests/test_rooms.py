"""The import rule of `CONTRIBUTING.md`, checked on the source of every module of `tnkfac`.

`tnkfac/einsum`, `tnkfac/curvature` and `tnkfac/optim` are its rooms; the files beside them are
the root. Only names are read, nothing is run.
"""

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tnkfac").rglob("*.py"))

REACHES = {
    "einsum": {"einsum"},
    "curvature": {"curvature", "einsum"},
    "optim": {"optim", "curvature"},
    "root": {"root", "einsum", "curvature"},
}
REACH_OPTIM = {"tnkfac/__init__.py", "tnkfac/__main__.py"}
TORCH_IN_EINSUM = {f"tnkfac/einsum/{name}.py" for name in ("plans", "functional")}
TORCH_IN_EINSUM |= {
    str(path.relative_to(ROOT)) for path in (ROOT / "tnkfac/einsum/crs").glob("*.py")
}
HOOK = re.compile(r"register_(?!\w*state_dict)\w*hook\w*")
COLLECTIVE = re.compile(
    r"(all_|batch_|monitored_|i)?(barrier|broadcast|gather|isend|recv|reduce|scatter|send|to_all)\w*"
)


def room(parts: tuple[str, ...]) -> str:
    """The room of `tnkfac.<parts>`; what is no room of the table is the root."""
    return parts[0] if parts and parts[0] in REACHES else "root"


def mentions(tree: ast.AST, file: str) -> Iterator[tuple[str, ...]]:
    """The dotted name of everything imported, and of every attribute chain on such a name."""
    bound: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = tuple(alias.name.split("."))
                bound[alias.asname or full[0]] = full if alias.asname else full[:1]
                yield full
        elif isinstance(node, ast.ImportFrom):
            base = tuple(file.split("/")[: -node.level]) if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                bound[alias.asname or alias.name] = (*base, alias.name)
                yield (*base, alias.name)
    for node in ast.walk(tree):
        chain: tuple[str, ...] = ()
        while isinstance(node, ast.Attribute):
            node, chain = node.value, (node.attr, *chain)
        if chain and isinstance(node, ast.Name) and node.id in bound:
            yield bound[node.id] + chain


def violations(source: str, file: str) -> list[str]:
    tree, here, found = ast.parse(source), room(tuple(file.split("/")[1:-1])), []
    for name in mentions(tree, file):
        dotted = ".".join(name)
        if name[0] == "tnkfac":
            there = room(name[1:])
            if there not in REACHES[here] and not (there == "optim" and file in REACH_OPTIM):
                found.append(f"{here} may not use {dotted}")
            if there != here and any(re.match(r"_(?!_)", part) for part in name):
                found.append(f"{dotted} is private to {there}")
        if name[0] == "torch" and here == "einsum" and file not in TORCH_IN_EINSUM:
            found.append(f"{dotted}: this file does without torch")
        if name[0] == "opt_einsum" and file != "tnkfac/einsum/plans.py":
            found.append(f"{dotted} belongs in einsum/plans.py")
        collective = name[:2] == ("torch", "distributed") and COLLECTIVE.fullmatch(name[-1])
        if collective and file != "tnkfac/optim/distributed/reduction.py":
            found.append(f"{dotted} belongs in optim/distributed/reduction.py")
    for node in ast.walk(tree):
        # A word is a name, an attribute, an imported name or a string (for getattr).
        words = [getattr(node, field, None) for field in ("id", "attr", "name", "value")]
        words = [word for word in words if isinstance(word, str)]
        if "import_module" in words or "__import__" in words:
            found.append("a dynamic import hides from this check")
        if any(map(HOOK.fullmatch, words)) and not file.startswith("tnkfac/curvature/capture/"):
            found.append("hooks belong in curvature/capture")
    return found


def exports(source: str, file: str) -> set[str]:
    """The names an `__init__.py` binds, save for submodules imported as such."""
    package, names = tuple(file.split("/")[:-1]), set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names |= {alias.asname or alias.name for alias in node.names if base != package}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def test_the_rooms_are_those_of_the_table() -> None:
    assert {file.split("/")[1] for file in FILES if file.count("/") > 1} == set(REACHES) - {"root"}


@pytest.mark.parametrize("file", FILES)
def test_imports(file: str) -> None:
    assert violations((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("__init__.py")])
def test_no_module_is_named_like_an_export(file: str) -> None:
    path = ROOT / file
    modules = {other.stem for other in path.parent.iterdir()}
    assert exports(path.read_text(encoding="utf-8"), file) & modules == set()


FLOORS = {
    "einsum": ["", "operations", "crs", "drawing"],
    "curvature": ["moments", "structures", "layers", "capture", "uses", "estimators"],
    "optim": ["params", "report", "distributed", "rules", "step"],
}
"""Folders of each room: one imports those on its left only, and files beside them as they need."""
MOST_MODULES = 14


def modules() -> dict[str, str]:
    """File of every module, by its dotted name."""
    return {
        file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in FILES
    }


def imported(file: str) -> set[str]:
    """Modules of the package that a file imports, wherever it does."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found |= {full if full in known else node.module} & known.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known.keys()
    return found


def folder(module: str) -> tuple[str, str]:
    """Room and folder of a module; the folder is empty for files beside the folders."""
    parts = modules()[module].split("/")[1:-1]
    return (parts[0] if parts else "", parts[1] if len(parts) > 1 else "")


@pytest.mark.parametrize("room_name", ["curvature", "optim"])
def test_a_folder_imports_those_on_its_left(room_name: str) -> None:
    order = FLOORS[room_name]
    for module, file in modules().items():
        here, place = folder(module)
        if here != room_name or not place:
            continue
        for other in imported(file):
            there, level = folder(other)
            if there == here and level:
                assert order.index(level) <= order.index(place), (module, other)


def test_folders_are_those_of_the_table() -> None:
    found = {folder(module) for module in modules()}
    assert {place for here, place in found if here in FLOORS and place} == {
        place for places in FLOORS.values() for place in places if place
    }


def test_no_circle_of_imports() -> None:
    """Not inside of functions, either."""
    left = {module: imported(file) - {module} for module, file in modules().items()}
    while leaves := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, sorted(left)


def test_a_folder_holds_few_modules_and_no_name_comes_twice() -> None:
    names = [file.rsplit("/", 1) for file in FILES if not file.endswith("__init__.py")]
    assert max(Counter(place for place, *_ in names).values()) <= MOST_MODULES
    twice = Counter(name[-1] for name in names if name[-1] != "__main__.py")
    assert [name for name, count in twice.items() if count > 1] == []


SNIPPETS = [  # file under tnkfac/, source, number of violations
    ("einsum/plans.py", "import torch, opt_einsum\nfrom .network import Leg, _check", 0),
    ("einsum/network.py", "import torch.nn", 1),
    ("einsum/network.py", "if TYPE_CHECKING:\n    from torch import Tensor", 1),
    ("einsum/functional.py", "def f():\n    from opt_einsum import contract_path", 1),
    ("curvature/capture/tap.py", "import opt_einsum", 1),
    ("einsum/views.py", "from tnkfac.curvature import dense", 1),
    ("einsum/views.py", "from ..curvature.dense import Dense", 1),
    ("einsum/views.py", "import tnkfac", 1),
    ("curvature/dense.py", "from tnkfac.einsum import plan\nfrom .. import einsum", 0),
    ("curvature/dense.py", "from .. import optim", 1),
    ("curvature/dense.py", "from ..einsum import _plan", 1),
    ("curvature/dense.py", "from .. import einsum\neinsum._plan()", 1),
    ("curvature/dense.py", "from importlib import import_module", 1),
    ("curvature/dense.py", "optim = __import__('tnkfac.optim')", 1),
    ("curvature/deep/dense.py", "from ..other import _name\nfrom ...einsum import plan", 0),
    ("curvature/deep/dense.py", "from ...optim import KFAC", 1),
    ("optim/kfac.py", "import torch\nfrom ..curvature import Dense", 0),
    ("optim/kfac.py", "from ..einsum import plan", 1),
    ("optim/kfac.py", "import tnkfac.einsum as e", 1),
    ("__init__.py", "from ._version import __version__\nfrom .optim import KFAC", 0),
    ("__init__.py", "from .curvature.dense import _dense", 1),
    ("__main__.py", "from tnkfac.optim import KFAC", 0),
    ("other.py", "from tnkfac.optim import KFAC", 1),
    ("curvature/capture/tap.py", "module.register_forward_hook(f)", 0),
    ("curvature/dense.py", "tensor.register_hook(f)", 1),
    ("curvature/dense.py", "getattr(module, 'register_full_backward_hook')(f)", 1),
    ("optim/kfac.py", "from torch.nn.modules.module import register_module_forward_hook", 1),
    ("optim/base.py", "self.register_load_state_dict_pre_hook(f)", 0),
    ("optim/distributed/reduction.py", "import torch.distributed as dist\ndist.all_reduce(x)", 0),
    ("optim/kfac.py", "import torch.distributed as dist\ndist.is_initialized()", 0),
    ("optim/kfac.py", "import torch.distributed as dist\ndist.all_reduce(x)", 1),
    ("optim/kfac.py", "import torch\ntorch.distributed.broadcast(x, 0)", 1),
    ("curvature/dense.py", "from torch.distributed import all_gather_into_tensor", 1),
    ("curvature/dense.py", "import torch\ntorch.gather(x, 0, i)\nx.scatter(0, i, y)", 0),
]


@pytest.mark.parametrize(("file", "source", "count"), SNIPPETS)
def test_the_check_itself(file: str, source: str, count: int) -> None:
    assert len(violations(source, f"tnkfac/{file}")) == count


def test_the_check_of_exports_itself() -> None:
    source = "from .plans import plan\nfrom . import crs\nfrom tnkfac.einsum import views\n"
    assert exports(source + "def f(): ...", "tnkfac/einsum/__init__.py") == {"plan", "f"}


MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "tensor", "triu_indices", "zeros"}
MAKERS |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tril_indices"}


@pytest.mark.parametrize("file", FILES)
def test_tensors_are_made_on_a_named_device(file: str) -> None:
    """The default device is the user's; what belongs on the host is made there."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    nameless = [
        f"line {call.lineno}: torch.{call.func.attr}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
        and not {"device", None} & {keyword.arg for keyword in call.keywords}
    ]
    assert not nameless


def test_what_tests_import_is_there() -> None:
    """A file of tests that cannot be imported is skipped, since pytest also looks for doctests."""
    missing = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
                continue
            if node.module.split(".")[0] not in ("tnkfac", "oracles"):
                continue
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name) and not find_spec(f"{node.module}.{name}"):
                    missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing
