"""Which room of the source tree may import which: one table, held against the real imports.

Read are imports at module level, inside functions, below ``TYPE_CHECKING``, and modules loaded by
name (`importlib.import_module`). Importing a module also runs the ``__init__`` of its packages;
that does not count as an import here, or a registry could not collect the modules beside it.
"""

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "ops", "runtime", "cli", "models")

# Room -> rooms it may import, besides itself; ground first. A room of passes/ is a file or a folder
# there, every other folder is one room, and so is each file of src/onnxcomp ("onnxcomp" is the
# package's own `__init__`, the public names).
_GROUND = frozenset({"errors", "version", "plugins", "ops", "runtime"})
_IR = _GROUND | {"weight", "suggest", "codecs", "ir"}
_SITES = _IR | {"config", "analysis"}
_LOWERING = _SITES | {"lowering"}
_CALIBRATION = _LOWERING | {"calibration"}
_PLANNING = _CALIBRATION | {"latency", "gradients", "planning"}
# Rooms beside the way from a weight to its bytes.
_BESIDE = frozenset({"transforms", "verification", "report"})
_PASSES = _PLANNING | {"encoding", "driver"} | _BESIDE
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "version": frozenset(),
    "light_imports": frozenset(),
    "plugins": frozenset({"errors"}),
    "ops": frozenset({"errors", "version"}),
    "runtime": frozenset({"errors", "version", "ops"}),
    "weight": frozenset(),
    "suggest": frozenset(),
    "codecs": frozenset({"errors", "plugins", "weight", "suggest"}),
    "ir": _IR,
    "config": _IR,
    "analysis": _IR | {"config"},
    "lowering": _SITES,
    "calibration": _SITES | {"lowering"},
    "gradients": _CALIBRATION,
    "latency": _CALIBRATION,
    "planning": _PLANNING,
    "encoding": _PLANNING | {"light_imports"},
    "transforms": _CALIBRATION | {"gradients"},
    "verification": _CALIBRATION,
    "report": _CALIBRATION | {"transforms"},
    "driver": _PLANNING | {"encoding"} | _BESIDE,
    "passes": frozenset(),
    "models": _PASSES,
    # models: gives `--distill` its trainer, which needs torch and is loaded when it is asked for.
    "onnxcomp": _PASSES | {"models"},
    "cli": _PASSES | {"models", "onnxcomp", "light_imports"},
    "__main__": frozenset({"cli"}),
}
# The one module of models/ that the command line imports: it needs numpy only.
FRAMEWORK_FREE = "onnxcomp.models.character_kinds"

PROTOCOL = "onnxcomp.passes.codecs.protocol"
# Only the loader of models meets GraphSurgeon, and only models/ meets torch.
GRAPHSURGEON = "onnxcomp.passes.ir.graphsurgeon"

# Modules that import the codecs' protocol; modules with more than 12 imports of our own, not
# counting `onnxcomp.errors`.
_MOST_READERS_OF_PROTOCOL = 52
_MANY, _MOST_WITH_MANY = 12, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """The modules of a source tree.

    Attributes:
        paths: File of each module, by its full name.
    """

    paths: Mapping[str, Path]

    @classmethod
    def read(cls, root: Path) -> "Tree":
        """All modules below a root, seen through the links of src/onnxcomp."""
        paths = {}
        for folder in (*FOLDERS, "src/onnxcomp"):
            base = root / folder
            package = ("onnxcomp",) if folder == "src/onnxcomp" else ("onnxcomp", folder)
            for path in sorted(base.rglob("*.py")):
                parts = (*package, *path.relative_to(base).with_suffix("").parts)
                paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return cls(paths)

    def imports(self) -> dict[str, set[str]]:
        """What every module imports of the tree."""
        return {name: set(self._targets(name)) - {name} for name in self.paths}

    def foreign(self, name: str) -> set[str]:
        """First words of everything else that a module imports."""
        found = set()
        for node in ast.walk(self._parse(name)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Call) and _loads_by_name(node):
                found.add(_prefix(node.args[0], name, name)[0].split(".")[0])
        return found - {"onnxcomp"}

    def _parse(self, name: str) -> ast.Module:
        return ast.parse(self.paths[name].read_text())

    def _targets(self, name: str) -> Iterator[str]:
        tree = self._parse(name)
        package = name if self.paths[name].name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (a.name for a in node.names if a.name in self.paths)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                yield from self._from(node)
            elif isinstance(node, ast.Call) and _loads_by_name(node):
                yield from self._loaded(node, tree, name, package)

    def _from(self, node: ast.ImportFrom) -> Iterator[str]:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in self.paths:
                yield inner
            elif node.module in self.paths:
                yield node.module

    def _loaded(self, call: ast.Call, tree: ast.Module, name: str, package: str) -> Iterator[str]:
        """Modules that a call of `import_module` may load.

        Behind a prefix stand the modules that strings of the file name, or, where they name none,
        all that begin with it.
        """
        prefix, whole = _prefix(call.args[0], name, package)
        assert prefix, f"{name} line {call.lineno} loads a module whose name cannot be read"
        if whole:
            yield from {prefix} & set(self.paths)
            return
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        named = {f"{prefix}{text}" for text in strings if isinstance(text, str) and text}
        yield from (named & set(self.paths)) or (m for m in self.paths if m.startswith(prefix))


