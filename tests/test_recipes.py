"""The recipes of CONTRIBUTING.md, done: each is applied to a copy of the tree, counted and run.

A recipe is a folder in tests/recipes with the files that are new, and the lines that others get,
below. What it adds must work: the laws of codecs hold for the codec, the pass runs, the setting
reaches Python, the command line and configuration files, and the operator runs in ONNX Runtime.
Counted are all files that are new or changed, but for tests of what is new and for docs/cli.md,
whose tables a program writes.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.ops import library_path
from onnxcomp.passes.codecs.hyper import native

ROOT = Path(__file__).parents[1]
RECIPES = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Lines that an existing file gets.

    Attributes:
        path: The file.
        after: A text that is in it once; the lines go behind the line that it ends in.
        text: The lines.
    """

    path: str
    after: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What is added.

    Attributes:
        folder: Of the new files, in tests/recipes.
        lines: What other files get.
    """

    folder: str
    lines: tuple[Line, ...]

    def apply(self, tree: Path) -> list[str]:
        """Change a copy of the tree; the files that were touched."""
        touched = set()
        for line in self.lines:
            path = tree / line.path
            text = path.read_text()
            assert text.count(line.after) == 1, f"{line.path}: {line.after!r}"
            end = text.index("\n", text.index(line.after) + len(line.after)) + 1
            path.write_text(text[:end] + line.text + text[end:])
            touched.add(line.path)
        source = RECIPES / self.folder
        for path in source.rglob("*"):
            name = str(path.relative_to(source))
            if path.is_file() and "__pycache__" not in name:
                assert not (tree / name).exists()
                (tree / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, tree / name)
                touched.add(name)
        return sorted(touched)


CODEC = Recipe(
    "codec",
    (
        Line(
            "passes/codecs/__init__.py",
            "import CodecRegistry",
            "from onnxcomp.passes.codecs.rows8 import Rows8Codec\n",
        ),
        Line("passes/codecs/__init__.py", "        HashCodec(),", "        Rows8Codec(),\n"),
        Line(
            "docs/format.md",
            "The codec `fp16` stores `<weight>::half`",
            "The codec `rows8` stores `<weight>::codes`, int8 `(rows, length)`, and\n"
            "`<weight>::scale`, float32 `(rows, 1)`; the weight is their product.\n",
        ),
    ),
)

PASS = Recipe(
    "pass",
    (
        Line(
            "passes/transforms/registry.py",
            "import RepeatedValues",
            "from onnxcomp.passes.transforms.drop_identities import DropIdentities\n",
        ),
        Line("passes/transforms/registry.py", "    Canonicalize(),", "    DropIdentities(),\n"),
    ),
)

SETTING = Recipe(
    "setting",
    (
        Line(
            "passes/config/options.py",
            '"""Options that decide which bytes are written."""',
            """
    least_rows: int = option(
        0, Number(whole=True, least=0, metavar="N"), "method",
        "Leave weights of fewer rows alone.",
        example="8",
    )  # fmt: skip
""",
        ),
        Line(
            "passes/driver/prepare.py",
            "        threads=threads,\n    )",
            "    tall = tuple(site for site in found.sites if site.rows >= settings.least_rows)\n"
            "    found = dataclasses.replace(found, sites=tall)\n",
        ),
    ),
)

FAMILY = Recipe(
    "family",
    (
        Line("ops/CMakeLists.txt", "  hyper/weight.cc", "  sign/cpu.cc\n"),
        Line("ops/registry.cc", '#include "hyper/kernel.h"', '#include "sign/kernel.h"\n'),
        Line("ops/registry.cc", "  winding::AddOps", "  sign::AddOps(api, domain.ops);\n"),
        Line(
            "tests/fuzz/kernels.cc",
            "    AddWeightOfWinding(random, made, rows, length);",
            '  } else if (made.name.rfind("Sign", 0) == 0) {\n'
            "    node.inputs.emplace_back(onnxcomp::kUint8, Dims{rows, (length + 7) / 8});\n"
            "    node.inputs.emplace_back(onnxcomp::kFloat, Dims{rows, 1});\n"
            "    made.parts = 2;\n"
            "    random.Fill(node.inputs[0]);\n"
            "    FillFloats(random, node.inputs[1], 0.05);\n",
        ),
    ),
)


# What .gitignore names, and git's own folder.
_BUILT = (
    *(".git", ".cache", ".venv", ".*_cache", ".hypothesis", "__pycache__"),
    *("build", "dist", "*.egg-info", "*.so"),
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, without what was built or installed beside them."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*_BUILT))
    return tree


def run(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a copy of the tree, with its own onnxcomp and the libraries of this one."""
    libraries = {
        "ONNXCOMP_OPS_LIBRARY": str(library_path()),
        "ONNXCOMP_ENCODERS_LIBRARY": str(native.library_path() or ""),
    }
    environment = {**os.environ, **libraries, "PYTHONPATH": str(tree / "src"), **variables}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def check_rules(tree: Path, touched: Sequence[str]) -> None:
    """What was written keeps the rules of the tree: style, imports, sizes."""
    python = [name for name in touched if name.endswith(".py")]
    if python:
        run(tree, "-m", "ruff", "check", *python)
        run(tree, "-m", "ruff", "format", "--check", *python)
    tests = ("test_rooms_import_what_the_table_allows", "test_there_is_no_cycle_between_modules")
    names = [f"tests/test_imports.py::{name}" for name in tests]
    run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names)