def _loads_by_name(call: ast.Call) -> bool:
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return called in ("import_module", "__import__")


def _prefix(argument: ast.expr, name: str, package: str) -> tuple[str, bool]:
    """What is known of a module's name without running the code, and whether that is all of it."""
    if isinstance(argument, ast.Constant):
        return str(argument.value), True
    known = ""
    for part in argument.values if isinstance(argument, ast.JoinedStr) else ():
        if isinstance(part, ast.Constant):
            known += str(part.value)
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            spelled = {"__name__": name, "__package__": package}.get(part.value.id)
            if spelled is None:
                return known, False
            known += spelled
        else:
            return known, False
    return known, isinstance(argument, ast.JoinedStr)


def room(name: str) -> str:
    """The room that a module belongs to."""
    parts = name.split(".")
    if len(parts) == 1:
        return "onnxcomp"
    return parts[2] if parts[1] == "passes" and len(parts) > 2 else parts[1]


def violations(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports that the table does not allow."""
    found = []
    for name, targets in sorted(imports.items()):
        here = room(name)
        if here not in ALLOWED:
            found.append(f"{name}: room {here!r} is not in the table")
            continue
        for target in sorted(targets):
            there = room(target)
            torch = (here, there) == ("cli", "models") and not target.startswith(FRAMEWORK_FREE)
            if there not in ALLOWED[here] | {here} or torch:
                found.append(f"{name} imports {target}")
    return found


def folders(imports: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Imports between the rooms of passes/."""
    result: dict[str, set[str]] = defaultdict(set)
    for name, targets in imports.items():
        for target in targets:
            pair = room(name), room(target)
            inside = all(module.startswith("onnxcomp.passes.") for module in (name, target))
            if inside and pair[0] != pair[1]:
                result[pair[0]].add(pair[1])
    return dict(result)


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            start = stack.index(node)
            members = stack[start:]
            del stack[start:]
            if len(members) > 1:
                result.append(sorted(members))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return result


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.read(ROOT)


@pytest.fixture(scope="module")
def imports(tree: Tree) -> dict[str, set[str]]:
    return tree.imports()


def test_rooms_import_what_the_table_allows(imports: dict[str, set[str]]) -> None:
    assert violations(imports) == []


def test_the_table_has_an_order() -> None:
    """What a room may import stands above it, but for the training of `--distill`."""
    rooms = list(ALLOWED)
    for position, (name, allowed) in enumerate(ALLOWED.items()):
        below = allowed - set(rooms[: position + 1]) - {name}
        assert below <= ({"models"} if name == "encoding" else set()), name


def test_there_is_no_cycle_between_modules(imports: dict[str, set[str]]) -> None:
    assert cycles(imports) == []


def test_there_is_no_cycle_between_folders_of_passes(imports: dict[str, set[str]]) -> None:
    assert cycles(folders(imports)) == []


def test_few_modules_read_the_protocol_of_codecs(imports: dict[str, set[str]]) -> None:
    readers = [name for name, targets in imports.items() if PROTOCOL in targets]
    assert len(readers) <= _MOST_READERS_OF_PROTOCOL, sorted(readers)


def test_few_modules_import_many(imports: dict[str, set[str]]) -> None:
    counts = {name: len(targets - {"onnxcomp.errors"}) for name, targets in imports.items()}
    del counts["onnxcomp"]  # the index of the public names
    del counts["onnxcomp.passes.transforms.registry"]  # the list of the graph passes
    many = {name: count for name, count in counts.items() if count > _MANY}
    assert len(many) <= _MOST_WITH_MANY, many


def test_torch_and_graphsurgeon_stay_where_they_belong(tree: Tree) -> None:
    foreign = {name: tree.foreign(name) for name in tree.paths}
    torch = {name for name, words in foreign.items() if "torch" in words}
    assert torch and {room(name) for name in torch} == {"models"}
    assert {name for name, words in foreign.items() if "onnx_graphsurgeon" in words} == {
        GRAPHSURGEON
    }


# A file that does what the rules forbid, and what is to be found of it.
_PLANTED = {
    "module level": ("passes/ir/a.py", "from onnxcomp.passes.driver import b\n"),
    "a name of a module": ("passes/ir/a.py", "from onnxcomp.passes.driver.b import run\n"),
    "a plain import": ("passes/ir/a.py", "import onnxcomp.passes.driver.b as b\n"),
    "lazy": ("passes/ir/a.py", "def f():\n    from onnxcomp.passes.driver.b import run\n"),
    "types only": (
        "passes/ir/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from onnxcomp.passes.driver.b import run\n",
    ),
    "by name": (
        "passes/ir/a.py",
        "import importlib\nimportlib.import_module('onnxcomp.passes.driver.b')\n",
    ),
    "by a bare function": (
        "passes/ir/a.py",
        "from importlib import import_module\nimport_module('onnxcomp.passes.driver.b')\n",
    ),
    "by a prefix": (
        "passes/ir/a.py",
        "import importlib\ndef f(x):\n    importlib.import_module(f'onnxcomp.passes.{x}')\n",
    ),
    "a codec sees a graph": ("passes/codecs/a.py", "from onnxcomp.passes.driver.b import run\n"),
    "the runtime sees the compiler": ("runtime/a.py", "from onnxcomp.passes.driver import b\n"),
    "the command line sees torch": ("cli/a.py", "from onnxcomp.models import sharing\n"),
    "a room without a row": ("passes/attic/a.py", "from onnxcomp.passes.driver import b\n"),
}


def planted(root: Path, files: Mapping[str, str]) -> dict[str, set[str]]:
    """What the modules of a small tree import."""
    base = {
        "passes/__init__.py": "",
        "passes/driver/__init__.py": "",
        "passes/driver/b.py": "def run(): ...\n",
        "models/sharing.py": "",
    }
    for name, text in {**base, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree.read(root).imports()


@pytest.mark.parametrize("kind", _PLANTED)
def test_a_planted_import_is_found(kind: str, tmp_path: Path) -> None:
    path, text = _PLANTED[kind]
    assert violations(planted(tmp_path, {})) == []
    found = violations(planted(tmp_path, {path: text}))
    assert found and all(path.removesuffix(".py").replace("/", ".") in line for line in found)


def test_a_planted_name_that_cannot_be_read_is_found(tmp_path: Path) -> None:
    text = "import importlib\ndef f(name):\n    importlib.import_module(name)\n"
    with pytest.raises(AssertionError, match="cannot be read"):
        planted(tmp_path, {"passes/ir/a.py": text})


def test_names_behind_a_prefix_are_those_the_file_spells(tmp_path: Path) -> None:
    text = "import importlib\nN = ('b',)\nimportlib.import_module(f'{__name__}.{N[0]}')\n"
    files = {"passes/driver/__init__.py": text, "passes/driver/c.py": ""}
    assert planted(tmp_path, files)["onnxcomp.passes.driver"] == {"onnxcomp.passes.driver.b"}


def test_planted_cycles_are_found(tmp_path: Path) -> None:
    files = {
        "passes/ir/a.py": "def f():\n    from onnxcomp.passes.config.c import g\n",
        "passes/config/c.py": "from onnxcomp.passes.ir.a import f\n",
        "passes/ir/d.py": "from onnxcomp.passes.config.c import g\n",
    }
    found = planted(tmp_path, files)
    assert cycles(found) == [["onnxcomp.passes.config.c", "onnxcomp.passes.ir.a"]]
    assert cycles(folders(found)) == [["config", "ir"]]
    apart = {**files, "passes/config/c.py": "", "passes/config/e.py": files["passes/config/c.py"]}
    found = planted(tmp_path, apart)
    assert cycles(found) == []
    assert cycles(folders(found)) == [["config", "ir"]]