def optimized(tree: Path, model: Path, *options: str) -> tuple[dict[str, object], str]:
    """The JSON of a run of the command line, and its log."""
    small = tree.parent / "small.onnx"
    small.unlink(missing_ok=True)
    done = run(
        tree, "-m", "onnxcomp", "optimize", str(model), "-o", str(small), "--json", "-v", *options
    )
    return json.loads(done.stdout), done.stderr


def methods(report: Mapping[str, object]) -> set[str]:
    sites = report["sites"]
    assert isinstance(sites, list)
    return {site["method"] for site in sites} - {"dense"}


def test_a_codec_is_one_file_and_four_others(copy: Path, demo_model_path: Path) -> None:
    touched = CODEC.apply(copy)
    assert len(touched) <= 1 + 4, touched
    check_rules(copy, touched)
    laws = ["tests/passes/codecs/test_codec_laws.py", "tests/passes/codecs/test_rows8_codec.py"]
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *laws, "-k", "rows8")
    report, _ = optimized(copy, demo_model_path, "--method", "rows8")
    assert methods(report) == {"rows8"}
    verification = report["verify"]
    assert isinstance(verification, dict) and verification["passed"]


def test_a_pass_is_two_files(copy: Path) -> None:
    touched = PASS.apply(copy)
    assert len(touched) <= 2, touched
    check_rules(copy, touched)
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] y) { a = Identity (x)  b = Relu (a)  y = Identity (b) }"""
    model = copy.parent / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), model)
    _, log = optimized(copy, model, "--method", "dense")
    assert "drop_identities: 1 changes" in log
    small = onnx.load(copy.parent / "small.onnx")
    assert [node.op_type for node in small.graph.node] == ["Relu", "Identity"]


def test_a_setting_is_two_files(copy: Path, demo_model_path: Path) -> None:
    touched = SETTING.apply(copy)
    assert len(touched) <= 2, touched
    check_rules(copy, touched)
    report, _ = optimized(copy, demo_model_path)
    assert methods(report)
    by_option, _ = optimized(copy, demo_model_path, "--least-rows", "100000")
    assert methods(by_option) == set()
    assert by_option["config"]["least_rows"] == 100_000  # type: ignore[index]
    config = copy.parent / "onnxcomp.yaml"
    config.write_text("version: 1\nleast_rows: 100000\n")
    by_file, _ = optimized(copy, demo_model_path, "--config", str(config))
    assert methods(by_file) == set()
    program = "import inspect, onnxcomp; print(inspect.signature(onnxcomp.optimize))"
    assert "least_rows: 'int' = 0" in run(copy, "-c", program).stdout
    # The tables of the manual are written by a program.
    run(copy, "docs/option_tables.py", "--write")
    assert (
        "| `--least-rows 8` | Leave weights of fewer rows alone."
        in (copy / "docs" / "cli.md").read_text()
    )


def test_a_family_of_operators_is_its_folder_and_three_files(copy: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake: the operators cannot be built")
    touched = FAMILY.apply(copy)
    others = [name for name in touched if not name.startswith("ops/sign/")]
    assert len(others) <= 3, others
    library = build(copy)
    weight = np.random.default_rng(0).standard_normal((5, 13)).astype(np.float32)
    signs, scale = np.packbits(weight < 0, axis=1), np.abs(weight).mean(axis=1, keepdims=True)
    node = helper.make_node(
        "SignDecode", ["signs", "scale"], ["w"], domain="com.onnxcomp", extent=[5, 13]
    )
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 13])],
        [numpy_helper.from_array(signs, "signs"), numpy_helper.from_array(scale, "scale")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.onnxcomp", 1)]
    model = copy.parent / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), model)
    program = (
        "import sys, numpy as np\n"
        "from onnxcomp import InferenceSession\n"
        "np.save(sys.argv[2], InferenceSession(sys.argv[1]).run(None, {})[0])"
    )
    result = copy.parent / "w.npy"
    run(copy, "-c", program, str(model), str(result), ONNXCOMP_OPS_LIBRARY=str(library))
    assert np.array_equal(np.load(result), np.where(weight < 0, -scale, scale))
    driver = [os.environ.get("CXX", "g++"), "-std=c++17", "-fsyntax-only", "-Wall", "-Werror"]
    done = subprocess.run(
        [*driver, "-Iops", "tests/fuzz/kernels.cc"],
        cwd=copy, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def build(tree: Path) -> Path:
    """The operator library of a copy of the tree, for CPUs and without optimisation."""
    options = ["-DONNXCOMP_CUDA=OFF", "-DONNXCOMP_WERROR=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    for command in (
        ["cmake", "-S", ".", "-B", "build", *options, "-DCMAKE_CXX_FLAGS=-O0 -g0"],
        ["cmake", "--build", "build", "--target", "onnxcomp_ops", "-j2"],
    ):
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return tree / "build" / "ops" / "libonnxcomp_ops.so"
